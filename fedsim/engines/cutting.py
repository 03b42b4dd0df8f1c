"""How the clients of a cohort are shared out among several places."""

from __future__ import annotations

from collections.abc import Iterator

from fedsim.messages.cohort import ClientTask, CohortTask

CLIENTS_PER_TASK = 16


def cut(task: CohortTask, places: int, small: bool = False) -> Iterator[CohortTask]:
    """The task in parts, in order, that each go to one place; none has more than 16 clients unless a unit is larger.

    Many small parts balance the load but each costs some milliseconds: so they get smaller towards the end (guided
    self-scheduling, Polychronopoulos and Kuck 1987), or are as few as the limit allows.

    Args:
        task: of the whole cohort.
        places: workers or nodes.
        small: many small parts rather than few.
    """
    units, start, left, idle = task.units(), 0, len(task.clients), places
    while start < len(units):
        size = min(CLIENTS_PER_TASK, -(-left // (places if small else idle)))
        idle = max(1, idle - 1)
        end, count = start + 1, len(units[start])
        while end < len(units) and count + len(units[end]) <= size:
            count += len(units[end])
            end += 1
        yield task.of(_flat(units[start:end]))
        start, left = end, left - count


def _flat(units: list[list[ClientTask]]) -> Iterator[ClientTask]:
    for unit in units:
        yield from unit
