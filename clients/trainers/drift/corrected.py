"""SGD whose every step follows the gradient plus a constant of the round: what SCAFFOLD and FedDyn have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from clients.trainers.base import ClientContext, Gradients
from clients.trainers.sgd import Objective, SGDRun, SGDTrainer
from devices.cost import ModelCost
from devices.meter import matrix_product
from fedsim.messages.updates import Broadcast
from fedsim.messages.weights import bytes_of
from fedsim.workloads.base import Tensors, Workload


class CorrectedRun(SGDRun):
    """Steps along the gradient plus a correction.

    Attributes:
        correction: what is added to every gradient of this round, by weight; empty: nothing, bit for bit.
        steps: that were taken.
    """

    trainer: CorrectedTrainer

    def __init__(
        self,
        trainer: CorrectedTrainer,
        client: ClientContext,
        broadcast: Broadcast,
        objective: Objective | None = None,
    ):
        super().__init__(trainer, client, broadcast, objective)
        self.correction: Tensors = {}
        self.steps = 0

    def gradients(self, batch: Any) -> tuple[Gradients, Tensor]:
        """Returns the corrected gradient of a step; the correction costs a multiply-add for each weight."""
        gradients, loss = super().gradients(batch)
        self.steps += 1
        if not self.correction:
            return gradients, loss
        self.client.log.add(matrix_product(sum(t.numel() for t in self.correction.values()), 1), 1, forwards=1)
        pairs = zip(self.trainer.order, gradients, strict=True)
        return [_sum(g, self.correction.get(name)) for name, g in pairs], loss

    def copies(self) -> float:
        """Counts, with a correction, the corrected gradients."""
        return super().copies() + (1.0 if self.correction else 0.0)

    def kept(self, group: str) -> Tensors:
        """Returns what the client keeps of each weight under a name; empty before the first accepted round."""
        state = self.client.state
        names = (name for name in self.trainer.shared if f"{group}.{name}" in state)
        return {name: state[f"{group}.{name}"].to(self.client.device) for name in names}

    def moved(self) -> Iterator[tuple[str, Tensor]]:
        """Yields how far each weight has moved from what was received, y - x."""
        for name in self.trainer.shared:
            yield name, self.client.weights[name] - self.broadcast.weights[name]

    def hold(self, name: str, tensors: Tensors) -> None:
        """Reports tensors that stay in memory through the round."""
        self.client.log.hold(name, bytes_of(tensors))


class CorrectedTrainer(SGDTrainer):
    """SGD with corrected steps; arguments are those of SGDTrainer.

    Attributes:
        order: names of the trained weights, as the model has them.
    """

    run: ClassVar[type[SGDRun]] = CorrectedRun

    def __init__(self, **sgd: Any):
        super().__init__(**sgd)
        self.order: tuple[str, ...] = ()

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds the trained weights."""
        super().setup(workload, model, network)
        self.order = tuple(name for name, p in model.named_parameters() if p.requires_grad)

    @property
    def shared(self) -> list[str]:
        """Returns the names of the trained weights that are sent; those that stay on the device are not corrected."""
        return [name for name in self.order if name not in self.private]


def _sum(gradient: Tensor | None, correction: Tensor | None) -> Tensor | None:
    """Returns the sum; a weight that the pass did not use has gradient 0."""
    if correction is None:
        return gradient
    return correction if gradient is None else gradient + correction
