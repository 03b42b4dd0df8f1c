"""Nested widths: each client trains the first channels of every layer, more of them on a faster device.

Source of the nested widths: Diao et al., "HeteroFL", ICLR 2021, section 3; Horvath et al., "FjORD", NeurIPS 2021,
section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from annotated_types import Gt, Interval, MinLen

from devices.compression.channels import Kept
from devices.compression.prune import largest_ratio
from devices.population import by_group, of_device
from devices.profile import BY_LATENCY, BY_NAME
from fedsim.errors import ConfigError
from fedsim.exchanges.slices import RATIO
from fedsim.grid.edge import Enrolled
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.seeding import generator
from fedsim.workloads.base import Tensors
from strategies.subnet import SubnetStrategy

Ratio = Annotated[float, Interval(gt=0, le=1)]


class WidthStrategy(SubnetStrategy):
    """Gives each client the first channels of every layer, at one of some keep ratios.

    Args:
        levels: the ratios there are, each in (0, 1].
        assign: tier takes the ratio of the device in `tiers`; latency the largest one whose predicted
            training step takes at most `step_ms`; random an equal draw per client, fixed for the run.
        tiers: ratio by name, tier (low, mid, high: `devices.population`) or kind of device, the narrowest first; 1
            where nothing is said.
        step_ms: for assign=latency: how long a training step may take.
        batch_size: for assign=latency: examples of a training step.
        judged_at: keep ratios at which clients are judged beside their own; they are sent the widest.
        weighted: weight clients by their examples; without, all count alike.

    Raises:
        ConfigError: for a setting that is not allowed.
    """

    def __init__(
        self,
        levels: Annotated[Sequence[Ratio], MinLen(1)],
        assign: Literal["tier", "latency", "random"] = "tier",
        tiers: Mapping[str, Ratio] | None = None,
        step_ms: Annotated[float, Gt(0)] | None = None,
        batch_size: int = 1,
        judged_at: Sequence[float] = (),
        weighted: bool = True,
        **sampling: Any,
    ):
        super().__init__(**sampling)
        if not all(0 < ratio <= 1 for ratio in judged_at):  # no bound, so that trainer.judged_at is named first
            raise ConfigError(f"strategy.judged_at must be keep ratios in (0, 1], got {list(judged_at)}")
        if (assign == "latency") != (step_ms is not None):
            raise ConfigError(
                "strategy.step_ms must be greater than 0 with strategy.assign=latency and null otherwise, got "
                f"{step_ms!r} with assign={assign}"
            )
        self.tiers = by_group(tiers or {}, "strategy.tiers", ConfigError)
        self.levels, self.assign, self.weighted = list(levels), assign, weighted
        self.step_ms, self.batch_size, self.judged_at = step_ms, batch_size, list(judged_at)
        self._ratios: dict[int, float] = {}

    def choose(self, number: int, client: Enrolled) -> Kept:
        """Returns the first channels at the client's ratio, the same in every round; in an evaluation all it needs."""
        own = self.own_ratio(client)
        return self.slices.groups.first(max([own, *self.judged_at]) if self.judging else own)

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns the client's part; where it is judged at other ratios too, with its own ratio."""
        part = super().broadcast(number, client, weights)
        is_wider = self.judging and self.judged_at
        return replace(part, settings={RATIO: self.own_ratio(client)}) if is_wider else part

    @property
    def device_reads(self) -> Mapping[str, str]:
        """The width of a client's network, unless it is drawn."""
        by = {"tier": BY_NAME, "latency": BY_LATENCY}.get(self.assign)
        return {by: f"widths are assigned by {self.assign} (strategy.assign)"} if by else {}

    def own_ratio(self, client: Enrolled) -> float:
        """Returns the keep ratio of a client, found once."""
        if client.client_id not in self._ratios:
            self._ratios[client.client_id] = self.ratio(client)
        return self._ratios[client.client_id]

    def weight(self, update: ClientUpdate) -> float:
        """Returns its examples, or 1 where all clients count alike."""
        return update.num_examples if self.weighted else 1.0

    def ratio(self, client: Enrolled) -> float:
        """Finds the keep ratio of a client by the rule of `assign`."""
        if self.assign == "random":
            draw = generator(self.context.seed, "width", client.client_id)
            return self.levels[int(draw.integers(len(self.levels)))]
        if self.assign == "tier":
            return float(of_device(self.tiers, client.profile, 1.0))

        def takes_ms(ratio: float) -> float:
            kept = self.slices.groups.first(ratio)
            return self.slices.step_ms(kept, self.batch_size, self.context.latency, client.profile)

        assert self.step_ms is not None
        return largest_ratio(takes_ms, self.step_ms, self.levels)
