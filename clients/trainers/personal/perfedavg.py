"""Per-FedAvg: clients learn weights from which one small step on a client's own examples leads to a good model.

Source: Fallah et al., "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning
Approach", NeurIPS 2020, algorithm 1 with its first-order and Hessian-free forms (recalled). Differs: the server's mean
is weighted by examples, as everywhere here. All passes of a step count as work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from clients.trainers.base import ClientContext, Gradients
from clients.trainers.sgd import SGDRun, SGDTrainer
from devices.meter import peak_memory_bytes
from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors

FIRST_ORDER, HESSIAN_FREE = "fo", "hf"
COPIES = {FIRST_ORDER: 1.0, HESSIAN_FREE: 4.0}  # the weights; and gradients at three places, and what becomes of them


class PerFedAvgRun(SGDRun):
    """Steps from w by (I - alpha H(w)) g(w - alpha g(w)); g and H on batches of their own."""

    trainer: PerFedAvgTrainer

    def batches(self) -> Iterator[tuple[Tensors, ...]]:
        """Yields the batches of FedAvg, each with those that the inner step and the Hessian see, drawn apart."""
        trainer, client = self.trainer, self.client
        beside = (trainer.shuffled(client, d, trainer.local_epochs, trainer.local_steps) for d in trainer.draws)
        return zip(super().batches(), *beside, strict=True)

    def gradients(self, batch: Sequence[Tensors]) -> tuple[Gradients, Tensor]:
        """Returns the direction at the present weights, and the loss of the outer batch at the adapted ones."""
        outer, *beside = batch
        if not beside:
            return super().gradients(outer)
        start = [p.detach().clone() for p in self.client.parameters]
        self.move(super().gradients(beside[0])[0], -self.trainer.inner_lr)
        gradients, loss = super().gradients(outer)
        if beside[1:]:
            gradients = self.without_curvature(gradients, start, beside[1])
        self.put(start)
        return gradients, loss

    def without_curvature(self, gradients: Gradients, start: Sequence[Tensor], batch: Tensors) -> Gradients:
        """Returns (I - alpha H) g; H g is the difference of the gradients at start +- delta g, by 2 delta."""
        sides, trainer = [], self.trainer
        for delta in (trainer.delta, -trainer.delta):
            self.put(start)
            self.move(gradients, delta)
            sides.append(super().gradients(batch)[0])
        factor = trainer.inner_lr / (2 * trainer.delta)
        return [
            g if g is None or plus is None or minus is None else g - factor * (plus - minus)
            for g, plus, minus in zip(gradients, *sides, strict=True)
        ]

    @torch.no_grad()
    def move(self, gradients: Gradients, rate: float) -> None:
        """Adds so much of the gradients to the weights."""
        for p, g in zip(self.client.parameters, gradients, strict=True):
            if g is not None:
                p.add_(g, alpha=rate)

    @torch.no_grad()
    def put(self, weights: Sequence[Tensor]) -> None:
        """Sets the weights."""
        torch._foreach_copy_(self.client.parameters, list(weights))

    def adapt(self) -> None:
        """Takes inner steps on the client's own examples."""
        trainer, client = self.trainer, self.client
        batch_size = min(trainer.batch_size, len(client.data.train))
        client.log.reserve(peak_memory_bytes(client.step_cost, batch_size, 0.0))
        client.model.train()
        for batch in trainer.shuffled(client, "adapt-batches", 1, trainer.adapt_steps):
            self.move(super().gradients(batch)[0], -trainer.inner_lr)

    def copies(self) -> float:
        """Counts the weights that an inner step leaves, and of the Hessian-free form the gradients that wait."""
        return super().copies() + (COPIES[self.trainer.form] if self.trainer.draws else 0.0)


class PerFedAvgTrainer(SGDTrainer):
    """SGD through one inner step; clients are judged after `adapt_steps` of them on their own training examples.

    Args:
        inner_lr: alpha, the rate of inner steps, during training and before a client is judged. 0 is FedAvg, bit for
            bit and pass for pass: the outer batches are FedAvg's.
        form: fo leaves out the Hessian (two passes a step), hf takes a difference of gradients for it (four passes).
        delta: of that difference, as a share of the gradient.
        adapt_steps: inner steps before an evaluation, of `batch_size` examples each; 0 judges the model as it came.
        sgd: arguments of SGDTrainer; `lr` is beta.
    """

    run = PerFedAvgRun

    def __init__(
        self,
        inner_lr: Annotated[float, Ge(0), Le(1e30)],
        form: Literal["fo", "hf"] = "fo",
        delta: Annotated[float, Gt(0), Le(1e30)] = 0.001,
        adapt_steps: Annotated[int, Ge(0), Le(10_000)] = 1,
        **sgd: Any,
    ):
        super().__init__(**sgd)
        self.inner_lr, self.form, self.delta, self.adapt_steps = inner_lr, form, delta, adapt_steps
        inner, curvature = ("inner-batches",), ("curvature-batches",)
        self.draws = () if inner_lr == 0 else inner if form == FIRST_ORDER else inner + curvature

    def personalise(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Adapts the received model, and pays for it."""
        if self.inner_lr and self.adapt_steps:
            PerFedAvgRun(self, client, broadcast).adapt()
        return {}
