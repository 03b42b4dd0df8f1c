"""FedDyn: each client's objective is bent by a linear term, so that its minimum is drawn to everybody's.

Source: Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, algorithm 1 (recalled; compared
with the authors' code): L_k(y) - <l_k, y> + alpha / 2 |y - x|^2, and then l_k <- l_k - alpha (y - x), at a minimum the
gradient of L_k. Differs: SGD for some epochs, as in the authors' code, where the paper minimises; alpha is
the same for all, where the authors' code divides it by a client's share of the examples. The linear term is added to
gradients, so the reported loss is without it. Weights alone travel. State: reply.linear.*, by weight: -l_k.
"""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Gt

from clients.trainers.base import ClientContext
from clients.trainers.drift.corrected import CorrectedRun, CorrectedTrainer
from clients.trainers.fedprox import Pulled
from clients.trainers.sgd import WorkloadLoss
from fedsim.messages.records import OF_REPLY
from fedsim.messages.updates import Broadcast, ClientUpdate

LINEAR = f"{OF_REPLY}linear"  # group of a client's state


class FedDynRun(CorrectedRun):
    """A round on the bent objective."""

    trainer: FedDynTrainer

    def __init__(self, trainer: FedDynTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.correction = self.kept(LINEAR)

    def update(self, train_loss: float) -> ClientUpdate:
        """Returns the weights; the linear term moves on."""
        for name, moved in self.moved():
            new = moved.mul_(self.trainer.alpha)
            if self.correction:
                new += self.correction.pop(name)
            self.client.state.store(LINEAR, {name: new})
        return super().update(train_loss)

    def reserve(self) -> None:
        """Reserves a step beside the linear term."""
        self.hold("linear term", self.correction)
        super().reserve()


class FedDynTrainer(CorrectedTrainer):
    """SGD on the loss with FedDyn's dynamic regulariser; a client's first round is FedProx's with mu = alpha.

    Args:
        alpha: strength of the regulariser. Steps need lr x alpha < 2 to converge.
        sgd: arguments of SGDTrainer.
    """

    run = FedDynRun

    def __init__(self, alpha: Annotated[float, Gt(0)] = 0.01, **sgd: Any):
        super().__init__(**sgd)
        self.alpha, self.objective = alpha, Pulled(WorkloadLoss(), alpha)
