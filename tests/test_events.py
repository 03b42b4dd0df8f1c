"""In which order events leave their queue."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from fedsim.grid.events import Event, EventQueue


def drained(queue: EventQueue[str]) -> list[Event]:
    return [queue.pop()[0] for _ in range(len(queue))]


def test_equal_times_leave_by_client_however_they_came():
    queue = EventQueue[str]()
    for event in (Event(2.0, 1), Event(1.0, 9, 1), Event(1.0, 4, 2)):
        queue.put(event, "")
    assert queue.next_s == 1.0
    assert drained(queue) == [Event(1.0, 4, 2), Event(1.0, 9, 1), Event(2.0, 1)]
    assert queue.next_s == math.inf


def test_nobody_is_on_the_way_twice():
    queue = EventQueue[str]()
    queue.put(Event(1.0, 3), "first")
    with pytest.raises(ValueError, match="client 3 is on its way already"):
        queue.put(Event(2.0, 3), "second")
    assert (queue.pop()[1], 3 in queue) == ("first", False)
    queue.put(Event(2.0, 3), "third")
    with pytest.raises(ValueError, match="client 4 must come at some time, got nan"):
        queue.put(Event(math.nan, 4), "")


@given(some.lists(some.tuples(some.booleans(), some.sampled_from([0.0, 0.5, 2.0]), some.integers(0, 5))))
def test_events_leave_in_order_of_time_and_client(steps: list[tuple[bool, float, int]]):
    """Whatever is put and taken in between, as long as nothing is put before what has left."""
    queue, now_s = EventQueue[int](), 0.0
    for dispatch, (takes, later_s, client) in enumerate(steps):
        if takes and queue:
            event, item = queue.pop()
            assert event.time_s >= now_s
            assert item == event.client
            assert all(event < other for other, _ in queue)
            now_s = event.time_s
        elif client not in queue:
            queue.put(Event(now_s + later_s, client, dispatch), client)
    waiting = [event for event, _ in queue]
    assert waiting == drained(queue) == sorted(waiting)
