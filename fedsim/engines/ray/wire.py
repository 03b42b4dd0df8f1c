"""How tasks and answers cross process borders with few copies: tensors travel as numpy arrays, beside the pickle.

Ray lays the bytes of large arrays into shared memory as they are, and hands them out as views; whoever unpacks them
copies, so that nothing holds on to Ray's memory. What several tasks of an exchange have in common travels once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from fedsim.messages.cohort import CohortTask
from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors

Swap = Callable[[Tensors], Tensors]


def send_tensors_as_arrays() -> None:
    """Teaches Ray, in this process, how tensors travel; needs a connection to Ray."""
    import ray

    ray.util.register_serializer(
        torch.Tensor,
        serializer=lambda tensor: tensor.detach().cpu().numpy(),
        deserializer=lambda array: torch.from_numpy(array.copy()),
    )


@dataclass(frozen=True)
class Shared:
    """Tensors that travel by themselves, by number; an object of one class, which Ray pickles as a whole."""

    tensors: tuple[Tensors, ...] = ()


class Elsewhere(Tensors):
    """Stands for tensors that travel by themselves.

    Attributes:
        number: which of them.
    """

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def __reduce__(self) -> tuple[type[Elsewhere], tuple[int]]:
        return Elsewhere, (self.number,)


def in_common(tasks: Iterable[CohortTask]) -> Shared:
    """The tensors that several tasks send (the same object), in the order in which they first appear."""
    counts: Counter[int] = Counter()
    first: dict[int, Tensors] = {}
    for task in tasks:
        for key, tensors in {id(t): t for one in task.clients for t in _sent(one.broadcast) if t}.items():
            counts[key] += 1
            first.setdefault(key, tensors)
    return Shared(tuple(tensors for key, tensors in first.items() if counts[key] > 1))


def without(task: CohortTask, numbers: Mapping[int, int]) -> CohortTask:
    """The task without the tensors that travel by themselves.

    Args:
        task: as a worker shall get it.
        numbers: of those tensors, by their `id`.
    """
    places = {key: Elsewhere(number) for key, number in numbers.items()}
    return _swapped(task, lambda tensors: places.get(id(tensors), tensors))


def whole(task: CohortTask, shared: Shared) -> CohortTask:
    """The inverse of `without`: the same objects every time."""
    return _swapped(task, lambda tensors: shared.tensors[tensors.number] if isinstance(tensors, Elsewhere) else tensors)


def _swapped(task: CohortTask, swap: Swap) -> CohortTask:
    """The task with other tensors in its broadcasts; those that clients share stay shared."""
    known: dict[int, Broadcast] = {}
    for one in task.clients:
        sent = one.broadcast
        if id(sent) not in known:
            extras = {name: swap(tensors) for name, tensors in sent.extras.items()}
            known[id(sent)] = replace(sent, weights=swap(sent.weights), extras=extras)
    return task.of(replace(one, broadcast=known[id(one.broadcast)]) for one in task.clients)


def _sent(broadcast: Broadcast) -> Iterator[Tensors]:
    yield broadcast.weights
    yield from broadcast.extras.values()
