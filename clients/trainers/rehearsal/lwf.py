"""Learning without forgetting (LwF): the model before the task teaches the present one on the task's own examples.

Source: Li and Hoiem, "Learning without Forgetting", ECCV 2016. The teacher is the model that a client received when it
first took part in a task, kept on the device (state: teacher.*, as large as the model).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from clients.trainers.base import ClientContext
from clients.trainers.sgd import SGDTrainer
from fedsim.errors import ConfigError
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from fedsim.workloads.classification import classification

PHASE, TEACHER = "phase", "teacher."


class LwFTrainer(SGDTrainer):
    """Adds distill_weight * T^2 * KL(teacher, model) of outputs softened by T, for the classes of earlier tasks.

    Where tasks have outputs of their own, each earlier task's are compared among themselves; otherwise all.

    Args:
        distill_weight: lambda; 0 is plain SGD.
        temperature: T.
        sgd: arguments of SGDTrainer.
    """

    pure_loss = False

    def __init__(self, distill_weight: float = 1.0, temperature: float = 2.0, **sgd: Any):
        super().__init__(**sgd)
        if distill_weight < 0 or temperature <= 0:
            said = f"got {distill_weight!r} and {temperature!r}"
            raise ConfigError(f"trainer.distill_weight must be at least 0 and trainer.temperature above 0, {said}")
        self.distill_weight, self.temperature = distill_weight, temperature
        self.teacher: Tensors | None = None
        self.tasks: list[int] = []

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        """Keeps the model of the first broadcast of a task as its teacher."""
        phase = client.workload.phase(client.round)
        if int(client.state.get(PHASE, torch.tensor(0))) < phase and self.distill_weight:
            client.state.update({f"{TEACHER}{name}": t.clone() for name, t in task.weights.items()})
        client.state[PHASE] = torch.tensor(phase)
        kept = {k.removeprefix(TEACHER): t.to(client.device) for k, t in client.state.items() if k.startswith(TEACHER)}
        self.teacher = kept or None
        order = getattr(client.workload, "order_of", lambda client_id: [0])(client.client_id)
        self.tasks = list(order[:phase])
        return super().fit(client, task)

    def loss(self, client: ClientContext, batch: Tensors, task: Broadcast) -> Tensor:
        """Workload loss and, after the first task, the distillation."""
        if self.teacher is None:
            return super().loss(client, batch, task)
        own = client.model(batch["x"])
        logits = own + (classification(client.workload).logits(lambda _: torch.zeros_like(own), batch))  # type: ignore[arg-type]
        loss = F.cross_entropy(logits.flatten(0, -2), batch["y"].flatten())
        was_training = client.model.training
        client.model.eval()
        with torch.no_grad():
            taught = functional_call(client.model, self.teacher, (batch["x"],))
        client.model.train(was_training)
        return loss + self.distill_weight * self.distill(client, own, taught)

    def distill(self, client: ClientContext, own: Tensor, taught: Tensor) -> Tensor:
        """T^2 KL per example, summed over the earlier tasks that have outputs of their own."""
        masks = getattr(client.workload, "masks", None)
        separate = getattr(client.workload, "incremental", "") == "task" and masks is not None
        views = [masks[s].to(own.device) for s in self.tasks] if separate and masks is not None else [own.new_zeros(())]
        total = own.new_zeros(())
        for mask in views:
            soft, target = ((z + mask).flatten(0, -2) / self.temperature for z in (own, taught))
            parts = F.kl_div(soft.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
            total = total + parts * self.temperature**2
        return total

    def log_step(self, client: ClientContext, batch: int) -> None:
        super().log_step(client, batch)
        if self.teacher is not None:
            client.log.add(client.network, batch, forwards=1)

    def reserve(self, client: ClientContext, task: Broadcast) -> None:
        if self.teacher is not None:
            client.log.hold("teacher", client.network.parameter_bytes)
        super().reserve(client, task)
