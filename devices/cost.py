"""Work (facts about what ran) and its price on a device (seconds and joules).

A trainer reports `Work`; a `LatencyModel` turns (work, device) into a `Cost`. Nothing here knows of federations, so a
finished run can be priced again on other devices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from devices.bounds import Checked
from devices.latency.columns import TABLE_KINDS_0_1, from_0_1

if TYPE_CHECKING:
    from devices.profile import DeviceProfile, Units


@dataclass(frozen=True)
class ModelCost:
    """What one example costs in one network: facts that are the same on every device.

    FLOPs count a multiply-add as two. `backward_flops` is the gradient step alone, without the forward pass before it.
    """

    name: str
    forward_flops: float  # per example
    backward_flops: float  # per example
    parameter_bytes: int
    activation_bytes: int  # per example, kept between forward and backward
    calls: int = 1  # layers started per pass, whatever the batch
    layers: tuple[tuple[float, ...], ...] | None = None  # rows of a LayerTable, where the network was traced
    backward_share: float = 1.0  # of the backward pass of all layers; less where some are frozen
    encoding: str | None = None  # "space:operations" of a network of a search space, e.g. "nb201:341213"
    # Bytes held at the fullest moments of a training step, and of an inference: (whatever the batch, per example), with
    # weights and batch. Empty where they were not measured.
    step_bytes: tuple[tuple[int, int], ...] = ()
    inference_bytes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> ModelCost:
        """Reads plain JSON types."""
        rows = {key: facts[key] for key in ("layers", "step_bytes", "inference_bytes") if facts.get(key) is not None}
        if len(rows.get("layers", ())) == len(TABLE_KINDS_0_1):
            rows["layers"] = from_0_1(rows["layers"])
        return cls(**{**facts, **{key: tuple(map(tuple, value)) for key, value in rows.items()}})

    def twice(self) -> ModelCost:
        """Returns the cost of a step on two passes: activations and gradients of one wait for the other."""
        more = self.activation_bytes
        moments = tuple((fixed + self.parameter_bytes, each + more) for fixed, each in self.step_bytes)
        return replace(self, activation_bytes=2 * more, step_bytes=moments)


@dataclass(frozen=True)
class Passes:
    """Equal passes through one network: how many forward and how many backward, and of which batch size."""

    network: ModelCost
    batch: int
    forwards: int
    backwards: int = 0

    @property
    def flops(self) -> float:
        forward = self.forwards * self.network.forward_flops
        return self.batch * (forward + self.backwards * self.network.backward_flops)


@dataclass(frozen=True)
class Work:
    """What a client did in one round: measured facts, never seconds.

    `storage_bytes` is what the client keeps on the device between rounds (coreset, personal layers); `round_trips` is
    how often it waits for an answer of the server beside its download and upload.
    """

    passes: tuple[Passes, ...] = ()
    peak_memory_bytes: int = 0
    storage_bytes: int = 0
    down_bytes: int = 0
    up_bytes: int = 0
    round_trips: int = 0

    @property
    def flops(self) -> float:
        return sum(p.flops for p in self.passes)

    def figures(self) -> dict[str, int]:
        """Returns all but the passes by name; `round_trips` only where there are any."""
        return {name: v for name, v in vars(self).items() if name != "passes" and (v or name != "round_trips")}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types; `from_dict` is the inverse."""
        return {"passes": [{**vars(p), "network": vars(p.network)} for p in self.passes], **self.figures()}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Work:
        passes = tuple(Passes(**{**p, "network": ModelCost.from_dict(p["network"])}) for p in facts["passes"])
        return cls(**{**facts, "passes": passes})


def pack_works(works: Sequence[Work]) -> dict[str, Any]:
    """Packs many clients' work as plain JSON types; a network that they share stands there once."""
    numbers: dict[int, int] = {}
    networks: list[dict[str, Any]] = []
    packed = []
    for work in works:
        passes = []
        for p in work.passes:
            if id(p.network) not in numbers:
                numbers[id(p.network)] = len(networks)
                networks.append(vars(p.network))
            passes.append([numbers[id(p.network)], p.batch, p.forwards, p.backwards])
        packed.append({"passes": passes, **work.figures()})
    return {"networks": networks, "works": packed}


def unpack_works(facts: dict[str, Any]) -> list[Work]:
    """Reads what `pack_works` made."""
    networks = [ModelCost.from_dict(network) for network in facts["networks"]]
    return [
        Work(**{**work, "passes": tuple(Passes(networks[number], *counts) for number, *counts in work["passes"])})
        for work in facts["works"]
    ]


@dataclass(frozen=True)
class Jitter:
    """Factors on the seconds of one client in one round, each around 1."""

    compute: float = 1.0
    down: float = 1.0
    up: float = 1.0


@dataclass(frozen=True)
class Cost:
    """What the work costs on a device: seconds and joules of each phase, and whether it fits into memory.

    After a transfer the radio stays awake for a while, its tail: first beside the computation, then after the upload.
    The tail takes energy and no time, as nobody waits for it.

    Attributes:
        compute_tail_s: seconds of the tail after the download; the upload ends it, if it lasts that long.
        up_tail_s: seconds of the tail after the upload.
        tail_watts: what the radio draws in its tail, beside the draw of the device.
        down_share: part of the download that took place; below 1 where the client stopped during it.
        up_share: the same of the upload.
    """

    down_s: float = 0.0
    compute_s: float = 0.0
    up_s: float = 0.0
    down_joules: float = 0.0
    compute_joules: float = 0.0
    up_joules: float = 0.0
    fits: bool = field(default=True)
    compute_tail_s: float = 0.0
    up_tail_s: float = 0.0
    tail_watts: float = 0.0
    down_share: float = 1.0
    up_share: float = 1.0

    @property
    def total_s(self) -> float:
        return self.down_s + self.compute_s + self.up_s

    @property
    def tail_s(self) -> float:
        return self.compute_tail_s + self.up_tail_s

    @property
    def tail_joules(self) -> float:
        return self.tail_s * self.tail_watts

    @property
    def joules(self) -> float:
        return self.down_joules + self.compute_joules + self.up_joules + self.tail_joules

    def until(self, elapsed_s: float) -> Cost:
        """Returns the part of this cost that is spent when the client stops after `elapsed_s` seconds.

        An upload that was cut short has no tail after it.
        """
        if elapsed_s >= self.total_s:
            return self
        left = max(0.0, elapsed_s)
        spent = []
        for seconds in (self.down_s, self.compute_s, self.up_s):
            spent.append(min(seconds, left))
            left -= spent[-1]
        down_s, compute_s, up_s = spent
        down_share, up_share = _share(down_s, self.down_s), _share(up_s, self.up_s)
        return replace(
            self,
            down_s=down_s,
            compute_s=compute_s,
            up_s=up_s,
            down_joules=self.down_joules * down_share,
            compute_joules=self.compute_joules * _share(compute_s, self.compute_s),
            up_joules=self.up_joules * up_share,
            compute_tail_s=min(self.compute_tail_s, compute_s),
            up_tail_s=0.0,
            down_share=self.down_share * down_share,
            up_share=self.up_share * up_share,
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class Costs:
    """The costs of a cohort: a column [clients] for each figure of `Cost`; `costs[number]` is the cost of one client.

    The arithmetic is that of `Cost`, to the last bit.
    """

    down_s: np.ndarray
    compute_s: np.ndarray
    up_s: np.ndarray
    down_joules: np.ndarray
    compute_joules: np.ndarray
    up_joules: np.ndarray
    fits: np.ndarray  # bool
    compute_tail_s: np.ndarray
    up_tail_s: np.ndarray
    tail_watts: np.ndarray
    down_share: np.ndarray
    up_share: np.ndarray

    @classmethod
    def of(cls, costs: Sequence[Cost]) -> Costs:
        """Puts the costs of some clients together."""
        return cls(*(np.array([getattr(cost, column.name) for cost in costs]) for column in fields(cls)))

    def __len__(self) -> int:
        return len(self.down_s)

    def __getitem__(self, number: int) -> Cost:
        return Cost(*(column[number].item() for column in vars(self).values()))

    def all(self) -> list[Cost]:
        """Returns the cost of each client."""
        return [Cost(*figures) for figures in zip(*(column.tolist() for column in vars(self).values()), strict=True)]

    @property
    def total_s(self) -> np.ndarray:
        return np.asarray(self.down_s + self.compute_s + self.up_s)

    @property
    def tail_joules(self) -> np.ndarray:
        return np.asarray((self.compute_tail_s + self.up_tail_s) * self.tail_watts)

    @property
    def joules(self) -> np.ndarray:
        return np.asarray(self.down_joules + self.compute_joules + self.up_joules + self.tail_joules)

    def until(self, elapsed_s: np.ndarray) -> Costs:
        """Returns the part of each cost that is spent when its client stops after `elapsed_s`.

        Args:
            elapsed_s: seconds until each client stops, inf for never, [clients].
        """
        left, spent, shares = np.maximum(0.0, elapsed_s), [], []
        for seconds in (self.down_s, self.compute_s, self.up_s):
            spent.append(np.minimum(seconds, left))
            shares.append(np.divide(spent[-1], seconds, out=np.zeros(len(self)), where=seconds != 0))
            left = left - spent[-1]
        (down_s, compute_s, up_s), (down, compute, up) = spent, shares
        cut = Costs(
            down_s,
            compute_s,
            up_s,
            self.down_joules * down,
            self.compute_joules * compute,
            self.up_joules * up,
            self.fits,
            np.minimum(self.compute_tail_s, compute_s),
            np.zeros(len(self)),
            self.tail_watts,
            self.down_share * down,
            self.up_share * up,
        )
        ended = elapsed_s >= self.total_s
        return Costs(**{name: np.where(ended, column, vars(cut)[name]) for name, column in vars(self).items()})


# By what prices a cohort: the plain loop for it, and what prices one client.
_LOOPS = {
    "costs": ("costs_one_by_one", "cost"),
    "seconds": ("seconds", "compute_s", "least_s"),
    "joules": ("joules", "compute_joules"),
}


def _place(cls: type, name: str) -> int:
    """How far up a class finds an attribute: 0 in itself."""
    return next(place for place, above in enumerate(cls.__mro__) if name in vars(above))


class LatencyModel(Checked, ABC, group="latency"):
    """Turns (work, device) into seconds; energy and transfer are the same for every model and live in `cost`.

    `costs` prices a cohort at once, by `seconds` and `joules`. A class that overrides what one client takes, and not
    what a cohort takes, gets the plain loop over clients, not its parent's shorter way.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for cohort, (loop, *single) in _LOOPS.items():
            if min(_place(cls, name) for name in single) < _place(cls, cohort):
                setattr(cls, cohort, getattr(LatencyModel, loop))

    @abstractmethod
    def compute_s(self, work: Work, device: DeviceProfile) -> float:
        """Returns the seconds that the passes of `work` take on `device`, without jitter."""

    def least_s(self, work: Work, device: DeviceProfile) -> float:
        """Returns the seconds below which no unit of `device` computes the passes; 0 where no peak is known.

        A multiply-add is two FLOPs.
        """
        return work.flops / 2 / device.peak_macs_per_s if device.peak_macs_per_s else 0.0

    def inference_ms(self, network: ModelCost, device: DeviceProfile) -> float:
        """Returns the milliseconds that one forward pass of one example takes on `device`, without jitter."""
        return 1e3 * self.compute_s(Work((Passes(network, 1, 1),)), device)

    def compute_joules(self, work: Work, device: DeviceProfile, compute_s: float) -> float:
        """Returns the joules of the passes of `work` when they last `compute_s` seconds, jitter included."""
        return compute_s * device.compute_watts

    def cost(self, work: Work, device: DeviceProfile, jitter: Jitter = Jitter()) -> Cost:
        """Prices one client's round.

        Seconds: a transfer is its set-up in round trips plus bytes over bandwidth, times its jitter, and the upload
        has the round trips of `work` too; compute is
        `compute_s` times its jitter, and `least_s` at least. Joules: a transfer takes its seconds times the watts of
        its direction, and so much for each byte; compute takes `compute_joules`; then there is the tail of the radio,
        see `Cost`.
        """
        setup_s = device.setup_round_trips * device.rtt_s
        down_s = (setup_s + work.down_bytes / device.down_bytes_per_s) * jitter.down
        up_s = (setup_s + work.round_trips * device.rtt_s + work.up_bytes / device.up_bytes_per_s) * jitter.up
        compute_s = max(self.compute_s(work, device) * jitter.compute, self.least_s(work, device))
        return Cost(
            down_s,
            compute_s,
            up_s,
            down_s * device.rx_watts + work.down_bytes * device.rx_joules_per_byte,
            self.compute_joules(work, device, compute_s),
            up_s * device.tx_watts + work.up_bytes * device.tx_joules_per_byte,
            fits=work.peak_memory_bytes <= device.memory_bytes,
            compute_tail_s=min(device.tail_s, compute_s),
            up_tail_s=device.tail_s,
            tail_watts=device.tail_watts,
        )

    def costs(self, works: Sequence[Work], units: Units, jitters: Sequence[Jitter]) -> Costs:
        """Prices the round of each client of a cohort: what `cost` says of each, to the last bit."""
        jitter = np.array([(j.compute, j.down, j.up) for j in jitters]).reshape(-1, 3)
        down_bytes, up_bytes = (np.array([w.down_bytes for w in works]), np.array([w.up_bytes for w in works]))
        setup_s = units.column(lambda d: d.setup_round_trips * d.rtt_s)
        tail_s, tail_watts = units.column(lambda d: d.tail_s), units.column(lambda d: d.tail_watts)
        down_rate = units.column(lambda d: d.down_bytes_per_s) * units.bandwidth
        up_rate = units.column(lambda d: d.up_bytes_per_s) * units.bandwidth
        down_s = (setup_s + down_bytes / down_rate) * jitter[:, 1]
        trips_s = np.array([w.round_trips for w in works]) * units.column(lambda d: d.rtt_s)
        up_s = (setup_s + trips_s + up_bytes / up_rate) * jitter[:, 2]
        nominal_s, least_s = self.seconds(works, units)
        compute_s = np.maximum(nominal_s * jitter[:, 0], least_s)
        rx, tx = units.column(lambda d: d.rx_joules_per_byte), units.column(lambda d: d.tx_joules_per_byte)
        return Costs(
            down_s,
            compute_s,
            up_s,
            down_s * units.column(lambda d: d.rx_watts) + down_bytes * rx,
            self.joules(works, units, compute_s),
            up_s * units.column(lambda d: d.tx_watts) + up_bytes * tx,
            np.array([w.peak_memory_bytes for w in works]) <= units.column(lambda d: d.memory_bytes),
            np.minimum(tail_s, compute_s),
            tail_s,
            tail_watts,
            np.ones(len(works)),
            np.ones(len(works)),
        )

    def costs_one_by_one(self, works: Sequence[Work], units: Units, jitters: Sequence[Jitter]) -> Costs:
        """The same of a model that says by itself what one client's round costs."""
        each = enumerate(zip(works, jitters, strict=True))
        return Costs.of([self.cost(work, units[number], jitter) for number, (work, jitter) in each])

    def seconds(self, works: Sequence[Work], units: Units) -> tuple[np.ndarray, np.ndarray]:
        """Returns `compute_s` and `least_s` of each client, [clients] each; a model may have a shorter way."""
        devices = [units[number] for number in range(len(units))]
        pairs = list(zip(works, devices, strict=True))
        return np.array([self.compute_s(*pair) for pair in pairs]), np.array([self.least_s(*pair) for pair in pairs])

    def joules(self, works: Sequence[Work], units: Units, compute_s: np.ndarray) -> np.ndarray:
        """Returns `compute_joules` of each client, [clients]; a model may have a shorter way."""
        each = enumerate(zip(works, compute_s.tolist(), strict=True))
        return np.array([self.compute_joules(work, units[number], seconds) for number, (work, seconds) in each])


class FlopsLatency(LatencyModel):
    """One rate per device, whatever the network: the naive baseline that other simulators use."""

    def compute_s(self, work: Work, device: DeviceProfile) -> float:
        return max(work.flops / device.flops_per_s, self.least_s(work, device))

    def seconds(self, works: Sequence[Work], units: Units) -> tuple[np.ndarray, np.ndarray]:
        flops = np.array([work.flops for work in works])
        least_s = flops / 2 / units.column(lambda d: d.peak_macs_per_s or math.inf)
        return np.maximum(flops / (units.column(lambda d: d.flops_per_s) * units.speed), least_s), least_s

    def joules(self, works: Sequence[Work], units: Units, compute_s: np.ndarray) -> np.ndarray:
        return np.asarray(compute_s * units.column(lambda d: d.compute_watts))
