"""Learning without forgetting (LwF): the model before the task teaches the present one on the task's own examples.

Source: Li and Hoiem, "Learning without Forgetting", ECCV 2016. The teacher is the model that a client received when it
first took part in a task, kept on the device (state: teacher.*, as large as the model).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from clients.trainers.base import ClientContext
from clients.trainers.sgd import Objective, SGDRun, SGDTrainer
from devices.compression.distil import divergence
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from fedsim.workloads.classification import classification

PHASE, TEACHER = "phase", "teacher."


class Distilled(Objective):
    """The workload's loss plus weight * T^2 * KL(teacher, model) of outputs softened by T, after the first task.

    Args:
        weight: lambda.
        temperature: T.
    """

    def __init__(self, weight: float, temperature: float):
        self.weight, self.temperature = weight, temperature

    def __call__(self, run: LwFRun, batch: Tensors) -> Tensor:
        workload, model = run.client.workload, run.client.model
        if run.teacher is None:
            return workload.loss(model, batch)
        own = model(batch["x"])
        logits = own + classification(workload).logits(lambda _: torch.zeros_like(own), batch)  # type: ignore[arg-type]
        loss = F.cross_entropy(logits.flatten(0, -2), batch["y"].flatten())
        was_training = model.training
        model.eval()
        with torch.no_grad():
            taught = functional_call(model, run.teacher, (batch["x"],))
        model.train(was_training)
        return loss + self.weight * self.distance(run, own, taught)

    def distance(self, run: LwFRun, own: Tensor, taught: Tensor) -> Tensor:
        """Sums T^2 KL per example over the earlier tasks that have outputs of their own."""
        total = own.new_zeros(())
        for view in run.views or [own.new_zeros(())]:
            mask = view.to(own.device)
            total = total + divergence(own + mask, taught + mask, self.temperature)
        return total

    def held(self, run: LwFRun) -> dict[str, int]:
        return {} if run.teacher is None else {"teacher": run.client.step_cost.parameter_bytes}


class LwFRun(SGDRun):
    """A round with the model of the first broadcast of a task as its teacher.

    Attributes:
        teacher: its weights; None in the first task.
        views: what leaves the outputs of one earlier task alone, for each; empty where tasks share their outputs.
    """

    trainer: LwFTrainer

    def __init__(self, trainer: LwFTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.teacher: Tensors | None = None
        self.views: list[Tensor] = trainer.views(client)

    def fit(self) -> ClientUpdate:
        client, state = self.client, self.client.state
        phase = client.workload.phase(client.round)
        if int(state.get(PHASE, torch.tensor(0))) < phase and self.trainer.distill_weight:
            state.update({f"{TEACHER}{name}": t.clone() for name, t in self.broadcast.weights.items()})
        state[PHASE] = torch.tensor(phase)
        kept = {k.removeprefix(TEACHER): t.to(client.device) for k, t in state.items() if k.startswith(TEACHER)}
        self.teacher = kept or None
        return super().fit()

    def log_step(self, batch: int) -> None:
        super().log_step(batch)
        if self.teacher is not None:
            self.client.log.add(self.client.step_cost, batch, forwards=1)


class LwFTrainer(SGDTrainer):
    """SGD on the workload's loss and, for the classes of earlier tasks, the distance from the model before the task.

    Where tasks have outputs of their own, each earlier task's are compared among themselves; otherwise all.

    Args:
        distill_weight: lambda; 0 is plain SGD.
        temperature: T.
        sgd: arguments of SGDTrainer.
    """

    needs_classes = True
    run = LwFRun

    def __init__(
        self, distill_weight: Annotated[float, Ge(0)] = 1.0, temperature: Annotated[float, Gt(0)] = 2.0, **sgd: Any
    ):
        super().__init__(**sgd)
        self.distill_weight = distill_weight
        self.objective: Distilled = Distilled(distill_weight, temperature)

    def views(self, client: ClientContext) -> list[Tensor]:
        """Returns masks of the outputs of the client's earlier tasks; none where tasks share their outputs."""
        workload = classification(client.workload)
        return workload.masks_before(client.client_id, workload.phase(client.round))
