"""Averaged gradient episodic memory (A-GEM): a step never goes against the gradient of the memory.

Source: Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019, equation 11. Differs: the memory is a
reservoir, not one ring buffer per task. May import: what `clients.trainers.reservoir` may.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clients.trainers.base import ClientContext
from clients.trainers.reservoir import ReservoirTrainer
from fedsim.messages import Broadcast
from fedsim.workload import Tensors


def project(gradients: tuple[Tensor, ...], past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradient g, without its part along the memory's r where they disagree: g - (g.r / r.r) r if g.r < 0."""
    along = torch.stack([(g * r).sum() for g, r in zip(gradients, past, strict=True)]).sum()
    if along >= 0:
        return gradients
    length = torch.stack([(r * r).sum() for r in past]).sum()
    return tuple(g - (along / length) * r for g, r in zip(gradients, past, strict=True))


class AGemTrainer(ReservoirTrainer):
    """SGD whose gradient is projected where it would raise the loss of a memory batch.

    Args:
        reservoir: arguments of ReservoirTrainer; replay_weight 0 never looks at the memory.
    """

    def copies(self, client: ClientContext, task: Broadcast) -> float:
        """The gradient of the memory, the projected one, and the products on the way there."""
        return super().copies(client, task) + 3.0

    def gradients(
        self, client: ClientContext, task: Broadcast, batch: Tensors, kept: Tensors | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        gradients, loss = super().gradients(client, task, batch, None)
        if kept is None:
            return gradients, loss
        past = torch.autograd.grad(self.loss(client, kept, task), client.parameters)
        self.log_step(client, len(kept["y"]))
        return project(gradients, past), loss
