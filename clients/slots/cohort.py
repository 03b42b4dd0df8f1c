"""The clients of a cohort in slots: one's work is asked for while the device still does that of others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clients.live_model import LiveModel
from clients.slots.record import GraphRecorder, Repeater
from clients.slots.slot import Slot
from clients.trainers.base import ClientContext, LocalTrainer
from clients.trainers.sgd import SGDRun, SGDTrainer
from fedsim.messages.cohort import ClientAnswer, ClientTask
from fedsim.messages.weights import SentWeights, sums_of

if TYPE_CHECKING:
    from clients.worker import Worker


def make_slots(count: int, build: Callable[[], nn.Module], first: LiveModel) -> list[Slot]:
    """Makes slots on the device of a network; they record on a card, and nowhere else.

    Args:
        count: how many.
        build: makes a network.
        first: the network of the first slot.
    """
    made = []
    for number in range(count):
        live = first if number == 0 else LiveModel(build(), first.device)
        stream: Any = torch.cuda.Stream(first.device) if first.device.type == "cuda" else None
        made.append(Slot(live, Repeater() if stream is None else GraphRecorder(stream), stream))
    return made


@dataclass
class Flight:
    """A client whose steps are asked for, and not waited for.

    Attributes:
        sent: a copy of its weights, on the device.
        sums: of these, finite where all of them are.
        landed: on a card, when all of that is there.
    """

    task: ClientTask
    client: ClientContext
    run: SGDRun
    sent: SentWeights
    sums: list[Tensor]
    landed: Any = None


class InSlots:
    """Trains the clients of a cohort.

    Args:
        worker: of this process.
        slots: its own; the first is its network.
        stay: weights are added up here, and need not come to the host.
    """

    def __init__(self, worker: Worker, slots: Sequence[Slot], stay: bool):
        self.worker, self.stay = worker, stay
        self.slots = slots if can_wait(worker.trainer) and not worker.keeps_or_changes else slots[:1]

    def answers(self, tasks: Iterable[ClientTask]) -> Iterator[ClientAnswer]:
        """Yields the answer of each client, in order."""
        waiting: deque[ClientAnswer | Flight] = deque()
        for number, task in enumerate(tasks):
            waiting.append(self._begin(task, self.slots[number % len(self.slots)]))
            if len(waiting) == 2 * len(self.slots):  # so that the device has work while this half is looked at
                yield from self._landed([waiting.popleft() for _ in self.slots])
        yield from self._landed(waiting)

    def _begin(self, task: ClientTask, slot: Slot) -> ClientAnswer | Flight:
        """Asks for a client's steps, on its slot's stream; a client that must be waited for, or fails, has answered.

        What one stream has made and another uses is kept until both are through with it.
        """
        if slot.stream is None:
            return self._begun(task, slot)
        main, live = torch.cuda.current_stream(slot.live.device), self.worker.live
        received = live.received(task.broadcast.weights)
        slot.stream.wait_stream(main)
        with torch.cuda.stream(slot.stream):
            begun = self._begun(task, slot)
        used = [*received.values()]
        if isinstance(begun, Flight):
            begun.landed = slot.stream.record_event()
            used += begun.client.data.train.tensors.values()
            made = [*begun.sent.tensors.values(), *begun.sums, *begun.run.means.values()]
        else:  # nobody waits for it later
            main.wait_stream(slot.stream)
            made = [tensor for tensor in begun.state.values() if tensor.is_cuda]
        for tensor in made:
            tensor.record_stream(main)
        for tensor in used:
            tensor.record_stream(slot.stream)
        return begun

    def _begun(self, task: ClientTask, slot: Slot) -> ClientAnswer | Flight:
        if len(self.slots) == 1:
            return self.worker.serve_one("train", task, slot)
        begun = self.worker.begin(task, slot)
        if isinstance(begun, ClientAnswer):
            return begun
        client, run = begun
        sent = slot.live.sent(slot.live.weights, run.broadcast.weights, stay=True)
        return Flight(task, client, run, sent, sums_of(sent.tensors.values()))

    def _landed(self, some: Iterable[ClientAnswer | Flight]) -> Iterator[ClientAnswer]:
        """Waits for all of them, and yields their answers in order."""
        every = list(some)
        flights = [one for one in every if isinstance(one, Flight)]
        for flight in flights:
            if flight.landed is not None:
                flight.landed.wait()
        scalars = [t.double() for flight in flights for t in (*flight.run.means.values(), *flight.sums)]
        numbers = iter(torch.stack(scalars).tolist() if scalars else [])
        for one in every:
            yield self._ended(one, numbers) if isinstance(one, Flight) else one

    def _ended(self, flight: Flight, numbers: Iterator[Any]) -> ClientAnswer:
        """The answer of a client whose figures are the next of these numbers."""
        flight.run.means = {name: next(numbers) for name in flight.run.means}
        sums = [next(numbers) for _ in flight.sums]
        sent = flight.sent if self.stay else flight.sent.on_host()
        return self.worker.end(flight.task, flight.client, flight.run, sent, sums)


def can_wait(trainer: LocalTrainer) -> bool:
    """Returns whether a trainer's clients can answer after others have begun in their place."""
    return (
        isinstance(trainer, SGDTrainer)
        and not trainer.own_network
        and type(trainer).fit is LocalTrainer.fit
        and type(trainer).start is SGDTrainer.start
        and trainer.run.ends_later
    )
