"""What is on its way in simulated time: events leave in the order of their time, and never by host arrival."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Event(NamedTuple):
    """When something happens to a client: equal times are ordered by client, then by dispatch."""

    time_s: float
    client: int
    dispatch: int = 0


class EventQueue(Generic[T]):
    """A queue of what will happen to clients, each of whom is in it at most once."""

    def __init__(self) -> None:
        self._heap: list[Event] = []
        self._items: dict[int, T] = {}

    def put(self, event: Event, item: T) -> None:
        """Adds an event.

        Raises:
            ValueError: if its client has one already, or its time is nan.
        """
        if event.client in self._items:
            raise ValueError(f"client {event.client} is on its way already")
        if math.isnan(event.time_s):
            raise ValueError(f"client {event.client} must come at some time, got {event.time_s}")
        self._items[event.client] = item
        heapq.heappush(self._heap, event)

    @property
    def next_s(self) -> float:
        """The time of the first event; inf where there is none."""
        return self._heap[0].time_s if self._heap else math.inf

    def pop(self) -> tuple[Event, T]:
        """Takes the first event out."""
        event = heapq.heappop(self._heap)
        return event, self._items.pop(event.client)

    def __contains__(self, client: int) -> bool:
        return client in self._items

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[tuple[Event, T]]:
        """The events in order; they stay."""
        return ((event, self._items[event.client]) for event in sorted(self._heap))
