"""Mini-batch SGD on the client's own examples: the one local loop, from which most trainers override a step.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
algorithm 1 (ClientUpdate).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import Le
from torch import Tensor, nn

from clients.trainers import batched
from clients.trainers.base import ClientContext, Gradients, LocalTrainer
from devices.cost import NetworkCost
from devices.errors import unknown
from devices.meter import peak_memory_bytes
from fedsim.errors import ConfigError
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors

Arrays = tuple[Tensor, ...] | list[Tensor]


class SGDTrainer(LocalTrainer):
    """Trains for some local epochs or steps with SGD.

    Args:
        lr: learning rate of round 1.
        batch_size: examples per step; the last batch of an epoch may be smaller.
        local_epochs: passes over the client's examples, unless `local_steps` is given.
        local_steps: steps per round instead of epochs; epochs are strung together as needed.
        momentum, weight_decay: as in torch.optim.SGD; momentum starts at zero in each round.
        lr_decay: factor on the learning rate per round.
        clip_norm: largest gradient norm of a step; None does not clip.
        task_decay: factor on the learning rate per task, where the workload is a stream.
    """

    pure_loss = True  # `loss` is a function of parameters, batch and broadcast; a class that overrides it says so anew
    known_settings = frozenset({"server-round", "lr"})

    def __init__(
        self,
        lr: Annotated[float, Le(1e30)],  # a run tells what diverges
        batch_size: int,
        local_epochs: Annotated[int, Le(10_000)] = 1,
        local_steps: Annotated[int, Le(10**7)] | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        lr_decay: float = 1.0,
        clip_norm: float | None = None,
        task_decay: float = 1.0,
    ):
        _require("trainer.lr", lr, lr > 0, "greater than 0")
        _require("trainer.batch_size", batch_size, batch_size >= 1, "at least 1")
        _require("trainer.local_epochs", local_epochs, local_epochs >= 1, "at least 1")
        _require("trainer.local_steps", local_steps, local_steps is None or local_steps >= 1, "null or at least 1")
        _require("trainer.momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        _require("trainer.weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        _require("trainer.lr_decay", lr_decay, 0 < lr_decay <= 1, "in (0, 1]")
        _require("trainer.clip_norm", clip_norm, clip_norm is None or clip_norm > 0, "null or greater than 0")
        _require("trainer.task_decay", task_decay, 0 < task_decay <= 1, "in (0, 1]")
        self.lr, self.batch_size, self.task_decay = lr, batch_size, task_decay
        self.local_epochs, self.local_steps = local_epochs, local_steps
        self.momentum, self.weight_decay = momentum, weight_decay
        self.lr_decay, self.clip_norm = lr_decay, clip_norm

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        """The local loop; reports one forward and one backward pass per step."""
        self.check_settings(task)
        self.reserve(client, task)
        train_loss = self.train(client, task, self.batches(client, task))
        return ClientUpdate(client.client_id, len(client.data.train), client.weights, {"train_loss": train_loss})

    def train(self, client: ClientContext, task: Broadcast, batches: Iterable[Tensors]) -> float:
        """Trains `client.parameters` on `batches`; returns the mean loss of a step."""
        lr, velocity = self.learning_rate(client, task), None
        losses = []
        for batch in batches:
            loss = self.loss(client, batch, task)
            gradients = torch.autograd.grad(loss, client.parameters, allow_unused=True)
            velocity = self.step(client.parameters, gradients, lr, velocity)
            del gradients  # as large as the model: the next step shall not find them in memory
            self.log_step(client, client.workload.batch_size_of(batch))
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    def fit_together(self, clients: Sequence[ClientContext], tasks: Sequence[Broadcast]) -> list[ClientUpdate]:
        """As `fit`, for clients whose broadcasts have equal settings."""
        self.check_settings(tasks[0])
        for client, task in zip(clients, tasks, strict=True):
            self.reserve(client, task)
        return batched.fit(self, clients, tasks)

    def reason_against_together(self, model: nn.Module) -> str:
        """Only the local loop of this class can be mapped, and a `loss` whose class says that it is pure."""
        own = [
            name
            for name in ("fit", "train", "step", "batches")
            if getattr(type(self), name) is not getattr(SGDTrainer, name)
        ]
        writer = next(c for c in type(self).__mro__ if "loss" in vars(c))
        if own or not vars(writer).get("pure_loss", False):
            return f"{type(self).__name__} does not train by a pure function of parameters and batch"
        return batched.reason_against(model)

    def reserve(self, client: ClientContext, task: Broadcast) -> None:
        """Declares the memory of a step."""
        batch_size = min(self.batch_size, len(client.data.train))
        client.log.reserve(self.step_bytes(client.network, batch_size, self.copies(client, task)))

    def step_bytes(self, network: NetworkCost, batch: int, copies: float = 0.0) -> int:
        """Most memory that a step holds: in its passes, or where gradients are clipped or decayed into new ones.

        Args:
            network: that is trained.
            batch: examples of the step.
            copies: tensors as large as the weights, beside weights, gradients and momentum.
        """
        momentum = 1.0 if self.momentum else 0.0
        new = (self.clip_norm is not None) + (self.weight_decay > 0)
        update_bytes = round((2 + momentum + new) * network.parameter_bytes)
        return max(peak_memory_bytes(network, batch, momentum), update_bytes) + round(copies * network.parameter_bytes)

    def copies(self, client: ClientContext, task: Broadcast) -> float:
        """How many tensors as large as the weights a step holds beside weights, gradients and momentum.

        What `loss` and `step` allocate and autograd keeps for them counts; `test_memory_contract.py` finds it out.
        """
        return 0.0

    @torch.no_grad()
    def step(self, parameters: Arrays, gradients: Gradients, lr: float, velocity: Arrays | None) -> Arrays | None:
        """One update of `parameters` in place, the arithmetic of torch.optim.SGD; returns the new velocity.

        As there, a parameter without a gradient stays, whatever its momentum and the weight decay.

        Written out with foreach operators: making an optimiser per client and its bookkeeping per step cost 8 % of a
        LeNet-5 step on a CPU.
        """
        used = {n: g for n, g in enumerate(gradients) if g is not None}
        if len(used) < len(gradients):
            return self._step_of_some(parameters, used, lr, velocity)
        moves: Arrays = list(used.values())
        if self.clip_norm is not None:
            total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(moves)))
            moves = torch._foreach_mul(moves, torch.clamp(self.clip_norm / (total + 1e-6), max=1.0))
        if self.weight_decay:
            moves = torch._foreach_add(moves, parameters, alpha=self.weight_decay)
        if self.momentum:
            if velocity is None:
                velocity = [g.clone() for g in moves]  # autograd may have given two parameters one tensor
            else:
                torch._foreach_mul_(velocity, self.momentum)
                torch._foreach_add_(velocity, moves)
            moves = velocity
        torch._foreach_add_(parameters, moves, alpha=-lr)
        return velocity

    def _step_of_some(
        self, parameters: Arrays, gradients: Mapping[int, Tensor], lr: float, velocity: Arrays | None
    ) -> Arrays | None:
        """A step of the parameters at these places; the others begin at velocity zero when they are first used."""
        own = None if velocity is None else [velocity[n] for n in gradients]
        moved = SGDTrainer.step(self, [parameters[n] for n in gradients], list(gradients.values()), lr, own)
        if moved is None:
            return None
        every = [torch.zeros_like(p) for p in parameters] if velocity is None else list(velocity)
        for n, v in zip(gradients, moved, strict=True):
            every[n] = v
        return every

    def learning_rate(self, client: ClientContext, task: Broadcast) -> float:
        """Learning rate of this round and task; a strategy's `lr` setting comes before the trainer's own."""
        lr = float(task.settings.get("lr", self.lr)) * self.lr_decay ** (task.round - 1)
        return lr * self.task_decay ** client.workload.phase(task.round)

    def batches(self, client: ClientContext, task: Broadcast) -> Iterator[Tensors]:
        """Shuffled batches of the client's training examples: tensors with leading size `batch_size` or less."""
        return self.shuffled(client, "batches", self.local_epochs, self.local_steps)

    def shuffled(self, client: ClientContext, purpose: str, epochs: int, steps: int | None = None) -> Iterator[Tensors]:
        """Batches of so many epochs, or of `steps` if it is given, in an order that `purpose` draws."""
        for order in self.orders(client, purpose, self.batch_size, epochs, steps):
            yield from client.data.train.gather_batches(order, self.batch_size)

    def rows(self, client: ClientContext, batch_size: int, epochs: int) -> Iterator[Tensor]:
        """Places of the examples of each batch, [batch_size or less] int64; `local_steps` ends the epochs."""
        for order in self.orders(client, "batches", batch_size, epochs, self.local_steps):
            yield from order.split(batch_size)

    def ends_in_one(self, examples: int) -> bool:
        """Whether the last batch of an epoch has one example, and `local_steps` leads there."""
        return self.leaves_one(examples, self.batch_size)

    def leaves_one(self, examples: int, size: int) -> bool:
        """Whether batches of `size` end in one of a single example, and `local_steps` leads there."""
        lone = size == 1 or examples % size == 1
        return lone and (self.local_steps is None or size == 1 or self.local_steps > examples // size)

    def orders(
        self,
        client: ClientContext,
        purpose: str,
        batch_size: int,
        epochs: int,
        steps: int | None,
        among: int | None = None,
    ) -> Iterator[Tensor]:
        """The order of each epoch, [examples] int64; with `steps`, epochs until there are so many batches.

        An epoch is as long as the client's examples, and draws from so many: from `among` where it is given.
        """
        shuffle, size = client.stream(purpose), len(client.data.train)
        for _ in range(epochs if steps is None else steps):  # an epoch has at least one step
            order = torch.randperm(size if among is None else among, generator=shuffle)[:size]
            if steps is not None:
                order = order[: steps * batch_size]
                steps -= -(-len(order) // batch_size)
            yield order
            if steps == 0:
                return

    def loss(self, client: ClientContext, batch: Tensors, task: Broadcast) -> Tensor:
        """The objective of one step, a scalar."""
        return client.workload.loss(client.model, batch)

    def log_step(self, client: ClientContext, batch: int) -> None:
        """Reports what one step ran; override together with `loss` when a step costs more."""
        client.log.add(client.network, batch, forwards=1, backwards=1)

    def check_settings(self, task: Broadcast) -> None:
        """Refuses a setting that nobody would act on.

        Raises:
            ConfigError: names the setting and the trainer.
        """
        for key in task.settings:
            if key not in self.known_settings:
                what = unknown(f"setting for {type(self).__name__}", key, self.known_settings)
                raise ConfigError(f"{what}; the strategy sends it, so choose the trainer that belongs to the strategy")


def _require(key: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{key} must be {allowed}, got {value!r}")
