"""Sub-FedAvg: every client prunes the network that it trains a little more in each round, by magnitude.

Source: Vahidian et al., "Personalized Federated Learning by Structured and Unstructured Pruning under Data
Heterogeneity", ICDCS Workshops 2021, the unstructured form. Differs: the accuracy that permits pruning is measured on a
validation split of the client's training part, where the authors' code takes the test split. Masks are unstructured, so
a device gains memory and bytes from them, but no time. Records: see `strategies.sub_fedavg`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from clients.trainers.base import ClientContext, Gradients
from clients.trainers.sgd import Arrays, SGDTrainer
from devices.cost import NetworkCost
from fedsim.errors import ConfigError
from fedsim.exchanges.slices import pack_bits
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.seeding import torch_generator
from fedsim.workloads.base import ClientData, Examples, Tensors, Workload

MASK = "mask"  # extra record, and group of a client's state: by weight, [entries] bool


class SubFedAvgTrainer(SGDTrainer):
    """SGD with masked gradients; the mask shrinks while accuracy holds. Needs two local epochs or more to do so.

    Args:
        prune_step: share of the alive weights of each layer that one round may take.
        target: share of the weights at which pruning ends.
        least_accuracy: on the validation split, below which nothing is pruned.
        least_change: share of entries in which the masks after the first and the last epoch must differ.
        validation: share of the client's training part that is only used to decide.
        sgd: arguments of SGDTrainer.
    """

    pure_loss = False

    def __init__(
        self,
        prune_step: float = 0.1,
        target: float = 0.5,
        least_accuracy: float = 0.5,
        least_change: float = 1e-4,
        validation: float = 0.1,
        **sgd: Any,
    ):
        super().__init__(**sgd)
        for key, value in (("prune_step", prune_step), ("target", target), ("validation", validation)):
            if not 0 < value < 1:
                raise ConfigError(f"trainer.{key} must be between 0 and 1, got {value!r}")
        for key, value in (("least_accuracy", least_accuracy), ("least_change", least_change)):
            if not 0 <= value <= 1:
                raise ConfigError(f"trainer.{key} must be in [0, 1], got {value!r}")
        self.prune_step, self.target, self.validation = prune_step, target, validation
        self.least_accuracy, self.least_change = least_accuracy, least_change
        self.masks: Tensors = {}  # of the client at work
        self.early: Tensors = {}  # what pruning after the first epoch would leave

    def setup(self, workload: Workload, model: nn.Module, network: NetworkCost) -> None:
        """Weights with two dimensions or more are pruned; biases and norms are not."""
        self.whole = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1}
        self.order = [n for n, p in model.named_parameters() if p.requires_grad]

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        """Trains under the client's mask, then prunes further where all three conditions hold."""
        self.check_settings(task)
        training, judged = self.split(client)
        self.take_mask(training)
        self.reserve(training, task)
        self.early = self.masks
        train_loss = self.train(training, task, self.batches(training, task))
        late = self.pruned(client.weights)
        if self.ripe(client, judged, late):
            self.masks = late
            self.apply(client)
        client.state.keep(MASK, self.masks)
        sparsity = 1 - alive(self.masks)
        shared = {name: mask for name, mask in self.masks.items() if name not in self.private}
        metrics = {"train_loss": train_loss, "sparsity": sparsity}
        extras = {MASK: {name: pack_bits(mask) for name, mask in shared.items()}}
        return ClientUpdate(client.client_id, len(training.data.train), client.weights, metrics, extras)

    def evaluate(self, client: ClientContext, task: Broadcast) -> dict[str, float]:
        """Metrics of the client's own part of the network; all of it where the client never trained."""
        self.take_mask(client)
        metrics = super().evaluate(client, task)
        return {**metrics, "keep_ratio": alive(self.masks)} if metrics else {}

    def split(self, client: ClientContext) -> tuple[ClientContext, Examples]:
        """The client with what it trains on, and the examples that decide; the same in every round."""
        train = client.data.train
        count = self.judged_examples(len(train))
        order = torch.randperm(len(train), generator=torch_generator(client.seed, "validation", client.client_id))
        parts = [Examples(train.gather(rows)) for rows in (order[count:].sort().values, order[:count].sort().values)]
        return replace(client, data=ClientData(parts[0], client.data.test)), parts[1]

    def judged_examples(self, examples: int) -> int:
        """How many of a client's examples decide."""
        return min(max(1, round(self.validation * examples)), examples - 1)

    def ends_in_one(self, examples: int) -> bool:
        return super().ends_in_one(examples - self.judged_examples(examples))

    def reserve(self, client: ClientContext, task: Broadcast) -> None:
        """A step, and pruning: magnitudes of the largest layer, sorted with their places."""
        masks = [mask.numel() for mask in self.whole.values()]
        client.log.hold("masks", 2 * sum(masks))  # the client's own, and those after the first epoch
        super().reserve(client, task)
        weights = (2 if self.momentum else 1) * client.network.parameter_bytes
        client.log.reserve(weights + sum(masks) + 20 * max(masks))

    def copies(self, client: ClientContext, task: Broadcast) -> float:
        """The masked gradients."""
        return super().copies(client, task) + 1.0

    def take_mask(self, client: ClientContext) -> None:
        """Puts the client's mask on the weights that it was sent."""
        self.masks = {n: m.to(client.device).bool() for n, m in client.state.kept(MASK, self.whole).items()}
        self.apply(client)

    @torch.no_grad()
    def apply(self, client: ClientContext) -> None:
        """Sets what is pruned to zero."""
        for name, mask in self.masks.items():
            client.weights[name].mul_(mask)

    def step(self, parameters: Arrays, gradients: Gradients, lr: float, velocity: Arrays | None) -> Arrays | None:
        """A step of SGD with masked gradients."""
        ones = (self.masks.get(name) for name in self.order)
        masked = [g if g is None or mask is None else g * mask for g, mask in zip(gradients, ones, strict=True)]
        return super().step(parameters, masked, lr, velocity)

    def batches(self, client: ClientContext, task: Broadcast) -> Iterator[Tensors]:
        """The batches of plain SGD; notes after the first epoch which weights would stay."""
        left = -(-len(client.data.train) // self.batch_size)
        for batch in super().batches(client, task):
            if left == 0:
                self.early = self.pruned(client.weights)
            left -= 1
            yield batch
        if left >= 0:  # one epoch or less: nothing to compare
            self.early = self.pruned(client.weights)

    def pruned(self, weights: Tensors) -> Tensors:
        """Masks without the smallest |w| of each layer's alive weights."""
        masks = {}
        for name, mask in self.masks.items():
            living = int(mask.sum())
            gone = min(int(self.prune_step * living), living - 1)
            size = weights[name].abs().masked_fill(~mask, float("inf")).flatten()
            smallest = size.argsort(stable=True)[:gone]
            masks[name] = mask.flatten().index_fill(0, smallest, False).view_as(mask)
        return masks

    def ripe(self, client: ClientContext, judged: Examples, late: Tensors) -> bool:
        """Whether the mask still moves, the target is not reached, and the network does well on what decides."""
        entries = sum(mask.numel() for mask in late.values())
        changed = sum(int((mask != self.early[name]).sum()) for name, mask in late.items()) / entries
        if changed <= self.least_change or 1 - alive(late) > self.target + 1e-9 or not len(judged):
            return False
        client.log.judge(client.network, len(judged))
        return client.workload.evaluate(client.model, judged)["accuracy"] > self.least_accuracy


def alive(masks: Tensors) -> float:
    """Entries that stay over all."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
