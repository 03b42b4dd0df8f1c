"""Rules by which each client gets one of several networks that lie inside one another.

A server knows the data sheet of a device, from which seconds and memory of a training step are predicted, without
compression of what is sent. A rule with limits never gives a device a network that it predicts to take longer, or more
memory than the device has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from devices.bounds import Checked
from devices.compression.channels import Kept
from devices.cost import LatencyModel, ModelCost, Passes, Work
from devices.meter import peak_memory_bytes
from devices.nas.search import Limit, NothingFitsError, select
from devices.population import by_group, of_device
from devices.profile import BY_LATENCY, BY_MEMORY, BY_NAME, DeviceProfile
from fedsim.errors import ConfigError
from fedsim.exchanges.slices import Slices
from fedsim.grid.edge import Enrolled
from fedsim.seeding import generator

MOST_MET = 10_000  # clients that are looked at for the slowest; each is priced
MOMENTUM = 1.0  # of a step's memory, as large as the weights

Share = Annotated[float, Interval(gt=0, le=1)]


@dataclass(frozen=True, eq=False)
class Member:
    """One network of a family.

    Attributes:
        width, depth: shares of channels and of blocks that may be left out.
        kept: what stays of the whole network.
        cost: of one example.
    """

    width: float
    depth: float
    kept: Kept
    cost: ModelCost

    def __str__(self) -> str:
        return f"width {self.width:g}, depth {self.depth:g}"


class Family:
    """Networks that lie inside one another, and what they take on a device.

    Args:
        slices: narrowed forms of the whole network.
        kept: what stays of it in each member, by (width, depth).
        batch: examples of a training step.
        latency: predicts seconds.
        seed: of draws.
        num_outputs: of the networks.

    Attributes:
        members: without repetitions, the one with the fewest FLOPs first.
    """

    def __init__(
        self,
        slices: Slices,
        kept: Mapping[tuple[float, float], Kept],
        batch: int,
        latency: LatencyModel,
        seed: int,
        num_outputs: int,
    ):
        self.slices, self.batch, self.latency, self.seed, self.num_outputs = slices, batch, latency, seed, num_outputs
        found: dict[tuple[int, ...], Member] = {}
        for (width, depth), own in sorted(kept.items(), reverse=True):
            found.setdefault(tuple(map(len, own.values())), Member(width, depth, own, slices.cost(own)))
        self.members = sorted(found.values(), key=lambda m: (m.cost.forward_flops, m.cost.parameter_bytes))
        self._numbers = {tuple(map(len, member.kept.values())): n for n, member in enumerate(self.members)}

    def number_of(self, kept: Kept) -> int:
        """Returns the number of the member that keeps this."""
        return self._numbers[tuple(map(len, kept.values()))]

    def round_s(self, profile: DeviceProfile, steps: int) -> np.ndarray:
        """Predicts the seconds of a round with each member on a device, [n]."""
        return np.array([self.member_s(number, profile, steps) for number in range(len(self.members))])

    def member_s(self, number: int, profile: DeviceProfile, steps: int) -> float:
        """Predicts the seconds of a round with one member on a device: download, training steps and upload."""
        cost = self.members[number].cost
        size = cost.parameter_bytes
        work = Work((Passes(cost, self.batch, steps, steps),), down_bytes=size, up_bytes=size)
        return self.latency.cost(work, profile).total_s

    def memory_bytes(self) -> np.ndarray:
        """Returns the memory of a training step with momentum of each member, [n]."""
        return np.array([peak_memory_bytes(m.cost, self.batch, MOMENTUM) for m in self.members], float)


class Architecture(Checked, ABC, group="architecture", error=ConfigError):
    """A rule that gives each client one network of a family, once; it keeps nothing itself from round to round.

    Attributes:
        asks: it needs what a client tells of its data, once.
    """

    asks: ClassVar[bool] = False

    family: Family

    @property
    def chooses(self) -> bool:
        """Whether it needs a strategy that sends different networks."""
        return True

    @property
    def device_reads(self) -> Mapping[str, str]:
        """What it decides by a client's device, as `ServerHalf.device_reads` has it."""
        return {}

    def read(self) -> None:
        """Reads files that the rule needs, before anything of a run is written.

        Raises:
            DataError: for a file or folder that is no such thing.
        """

    def begin(self, family: Family, clients: Iterable[Enrolled]) -> None:
        """Takes what there is to know, once.

        Args:
            family: the networks.
            clients: all of them, to be looked through only where a rule must.
        """
        self.family = family

    @abstractmethod
    def choose(self, client: Enrolled, told: Tensor | None) -> int:
        """Returns the number of a client's network in `family.members`.

        Args:
            client: what the server knows of it.
            told: what it told of its data, where the rule asks; None: it was asked and did not answer.
        """

    def candidates(self, client: Enrolled) -> Sequence[int]:
        """Returns the networks among which a client is to choose by itself, smallest first; none: it is not."""
        return ()


class Whole(Architecture):
    """Everybody trains the whole network, as in federated averaging."""

    @property
    def chooses(self) -> bool:
        return False

    def choose(self, client: Enrolled, told: Tensor | None) -> int:
        return len(self.family.members) - 1


class ByTier(Architecture):
    """The widest network, of all its blocks, up to a width for each tier or kind of device.

    Args:
        tiers: width by name, tier (low, mid, high: `devices.population`) or kind of device, the narrowest first; 1
            where nothing is said.

    Source: Diao et al., "HeteroFL", ICLR 2021, section 3, whose tiers are this.
    """

    def __init__(self, tiers: Mapping[str, Share]):
        self.tiers = by_group(tiers, "architecture.tiers", ConfigError)

    @property
    def device_reads(self) -> Mapping[str, str]:
        return {BY_NAME: "networks are assigned by tier (architecture.tiers)"}

    def choose(self, client: Enrolled, told: Tensor | None) -> int:
        most, members = float(of_device(self.tiers, client.profile, 1.0)), self.family.members
        deepest = max(member.depth for member in members)
        fitting = [n for n, m in enumerate(members) if m.width <= most and m.depth == deepest]
        return fitting[-1] if fitting else next(n for n, m in enumerate(members) if m.depth == deepest)


class WithinLimits(Architecture):
    """A rule whose networks keep a limit of time, and the device's memory.

    Args:
        round_s: how long a round may take a client, as predicted: download, training steps and upload; None: as long as
            with the smallest network on the slowest device.
        steps: training steps of that round.
        margin: by which share more predictions may be wrong: networks with prediction * (1 + margin) <= round_s fit.

    Attributes:
        looks_at_all: it goes by the devices of all clients, not only by a client's own.
    """

    looks_at_all: ClassVar[bool] = False

    def __init__(
        self,
        round_s: Annotated[float, Gt(0)] | None = None,
        steps: Annotated[int, Ge(1)] = 20,
        margin: Annotated[float, Ge(0)] = 0.0,
    ):
        self.round_s, self.steps, self.margin = round_s, steps, margin
        self.most_s = np.inf
        self._fits: dict[int, list[int]] = {}

    @property
    def device_reads(self) -> Mapping[str, str]:
        what = "networks keep a limit of time and memory (architecture.round_s)"
        return {BY_LATENCY: what, BY_MEMORY: what}

    def begin(self, family: Family, clients: Iterable[Enrolled]) -> None:
        """Finds the limit, where it is that of the slowest device.

        Raises:
            ConfigError: where there are too many clients to look at them all.
        """
        super().begin(family, clients)
        self._fits = {}
        some = list(islice(clients, MOST_MET + 1)) if self.round_s is None or self.looks_at_all else []
        too_many = len(some) > MOST_MET
        if too_many:
            raise ConfigError(
                f"the slowest of more than {MOST_MET:,} clients is not looked for; give architecture.round_s, and a "
                "rule that looks at single clients, such as architecture=largest"
            )
        self.most_s = self.round_s or 0.0
        if self.round_s is None:
            slowest = max(family.member_s(0, client.profile, self.steps) for client in some)
            self.most_s = slowest * (1 + self.margin) * (1 + 1e-12)
        if self.looks_at_all:
            self.meet(some)

    def meet(self, everybody: Sequence[Enrolled]) -> None:
        """Takes all clients, where the rule looks at them."""

    def limits(self, profile: DeviceProfile) -> list[Limit]:
        """Returns what a device allows."""
        memory = Limit("bytes", self.family.memory_bytes(), float(profile.memory_bytes))
        return [Limit("s", self.family.round_s(profile, self.steps), self.most_s, self.margin), memory]

    def fitting(self, client: Enrolled) -> list[int]:
        """Returns the numbers of the networks that fit a client's device, smallest first; found once.

        Raises:
            ConfigError: if none does.
        """
        if client.client_id not in self._fits:
            limits, members = self.limits(client.profile), self.family.members
            try:
                found = select(np.arange(len(members)), limits, name_of=lambda n: str(members[n]), best=len(members))
            except NothingFitsError as error:
                raise ConfigError(
                    f"{client.profile.name}: {error}; give a larger architecture.round_s, or smaller strategy.widths "
                    "or strategy.depths"
                ) from None
            self._fits[client.client_id] = sorted(found.best)
        return self._fits[client.client_id]

    def best(self, client: Enrolled, scores: Sequence[float]) -> int:
        """Returns the network with the best score of those that fit; of equal ones the larger."""
        return max(self.fitting(client), key=lambda number: (scores[number], number))


class Largest(WithinLimits):
    """The largest network that fits each client's device."""

    def choose(self, client: Enrolled, told: Tensor | None) -> int:
        return self.fitting(client)[-1]


class OneSize(WithinLimits):
    """One network for everybody: the largest that fits all devices."""

    looks_at_all: ClassVar[bool] = True

    def meet(self, everybody: Sequence[Enrolled]) -> None:
        """Finds the network that fits all.

        Raises:
            ConfigError: if none does.
        """
        common = set.intersection(*(set(self.fitting(client)) for client in everybody))
        if not common:
            raise ConfigError(
                f"no network fits all devices within {self.most_s:g} s and their memory; give a larger "
                "architecture.round_s, or smaller strategy.widths or strategy.depths"
            )
        self.number = max(common)

    def choose(self, client: Enrolled, told: Tensor | None) -> int:
        return self.number


class RandomFit(WithinLimits):
    """A network that is drawn of those that fit the client's device, each with the same chance, for the whole run."""

    def choose(self, client: Enrolled, told: Tensor | None) -> int:
        fitting = self.fitting(client)
        return fitting[int(generator(self.family.seed, "architecture", client.client_id).integers(len(fitting)))]


class Oracle(WithinLimits):
    """The network that fits the device and judges the client's held-out examples best, in each round anew.

    That is no rule for a device: it looks at what judges it, and nobody pays for the looking. What it downloads, and
    pays for, holds all the networks that fit. Results are marked as an oracle's.
    """

    def choose(self, client: Enrolled, told: Tensor | None) -> int:
        return self.fitting(client)[-1]

    def candidates(self, client: Enrolled) -> Sequence[int]:
        return self.fitting(client)
