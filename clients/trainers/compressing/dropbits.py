"""DropBits: bits of each layer are dropped at random while it trains, and those that are not missed stay dropped.

After Lee et al., ICCV 2021, with CPQ: a reconstruction (see `devices.compression.categorical`), no figure here is the
paper's. A layer's gate for each width from 2 on is hard-concrete; once gates have learned, widths are final and the
network is fine-tuned with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clients.trainers.base import ClientContext
from clients.trainers.compressing.cpq import CPQTrainer, scaled
from clients.trainers.compressing.gradual import GradualRun
from clients.trainers.sgd import Objective
from devices.compression.categorical import chance_open, drawn_gates, nested, usual_gates
from devices.compression.masks import Masks
from devices.compression.sizes import wire_bytes
from devices.cost import ModelCost
from devices.population import by_group, of_device
from devices.profile import BY_NAME, DeviceProfile
from fedsim.errors import ConfigError
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload

GATES, WIDTHS = "gates", "widths"  # a layer's logits of gates, behind its name; group of a client's state
OPEN = 2.0  # logit of a fresh gate: nine in ten are fully open


class Penalised(Objective):
    """Another objective plus penalty times the expected number of open gates, while gates learn.

    Args:
        to: the other objective.
        penalty: lambda.
    """

    def __init__(self, to: Objective, penalty: float):
        self.to, self.penalty = to, penalty

    def __call__(self, run: DropBitsRun, batch: Tensors) -> Tensor:
        loss = self.to(run, batch)
        if not run.compresses or run.widths or not self.penalty:
            return loss
        return loss + self.penalty * torch.stack([chance_open(t).sum() for t in run.gates().values()]).sum()

    def held(self, run: DropBitsRun) -> dict[str, int]:
        return self.to.held(run)


class DropBitsRun(GradualRun):
    """The local loop with gates, or with the widths that they have left.

    Attributes:
        widths: bits of each layer, once they are final.
    """

    trainer: DropBitsTrainer

    def __init__(self, trainer: DropBitsTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.noise = client.stream("gates")
        state = client.state
        self.widths = {n: int(state[f"{WIDTHS}.{n}"]) for n in trainer.pruned if f"{WIDTHS}.{n}" in state}

    def fit(self) -> ClientUpdate:
        if self.broadcast.round > self.trainer.last_gating and not self.widths:
            self.masks = self.masks or self.trainer.masks_at(self.broadcast.round - 1)
            self.widths = self.trainer.widths_of(self)
            self.client.state.store(WIDTHS, {name: torch.tensor(width) for name, width in self.widths.items()})
        return super().fit()

    def gates(self) -> Tensors:
        """Returns each layer's logits of gates."""
        rate = self.trainer.gate_rate
        return Tensors({name: scaled(self.learned[f"{name}.{GATES}"], rate) for name in self.trainer.pruned})

    def trained(self) -> list[Tensor]:
        """Returns what is trained beside the model's parameters: gates no more once widths are final."""
        return [t for name, t in self.learned.items() if not (self.widths and name.endswith(f".{GATES}"))]

    def settle(self, broadcast: Broadcast) -> None:
        super().settle(broadcast)
        if self.compresses and not self.widths:
            self.widths = self.trainer.widths_of(self)


class DropBitsTrainer(CPQTrainer):
    """CPQ whose layers lose the bits that the loss does not miss, or as many as a budget of bytes asks for.

    Gates learn in the `gate_rounds` behind the dense ones. Then each layer keeps its widths from the first up to the
    first whose gate is shut (at most one half without noise); with `size_limit_bytes`, the gates that are the least
    likely to be open shut first, as many more as it takes. The limit is on what a device stores, `wire_bytes`, of the
    network at that moment; fine-tuning moves the bytes of a pruned network little. Bits change sizes, never
    milliseconds: see GradualTrainer.

    Args:
        gate_rounds: rounds in which gates learn.
        gate_rate: factor on the learning rate of gates, whose own gradient is small.
        penalty: lambda, of the expected number of open gates.
        size_limit_bytes: most bytes of the compressed network, for all or by name, tier or kind of device, e.g.
            {phone: 20000, mcu: 8000}, the narrowest first; null, or a device that is not named: no limit.
        cpq: arguments of CPQTrainer; `bits` is the most that a layer may keep.
    """

    run = DropBitsRun

    def __init__(
        self,
        gate_rounds: Annotated[int, Ge(1)],
        gate_rate: Annotated[float, Gt(0)] = 100.0,
        penalty: Annotated[float, Ge(0)] = 0.01,
        size_limit_bytes: Annotated[int, Gt(0)] | Mapping[str, Annotated[int, Gt(0)]] | None = None,
        **cpq: Any,
    ):
        super().__init__(**cpq)
        self.gate_rounds, self.gate_rate = gate_rounds, gate_rate
        self.objective = Penalised(self.objective, penalty)
        self.limits: dict[str, int] = {}
        self.limit: int | None = size_limit_bytes if isinstance(size_limit_bytes, int) else None
        if isinstance(size_limit_bytes, Mapping):
            self.limits = by_group(size_limit_bytes, "trainer.size_limit_bytes", ConfigError)

    @property
    def device_reads(self) -> Mapping[str, str]:
        """Returns what clients decide by their device: also how many bytes it may hold, where limits go by device."""
        limited = {BY_NAME: "bytes are limited by device (trainer.size_limit_bytes)"} if self.limits else {}
        return {**super().device_reads, **limited}

    @property
    def last_gating(self) -> int:
        """Returns the last round in which gates learn."""
        return self.dense_rounds + self.gate_rounds

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Refuses limits that no widths can meet.

        Raises:
            ConfigError: says what the model takes with one bit for each weight.
        """
        super().setup(workload, model, network)
        tensors = dict(model.state_dict())
        for name in self.pruned:
            tensors[name] = torch.full_like(tensors[name], -1, dtype=torch.int8)
            tensors[f"{name.removesuffix('weight')}scale"] = torch.ones(1)
        least = wire_bytes(tensors, dict.fromkeys(self.pruned, 1))
        for where, limit in {"": self.limit, **{f".{name}": limit for name, limit in self.limits.items()}}.items():
            if limit is not None and limit < least:
                raise ConfigError(
                    f"trainer.size_limit_bytes{where} must be at least {least}, what {type(model).__name__} takes with "
                    f"one bit for each weight, got {limit}"
                )

    def limit_of(self, profile: DeviceProfile) -> int | None:
        """Returns how many bytes a device may hold; None: any number."""
        return of_device(self.limits, profile, self.limit)

    def first_learned(self, masks: Masks) -> Tensors:
        """Returns what CPQ learns, and open gates for each width from 2 on."""
        learned = super().first_learned(masks)
        gates = {
            f"{name}.{GATES}": torch.full((self.bits - 1,), OPEN, device=w.device) for name, w in self.weights().items()
        }
        return Tensors({**learned, **gates})

    def kept(self, run: GradualRun, name: str) -> Tensor:
        """Returns how far each width of a layer is kept: drawn anew in each step, until widths are final."""
        assert isinstance(run, DropBitsRun)
        if run.widths:
            return (torch.arange(self.bits, device=run.client.device) < run.widths[name]).float()
        return nested(drawn_gates(run.gates()[name], run.noise))

    def scratch_tensors(self, run: GradualRun) -> int:
        """Counts a term for each width while gates learn."""
        assert isinstance(run, DropBitsRun)
        return super().scratch_tensors(run) + (0 if run.widths else 5 * self.bits)

    @torch.no_grad()
    def widths_of(self, run: DropBitsRun) -> dict[str, int]:
        """Returns the bits that gates leave to each layer, within the limit of the client's device."""
        gates = run.gates()
        widths = {name: 1 + int((usual_gates(t) > 0.5).cumprod(0).sum()) for name, t in gates.items()}
        limit = self.limit_of(run.client.profile)
        if limit is None:
            return widths
        # A width is as likely kept as the least likely gate up to it; the more weights it would spare, the sooner.
        order = sorted(
            (float(chance), -len(run.masks[name].flatten()), -width, name)
            for name, t in gates.items()
            for width, chance in enumerate(chance_open(t).cummin(0).values.tolist(), 2)
            if width <= widths[name]
        )

        def without(count: int) -> dict[str, int]:
            left = dict(widths)
            for *_, width, name in order[:count]:
                left[name] = min(left[name], -width - 1)
            return left

        fewest, most = 0, len(order)  # how many to shut: bisection, since each that shuts spares bytes
        while fewest < most:
            middle = (fewest + most) // 2
            run.widths = without(middle)
            fits = wire_bytes(*self.exported(run)) <= limit
            fewest, most = (fewest, middle) if fits else (middle + 1, most)
        return without(fewest)
