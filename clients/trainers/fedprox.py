"""SGD held close to the broadcast weights.

Source: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation 2 (the proximal term).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clients.trainers.base import RECEIVED, ClientContext
from clients.trainers.sgd import SGDTrainer
from fedsim.errors import ConfigError
from fedsim.messages.records import Broadcast
from fedsim.workloads.base import Tensors

PROXIMAL_COPIES = 2.0


class FedProxTrainer(SGDTrainer):
    """Adds proximal_mu / 2 times the squared distance to the broadcast weights.

    Args:
        proximal_mu: mu of the paper; 0 is plain SGD, bit for bit. A strategy's `proximal-mu` setting comes before it.
        sgd: arguments of SGDTrainer.
    """

    pure_loss = True
    known_settings = SGDTrainer.known_settings | {"proximal-mu"}

    def __init__(self, proximal_mu: float = 0.0, **sgd: Any):
        super().__init__(**sgd)
        if proximal_mu < 0:
            raise ConfigError(f"trainer.proximal_mu must be at least 0, got {proximal_mu!r}")
        self.proximal_mu = proximal_mu

    def loss(self, client: ClientContext, batch: Tensors, task: Broadcast) -> Tensor:
        """Workload loss plus the proximal term."""
        loss, penalty = super().loss(client, batch, task), self.penalty(client, task)
        return loss if penalty is None else loss + penalty

    def penalty(self, client: ClientContext, task: Broadcast) -> Tensor | None:
        """The proximal term of the global objective, a scalar; None where mu is 0."""
        return self.proximal(client, task, self.mu(task))

    def reserve(self, client: ClientContext, task: Broadcast) -> None:
        """A step, with the received weights beside the model where the term is there."""
        if self.mu(task):
            client.log.hold(RECEIVED, client.network.parameter_bytes)
        super().reserve(client, task)

    def copies(self, client: ClientContext, task: Broadcast) -> float:
        """With the term: the differences, which autograd keeps, and their gradients beside those of the loss."""
        return super().copies(client, task) + (PROXIMAL_COPIES if self.mu(task) else 0.0)

    def mu(self, task: Broadcast) -> float:
        """Mu of this round."""
        return float(task.settings.get("proximal-mu", self.proximal_mu))

    def proximal(self, client: ClientContext, task: Broadcast, mu: float) -> Tensor | None:
        """Half of mu times the squared distance of the parameters to the broadcast weights; None where mu is 0."""
        if mu == 0:
            return None
        distances = [
            torch.sum((p - task.weights[name]) ** 2) for name, p in client.model.named_parameters() if p.requires_grad
        ]
        return mu / 2 * torch.stack(distances).sum()
