"""What PQK and DCIL share: local training of a pruned network inside the whole one that teaches it.

The server averages the dense weights; a client is judged with the pruned network that they hold. The teacher's norms
never leave the device: they are of use in its training only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clients.trainers.base import ClientContext
from clients.trainers.sgd import SGDTrainer
from devices.compression.distil import Remembering
from devices.compression.masks import FLOOR, PRUNABLE, Masks, SparsitySchedule, global_masks, sparsity_of
from devices.compression.quantise import ActivationRange
from devices.compression.sizes import dense_bytes, nonzero_bytes, wire_bytes
from devices.compression.two_paths import TwoPaths
from devices.cost import NetworkCost
from fedsim.errors import ConfigError
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload

TEACHER, MASKS = "teacher", "masks"  # groups of a client's state: the teacher's norms; masks that are final


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

    pure_loss = False
    bits, activation_bits = 32, 32
    paths: TwoPaths

    def __init__(
        self,
        sparsity: float,
        prune_rounds: int,
        refresh: int = 16,
        floor: float = FLOOR,
        temperature: float = 2.0,
        **sgd: Any,
    ):
        super().__init__(**sgd)
        if not 0 <= sparsity < 1 or not 0 <= floor <= 1 - sparsity:
            raise ConfigError(
                "trainer.sparsity must be in [0, 1), and trainer.floor at most what it leaves, got "
                f"{sparsity!r} and {floor!r}"
            )
        for key, value in (("prune_rounds", prune_rounds), ("refresh", refresh)):
            if value < 1:
                raise ConfigError(f"trainer.{key} must be at least 1, got {value!r}")
        if not temperature > 0:
            raise ConfigError(f"trainer.temperature must be greater than 0, got {temperature!r}")
        self.sparsity, self.prune_rounds, self.refresh, self.floor = sparsity, prune_rounds, refresh, floor
        self.temperature = temperature
        self.schedule = SparsitySchedule(sparsity, end=1)
        self.masks: Masks = {}  # of the client at work
        self.norms: Tensors = {}  # of its teacher
        self._twice: tuple[NetworkCost, NetworkCost] | None = None

    def names(self, model: nn.Module) -> list[str]:
        """Weights that are pruned."""
        raise NotImplementedError(f"{type(self).__name__} does not say which weights it prunes")

    def teaches(self, task: Broadcast) -> bool:
        """Whether the teacher is trained too in this round."""
        raise NotImplementedError(f"{type(self).__name__} does not say when its teacher is trained")

    def setup(self, workload: Workload, model: nn.Module, network: NetworkCost) -> None:
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
        learned = {name for name, p in model.named_parameters() if p.requires_grad}
        self.learned_norms = [name for name in self.paths.norms if name in learned]

    # --- training -----------------------------------------------------------------------------------------------------

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        """The local loop, with the teacher's norms among what is trained where it has a say."""
        self.check_settings(task)
        self.reserve_paths(client, task)
        self.take(client)
        parameters = list(client.parameters)
        if self.teaches(task):
            parameters += [self.norms[name].requires_grad_() for name in self.learned_norms]
        training = replace(client, parameters=parameters, network=self.network(client, task))
        train_loss = self.train(training, task, self.batches(client, task))
        if self.norms:
            client.state.keep(TEACHER, self.norms)
        if task.round > self.prune_rounds:
            client.state.keep(MASKS, self.masks)
        metrics = {"train_loss": train_loss, "sparsity": sparsity_of(self.masks)}
        return ClientUpdate(client.client_id, len(client.data.train), client.weights, metrics)

    def take(self, client: ClientContext) -> None:
        """The client's final masks, if it has some, and the norms of its teacher."""
        final = all(f"{MASKS}.{name}" in client.state for name in self.paths.names)
        self.masks = {name: client.state[f"{MASKS}.{name}"].cpu() for name in self.paths.names} if final else {}
        self.norms = {n: t.detach().clone() for n, t in client.state.kept(TEACHER, self.first_norms).items()}

    def batches(self, client: ClientContext, task: Broadcast) -> Iterator[Tensors]:
        """The batches of plain SGD; masks are made anew between them."""
        steps = self.local_steps or self.local_epochs * -(-len(client.data.train) // self.batch_size)
        for number, batch in enumerate(super().batches(client, task)):
            if not self.masks or (task.round <= self.prune_rounds and number % self.refresh == 0):
                self.masks = self.masks_at(task.round - 1 + number / steps)
            yield batch

    def masks_at(self, rounds: float) -> Masks:
        """Masks of the model's weights after so many rounds."""
        return global_masks(self.paths.weights(), self.schedule.at(rounds / self.prune_rounds), self.floor)

    def networks(self, client: ClientContext, rule: str = "masked") -> tuple[Remembering, Remembering]:
        """The student and the teacher under the masks of the moment; `rule` is that of the student's gradient."""
        model = client.model
        student, teacher = self.paths.student(self.masks, rule), self.paths.teacher(self.masks, self.norms)

        def pruned(x: Tensor) -> Tensor:
            with self.integer_inputs(model):
                return functional_call(model, student, (x,))

        return Remembering(pruned), Remembering(lambda x: functional_call(model, teacher, (x,)))

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

    # --- price --------------------------------------------------------------------------------------------------------

    def network(self, client: ClientContext, task: Broadcast) -> NetworkCost:
        """What a step costs on one example: the network once, or twice where both paths are trained."""
        if not self.teaches(task):
            return client.network
        if self._twice is None or self._twice[0] is not client.network:
            one = client.network
            self._twice = (one, one.twice())
        return self._twice[1]

    def log_step(self, client: ClientContext, batch: int) -> None:
        """Both paths, where both are trained."""
        passes = 2 if self._twice is not None and client.network is self._twice[1] else 1
        client.log.add(client.network, batch, forwards=passes, backwards=passes)

    def copies(self, client: ClientContext, task: Broadcast) -> float:
        """Of what is pruned: the weights of both networks, a mask of floats for each, and the gradients of each."""
        own = dict(client.model.named_parameters())
        pruned = sum(own[name].nbytes for name in self.paths.names)
        return super().copies(client, task) + 6.0 * pruned / client.network.parameter_bytes

    def reserve_paths(self, client: ClientContext, task: Broadcast) -> None:
        """Declares the memory of a step; both paths are held until the backward pass."""
        batch = min(self.batch_size, len(client.data.train))
        client.log.reserve(self.step_bytes(self.network(client, task), batch, self.copies(client, task)))

    # --- judging ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, client: ClientContext, task: Broadcast) -> dict[str, float]:
        """Metrics and sizes of the student, and beside them the accuracy of the client's teacher."""
        if not len(client.data.test):
            return {}
        self.take(client)
        self.masks = self.masks or self.masks_at(task.round)
        tensors, bits = self.paths.exported(self.masks)
        student = self.paths.student(self.masks)
        own = {name: client.weights[name].clone() for name in self.norms}
        _copy(self.norms, client.weights)
        taught = client.workload.evaluate(client.model, client.data.test)
        _copy({**own, **student}, client.weights)
        with self.integer_inputs(client.model):
            metrics = super().evaluate(client, task)
        return {
            **metrics,
            "accuracy_teacher": taught["accuracy"],
            "sparsity": sparsity_of(self.masks),
            "dense_bytes": float(dense_bytes(client.weights)),
            "nonzero_bytes": nonzero_bytes(tensors, bits),
            "wire_bytes": float(wire_bytes(tensors, bits)),
        }


def _copy(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, tensor in values.items():
        into[name].copy_(tensor)
