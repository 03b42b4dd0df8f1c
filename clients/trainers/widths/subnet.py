"""Training a part of the network: the channels that the server sent, as a dense network of its own.

What runs, is priced and takes memory is the small network. Records: arrays, down and up: its tensors. kept, down: bits
[ceil(C / 8)] uint8, which of the C removable channels it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch import nn

from clients.trainers.base import ClientContext
from clients.trainers.sgd import SGDRun, SGDTrainer
from devices.compression.channels import ChannelGroups, Kept
from devices.cost import ModelCost
from fedsim.errors import ConfigError
from fedsim.exchanges.slices import BITS, KEPT, RATIO, Slices
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload


class SubnetRun(SGDRun):
    """The local loop on the part; returns its tensors.

    Attributes:
        channels: that the server sent.
    """

    trainer: SubnetTrainer

    def __init__(self, trainer: SubnetTrainer, client: ClientContext, broadcast: Broadcast):
        self.channels = trainer.channels_sent(broadcast)
        weights = trainer.fitting(broadcast.weights, self.channels)
        super().__init__(trainer, trainer.narrowed(client, self.channels, weights), broadcast)

    def update(self, train_loss: float) -> ClientUpdate:
        update, ratio = super().update(train_loss), self.trainer.slices.groups.keep_ratio(self.channels)
        weights = self.trainer.returned(update.weights, self.channels, self.broadcast.weights)
        return replace(update, weights=weights, metrics={**update.metrics, "keep_ratio": ratio})


class SubnetTrainer(SGDTrainer):
    """SGD on the part of the network that the server sends.

    Args:
        judged_at: keep ratios at which a client is judged beside its own, as metrics NAME_at_RATIO. That is no work of
            its device, though its download then holds the widest of them.
        sgd: arguments of SGDTrainer.

    Attributes:
        kind: what of the network may go; the strategy's is the same.
        slices: the narrowed networks.
    """

    run: ClassVar[type[SGDRun]] = SubnetRun
    own_network = True
    kind: ClassVar[type[ChannelGroups]] = ChannelGroups
    slices: Slices

    def __init__(self, judged_at: Sequence[Annotated[float, Interval(gt=0, le=1)]] = (), **sgd: Any):
        super().__init__(**sgd)
        self.judged_at = tuple(judged_at)

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds the channel groups of the model."""
        super().setup(workload, model, network)
        device = next(model.parameters()).device
        self.slices = Slices(workload, device, self.prepare, self.kind)

    def prepare(self, network: nn.Module, kept: Kept) -> None:
        """Prepares a static network once, when it is built."""

    def evaluate(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Returns metrics of the part that this device would run, and of other widths where those are asked for."""
        groups, sent = self.slices.groups, self.channels_sent(broadcast)
        own = groups.first(float(broadcast.settings[RATIO])) if RATIO in broadcast.settings else sent
        metrics = super().evaluate(self.part(client, broadcast, own, sent), broadcast)
        for ratio in self.judged_at if len(client.data.test) else ():
            self.judge_beside(self.part(client, broadcast, groups.first(ratio), sent), f"at_{float(ratio)}", metrics)
        return metrics

    def part(self, client: ClientContext, broadcast: Broadcast, kept: Kept, sent: Kept) -> ClientContext:
        """Returns the client with the network of some of the channels that were sent."""
        weights = self.fitting(broadcast.weights, sent)
        return self.narrowed(client, kept, self.slices.groups.within(weights, kept, sent))

    def fitting(self, weights: Tensors, held: Kept) -> Tensors:
        """Returns the weights that were sent, with the client's private ones, which are whole, cut to their sizes."""
        private = {name: weights[name] for name in self.private}
        return {**weights, **self.slices.groups.slice(private, held)} if private else weights

    def returned(self, weights: Tensors, kept: Kept, before: Tensors) -> Tensors:
        """Returns the trained tensors, private ones put back into whole ones, so that no channel of them is lost."""
        if not self.private:
            return weights
        trained = {name: weights[name] for name in self.private if name in weights}
        dense, masks = self.slices.groups.scatter(trained, kept, before)
        whole = {name: torch.where(masks[name], t, before[name]) for name, t in dense.items()}
        return {**weights, **{name: before[name] for name in self.private}, **whole}

    def judge_beside(self, client: ClientContext, name: str, metrics: dict[str, float]) -> None:
        """Adds the primary metric of another network than the client's own, which is no work of its device."""
        primary = client.workload.primary.name
        metrics[f"{primary}_{name}"] = client.workload.evaluate(client.model, client.data.test)[primary]
        client.log.judged[name] = client.step_cost

    def channels_sent(self, broadcast: Broadcast) -> Kept:
        """Returns the channels that the server sent.

        Raises:
            ConfigError: if the strategy sends none.
        """
        if KEPT not in broadcast.extras:
            raise ConfigError(
                f"{type(self).__name__} got no part of the network; take the strategy that belongs to it, by method=..."
            )
        return self.slices.groups.unpack(broadcast.extras[KEPT][BITS].cpu())

    @torch.no_grad()
    def narrowed(self, client: ClientContext, kept: Kept, weights: Tensors) -> ClientContext:
        """Returns the client with the static network of these channels in place of the dense one.

        Args:
            client: as the app gives it.
            kept: the channels.
            weights: tensors of the part, or of the dense network, which are then cut.
        """
        network = self.slices.network(kept)
        own = network.state_dict()
        dense = self.slices.model.state_dict()
        if all(t.shape == dense[name].shape for name, t in weights.items()):
            weights = self.slices.groups.slice(weights, kept)
        for name, tensor in own.items():
            tensor.copy_(weights[name])
        network.train()
        client.seed_dropout(network)
        return replace(
            client,
            model=network,
            parameters=[p for p in network.parameters() if p.requires_grad],
            weights=dict(own),
            step_cost=self.slices.cost(kept),
        )
