"""Mini-batch SGD on the client's own examples: the one local loop of all trainers.

Methods differ in the objective of a step, in where batches come from, and in what happens around the loop. Source:
McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, algorithm 1
(ClientUpdate).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Interval, Le
from torch import Tensor, nn

from clients.trainers import batched
from clients.trainers.base import ClientContext, Gradients, LocalRun, LocalTrainer
from devices.cost import ModelCost
from devices.errors import unknown
from devices.meter import peak_memory_bytes
from fedsim.errors import ConfigError
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors

Arrays = tuple[Tensor, ...] | list[Tensor]
LOSS = "loss"  # of a step, among the means of a run
HOOKS_ELSEWHERE = frozenset({"gradients", "size_of", "after_step", "update", "train", "log_step", "reserve", "copies"})
HOOKS_ELSEWHERE |= {"loss", "penalty", "proximal", "mu"}  # of a trainer of 0.1
BESIDE_THE_EQUATION = ("__init__", "copies", "held")  # functions of an objective that no loss depends on


class Objective:
    """What a step minimises, read as an equation: a scalar from a run and one of its batches.

    It belongs to the trainer, so it never changes; what belongs to a client is in the run.

    Attributes:
        is_pure: it depends on nothing but the model's parameters, the batch, the received weights and the settings that
            came with them, draws nothing, and decides nothing by their numbers, so that a step on it can be recorded
            for all clients, or several be mapped through it at once, if the objectives that it is made of are pure,
            too. A class that changes the equation says so itself.
    """

    is_pure: ClassVar[bool] = False

    def __init_subclass__(cls, **rest: Any) -> None:
        """Takes a new equation, or a new part of one, for impure until its class says that it is not."""
        super().__init_subclass__(**rest)
        if any(inspect.isfunction(value) for name, value in vars(cls).items() if name not in BESIDE_THE_EQUATION):
            cls.is_pure = vars(cls).get("is_pure", False)

    def can_be_mapped(self) -> bool:
        """Returns whether this and the objectives that it is made of are pure."""
        parts = (part for part in vars(self).values() if isinstance(part, Objective))
        return self.is_pure and all(part.can_be_mapped() for part in parts)

    def __call__(self, run: Any, batch: Any) -> Tensor:
        """Returns the loss of a batch."""
        raise NotImplementedError(f"{type(self).__name__} has no equation")

    def copies(self, run: Any) -> float:
        """Returns how many tensors as large as the weights a step holds for it beside weights, gradients and momentum.

        What it allocates and autograd keeps counts; `test_memory_contract.py` finds it out.
        """
        return 0.0

    def held(self, run: Any) -> dict[str, int]:
        """Returns bytes that stay in memory through the round for it, by what they are."""
        return {}


class WorkloadLoss(Objective):
    """The workload's own loss of a batch, such as its mean cross-entropy."""

    is_pure = True

    def __call__(self, run: SGDRun, batch: Tensors) -> Tensor:
        return run.client.workload.loss(run.client.model, batch)


class SGDRun(LocalRun):
    """One client's round of SGD.

    Args:
        trainer: its settings.
        client: whose parameters are trained.
        broadcast: what the server sent.
        objective: of the steps; None is the trainer's.

    Attributes:
        notes: scalars that the objective has noted, a list of one per step by name.
        means: of the steps' losses and notes, scalars by name; they may still be on their way to the host.
        ends_later: `end` looks at no weights, so that the network may train others before it. A class that changes
            `fit` or `update` says so itself.
    """

    trainer: SGDTrainer
    ends_later: ClassVar[bool] = True

    def __init_subclass__(cls, **rest: Any) -> None:
        """Takes a new `fit` or `update` for one that looks at the weights until its class says that it does not."""
        super().__init_subclass__(**rest)
        if {"fit", "begin", "end", "update"} & vars(cls).keys():
            cls.ends_later = vars(cls).get("ends_later", False)

    def __init__(
        self, trainer: SGDTrainer, client: ClientContext, broadcast: Broadcast, objective: Objective | None = None
    ):
        super().__init__(client, broadcast)
        self.trainer, self.objective = trainer, objective or trainer.objective
        self.notes: dict[str, list[Tensor]] = {}
        self.means: dict[str, Tensor] = {}

    def fit(self) -> ClientUpdate:
        """Trains on all batches, and answers."""
        self.begin()
        return self.end()

    def begin(self) -> None:
        """Checks the settings, reserves the memory of a step, and steps on all batches; waits for no result."""
        self.trainer.check_settings(self.broadcast)
        self.reserve()
        self.take_steps(self.batches())

    def end(self) -> ClientUpdate:
        """Returns what is answered when all steps are done."""
        return self.update(float(self.means[LOSS]))

    def train(self, batches: Iterable[Any]) -> float:
        """Steps along the gradient of each batch's objective; returns the mean loss of a step."""
        self.take_steps(batches)
        return float(self.means[LOSS])

    def take_steps(self, batches: Iterable[Any]) -> None:
        """Takes a step on each batch, the one loop of SGD; in a slot, as that has recorded it."""
        if (slot := self.client.slot) is not None:
            first = next(batches := iter(batches), None)
            batches = chain([] if first is None else [first], batches)
            if slot.can_train(self, first):
                self.means = slot.train(self, batches)
                self.client.live.take_in()
                return
        parameters, trainer = self.client.parameters, self.trainer
        lr, velocity = trainer.rate_on(self.client.device, trainer.learning_rate(self.client, self.broadcast)), None
        losses = []
        for batch in batches:
            gradients, loss = self.gradients(batch)
            velocity = trainer.step(parameters, gradients, lr, velocity)
            del gradients  # as large as the model: the next step shall not find them in memory
            self.after_step(batch)
            losses.append(loss)
        self.client.live.take_in()
        self.means = {name: torch.stack(some).mean() for name, some in {LOSS: losses, **self.notes}.items()}

    def note(self, **scalars: Tensor) -> None:
        """Takes notice of scalars beside a step's loss, of which `update` reports the means."""
        for name, scalar in scalars.items():
            self.notes.setdefault(name, []).append(scalar.detach())

    def batches(self) -> Iterator[Any]:
        """Yields what the steps of the round are taken on, in order."""
        return self.trainer.batches(self.client, self.broadcast)

    def gradients(self, batch: Any) -> tuple[Gradients, Tensor]:
        """Returns the direction of one step and its loss; counts what they cost."""
        loss = self.objective(self, batch)
        gradients = torch.autograd.grad(loss, self.client.parameters, allow_unused=True)
        self.log_step(self.size_of(batch))
        return gradients, loss.detach()

    def size_of(self, batch: Any) -> int:
        """Returns how many examples a step passes through the network."""
        return self.client.workload.batch_size_of(batch)

    def after_step(self, batch: Any) -> None:
        """Takes notice of what a step was trained on; here nothing happens."""

    def update(self, train_loss: float) -> ClientUpdate:
        """Returns what is answered: the weights, the mean loss, and the means of what was noted."""
        client, noted = self.client, {name: float(mean) for name, mean in self.means.items() if name != LOSS}
        return ClientUpdate(client.client_id, client.num_examples, client.weights, {"train_loss": train_loss, **noted})

    def log_step(self, batch: int) -> None:
        """Reports what one step ran; override together with an objective that costs more."""
        self.client.log.add(self.client.step_cost, batch, forwards=1, backwards=1)

    def reserve(self) -> None:
        """Reports the memory of a step."""
        for name, held_bytes in self.objective.held(self).items():
            self.client.log.hold(name, held_bytes)
        batch_size = min(self.trainer.batch_size, len(self.client.data.train))
        self.client.log.reserve(self.trainer.step_bytes(self.client.step_cost, batch_size, self.copies()))

    def copies(self) -> float:
        """Returns how many tensors as large as the weights a step holds beside weights, gradients and momentum."""
        return self.objective.copies(self)


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
        warmup_rounds: through which the learning rate rises to its full value, in equal steps.
        cosine_rounds: after so many rounds, warm-up among them, the rate would be 0 along half a cosine; rounds beyond
            keep the last one. None: no cosine.

    Attributes:
        objective: of a step.
        run: makes what one client's round owns.
    """

    objective: Objective = WorkloadLoss()
    run: ClassVar[type[SGDRun]] = SGDRun
    known_settings = frozenset({"server-round", "lr"})

    def __init__(
        self,
        lr: Annotated[float, Gt(0), Le(1e30)],  # a run tells what diverges
        batch_size: Annotated[int, Ge(1)],
        local_epochs: Annotated[int, Ge(1), Le(10_000)] = 1,
        local_steps: Annotated[int, Ge(1), Le(10**7)] | None = None,
        momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        lr_decay: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        clip_norm: Annotated[float, Gt(0)] | None = None,
        task_decay: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        warmup_rounds: Annotated[int, Ge(0)] = 0,
        cosine_rounds: Annotated[int, Ge(1)] | None = None,
    ):
        if cosine_rounds is not None and cosine_rounds <= warmup_rounds:
            raise ConfigError(
                f"trainer.cosine_rounds must be more than the {warmup_rounds} of warm-up, got {cosine_rounds}"
            )
        self.lr, self.batch_size, self.task_decay = lr, batch_size, task_decay
        self.warmup_rounds, self.cosine_rounds = warmup_rounds, cosine_rounds
        self.local_epochs, self.local_steps = local_epochs, local_steps
        self.momentum, self.weight_decay = momentum, weight_decay
        self.lr_decay, self.clip_norm = lr_decay, clip_norm

    def start(self, client: ClientContext, broadcast: Broadcast) -> SGDRun:
        """Begins one client's round."""
        return self.run(self, client, broadcast)

    def check_hooks(self) -> None:
        """Refuses what stands on the trainer and nothing calls: hooks of a run, and those of fedsim 0.1.

        A module that has a run, an objective or a `fit` of its own may call its trainer's functions as it likes.

        Raises:
            ConfigError: says where it belongs.
        """
        kinds = type(self).__mro__
        loops = (kind for kind in kinds if {"fit", "start"} & vars(kind).keys())
        callers = {kind.__module__ for kind in (self.run, type(self.objective), next(loops))}
        for kind in kinds[: kinds.index(SGDTrainer)]:
            if kind.__module__ not in callers and (unused := sorted(HOOKS_ELSEWHERE & vars(kind).keys())):
                raise ConfigError(
                    f"trainer {kind.__name__} has {', '.join(unused)}, which nothing calls: the loss of a step is an "
                    "Objective in `objective`, and what happens around it stands in a subclass of SGDRun, which `run` "
                    "names (clients/README.md)"
                )

    def plan_work(self, client: ClientContext, broadcast: Broadcast) -> bool:
        """Reports the steps of a round that is the loop alone, on a pure objective."""
        if not self.is_loop_alone or type(self).batches is not SGDTrainer.batches:
            return False
        self.check_settings(broadcast)
        run = self.start(client, broadcast)
        run.reserve()
        for rows in self.rows(client, self.batch_size, self.local_epochs):
            run.log_step(len(rows))
        return True

    @property
    def is_loop_alone(self) -> bool:
        """Whether a round is the loop of SGD and nothing else, on an objective that is a pure function."""
        kind = type(self)
        own = kind.fit is not LocalTrainer.fit or kind.start is not SGDTrainer.start
        own = own or kind.step is not SGDTrainer.step or self.run is not SGDRun
        return not own and self.objective.can_be_mapped()

    # --- several clients at once --------------------------------------------------------------------------------------

    def fit_together(self, clients: Sequence[ClientContext], broadcasts: Sequence[Broadcast]) -> list[ClientUpdate]:
        """Trains as `fit`, for clients whose broadcasts have equal settings."""
        self.check_settings(broadcasts[0])
        runs = [self.start(client, broadcast) for client, broadcast in zip(clients, broadcasts, strict=True)]
        for run in runs:
            run.reserve()
        return batched.fit(self, runs)

    def reason_against_together(self, model: nn.Module) -> str:
        """Returns why the trainer cannot be mapped; empty if its objective is pure, and a round is the loop alone."""
        if not self.is_loop_alone:
            return f"{type(self).__name__} does not train by a pure function of parameters and batch"
        return batched.reason_against(model)

    # --- batches ------------------------------------------------------------------------------------------------------

    def batches(self, client: ClientContext, broadcast: Broadcast) -> Iterator[Tensors]:
        """Yields shuffled batches of the client's training examples: tensors with leading size `batch_size` or less."""
        return self.shuffled(client, "batches", self.local_epochs, self.local_steps)

    def shuffled(self, client: ClientContext, purpose: str, epochs: int, steps: int | None = None) -> Iterator[Tensors]:
        """Yields batches of so many epochs, or of `steps` if it is given, in an order that `purpose` draws."""
        for order in self.orders(client, purpose, self.batch_size, epochs, steps):
            yield from client.data.train.gather_batches(order, self.batch_size)

    def rows(self, client: ClientContext, batch_size: int, epochs: int) -> Iterator[Tensor]:
        """Yields the places of each batch's examples, [batch_size or less] int64; `local_steps` ends the epochs."""
        for order in self.orders(client, "batches", batch_size, epochs, self.local_steps):
            yield from order.split(batch_size)

    def orders(
        self,
        client: ClientContext,
        purpose: str,
        batch_size: int,
        epochs: int,
        steps: int | None,
        among: int | None = None,
    ) -> Iterator[Tensor]:
        """Yields the order of each epoch, [examples] int64; with `steps`, epochs until there are so many batches.

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

    def ends_in_one(self, examples: int) -> bool:
        """Returns whether the last batch of an epoch has one example, and `local_steps` leads there."""
        return self.leaves_one(examples, self.batch_size)

    def leaves_one(self, examples: int, size: int) -> bool:
        """Returns whether batches of `size` end in one of a single example, and `local_steps` leads there."""
        lone = size == 1 or examples % size == 1
        return lone and (self.local_steps is None or size == 1 or self.local_steps > examples // size)

    # --- the step -----------------------------------------------------------------------------------------------------

    def learning_rate(self, client: ClientContext, broadcast: Broadcast) -> float:
        """Returns the learning rate of this round and task; a strategy's `lr` setting comes before the trainer's."""
        lr = float(broadcast.settings.get("lr", self.lr)) * self.lr_decay ** (broadcast.round - 1)
        return lr * self.task_decay ** client.workload.phase(broadcast.round) * self.rate_of_round(broadcast.round)

    def rate_on(self, device: torch.device, lr: float) -> float | Tensor:
        """Returns a learning rate as `step` takes it there: on a card a scalar, which a recorded step can be told."""
        return torch.full((), lr, device=device) if device.type == "cuda" else lr

    def rate_of_round(self, number: int) -> float:
        """Returns the share of the learning rate that warm-up and cosine leave in a round, counted from 1."""
        if number <= self.warmup_rounds:
            return number / self.warmup_rounds
        if self.cosine_rounds is None:
            return 1.0
        done = min(number, self.cosine_rounds) - 1 - self.warmup_rounds
        return (1 + math.cos(math.pi * done / (self.cosine_rounds - self.warmup_rounds))) / 2

    @torch.no_grad()
    def step(
        self, parameters: Arrays, gradients: Gradients, lr: float | Tensor, velocity: Arrays | None
    ) -> Arrays | None:
        """Updates `parameters` in place by the arithmetic of torch.optim.SGD; returns the new velocity.

        As there, a parameter without a gradient stays, whatever its momentum and the weight decay. A velocity of -0
        everywhere is that of the first step.

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
        if isinstance(lr, Tensor):
            torch._foreach_sub_(parameters, torch._foreach_mul(moves, lr))
        else:
            torch._foreach_add_(parameters, moves, alpha=-lr)
        return velocity

    def _step_of_some(
        self, parameters: Arrays, gradients: Mapping[int, Tensor], lr: float | Tensor, velocity: Arrays | None
    ) -> Arrays | None:
        """Steps the parameters at these places; the others begin at velocity zero when they are first used."""
        own = None if velocity is None else [velocity[n] for n in gradients]
        moved = self.step([parameters[n] for n in gradients], list(gradients.values()), lr, own)
        if moved is None:
            return None
        every = [torch.zeros_like(p) for p in parameters] if velocity is None else list(velocity)
        for n, v in zip(gradients, moved, strict=True):
            every[n] = v
        return every

    def step_bytes(self, cost: ModelCost, batch: int, copies: float = 0.0) -> int:
        """Returns the most memory a step holds: in its passes, or where gradients are clipped or decayed into new.

        Args:
            cost: of the network that is trained.
            batch: examples of the step.
            copies: tensors as large as the weights, beside weights, gradients and momentum.
        """
        momentum = 1.0 if self.momentum else 0.0
        new = (self.clip_norm is not None) + (self.weight_decay > 0)
        update_bytes = round((2 + momentum + new) * cost.parameter_bytes)
        return max(peak_memory_bytes(cost, batch, momentum), update_bytes) + round(copies * cost.parameter_bytes)

    def check_settings(self, broadcast: Broadcast) -> None:
        """Refuses a setting that nobody would act on.

        Raises:
            ConfigError: names the setting and the trainer.
        """
        for key in broadcast.settings:
            if key not in self.known_settings:
                what = unknown(f"setting for {type(self).__name__}", key, self.known_settings)
                raise ConfigError(f"{what}; the strategy sends it, so choose the trainer that belongs to the strategy")
