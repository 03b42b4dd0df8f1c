"""DCIL: a sparse network and the dense one around it train together and teach each other; masks move as they do.

Source: Kim et al., "Dynamic Collective Intelligence Learning: Finding Efficient Sparse Model via Refined Gradients for
Pruned Weights", arXiv 2109.04660, and its code. Differs: the server averages clients' dense weights, and the dense
network's own norms stay on the device; targets get no 1e-7; the share of weights that every layer keeps is new.
"""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor, nn

from clients.trainers.compressing.two_paths import TwoPathRun, TwoPathTrainer
from clients.trainers.sgd import Objective
from devices.compression.distil import divergence
from devices.compression.two_paths import prunable_first
from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors


class Collective(Objective):
    """CE(part) + CE(full), plus T^2 KL both ways after some rounds.

    Args:
        distil_after: rounds before the networks teach each other (E_kl of the code, in rounds).
        temperature: T.
    """

    def __init__(self, distil_after: int, temperature: float):
        self.distil_after, self.temperature = distil_after, temperature

    def __call__(self, run: TwoPathRun, batch: Tensors) -> Tensor:
        workload, (part, full) = run.client.workload, run.networks()
        loss = workload.loss(part, batch) + workload.loss(full, batch)  # type: ignore[arg-type]
        if run.broadcast.round <= self.distil_after:
            return loss
        return (
            loss
            + divergence(part.logits, full.logits, self.temperature)
            + divergence(full.logits, part.logits, self.temperature)
        )


class DCILTrainer(TwoPathTrainer):
    """Cross-entropy of both networks, and after some rounds the divergence of each from the other.

    Pruned are convolutions; where there are none, linear layers but the last.

    Args:
        distil_after: rounds before the networks teach each other.
        two_paths: arguments of TwoPathTrainer.
    """

    def __init__(self, distil_after: Annotated[int, Ge(0)], **two_paths: Any):
        super().__init__(**two_paths)
        self.objective = Collective(distil_after, self.temperature)

    def names(self, model: nn.Module) -> list[str]:
        """Returns weights of convolutions."""
        return prunable_first(model)

    def teaches(self, broadcast: Broadcast) -> bool:
        """Returns True: the dense network is trained in every round."""
        return True
