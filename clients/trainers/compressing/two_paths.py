"""What PQK and DCIL share: local training of a pruned network (student) inside the whole one (teacher).

The server averages the dense weights; a client is judged with the pruned network that they hold. The teacher's norms
never leave the device: they are of use in its training only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.func import functional_call

from clients.trainers.base import ClientContext
from clients.trainers.compressing.sparse import SparseRun, SparseTrainer, copy, sizes
from devices.compression.distil import Remembering
from devices.compression.masks import sparsity_of
from devices.compression.two_paths import TwoPaths
from devices.cost import ModelCost
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Workload

TEACHER = "teacher"  # group of a client's state: the teacher's norms


class TwoPathRun(SparseRun):
    """The local loop, with the teacher's norms among what is trained where it has a say.

    Attributes:
        norms: the teacher's own.
    """

    trainer: TwoPathTrainer

    def __init__(self, trainer: TwoPathTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        restored = client.state.restored(TEACHER, trainer.first_norms)
        self.norms = {name: t.detach().clone() for name, t in restored.items()}
        self.teaches = trainer.teaches(broadcast)

    def fit(self) -> ClientUpdate:
        trainer, client, state = self.trainer, self.client, self.client.state
        trainer.check_settings(self.broadcast)
        self.reserve()
        if self.teaches:
            assert trainer.both_paths is not None
            learned = [self.norms[name].requires_grad_() for name in trainer.learned_norms]
            self.client = replace(client, parameters=[*client.parameters, *learned], step_cost=trainer.both_paths)
        train_loss = self.train(self.batches())
        if self.norms:
            state.store(TEACHER, self.norms)
        self.keep_masks()
        metrics = {"train_loss": train_loss, "sparsity": sparsity_of(self.masks)}
        return ClientUpdate(client.client_id, client.num_examples, client.weights, metrics)

    def networks(self, rule: str = "masked") -> tuple[Remembering, Remembering]:
        """Returns student and teacher under the masks of the moment; `rule` is that of the student's gradient."""
        model, trainer = self.client.model, self.trainer
        student, teacher = trainer.paths.student(self.masks, rule), trainer.paths.teacher(self.masks, self.norms)

        def pruned(x: Tensor) -> Tensor:
            with trainer.integer_inputs(model):
                output: Tensor = functional_call(model, student, (x,))
                return output

        return Remembering(pruned), Remembering(lambda x: functional_call(model, teacher, (x,)))

    def log_step(self, batch: int) -> None:
        passes = 2 if self.teaches else 1
        self.client.log.add(self.client.step_cost, batch, forwards=passes, backwards=passes)

    def reserve(self) -> None:
        """Reserves the memory of a step; where both networks are trained, both are held until the backward pass."""
        trainer, batch = self.trainer, min(self.trainer.batch_size, len(self.client.data.train))
        cost = trainer.both_paths if self.teaches and trainer.both_paths else self.client.step_cost
        self.client.log.reserve(trainer.step_bytes(cost, batch, self.copies()))

    def copies(self) -> float:
        """Counts weights of both networks, a mask of floats for each and the gradients of each, of what is pruned."""
        own = dict(self.client.model.named_parameters())
        pruned = sum(own[name].nbytes for name in self.trainer.paths.names)
        return super().copies() + 6.0 * pruned / self.client.step_cost.parameter_bytes


class TwoPathTrainer(SparseTrainer):
    """SGD of a pruned network inside the whole one; subclasses say what is minimised.

    Args:
        sparsity, refresh, floor: see SparseTrainer.
        prune_rounds: rounds until sparsity is final.
        temperature: of the divergences.
        sparse: arguments of SparseTrainer.
    """

    needs_classes = True
    run = TwoPathRun
    paths: TwoPaths

    def __init__(
        self,
        sparsity: Annotated[float, Interval(ge=0, lt=1)],
        prune_rounds: Annotated[int, Ge(1)],
        temperature: Annotated[float, Gt(0)] = 2.0,
        **sparse: Any,
    ):
        super().__init__(sparsity, prune_rounds, **sparse)
        self.temperature = temperature
        self.both_paths: ModelCost | None = None  # what a step of both networks costs

    def teaches(self, broadcast: Broadcast) -> bool:
        """Returns whether the teacher is trained too in this round."""
        raise NotImplementedError(f"{type(self).__name__} does not say when its teacher is trained")

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds the weights to prune, and remembers the first norms of the teacher."""
        super().setup(workload, model, network)
        self.paths = TwoPaths(model, self.pruned, self.bits)
        state = model.state_dict()
        self.first_norms = {name: state[name].detach().clone() for name in self.paths.norms}
        self.both_paths = network.twice()
        learned = {name for name, p in model.named_parameters() if p.requires_grad}
        self.learned_norms = [name for name in self.paths.norms if name in learned]

    @torch.no_grad()
    def evaluate(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Returns metrics and sizes of the student, and beside them the accuracy of the client's teacher."""
        if not len(client.data.test):
            return {}
        run = TwoPathRun(self, client, broadcast)
        masks = run.masks or self.masks_at(broadcast.round)
        tensors, bits = self.paths.exported(masks)
        student = self.paths.student(masks)
        own = {name: client.weights[name].clone() for name in run.norms}
        copy(run.norms, client.weights)
        taught = client.workload.evaluate(client.model, client.data.test)
        copy({**own, **student}, client.weights)
        with self.integer_inputs(client.model):
            metrics = super().evaluate(client, broadcast)
        return {**metrics, "accuracy_teacher": taught["accuracy"], **sizes(client.weights, masks, tensors, bits)}
