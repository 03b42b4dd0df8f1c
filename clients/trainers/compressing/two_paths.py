"""What PQK and DCIL share: local training of a pruned network (student) inside the whole one (teacher).

The server averages the dense weights; a client is judged with the pruned network that they hold. The teacher's norms
never leave the device: they are of use in its training only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.func import functional_call

from clients.trainers.base import ClientContext
from clients.trainers.sgd import SGDRun, SGDTrainer
from devices.compression.distil import Remembering
from devices.compression.masks import FLOOR, PRUNABLE, Masks, SparsitySchedule, global_masks, sparsity_of
from devices.compression.quantise import ActivationRange
from devices.compression.sizes import dense_bytes, nonzero_bytes, wire_bytes
from devices.compression.two_paths import TwoPaths
from devices.cost import ModelCost
from fedsim.errors import ConfigError
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload

TEACHER, MASKS = "teacher", "masks"  # groups of a client's state: the teacher's norms; masks that are final


class TwoPathRun(SGDRun):
    """The local loop, with the teacher's norms among what is trained where it has a say.

    Attributes:
        masks: by weight, which entries are the student's; empty until they are made.
        norms: the teacher's own.
    """

    trainer: TwoPathTrainer

    def __init__(self, trainer: TwoPathTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        paths, state = trainer.paths, client.state
        final = all(f"{MASKS}.{name}" in state for name in paths.names)
        self.masks: Masks = {name: state[f"{MASKS}.{name}"].cpu() for name in paths.names} if final else {}
        self.norms = {n: t.detach().clone() for n, t in state.restored(TEACHER, trainer.first_norms).items()}
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
        if self.broadcast.round > trainer.prune_rounds:
            state.store(MASKS, self.masks)
        metrics = {"train_loss": train_loss, "sparsity": sparsity_of(self.masks)}
        return ClientUpdate(client.client_id, client.num_examples, client.weights, metrics)

    def batches(self) -> Iterator[Tensors]:
        """Yields the batches of plain SGD; masks are made anew between them."""
        trainer, round = self.trainer, self.broadcast.round
        steps = trainer.local_steps or trainer.local_epochs * -(-len(self.client.data.train) // trainer.batch_size)
        for number, batch in enumerate(super().batches()):
            if not self.masks or (round <= trainer.prune_rounds and number % trainer.refresh == 0):
                self.masks = trainer.masks_at(round - 1 + number / steps)
            yield batch

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


class TwoPathTrainer(SGDTrainer):
    """SGD under masks whose sparsity grows by the cubic schedule; subclasses say what is minimised.

    Masks are those of a client's own weights: made anew at the start of each of its rounds and every `refresh` steps,
    until sparsity is final; then the client keeps them. Weight decay and momentum act on all weights, masked or not.

    Args:
        sparsity: final share of zeros.
        prune_rounds: rounds until it is reached; from the next one on masks stay.
        refresh: F, steps from one mask to the next.
        floor: share of its weights that every layer keeps.
        temperature: of the divergences.
        sgd: arguments of SGDTrainer.
    """

    needs_classes = True
    run = TwoPathRun
    bits, activation_bits = 32, 32
    paths: TwoPaths

    def __init__(
        self,
        sparsity: Annotated[float, Interval(ge=0, lt=1)],
        prune_rounds: Annotated[int, Ge(1)],
        refresh: Annotated[int, Ge(1)] = 16,
        floor: Annotated[float, Interval(ge=0, le=1)] = FLOOR,
        temperature: Annotated[float, Gt(0)] = 2.0,
        **sgd: Any,
    ):
        super().__init__(**sgd)
        if floor > 1 - sparsity:
            raise ConfigError(
                "trainer.sparsity must be in [0, 1), and trainer.floor at most what it leaves, got "
                f"{sparsity!r} and {floor!r}"
            )
        self.sparsity, self.prune_rounds, self.refresh, self.floor = sparsity, prune_rounds, refresh, floor
        self.temperature = temperature
        self.schedule = SparsitySchedule(sparsity, end=1)
        self.both_paths: ModelCost | None = None  # what a step of both networks costs

    def names(self, model: nn.Module) -> list[str]:
        """Returns weights that are pruned."""
        raise NotImplementedError(f"{type(self).__name__} does not say which weights it prunes")

    def teaches(self, broadcast: Broadcast) -> bool:
        """Returns whether the teacher is trained too in this round."""
        raise NotImplementedError(f"{type(self).__name__} does not say when its teacher is trained")

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds the weights to prune, and remembers the first norms of the teacher.

        Raises:
            ConfigError: for a model without such weights.
        """
        super().setup(workload, model, network)
        names = self.names(model)
        if not names:
            raise ConfigError(f"{type(self).__name__} finds no weights to prune in {type(model).__name__}")
        self.paths = TwoPaths(model, names, self.bits)
        state = model.state_dict()
        self.first_norms = {name: state[name].detach().clone() for name in self.paths.norms}
        self.both_paths = network.twice()
        learned = {name for name, p in model.named_parameters() if p.requires_grad}
        self.learned_norms = [name for name in self.paths.norms if name in learned]

    def masks_at(self, rounds: float) -> Masks:
        """Returns masks of the model's weights after so many rounds."""
        return global_masks(self.paths.weights(), self.schedule.at(rounds / self.prune_rounds), self.floor)

    @contextmanager
    def integer_inputs(self, model: nn.Module) -> Iterator[None]:
        """Fakes integers for what the layers read, over the range of the batch at hand; gradients pass unchanged."""

        def fake(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            x, seen = given[0], ActivationRange(self.activation_bits)
            seen.see(x.detach())
            return (x + (seen.fake(x.detach()) - x.detach()), *given[1:])

        layers = [m for m in model.modules() if isinstance(m, PRUNABLE)] if self.activation_bits < 32 else []
        handles = [layer.register_forward_pre_hook(fake) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
        _copy(run.norms, client.weights)
        taught = client.workload.evaluate(client.model, client.data.test)
        _copy({**own, **student}, client.weights)
        with self.integer_inputs(client.model):
            metrics = super().evaluate(client, broadcast)
        return {
            **metrics,
            "accuracy_teacher": taught["accuracy"],
            "sparsity": sparsity_of(masks),
            "dense_bytes": float(dense_bytes(client.weights)),
            "nonzero_bytes": nonzero_bytes(tensors, bits),
            "wire_bytes": float(wire_bytes(tensors, bits)),
        }


def _copy(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, tensor in values.items():
        into[name].copy_(tensor)
