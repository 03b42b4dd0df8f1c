"""A slot: a network with buffers at fixed places, in which one client after the other trains by recorded steps.

What a step reads and writes (batch, received weights, learning rate, velocity, losses) never moves, so that on a card
the step is one CUDA graph for all clients. Its arithmetic is that of `SGDRun.take_steps`, to the last bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from clients.live_model import LiveModel
from clients.slots.record import Recorder, Work
from clients.trainers.base import WorkLog
from clients.trainers.sgd import LOSS, SGDRun, SGDTrainer
from fedsim.workloads.base import Tensors

KEPT_FIGURES = 1024  # of the steps, before they are taken out of the fixed buffer
MOST_RECORDED = 64  # steps of a slot; the one that was used longest ago makes room


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
        self.lr = torch.zeros((), device=live.device)
        self.figures: Tensors = {}  # of each step, [KEPT_FIGURES] by name
        self.rate: float | Tensor = 0.0  # what a step multiplies by: `lr`, on a CPU a plain number
        self._holds: Tensors = {}  # the broadcast weights that `received` is a copy of
        self._steps: OrderedDict[Hashable, Step] = OrderedDict()

    def works(self) -> AbstractContextManager[Any]:
        """Returns a block in which what is asked of the device is done on the slot's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

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
        whole = run.client.model is self.live.model and run.broadcast.weights.keys() == self.received.keys()
        return plain and whole and run.objective.can_be_mapped()

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
        self.rate = rate if self.live.device.type == "cpu" else self.lr

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
        shapes = tuple((name, t.shape, t.dtype, t.stride()) for name, t in batch.items())
        key = (run.objective, shapes, tuple(sorted(run.broadcast.settings.items())))
        if key not in self._steps:
            given = {name: torch.empty_like(t).copy_(t) for name, t in batch.items()}
            names: list[str] = []
            work = self._work(run, given, names)
            with self._unchanged():
                self._steps[key] = Step(given, self.recorder.record(work) or work, names)
            if len(self._steps) > MOST_RECORDED:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return self._steps[key]

    def _work(self, run: SGDRun, batch: Tensors, names: list[str]) -> Work:
        """Returns what takes a step on this batch, whoever the client is; it fills in the names of its figures."""
        anyone = copy(run)
        anyone.broadcast = replace(run.broadcast, weights=self.received, extras={})
        anyone.client = replace(run.client, log=cast(WorkLog, None), data=cast(Any, None), state=cast(Any, None))
        trainer, parameters = run.trainer, self.live.parameters
        velocity = self.velocity if trainer.momentum else None

        def work() -> None:
            anyone.notes = {}
            loss = anyone.objective(anyone, batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            trainer.step(parameters, gradients, self.rate, velocity)
            found = {LOSS: loss.detach(), **{name: noted[0] for name, noted in anyone.notes.items()}}
            for name, figure in found.items():
                if name not in self.figures:
                    self.figures[name] = figure.new_zeros(KEPT_FIGURES)
                self.figures[name].index_copy_(0, self.number, figure.reshape(1))
            self.number.add_(1)
            names[:] = found

        return work

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Takes back what recording a step has done: it may take it several times."""
        model = self.live.model
        own = [*model.parameters(), *model.buffers(), *self.velocity, *self.figures.values(), self.number]
        before = [t.detach().clone() for t in own]
        with torch.random.fork_rng(devices=[self.live.device] if self.live.device.type == "cuda" else []):
            yield
        with torch.no_grad():
            torch._foreach_copy_(own, before)
