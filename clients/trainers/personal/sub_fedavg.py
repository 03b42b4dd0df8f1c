"""Sub-FedAvg: every client prunes the network that it trains a little more in each round, by magnitude.

Source: Vahidian et al., "Personalized Federated Learning by Structured and Unstructured Pruning under Data
Heterogeneity", ICDCS Workshops 2021, the unstructured form. Differs: the accuracy that permits pruning is measured on a
validation split of the client's training part, where the authors' code takes the test split. Masks are unstructured, so
a device gains memory and bytes from them, but no time. Records: see `fedsim.exchanges.sub_fedavg`. State:
mask.*, by weight, [entries] bool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn

from clients.trainers.base import ClientContext, Gradients
from clients.trainers.sgd import SGDRun, SGDTrainer
from devices.cost import ModelCost
from fedsim.exchanges.sub_fedavg import MASK, packed
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.seeding import torch_generator
from fedsim.workloads.base import ClientData, Examples, Tensors, Workload


class SubFedAvgRun(SGDRun):
    """A round under the client's mask, which then shrinks where all three conditions hold.

    Attributes:
        masks: by weight, which of its entries are alive.
        early: what pruning after the first epoch would leave.
    """

    trainer: SubFedAvgTrainer

    def __init__(self, trainer: SubFedAvgTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.masks = trainer.masks_of(client)
        self.early = self.masks

    def fit(self) -> ClientUpdate:
        whole, trainer = self.client, self.trainer
        trainer.check_settings(self.broadcast)
        self.client, deciding = trainer.split(whole)
        apply(self.masks, whole.weights)
        self.reserve()
        train_loss = self.train(self.batches())
        late = trainer.pruned(whole.weights, self.masks)
        if self.should_prune(deciding, late):
            self.masks = late
            apply(self.masks, whole.weights)
        whole.state.store(MASK, self.masks)
        record = packed({name: mask for name, mask in self.masks.items() if name not in trainer.private})
        metrics = {"train_loss": train_loss, "sparsity": 1 - alive(self.masks)}
        return ClientUpdate(whole.client_id, self.client.num_examples, whole.weights, metrics, {MASK: record})

    def batches(self) -> Iterator[Tensors]:
        """Yields the batches of plain SGD; notes after the first epoch which weights would stay."""
        trainer, weights = self.trainer, self.client.weights
        left = -(-len(self.client.data.train) // trainer.batch_size)
        for batch in super().batches():
            if left == 0:
                self.early = trainer.pruned(weights, self.masks)
            left -= 1
            yield batch
        if left >= 0:  # one epoch or less: nothing to compare
            self.early = trainer.pruned(weights, self.masks)

    def gradients(self, batch: Tensors) -> tuple[Gradients, Tensor]:
        """Returns the gradient of the loss where the mask is alive, and zero elsewhere."""
        gradients, loss = super().gradients(batch)
        masks = (self.masks.get(name) for name in self.trainer.order)
        return [g if g is None or mask is None else g * mask for g, mask in zip(gradients, masks, strict=True)], loss

    def should_prune(self, deciding: Examples, late: Tensors) -> bool:
        """Returns whether the mask still moves, the target is not reached, and what decides is judged well."""
        trainer, client = self.trainer, self.client
        entries = sum(mask.numel() for mask in late.values())
        changed = sum(int((mask != self.early[name]).sum()) for name, mask in late.items()) / entries
        if changed <= trainer.least_change or 1 - alive(late) > trainer.target + 1e-9 or not len(deciding):
            return False
        client.log.judge(client.step_cost, len(deciding))
        return client.workload.evaluate(client.model, deciding)["accuracy"] > trainer.least_accuracy

    def reserve(self) -> None:
        """Reserves a step, and pruning: magnitudes of the largest layer, sorted with their places."""
        sizes, client = [mask.numel() for mask in self.masks.values()], self.client
        client.log.hold("masks", 2 * sum(sizes))  # the client's own, and those after the first epoch
        super().reserve()
        weights = (2 if self.trainer.momentum else 1) * client.step_cost.parameter_bytes
        client.log.reserve(weights + sum(sizes) + 20 * max(sizes))

    def copies(self) -> float:
        """Counts the masked gradients."""
        return super().copies() + 1.0


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

    needs_classes = True
    run = SubFedAvgRun

    def __init__(
        self,
        prune_step: Annotated[float, Interval(gt=0, lt=1)] = 0.1,
        target: Annotated[float, Interval(gt=0, lt=1)] = 0.5,
        least_accuracy: Annotated[float, Interval(ge=0, le=1)] = 0.5,
        least_change: Annotated[float, Interval(ge=0, le=1)] = 1e-4,
        validation: Annotated[float, Interval(gt=0, lt=1)] = 0.1,
        **sgd: Any,
    ):
        super().__init__(**sgd)
        self.prune_step, self.target, self.validation = prune_step, target, validation
        self.least_accuracy, self.least_change = least_accuracy, least_change
        self.all_alive: Tensors = {}
        self.order: list[str] = []  # of the parameters that are trained

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds the weights to prune: those with two dimensions or more, no biases and norms."""
        super().setup(workload, model, network)
        self.all_alive = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1}
        self.order = [n for n, p in model.named_parameters() if p.requires_grad]

    def masks_of(self, client: ClientContext) -> Tensors:
        """Returns the client's masks; all alive where it has never trained."""
        return {n: m.to(client.device).bool() for n, m in client.state.restored(MASK, self.all_alive).items()}

    def pruned(self, weights: Tensors, masks: Tensors) -> Tensors:
        """Returns masks without the smallest |w| of each layer's alive weights."""
        fewer = {}
        for name, mask in masks.items():
            living = int(mask.sum())
            gone = min(int(self.prune_step * living), living - 1)
            size = weights[name].abs().masked_fill(~mask, float("inf")).flatten()
            smallest = size.argsort(stable=True)[:gone]
            fewer[name] = mask.flatten().index_fill(0, smallest, False).view_as(mask)
        return fewer

    def personalise(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Cuts out the client's own part of the network; all of it where the client never trained."""
        masks = self.masks_of(client)
        apply(masks, client.weights)
        return {"keep_ratio": alive(masks)}

    def split(self, client: ClientContext) -> tuple[ClientContext, Examples]:
        """Splits the client's examples into those it trains on and those that decide; the same in every round."""
        train = client.data.train
        count = self.num_deciding(len(train))
        order = torch.randperm(len(train), generator=torch_generator(client.seed, "validation", client.client_id))
        parts = [Examples(train.gather(rows)) for rows in (order[count:].sort().values, order[:count].sort().values)]
        return replace(client, data=ClientData(parts[0], client.data.test)), parts[1]

    def num_deciding(self, examples: int) -> int:
        """Returns how many of a client's examples decide."""
        return min(max(1, round(self.validation * examples)), examples - 1)

    def ends_in_one(self, examples: int) -> bool:
        return super().ends_in_one(examples - self.num_deciding(examples))


def alive(masks: Tensors) -> float:
    """Returns the share of entries that stay."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


@torch.no_grad()
def apply(masks: Tensors, weights: Tensors) -> None:
    """Sets what is pruned to zero."""
    for name, mask in masks.items():
        weights[name].mul_(mask)
