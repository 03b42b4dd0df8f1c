"""Prototype-based personalised pruning, federated: clients train one network and its gates, each for its own channels.

After Kim et al., "Prototype-based Personalized Pruning", ICASSP 2021: a reconstruction from the abstract and the patent
abstract, federated by us, so no figure of it is the paper's; a patent (US 12 505 348 B2) covers the idea. Records: see
`fedsim.exchanges.ppp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval, Le, MinLen
from flwr.app import ArrayRecord, Message, MetricRecord

from devices.compression.channels import Kept
from devices.compression.gates import Gates, mean_jaccard_distance
from devices.compression.prune import largest_ratio
from devices.errors import DeviceError
from devices.profile import BY_LATENCY
from fedsim.errors import ConfigError
from fedsim.exchanges.ppp import GATES, MASK, MASKED, SHARE
from fedsim.exchanges.slices import BITS, KEPT, RATIO
from fedsim.grid.edge import Enrolled
from fedsim.grid.server_half import ServerContext
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.seeding import derive
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy
from strategies.widths import Ratio, WidthStrategy


class PPPStrategy(WidthStrategy):
    """Averages the network per coordinate over those who trained it, and the gates over all who used them.

    A masked client knows no channel that it was not sent: it is sent everything once, then what its gates last asked
    for. With ratio 1 this is FedAvg, bit for bit, and mask bits beside.

    Args:
        ratio: keep ratio of every client; None chooses by latency_budget_ms, or by tiers where that is None too.
        latency_budget_ms: a client gets the largest of the levels whose network, cut at that ratio, needs at most so
            long for one example on its device, as predicted.
        levels, tiers: as for WidthStrategy.
        deploy_ratio: keep ratio at which clients are judged; None is the one they train for.
        train_mode: "full" trains all channels under gates; "masked" sends and trains the client's own.
        diversity: weight that clients give to masks unlike the others'; above 0 they are sent how many keep a unit.
        warmup: share of the rounds in which the ratio falls from 1 to the client's own.
        gate_hidden: units of a gate's hidden layer; None is max(8, inputs / 4).
        budget_conditioned: gates read the keep ratio.
        widths: other arguments of WidthStrategy.

    Raises:
        ConfigError: for a setting that is not allowed.
    """

    derived: ClassVar[frozenset[str]] = WidthStrategy.derived | {"plan"}
    gates: Tensors

    def __init__(
        self,
        ratio: Ratio | None = 0.5,
        latency_budget_ms: Annotated[float, Gt(0)] | None = None,
        levels: Annotated[Sequence[Ratio], MinLen(1)] = (0.3, 0.5, 0.7, 1.0),
        tiers: Mapping[str, Ratio] | None = None,
        deploy_ratio: Ratio | None = None,
        train_mode: Literal["full", "masked"] = "full",
        diversity: float = 0.0,
        warmup: Annotated[float, Interval(ge=0, le=1)] = 0.2,
        gate_hidden: Annotated[int, Ge(1), Le(10**6)] | None = None,
        budget_conditioned: bool = False,
        **widths: Any,
    ):
        super().__init__(levels=levels, tiers=tiers, **widths)
        if latency_budget_ms is not None and ratio is not None:
            raise ConfigError(
                f"strategy.latency_budget_ms={latency_budget_ms!r} needs strategy.ratio=null, got ratio={ratio!r}"
            )
        self.fixed, self.latency_budget_ms, self.deploy_ratio = ratio, latency_budget_ms, deploy_ratio
        self.masked, self.diversity, self.warmup = train_mode == "masked", diversity, warmup
        self.gate_hidden, self.budget_conditioned = gate_hidden, budget_conditioned
        self.masks: dict[int, Kept] = {}  # by client, the channels that its gates last asked for
        self.distance = 0.0

    def begin(self, context: ServerContext) -> None:
        """Finds the channel groups and makes fresh gates for them."""
        super().begin(context)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(context.seed, "gates"))
                self.plan = Gates(self.slices.model, self.slices.groups, self.gate_hidden, self.budget_conditioned)
        except DeviceError as error:
            raise ConfigError(f"{error}; take another model or another method") from error
        self.gates = {name: t.detach() for name, t in self.plan.state_dict().items()}

    # --- what a client gets -------------------------------------------------------------------------------------------

    def choose(self, number: int, client: Enrolled) -> Kept:
        """Returns all channels, or in masked training those that the client's gates last asked for.

        For an evaluation all: the client prunes the network for itself.
        """
        known = self.masks if self.masked and not self.judging else {}
        return known.get(client.client_id) or self.slices.groups.all()

    @property
    def device_reads(self) -> Mapping[str, str]:
        """The keep ratio, unless it is fixed."""
        if self.fixed is not None:
            return {}
        if self.latency_budget_ms is not None:
            return {BY_LATENCY: "keep ratios meet strategy.latency_budget_ms"}
        return super().device_reads

    @property
    def reads_rounds(self) -> str:
        """The rounds in which keep ratios fall to their own."""
        return "keep ratios fall in a share of the rounds (strategy.warmup)" if self.warmup else ""

    def ratio(self, client: Enrolled) -> float:
        """Finds the keep ratio that the client's device is given."""
        if self.fixed is not None:
            return float(self.fixed)
        if self.latency_budget_ms is None:
            return super().ratio(client)

        def needs_ms(ratio: float) -> float:
            return self.context.latency.inference_ms(self.slices.cost(self.plan.at_ratio(ratio)), client.profile)

        return largest_ratio(needs_ms, self.latency_budget_ms, self.levels)

    def ratio_now(self, number: int, client: Enrolled) -> float:
        """Returns the keep ratio of a round: it falls from 1 to the client's own in the first rounds."""
        own = self.own_ratio(client)
        if self.judging:
            return own if self.deploy_ratio is None else float(self.deploy_ratio)
        falling = self.warmup * self.context.rounds
        return own if number - 1 >= falling else 1 - (1 - own) * (number - 1) / falling

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns the client's channels and keep ratio, and the gates where they are at work."""
        part, ratio = super().broadcast(number, client, weights), self.ratio_now(number, client)
        extras = dict(part.extras)
        if ratio < 1 and self.fixed != 1:
            extras[GATES] = self.gates
        if self.masks and ratio < 1 and not self.judging and self.diversity:
            kept = [self.plan.masks(mask) for mask in self.masks.values()]
            extras[SHARE] = {n: torch.stack([one[n] for one in kept]).float().mean(0) for n in self.plan.names}
        return replace(part, extras=extras, settings={RATIO: ratio, MASKED: self.masked})

    # --- what comes back ----------------------------------------------------------------------------------------------

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns the mean of each coordinate over those who trained it; averages the gates, takes down the masks."""
        groups, masks = self.slices.groups, []
        for update in updates:
            record = update.extras.get(MASK) or update.extra(KEPT)
            kept = self.masks[update.client_id] = groups.unpack(record[BITS])
            masks.append(torch.cat(list(self.plan.masks(kept).values())))
        self.distance = mean_jaccard_distance(torch.stack(masks))
        gated = [replace(update, weights=update.extra(GATES)) for update in updates if GATES in update.extras]
        if gated:
            self.gates = EdgeStrategy.combine(self, number, gated)
        return super().combine(number, updates)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the new weights; adds the mean Jaccard distance between the clients' masks to the metrics."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is not None:
            metrics["mask_distance"] = self.distance
        return arrays, metrics
