"""Averaged gradient episodic memory (A-GEM): a step never goes against the gradient of the memory.

Source: Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019, equation 11. Differs: the memory is a
reservoir, not one ring buffer per task.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clients.trainers.base import Gradients
from clients.trainers.rehearsal.replay import StreamBatch
from clients.trainers.rehearsal.reservoir import ReservoirRun, ReservoirTrainer
from fedsim.errors import ConfigError


def project(gradients: Gradients, past: Gradients) -> Gradients:
    """Takes from the gradient g its part along the memory's r where they disagree: g - (g.r / r.r) r if g.r < 0.

    A parameter that one of the passes did not use has no part in g.r, and keeps what the other pass says.
    """
    both = [(g, r) for g, r in zip(gradients, past, strict=True) if g is not None and r is not None]
    agreement = torch.stack([(g * r).sum() for g, r in both]).sum()
    if agreement >= 0:
        return gradients
    length = torch.stack([(r * r).sum() for r in past if r is not None]).sum()

    def projected(g: Tensor | None, r: Tensor | None) -> Tensor | None:
        if r is None:
            return g
        return -(agreement / length) * r if g is None else g - (agreement / length) * r

    return tuple(projected(g, r) for g, r in zip(gradients, past, strict=True))


class AGemRun(ReservoirRun):
    """Steps along the batch's gradient, projected where it would raise the loss of a memory batch."""

    trainer: AGemTrainer

    def gradients(self, batch: StreamBatch) -> tuple[Gradients, Tensor]:
        gradients, loss = super().gradients(replace(batch, kept=None))
        if batch.kept is None:
            return gradients, loss
        past = torch.autograd.grad(
            self.client.workload.loss(self.client.model, batch.kept), self.client.parameters, allow_unused=True
        )
        self.log_step(self.client.workload.batch_size_of(batch.kept))
        return project(gradients, past), loss

    def reserve(self) -> None:
        """Reserves the batch, then the memory's beside the batch's gradients, then the projection.

        That holds both gradients, the projected one, and products on the way. The memory fills while a round trains.
        """
        trainer, cost = self.trainer, self.client.step_cost
        if not trainer.replay_weight:
            super().reserve()
            return
        batch = max(min(trainer.batch_size, len(self.client.data.train)), trainer.replay_batch_size)
        copies, plain = self.copies(), 2.0 + (trainer.momentum > 0)
        projecting = round((plain + 3.0 + copies) * cost.parameter_bytes)
        self.client.log.reserve(max(trainer.step_bytes(cost, batch, copies + 1.0), projecting))


class AGemTrainer(ReservoirTrainer):
    """SGD whose gradient is projected where it would raise the loss of a memory batch.

    Args:
        reservoir: arguments of ReservoirTrainer; replay_weight is 1, or 0 for never looking at the memory.

    Raises:
        ConfigError: for another replay_weight, which a projection has no use for.
    """

    run = AGemRun

    def __init__(self, **reservoir: Any):
        super().__init__(**reservoir)
        if self.replay_weight not in (0, 1):
            raise ConfigError(
                "trainer.replay_weight must be 0 or 1 for AGemTrainer, whose projection has no use for the length of "
                f"the memory's gradient, got {self.replay_weight!r}"
            )
