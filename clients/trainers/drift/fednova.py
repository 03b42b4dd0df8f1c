"""FedNova's client: local SGD that says how long its way was.

Source: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS
2020 (recalled; compared with the authors' code). A client's way is lr times a sum of gradients with weights a_i; the
sum of these is ||a_i||_1: the number of steps tau without more, [tau - m (1 - m^tau) / (1 - m)] / (1 - m) with momentum
m, [1 - (1 - lr mu)^tau] / (lr mu) with a proximal term. Differs: with both, the sum is that of the steps that are
really taken, where momentum carries the proximal term along; the authors' code adds to both recursions at once. Weight
decay counts as a part of the loss, as there. Records: see `fedsim.exchanges.fednova`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge

from clients.trainers.base import ClientContext
from clients.trainers.fedprox import FedProxTrainer, Proximal
from clients.trainers.sgd import SGDRun
from fedsim.errors import ConfigError
from fedsim.exchanges.fednova import NORM, STEPS, WAY
from fedsim.messages.updates import Broadcast, ClientUpdate


class NovaRun(SGDRun):
    """A round of SGD that counts its steps."""

    trainer: FedNovaTrainer
    ends_later: ClassVar[bool] = True

    def __init__(self, trainer: FedNovaTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.steps = 0

    def after_step(self, batch: Any) -> None:
        self.steps += 1

    def update(self, train_loss: float) -> ClientUpdate:
        """Returns the weights, and the length of the way to them."""
        found, trainer = super().update(train_loss), self.trainer
        norm = trainer.norm(self.steps, trainer.learning_rate(self.client, self.broadcast) * self.pull)
        found.extras[WAY] = {STEPS: torch.tensor(self.steps), NORM: torch.tensor(norm, dtype=torch.float64)}
        return found

    @property
    def pull(self) -> float:
        """Returns mu of this round."""
        return self.trainer.objective.strength(self)


class FedNovaTrainer(FedProxTrainer):
    """SGD, with a proximal term or without, that tells the server by how much its gradients add up.

    Args:
        proximal_mu: mu of the proximal term; 0 is plain SGD.
        fedprox: arguments of FedProxTrainer.

    Raises:
        ConfigError: where gradients are clipped together with the proximal term: their sum would not be known.
    """

    run = NovaRun
    objective: Proximal

    def __init__(self, proximal_mu: Annotated[float, Ge(0)] = 0.0, **fedprox: Any):
        super().__init__(proximal_mu=proximal_mu, **fedprox)
        if self.clip_norm is not None and proximal_mu:
            raise ConfigError(
                f"trainer.clip_norm={self.clip_norm} and trainer.proximal_mu={proximal_mu} exclude each other: the "
                "proximal term would be clipped with the gradient; set one of them to null or 0"
            )

    def norm(self, steps: int, pull: float) -> float:
        """Returns ||a_i||_1: how far this many steps along gradients of 1 lead, in learning rates.

        Args:
            steps: tau.
            pull: lr mu.

        Raises:
            ConfigError: if the proximal term alone steps beyond the received weights.
        """
        if pull >= 1:
            raise ConfigError(
                f"trainer.lr times trainer.proximal_mu must be less than 1, got {pull:g}: lower one of them"
            )
        velocity = way = 0.0
        for _ in range(steps):
            velocity = self.momentum * velocity + 1 - pull * way
            way += velocity
        return way
