"""Training a part of the network: the channels that the server sent, as a dense network of its own.

What runs, is priced and takes memory is the small network. Records: arrays, down and up: its tensors. kept, down: bits
[ceil(C / 8)] uint8, which of the C removable channels it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from clients.trainers.base import ClientContext
from clients.trainers.sgd import SGDTrainer
from devices.compression.channels import Kept
from devices.cost import NetworkCost
from fedsim.errors import ConfigError
from fedsim.exchanges.slices import BITS, KEPT, RATIO, Slices
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload


class SubnetTrainer(SGDTrainer):
    """SGD on the part of the network that the server sends.

    Args:
        judged_at: keep ratios at which a client is judged beside its own, as metrics NAME_at_RATIO. That is no work of
            its device, though its download then holds the widest of them.
        sgd: arguments of SGDTrainer.
    """

    own_network = True
    pure_loss = False
    slices: Slices

    def __init__(self, judged_at: Sequence[float] = (), **sgd: Any):
        super().__init__(**sgd)
        if not all(isinstance(ratio, int | float) and 0 < ratio <= 1 for ratio in judged_at):
            raise ConfigError(f"trainer.judged_at must be keep ratios in (0, 1], got {list(judged_at)}")
        self.judged_at = tuple(judged_at)

    def setup(self, workload: Workload, model: nn.Module, network: NetworkCost) -> None:
        """Finds the channel groups of the model."""
        device = next(model.parameters()).device
        self.slices = Slices(workload, device, self.prepare)

    def prepare(self, network: nn.Module, kept: Kept) -> None:
        """Called once with every static network that is built, before it is used."""

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        """The local loop of SGD on the part; returns its tensors."""
        kept = self.kept(task)
        update = super().fit(self.narrowed(client, kept, task.weights), task)
        return replace(update, metrics={**update.metrics, "keep_ratio": self.slices.groups.keep_ratio(kept)})

    def evaluate(self, client: ClientContext, task: Broadcast) -> dict[str, float]:
        """Metrics of the part that this device would run, and of other widths where those are asked for."""
        groups, sent = self.slices.groups, self.kept(task)
        own = groups.first(float(task.settings[RATIO])) if RATIO in task.settings else sent
        metrics = super().evaluate(self.part(client, task, own, sent), task)
        for ratio in self.judged_at if len(client.data.test) else ():
            self.judge_beside(self.part(client, task, groups.first(ratio), sent), f"at_{float(ratio)}", metrics)
        return metrics

    def part(self, client: ClientContext, task: Broadcast, kept: Kept, sent: Kept) -> ClientContext:
        """The client with the network of some of the channels that were sent."""
        return self.narrowed(client, kept, self.slices.groups.within(task.weights, kept, sent))

    def judge_beside(self, client: ClientContext, name: str, metrics: dict[str, float]) -> None:
        """Adds the accuracy of another network than the client's own, which is no work of its device."""
        metrics[f"accuracy_{name}"] = client.workload.evaluate(client.model, client.data.test)["accuracy"]
        client.log.judged[name] = client.network

    def kept(self, task: Broadcast) -> Kept:
        """The channels that the server sent.

        Raises:
            ConfigError: if the strategy sends none.
        """
        if KEPT not in task.extras:
            raise ConfigError(
                f"{type(self).__name__} got no part of the network; take the strategy that belongs to it, by method=..."
            )
        return self.slices.groups.unpack(task.extras[KEPT][BITS].cpu())

    @torch.no_grad()
    def narrowed(self, client: ClientContext, kept: Kept, weights: Tensors) -> ClientContext:
        """The client with the static network of these channels in place of the dense one.

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
        return replace(
            client,
            model=network,
            parameters=[p for p in network.parameters() if p.requires_grad],
            weights=dict(own),
            network=self.slices.cost(kept),
        )
