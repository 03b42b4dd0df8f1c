"""FedDecorr: features of a batch shall not be correlated, so that they fill all dimensions.

Source: Shi et al., "Towards Understanding and Mitigating Dimensional Collapse in Heterogeneous Federated Learning",
ICLR 2023 (recalled; compared with the authors' code): loss + beta |K|_F^2 / d^2 with the correlation matrix K of the d
features over a batch of n. The authors' code takes another scale, `penalty=off_diagonal`: the mean square of (n - 1) K
off its diagonal, over n, which is about n times as much. Differs: |K|_F is taken of the smaller of the matrices Z'Z and
ZZ' of the standardised features Z, which have one norm.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor, nn

from clients.trainers.sgd import Objective, SGDRun, SGDTrainer, WorkloadLoss
from clients.trainers.skew.features import FeatureShape, feature_shape, features_of
from devices.cost import ModelCost
from devices.meter import matrix_product
from fedsim.workloads.base import Tensors, Workload

EPSILON = 1e-8  # of a variance, as in the authors' code
Penalty = Literal["frobenius", "off_diagonal"]


def correlation(features: Tensor, penalty: Penalty) -> Tensor:
    """Returns how much features are correlated over a batch; 0 of a single example.

    Args:
        features: [n, d].
        penalty: `frobenius`: |K|_F^2 / d^2; `off_diagonal`: the authors' code.
    """
    n, d = features.shape
    if n == 1:
        return features.new_zeros(())
    centred = features - features.mean(0)
    z = centred / (centred.square().sum(0) / (n - 1) + EPSILON).sqrt()
    square = ((z @ z.T) if n < d else (z.T @ z)).square().sum()  # of the norm of (n - 1) K
    if penalty == "frobenius":
        return square / ((n - 1) * d) ** 2
    diagonal = z.square().sum(0).square().sum()
    return (square - diagonal) / (max(1, d * (d - 1)) * n)


class Decorrelated(Objective):
    """Another objective plus `strength` times the correlation of features.

    Args:
        to: the other objective.
        strength: beta; 0 is the other objective, bit for bit.
        penalty: how correlation is measured.
    """

    is_pure = True

    def __init__(self, to: Objective, strength: float, penalty: Penalty):
        self.to, self.strength, self.penalty = to, strength, penalty

    def __call__(self, run: FedDecorrRun, batch: Tensors) -> Tensor:
        if not self.strength:
            return self.to(run, batch)
        with features_of(run.client.model) as seen:
            loss = self.to(run, batch)
        return loss + self.strength * correlation(seen[-1], self.penalty)

    def held(self, run: FedDecorrRun) -> dict[str, int]:
        """Names, with a strength, the standardised features, their product, and what autograd keeps of both."""
        if not self.strength:
            return self.to.held(run)
        n, d = run.trainer.batch_size * run.trainer.shape.rows, run.trainer.shape.size
        return self.to.held(run) | {"correlation of features": 4 * (4 * n * d + 3 * min(n, d) ** 2)}


class FedDecorrRun(SGDRun):
    """A round of SGD whose steps multiply features with each other."""

    trainer: FedDecorrTrainer

    def log_step(self, batch: int) -> None:
        """Reports the step and the product of features: once forward, twice backward."""
        super().log_step(batch)
        rows, size = batch * self.trainer.shape.rows, self.trainer.shape.size
        if self.trainer.decorrelated.strength and rows > 1:
            self.client.log.add(matrix_product(size, min(rows, size)), rows, forwards=3)


class FedDecorrTrainer(SGDTrainer):
    """SGD on the loss and the correlation of features.

    Args:
        strength: beta; 0 is plain SGD, bit for bit.
        penalty: how correlation is measured: as the paper writes it, or as the authors' code computes it.
        sgd: arguments of SGDTrainer.
    """

    needs_classes = True
    run = FedDecorrRun

    def __init__(self, strength: Annotated[float, Ge(0)] = 0.1, penalty: Penalty = "frobenius", **sgd: Any):
        super().__init__(**sgd)
        self.objective = self.decorrelated = Decorrelated(WorkloadLoss(), strength, penalty)
        self.shape = FeatureShape(0, 0)

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds the size of the model's features."""
        super().setup(workload, model, network)
        self.shape = feature_shape(workload, model)
