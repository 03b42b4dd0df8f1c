"""SGD held close to the received weights.

Source: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation 2 (the proximal term).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from clients.trainers.base import RECEIVED
from clients.trainers.sgd import Objective, SGDRun, SGDTrainer, WorkloadLoss
from fedsim.workloads.base import Tensors

PROXIMAL_COPIES = 2.0


class Pulled(Objective):
    """Another objective plus pull / 2 times the squared distance of the parameters to the received weights.

    Args:
        to: the other objective.
        pull: weight of the distance; 0 is the other objective, bit for bit.
    """

    is_pure = True

    def __init__(self, to: Objective, pull: float):
        self.to, self.pull = to, pull

    def __call__(self, run: SGDRun, batch: Tensors) -> Tensor:
        loss, pull, received = self.to(run, batch), self.strength(run), run.broadcast.weights
        if pull == 0:
            return loss
        trained = ((name, p) for name, p in run.client.model.named_parameters() if p.requires_grad)
        distances = [torch.sum((p - received[name]) ** 2) for name, p in trained]
        return loss + pull / 2 * torch.stack(distances).sum()

    def strength(self, run: SGDRun) -> float:
        """Returns the pull in this round."""
        return self.pull

    def copies(self, run: SGDRun) -> float:
        """Counts, with a pull, the differences that autograd keeps, and their gradients beside those of the loss."""
        return self.to.copies(run) + (PROXIMAL_COPIES if self.strength(run) else 0.0)

    def held(self, run: SGDRun) -> dict[str, int]:
        """Names, with a pull, the received weights beside the model."""
        return self.to.held(run) | ({RECEIVED: run.client.step_cost.parameter_bytes} if self.strength(run) else {})


class Proximal(Pulled):
    """The proximal objective, whose mu (the pull) a strategy's setting `proximal-mu` may choose for a round."""

    is_pure = True

    def strength(self, run: SGDRun) -> float:
        return float(run.broadcast.settings.get("proximal-mu", self.pull))


class FedProxTrainer(SGDTrainer):
    """SGD on the workload's loss plus proximal_mu / 2 times the squared distance to the received weights.

    Args:
        proximal_mu: mu of the paper; 0 is plain SGD, bit for bit. A strategy's `proximal-mu` setting comes before it.
        sgd: arguments of SGDTrainer.
    """

    known_settings = SGDTrainer.known_settings | {"proximal-mu"}

    def __init__(self, proximal_mu: Annotated[float, Ge(0)] = 0.0, **sgd: Any):
        super().__init__(**sgd)
        self.objective = Proximal(WorkloadLoss(), proximal_mu)
