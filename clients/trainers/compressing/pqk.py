"""PQK: a network is pruned and quantised as it trains, then taught by itself with its unimportant weights put back.

After Kim, Chang and Kwak, "PQK: Model Compression via Pruning, Quantization, and Knowledge Distillation", Interspeech
2021: a reconstruction from the abstract, with the routing of gradients of DCIL's code (same first author); its tables
were not to be had, so no figure here is the paper's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval
from torch import Tensor, nn

from clients.trainers.compressing.two_paths import TwoPathRun, TwoPathTrainer
from clients.trainers.sgd import Objective
from devices.compression.distil import divergence
from devices.compression.masks import prunable
from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors


class Taught(Objective):
    """CE(student), in phase 2 plus teacher CE(teacher) and distil T^2 KL(teacher || student).

    Args:
        distil, teacher, phase1_grad: see PQKTrainer.
        temperature: T.
    """

    def __init__(self, distil: float, teacher: float, phase1_grad: str, temperature: float):
        self.distil, self.teacher, self.phase1_grad, self.temperature = distil, teacher, phase1_grad, temperature

    def __call__(self, run: TwoPathRun, batch: Tensors) -> Tensor:
        workload, first = run.client.workload, run.broadcast.round <= run.trainer.prune_rounds
        student, teacher = run.networks(self.phase1_grad if first else "masked")
        loss = workload.loss(student, batch)  # type: ignore[arg-type]
        if not run.teaches:
            return loss
        loss = loss + self.teacher * workload.loss(teacher, batch)  # type: ignore[arg-type]
        return loss + self.distil * divergence(student.logits, teacher.logits, self.temperature)


class PQKTrainer(TwoPathTrainer):
    """Phase 1, until sparsity is final: the student's cross-entropy. Phase 2: the teacher's too, and its divergence.

    Args:
        bits: of the student's pruned weights, with the step 2 mean |w| / sqrt(Q) for each output channel; 32: floats.
        activation_bits: of what its layers read, over the range of each batch; 32: floats.
        distil: lambda, weight of the student's divergence from the teacher.
        teacher: weight of the teacher's cross-entropy; with distil 0 too there is no teacher.
        phase1_grad: "masked" lets no gradient reach pruned weights in phase 1; "ste" lets all of it.
        two_paths: arguments of TwoPathTrainer.
    """

    def __init__(
        self,
        bits: Literal[32] | Annotated[int, Interval(ge=2, le=8)] = 8,
        activation_bits: Literal[32] | Annotated[int, Interval(ge=2, le=8)] = 8,
        distil: Annotated[float, Ge(0)] = 1.0,
        teacher: Annotated[float, Ge(0)] = 1.0,
        phase1_grad: Literal["masked", "ste"] = "masked",
        **two_paths: Any,
    ):
        super().__init__(**two_paths)
        self.bits, self.activation_bits, self.taught = bits, activation_bits, bool(distil or teacher)
        self.objective = Taught(distil, teacher, phase1_grad, self.temperature)

    def names(self, model: nn.Module) -> list[str]:
        """Returns weights of convolutions and linear layers; of several, the last is both networks' classifier."""
        names = prunable(model)
        return names[:-1] or names

    def teaches(self, broadcast: Broadcast) -> bool:
        """Returns whether phase 2 has begun, and there is something to teach."""
        return broadcast.round > self.prune_rounds and self.taught
