"""A slot: a network with buffers at fixed places, in which one client after the other trains by recorded steps.

What a step reads and writes (batch, received weights, learning rate, velocity, losses) never moves, so that on a card
the step is one CUDA graph for all clients. Its arithmetic is that of `SGDRun.take_steps`, to the last bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from clients.live_model import LiveModel
from clients.slots.record import Recorder, Work
from clients.trainers.base import ClientContext, ClientWorkload
from clients.trainers.sgd import LOSS, Objective, SGDRun, SGDTrainer
from fedsim.errors import ConfigError
from fedsim.messages.updates import Broadcast
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


class Settings(dict[str, Any]):
    """Settings that a broadcast brings, and those that were read.

    Attributes:
        read: their names.
    """

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__(settings)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


@dataclass
class Step:
    """A recorded step.

    Attributes:
        batch: the tensors that it reads.
        work: takes it.
        names: of the figures that it leaves; known when it was taken once.
    """

    batch: Tensors
    work: Work
    names: list[str]


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
        self.figures: Tensors = {}  # of each step, [KEPT_FIGURES] by name
        self.rate: float | Tensor = 0.0  # what a step multiplies by: `lr`, on a CPU a plain number
        self._holds: Tensors = {}  # the broadcast weights that `received` is a copy of
        self._steps: OrderedDict[Hashable, Step] = OrderedDict()
        self._read: dict[Objective, set[str]] = {}  # names of the settings that an objective reads

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

    def can_train(self, run: SGDRun) -> bool:
        """Returns whether a run's steps can be recorded: a pure objective, and the plain step on its gradient."""
        plain = type(run).gradients is SGDRun.gradients and type(run.trainer).step is SGDTrainer.step
        client = run.client
        whole = client.model is self.live.model and client.parameters is self.live.parameters
        known = run.broadcast.weights.keys() == self.received.keys()
        return plain and whole and known and run.objective.can_be_mapped()

    def train(self, run: SGDRun, batches: Iterable[Tensors]) -> Tensors:
        """Takes a step on each batch and waits for none; returns the means of their losses and notes, scalars by name.

        Args:
            run: for which `can_train` holds.
            batches: as its objective takes them.
        """
        self._begin(run)
        full: list[Tensors] = []
        step, taken = None, 0
        for batch in batches:
            if step is not None and taken == KEPT_FIGURES:
                full.append(self._taken_out(step.names, taken))
                taken = 0
            step = self._step_like(run, batch)
            torch._foreach_copy_(list(step.batch.values()), [batch[name] for name in step.batch])
            step.work()
            taken += 1
            run.log_step(run.size_of(batch))
            run.after_step(batch)
        assert step is not None, "a client trains on one batch at least"
        full.append(self._taken_out(step.names, taken))
        return {name: torch.cat([some[name] for some in full]).mean() for name in step.names}

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

    def _taken_out(self, names: list[str], count: int) -> Tensors:
        """Returns copies of the figures of the last steps, whose place is free again."""
        self.number.zero_()
        return {name: self.figures[name][:count].clone() for name in names}

    def _step_like(self, run: SGDRun, batch: Tensors) -> Step:
        """Returns the recorded step for batches like this one."""
        key = self._key(run, batch)
        if key not in self._steps:
            given = {name: torch.empty_like(t).copy_(t) for name, t in batch.items()}
            names: list[str] = []
            settings = Settings(run.broadcast.settings)
            work = self._work(run, given, settings, names)
            with self._unchanged():
                work()  # says what it reads and leaves
                self._read.setdefault(run.objective, set()).update(settings.read)
                key = self._key(run, batch)
                self._steps[key] = Step(given, self.recorder.record(work) or work, names)
            if len(self._steps) > MOST_RECORDED:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return self._steps[key]

    def _key(self, run: SGDRun, batch: Tensors) -> Hashable:
        """Returns what a recorded step depends on beside the numbers in its tensors."""
        shapes = tuple((name, t.shape, t.dtype, t.stride()) for name, t in batch.items())
        settings = run.broadcast.settings
        return (
            run.objective,
            shapes,
            tuple((name, settings.get(name)) for name in sorted(self._read.get(run.objective, ()))),
        )

    def _work(self, run: SGDRun, batch: Tensors, settings: Settings, names: list[str]) -> Work:
        """Returns what takes a step on this batch, whoever the client is; it fills in the names of its figures."""
        objective, trainer, parameters = run.objective, run.trainer, self.live.parameters
        anyone = copy(run)
        anyone.broadcast = cast(Broadcast, Anyone(objective, weights=self.received, settings=settings))
        workload = ClientWorkload(run.client.workload, None, 0)
        seen = {"workload": workload, "model": self.live.model, "parameters": parameters, "device": self.live.device}
        anyone.client = cast(ClientContext, Anyone(objective, **seen))
        velocity = self.velocity if trainer.momentum else None

        def work() -> None:
            anyone.notes = {}
            loss = objective(anyone, batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            trainer.step(parameters, gradients, self.rate, velocity)
            found = {LOSS: loss.detach(), **{name: noted[0] for name, noted in anyone.notes.items()}}
            for name, figure in found.items():
                if name not in self.figures:
                    self.figures[name] = figure.new_zeros(KEPT_FIGURES)
                row = self.figures[name]  # not by index: a card has no way to that which is sure to repeat, and quick
                row.copy_(torch.where(self.places == self.number, figure, row))
            self.number.add_(1)
            names[:] = found

        return work

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Takes back what recording a step has done: it may take it several times."""
        model = self.live.model
        own = [*model.parameters(), *model.buffers(), *self.velocity, *self.figures.values(), self.number]
        before, rewind = [t.detach().clone() for t in own], rewinding(model)
        with torch.random.fork_rng(devices=[self.live.device] if self.live.device.type == "cuda" else []):
            yield
        with torch.no_grad():
            torch._foreach_copy_(own, before)
            rewind()
