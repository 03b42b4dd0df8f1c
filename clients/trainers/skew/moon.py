"""MOON: features are drawn to those of the received model, and pushed away from those of the client's previous one.

Source: Li, He and Song, "Model-Contrastive Federated Learning", CVPR 2021 (recalled; compared with the authors' code):
loss + mu l_con with l_con = -log(e^(s_g / T) / (e^(s_g / T) + e^(s_p / T))), where s_g and s_p are the cosines of an
example's features with those of the received and of the previous model. Differs: features are what the last linear
layer sees, where the authors add a projection head of two layers; a client that has not trained yet has no previous
model and trains without the term, which there has an untrained model in its place. State: previous.*: the client's
weights after its last round, whether or not they were taken.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from clients.trainers.base import RECEIVED, ClientContext
from clients.trainers.sgd import Objective, SGDRun, SGDTrainer, WorkloadLoss
from clients.trainers.skew.features import feature_shape, features_of, features_under
from devices.cost import ModelCost
from devices.meter import inference_memory_bytes
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload

PREVIOUS = "previous"  # group of a client's state: a whole model


class Contrasted(Objective):
    """Another objective plus `pull` times the contrast of the received and the previous model.

    Args:
        to: the other objective.
        pull: mu; 0 is the other objective, bit for bit.
        temperature: T.
    """

    def __init__(self, to: Objective, pull: float, temperature: float):
        self.to, self.pull, self.temperature = to, pull, temperature

    def __call__(self, run: MoonRun, batch: Tensors) -> Tensor:
        if not run.previous:
            return self.to(run, batch)
        client = run.client
        received, previous = (
            features_under(weights, client.workload, client.model, batch)
            for weights in (run.broadcast.weights, run.previous)
        )
        with features_of(client.model) as seen:
            loss = self.to(run, batch)
        return loss + self.pull * self.contrast(seen[-1], received, previous)

    def contrast(self, features: Tensor, received: Tensor, previous: Tensor) -> Tensor:
        """Returns l_con, the mean over feature vectors, each [n, features]."""
        cosines = [F.cosine_similarity(features, other, dim=-1) for other in (received, previous)]
        logits = torch.stack(cosines, -1) / self.temperature
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))

    def held(self, run: MoonRun) -> dict[str, int]:
        """Names, where there is a contrast, the two models beside the one that is trained."""
        weights = run.client.step_cost.parameter_bytes
        return self.to.held(run) | ({RECEIVED: weights, "previous model": weights} if run.previous else {})


class MoonRun(SGDRun):
    """A round, after which the client keeps its model.

    Attributes:
        previous: its weights after its last round; empty where there are none, or with a pull of 0.
    """

    trainer: MoonTrainer

    def __init__(self, trainer: MoonTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        begun = trainer.contrasted.pull > 0 and any(name.startswith(f"{PREVIOUS}.") for name in client.state)
        self.previous = client.state.restored(PREVIOUS, client.weights) if begun else {}

    def log_step(self, batch: int) -> None:
        """Reports the step and, with a contrast, the forward passes of both other models."""
        super().log_step(batch)
        if self.previous:
            self.client.log.add(self.client.step_cost, batch, forwards=2)

    def update(self, train_loss: float) -> ClientUpdate:
        """Returns the weights, which the client keeps, too."""
        if self.trainer.contrasted.pull:
            self.previous = {}
            self.client.state.store(PREVIOUS, self.client.weights)
        return super().update(train_loss)

    def reserve(self) -> None:
        """Reserves a step, the passes of the other models before it, and the copy of the model that is kept."""
        super().reserve()
        cost, batch = self.client.step_cost, min(self.trainer.batch_size, len(self.client.data.train))
        if self.previous:
            self.client.log.reserve(inference_memory_bytes(cost, batch))
        elif self.trainer.contrasted.pull:
            self.client.log.reserve(3 * cost.parameter_bytes)


class MoonTrainer(SGDTrainer):
    """SGD on the loss and the contrast of two models.

    Args:
        pull: mu, the weight of the contrast; 0 is plain SGD, bit for bit.
        temperature: of the contrast.
        sgd: arguments of SGDTrainer.
    """

    needs_classes = True
    run = MoonRun

    def __init__(self, pull: Annotated[float, Ge(0)] = 1.0, temperature: Annotated[float, Gt(0)] = 0.5, **sgd: Any):
        super().__init__(**sgd)
        self.objective = self.contrasted = Contrasted(WorkloadLoss(), pull, temperature)

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Makes sure that the model has features."""
        super().setup(workload, model, network)
        feature_shape(workload, model)
