"""Ditto: beside the global update each client trains a personal model, pulled towards the weights it received.

Source: Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, algorithm 1
(recalled).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from clients.trainers.base import ClientContext
from clients.trainers.fedprox import FedProxTrainer, Pulled
from clients.trainers.sgd import SGDRun, WorkloadLoss
from devices.cost import ModelCost
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload

PERSONAL = "personal"  # group of a client's state: a whole model


class DittoRun(SGDRun):
    """The global update, then the personal model; the update is the global one."""

    trainer: DittoTrainer

    def fit(self) -> ClientUpdate:
        update, client, trainer = super().fit(), self.client, self.trainer
        sent = {name: t.clone() for name, t in client.weights.items()}
        _load(client, trainer.personal_model(client))
        batches = trainer.shuffled(client, "personal-batches", trainer.personal_epochs)
        personal_loss = self.personal().train(batches)
        client.state.store(PERSONAL, client.weights)
        _load(client, sent)
        return replace(update, metrics={**update.metrics, "personal_loss": personal_loss})

    def personal(self) -> PersonalRun:
        """Returns the training of the personal model."""
        return PersonalRun(self.trainer, self.client, self.broadcast, self.trainer.personal_objective)

    def reserve(self) -> None:
        """Reserves the global step, then one of the personal model."""
        super().reserve()
        self.personal().reserve()


class PersonalRun(SGDRun):
    """Training of the personal model, beside the update that waits to be sent."""

    def copies(self) -> float:
        return super().copies() + 1.0


class DittoTrainer(FedProxTrainer):
    """The global update of FedProx (mu 0: FedAvg, bit for bit), then the client's own model, which never leaves it.

    The personal model minimises loss + pull / 2 times its squared distance to the received weights. It begins as the
    initial model; clients are judged with it, also those that have never trained.

    Args:
        pull: lambda of the paper; 0 is training alone, without the federation. Steps need lr x pull < 2 to converge.
        personal_epochs: over the client's examples, per round.
        fedprox: arguments of FedProxTrainer; learning rate, momentum and the like hold for both models.
    """

    run = DittoRun

    def __init__(
        self, pull: Annotated[float, Ge(0)], personal_epochs: Annotated[int, Ge(1), Le(10_000)], **fedprox: Any
    ):
        super().__init__(**fedprox)
        self.personal_epochs, self.personal_objective = personal_epochs, Pulled(WorkloadLoss(), pull)
        self.initial: Tensors = {}

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Remembers the initial model."""
        super().setup(workload, model, network)
        self.initial = {name: t.detach().clone() for name, t in model.state_dict().items()}

    def personal_model(self, client: ClientContext) -> Tensors:
        """Returns the client's own model; the initial one where it has never trained."""
        return client.state.restored(PERSONAL, self.initial)

    def personalise(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Loads the personal model."""
        _load(client, self.personal_model(client))
        return {}


@torch.no_grad()
def _load(client: ClientContext, weights: Mapping[str, Tensor]) -> None:
    torch._foreach_copy_(list(client.weights.values()), [weights[name] for name in client.weights])
