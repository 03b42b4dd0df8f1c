"""A slot: a network with buffers at fixed places, in which one client after the other trains by recorded steps.

What a step reads and writes (batch, received weights, learning rate, velocity, losses) never moves, so that on a card
the step is one CUDA graph for all clients. Its arithmetic is that of `SGDRun.take_steps`, to the last bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clients.live_model import LiveModel
from clients.slots.record import Recorder, Work
from clients.trainers.base import ClientWorkload
from clients.trainers.sgd import LOSS, Objective, SGDRun, SGDTrainer
from fedsim.errors import ConfigError
from fedsim.models.dropout import rewinding
from fedsim.workloads.base import Tensors

KEPT_FIGURES = 256  # of the steps, before they are taken out of the fixed buffer
MOST_RECORDED = 64  # steps of a slot; the one that was used longest ago makes room


class Anyone:
    """Stands for every client, or for what each is sent, in a recorded step: it has what a pure objective may read.

    Args:
        objective: that reads it.
        has: what there is, by name.
    """

    def __init__(self, objective: Objective, **has: Any):
        self._objective = objective
        vars(self).update(has)

    def __getattr__(self, name: str) -> Any:
        raise ConfigError(
            f"{type(self._objective).__name__} says that it is pure and reads {name!r} of a client's round; it may "
            "read model, workload, received weights and settings; else its class says is_pure = False"
        )


class Settings(Mapping[str, Any]):
    """Settings that a broadcast brings, and those that were read, or looked for.

    Attributes:
        read: their names; EVERY among them where somebody went through all.
    """

    EVERY = "*"

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = settings
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        self.read.add(self.EVERY)
        return iter(self._settings)

    def __len__(self) -> int:
        self.read.add(self.EVERY)
        return len(self._settings)


class Itself:
    """A key that is equal where it is of the same object, whatever that takes for equal."""

    def __init__(self, one: Any):
        self.one = one

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and other.one is self.one

    def __hash__(self) -> int:
        return id(self.one)


class Figure(NamedTuple):
    """What a step leaves beside its parameters: its loss, or what its objective noted under a name for the nth time."""

    name: str
    nth: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass
class Step:
    """A recorded step.

    Attributes:
        batch: the tensors that it reads.
        work: takes it.
        figures: that it leaves, in order; known when it was taken once.
    """

    batch: Tensors
    work: Work
    figures: list[Figure]


class Slot:
    """A network of its own and all that its training writes to.

    Args:
        live: the network; nobody else uses it.
        recorder: makes one call of a step.
        stream: on which the slot works; None on a CPU.
    """

    def __init__(self, live: LiveModel, recorder: Recorder, stream: Any = None):
        self.live, self.recorder, self.stream = live, recorder, stream
        self.received, self._joined = live.blank()
        self.velocity = [torch.empty_like(p) for p in live.parameters]
        self.number = torch.zeros(1, dtype=torch.int64, device=live.device)  # of the step, in `figures`
        self.places = torch.arange(KEPT_FIGURES, device=live.device)
        self.lr = torch.zeros((), device=live.device)
        self.figures: dict[Figure, Tensor] = {}  # of each step, [KEPT_FIGURES, ...]
        self.rate: float | Tensor = 0.0  # what a step multiplies by: `lr`, on a CPU a plain number
        self._holds: Tensors = {}  # the broadcast weights that `received` is a copy of
        self._steps: OrderedDict[Hashable, Step] = OrderedDict()
        self._read: dict[Itself, set[str]] = {}  # names of the settings that an objective reads

    def load(self, weights: Tensors) -> None:
        """Puts a broadcast's weights into the network.

        Args:
            weights: with the names of the network's, on its device.

        Raises:
            ValueError: if they are not those of this network.
        """
        if weights.keys() != self.received.keys():
            raise ValueError(f"the broadcast has weights {sorted(weights)}, the model {sorted(self.received)}")
        self._hold(weights)
        self.live.put(self.received, self._joined)

    def can_train(self, run: SGDRun, batch: Any) -> bool:
        """Returns whether a run's steps on batches like this one can be recorded.

        They can with a pure objective, the plain step on its gradient, and batches that are tensors by name.
        """
        tensors = isinstance(batch, dict) and all(isinstance(t, Tensor) for t in batch.values())
        plain = type(run).gradients is SGDRun.gradients and type(run.trainer).step is SGDTrainer.step
        client = run.client
        whole = client.model is self.live.model and client.parameters is self.live.parameters
        known = run.broadcast.weights.keys() == self.received.keys()
        return tensors and plain and whole and known and run.objective.can_be_mapped()

    def train(self, run: SGDRun, batches: Iterable[Tensors]) -> Tensors:
        """Takes a step on each batch and waits for none; returns the means of their losses and notes, scalars by name.

        Args:
            run: for which `can_train` holds.
            batches: as its objective takes them.
        """
        self._begin(run)
        found: dict[str, list[Tensor]] = {}
        taken: list[Step] = []
        for batch in batches:
            if len(taken) == KEPT_FIGURES:
                self._take_out(taken, found)
            step = self._step_like(run, batch)
            torch._foreach_copy_(list(step.batch.values()), [batch[name] for name in step.batch])
            step.work()
            taken.append(step)
            run.log_step(run.size_of(batch))
            run.after_step(batch)
        self._take_out(taken, found)
        return {name: torch.cat(some).mean() for name, some in found.items()}

    def _begin(self, run: SGDRun) -> None:
        self._hold(run.broadcast.weights)
        for velocity in self.velocity:
            velocity.fill_(-0.0)  # that of a first step: -0 times anything plus a gradient is the gradient
        self.number.zero_()
        rate = run.trainer.learning_rate(run.client, run.broadcast)
        self.lr.fill_(rate)
        self.rate = self.lr if self.recorder.freezes_numbers else run.trainer.rate_on(self.live.device, rate)

    def _hold(self, weights: Tensors) -> None:
        """Copies a broadcast's weights to where recorded steps look for them."""
        if self._holds is not weights:
            torch._foreach_copy_(list(self.received.values()), [weights[name] for name in self.received])
            self._holds = weights

    def _take_out(self, taken: list[Step], found: dict[str, list[Tensor]]) -> None:
        """Adds copies of the figures of these steps to those that were found, by name, and makes their place free."""
        first, count = taken[0].figures, len(taken)
        if all(step.figures == first for step in taken) and not any(figure.nth for figure in first):
            copies = [(figure.name, self.figures[figure][:count].clone()) for figure in first]
        else:  # in the order in which they were noted
            places = [(figure, place) for place, step in enumerate(taken) for figure in step.figures]
            copies = [(figure.name, self.figures[figure][place : place + 1].clone()) for figure, place in places]
        for name, copy_of in copies:
            found.setdefault(name, []).append(copy_of)
        self.number.zero_()
        taken.clear()

    def _step_like(self, run: SGDRun, batch: Tensors) -> Step:
        """Returns the recorded step for batches like this one."""
        key = self._key(run, batch)
        if key not in self._steps:
            given = {name: torch.empty_like(t).copy_(t) for name, t in batch.items()}
            figures: list[Figure] = []
            settings = Settings(run.broadcast.settings)
            work = self._work(run, given, settings, figures)
            with self._unchanged():
                drawn = self._generators()
                work()  # says what it reads and leaves
                self._read.setdefault(Itself(run.objective), set()).update(settings.read)
                key = self._key(run, batch)
                # A recorded draw would depend on the replays before it, or be a number of the host that never changes.
                draws = any(not torch.equal(a, b) for a, b in zip(drawn, self._generators(), strict=True))
                self._steps[key] = Step(given, work if draws else self.recorder.record(work) or work, figures)
            if len(self._steps) > MOST_RECORDED:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return self._steps[key]

    def _key(self, run: SGDRun, batch: Tensors) -> Hashable:
        """Returns what a recorded step depends on beside the numbers in its tensors."""
        objective, settings = Itself(run.objective), run.broadcast.settings
        shapes = tuple((name, t.shape, t.dtype, t.stride()) for name, t in batch.items())
        read = self._read.get(objective, set())
        names = settings.keys() if Settings.EVERY in read else read
        return objective, shapes, tuple((name, repr(settings.get(name))) for name in sorted(names))

    def _generators(self) -> list[Tensor]:
        """Returns the states of torch's own generators, of the CPU and of a card that is used."""
        device = self.live.device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    def _work(self, run: SGDRun, batch: Tensors, settings: Settings, figures: list[Figure]) -> Work:
        """Returns what takes a step on this batch, whoever the client is; it fills in the figures that it leaves."""
        objective, trainer, parameters = run.objective, run.trainer, self.live.parameters
        workload = ClientWorkload(run.client.workload, None, 0)
        seen = {"workload": workload, "model": self.live.model, "parameters": parameters, "device": self.live.device}
        broadcast, client = Anyone(objective, weights=self.received, settings=settings), Anyone(objective, **seen)
        found: list[tuple[str, Tensor]] = []

        def note(**scalars: Tensor) -> None:
            found.extend((name, scalar.detach()) for name, scalar in scalars.items())

        anyone = Anyone(objective, client=client, broadcast=broadcast, trainer=trainer, note=note)
        velocity = self.velocity if trainer.momentum else None

        def work() -> None:
            found.clear()
            loss = objective(anyone, batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            trainer.step(parameters, gradients, self.rate, velocity)
            if self.recorder.freezes_numbers:
                self.live.take_in()  # or every replay would begin with the buffers of the first
            figures.clear()
            for name, value in [(LOSS, loss.detach()), *found]:
                nth = sum(figure.name == name for figure in figures)
                figures.append(figure := Figure(name, nth, value.dtype, value.shape))
                if figure not in self.figures:
                    self.figures[figure] = value.new_zeros((KEPT_FIGURES, *value.shape))
                row = self.figures[figure]  # not by index: a card has no way to that which is sure to repeat, and quick
                here = (self.places == self.number).view(-1, *(1 for _ in value.shape))
                row.copy_(torch.where(here, value, row))
            self.number.add_(1)

        return work

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Takes back what recording a step has done: it may take it several times."""
        model = self.live.model
        self.live.take_in()
        own = [*model.parameters(), *model.buffers(), *self.velocity, *self.figures.values(), self.number]
        before, rewind = [t.detach().clone() for t in own], rewinding(model)
        with torch.random.fork_rng(devices=[self.live.device] if self.live.device.type == "cuda" else []):
            yield
        self.live.take_in()
        with torch.no_grad():
            torch._foreach_copy_(own, before)
            rewind()
