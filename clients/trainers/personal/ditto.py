"""Ditto: beside the global update each client trains a personal model, pulled towards the weights it received.

Source: Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, algorithm 1
(recalled).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Le
from torch import Tensor, nn

from clients.trainers.base import RECEIVED, ClientContext
from clients.trainers.fedprox import PROXIMAL_COPIES, FedProxTrainer
from devices.cost import NetworkCost
from fedsim.errors import ConfigError
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload

PERSONAL = "personal"  # group of a client's state: a whole model


class DittoTrainer(FedProxTrainer):
    """The global update of FedProx (mu 0: FedAvg, bit for bit), then the client's own model, which never leaves it.

    The personal model minimises loss + pull / 2 times its squared distance to the received weights. It begins as the
    initial model; clients are judged with it, also those that have never trained.

    Args:
        pull: lambda of the paper; 0 is training alone, without the federation. Steps need lr x pull < 2 to converge.
        personal_epochs: over the client's examples, per round.
        fedprox: arguments of FedProxTrainer; learning rate, momentum and the like hold for both models.
    """

    pure_loss = False

    def __init__(self, pull: float, personal_epochs: Annotated[int, Le(10_000)], **fedprox: Any):
        super().__init__(**fedprox)
        if pull < 0:
            raise ConfigError(f"trainer.pull must be at least 0, got {pull!r}")
        if personal_epochs < 1:
            raise ConfigError(f"trainer.personal_epochs must be at least 1, got {personal_epochs!r}")
        self.pull, self.personal_epochs = pull, personal_epochs
        self.initial: Tensors = {}
        self.personal = False  # whose loss it is just now

    def setup(self, workload: Workload, model: nn.Module, network: NetworkCost) -> None:
        """Remembers the initial model."""
        self.initial = {name: t.detach().clone() for name, t in model.state_dict().items()}

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        """The global update, then the personal model; the update is the global one."""
        update = super().fit(client, task)
        sent = {name: t.clone() for name, t in client.weights.items()}
        _load(client, client.state.kept(PERSONAL, self.initial))
        self.personal = True
        try:
            batches = self.shuffled(client, "personal-batches", self.personal_epochs)
            personal_loss = self.train(client, task, batches)
        finally:
            self.personal = False
        client.state.keep(PERSONAL, client.weights)
        _load(client, sent)
        return replace(update, metrics={**update.metrics, "personal_loss": personal_loss})

    def penalty(self, client: ClientContext, task: Broadcast) -> Tensor | None:
        """The proximal term of the model that trains just now."""
        return self.proximal(client, task, self.pull) if self.personal else super().penalty(client, task)

    def reserve(self, client: ClientContext, task: Broadcast) -> None:
        """The global step, then one of the personal model beside the received weights and the update to be sent."""
        super().reserve(client, task)
        batch_size, weights = min(self.batch_size, len(client.data.train)), client.network.parameter_bytes
        if self.pull:
            client.log.hold(RECEIVED, weights)
        copies = 1.0 + (PROXIMAL_COPIES if self.pull else 0.0)
        client.log.reserve(self.step_bytes(client.network, batch_size, copies))

    def evaluate(self, client: ClientContext, task: Broadcast) -> dict[str, float]:
        """Metrics of the personal model."""
        _load(client, client.state.kept(PERSONAL, self.initial))
        return super().evaluate(client, task)


@torch.no_grad()
def _load(client: ClientContext, weights: Mapping[str, Tensor]) -> None:
    torch._foreach_copy_(list(client.weights.values()), [weights[name] for name in client.weights])
