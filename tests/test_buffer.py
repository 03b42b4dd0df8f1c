"""Who is sent out when, and which replies make new weights, where clients come in their own time (`loop=buffer`).

Times are those of `told_clients`: clients 0 to 3 take 0.64, 0.94, 1.24 and 1.54 s.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from flwr.app import Message, RecordDict
from told_clients import WEIGHTS, computing, edge, one_fails, update, windows

from devices.availability import Availability
from fedsim.errors import ClientError
from fedsim.grid.edge import TOO_LATE, EdgeGrid
from fedsim.grid.exchange import Exchange
from fedsim.grid.loops import TOO_STALE, BufferLoop
from fedsim.messages.cohort import ClientAnswer, ClientTask
from fedsim.report.repeat import command_of
from fedsim.settings.compose import compose


def instruct(number: int, clients: Sequence[int] | None, repeat: int) -> list[Message]:
    return [Message(RecordDict({"arrays": WEIGHTS}), client, "train") for client in clients or ()]


def rounds(grid: EdgeGrid, loop: BufferLoop, count: int, first: int = 1) -> list[Exchange]:
    """The exchanges of some rounds."""
    found = []
    for number in range(first, first + count):
        grid.round = number
        found.append(loop.exchange(grid, number, instruct))
    return found


def seen(exchange: Exchange) -> list[tuple[int, float, int]]:
    """Of every client that arrived: its id, when it was sent out, and how stale its reply was."""
    return [(r.client, round(r.start_s, 9), int(r.metrics["staleness"])) for r in exchange.reports]


def equal(task: ClientTask) -> ClientAnswer:
    """As `update`, of clients that all take 0.64 s."""
    return replace(update(task), work=replace(computing(0), up_bytes=1_000_000))


class Twice(Availability):
    """Client 1 is online until 0.5 s, and again from 2 s on."""

    def _end_s(self, client_id: int, now_s: float) -> float | None:
        away = client_id == 1 and 0.5 <= now_s < 2
        return None if away else 0.5 if client_id == 1 and now_s < 0.5 else math.inf

    def online_from(self, client_id: int, now_s: float) -> float:
        return max(2.0, now_s)


def test_clients_are_replaced_at_once_and_two_replies_make_new_weights():
    """Client 0 is back at 0.64 s, is sent out again under the same weights, and comes at 1.28 s, one version late."""
    grid = edge()
    first, second, third = rounds(grid, BufferLoop(concurrency=4, buffer_size=2), 3)
    assert seen(first) == [(0, 0.0, 0), (1, 0.0, 0)]
    assert seen(second) == [(2, 0.0, 1), (0, 0.64, 1)]
    assert seen(third) == [(3, 0.0, 2), (1, 0.94, 1)]
    assert grid.clock.now_s == pytest.approx(1.88)
    assert [origin.staleness for origin in second.origins] == [1, 1]
    assert third.accepted == (1, 3)  # replies are in client order


def test_one_that_arrives_as_the_buffer_fills_is_in_the_next_one_before_anybody_is_sent_out():
    grid = edge(answer=equal)
    first, second = rounds(grid, BufferLoop(concurrency=4, buffer_size=3), 2)
    assert seen(first) == [(0, 0.0, 0), (1, 0.0, 0), (2, 0.0, 0)]
    assert seen(second)[0] == (3, 0.0, 1)
    assert {start_s for _, start_s, _ in seen(second)[1:]} == {0.64}
    assert grid.clock.now_s == pytest.approx(1.28)


def test_two_aggregations_may_share_an_instant():
    grid = edge(answer=equal)
    first, second, third = rounds(grid, BufferLoop(concurrency=4, buffer_size=2), 3)
    assert [e.accepted for e in (first, second)] == [(0, 1), (2, 3)]
    assert [origin.staleness for origin in second.origins] == [1, 1]
    assert {start_s for _, start_s, _ in seen(third)} == {0.64}


def test_a_reply_that_is_too_stale_is_charged_and_not_used():
    grid = edge()
    _, second = rounds(grid, BufferLoop(concurrency=4, buffer_size=2, max_staleness=0), 2)
    late = [report for report in second.reports if report.outcome == "late"]
    assert {report.reason for report in late} == {TOO_STALE}
    assert all(report.joules > 0 for report in late)
    assert {origin.staleness for origin in second.origins} == {0}


def test_a_client_whose_reply_is_not_used_keeps_what_it_has_and_owes_what_it_owed():
    """Client 2 comes stale in round 2: what agrees with the server's books stays as it was."""

    def answer(task: ClientTask) -> ClientAnswer:
        told = update(task)
        return replace(told, state={**told.state, "reply.rounds": told.state["rounds"]})

    grid = edge(answer=answer)
    _, second = rounds(grid, BufferLoop(concurrency=4, buffer_size=2, max_staleness=0), 2)
    assert ("late", 2) in {(report.outcome, report.client) for report in second.reports}
    assert sorted(grid.store.get(2)) == ["rounds"]
    assert sorted(grid.store.get(1)) == ["reply.rounds", "rounds"]


def test_after_the_deadline_nobody_waits_for_a_client_that_still_works():
    """At 1 s clients 2 and 3 are given up; 2 ends at 1.24 s, and is sent out again only then."""
    grid = edge(deadline_s=1.0)
    loop = BufferLoop(concurrency=4, buffer_size=4)
    (first,) = rounds(grid, loop, 1)
    late = {report.client: report for report in first.reports if report.outcome == "late"}
    assert set(late) == {2, 3}
    assert late[2].reason == TOO_LATE
    assert late[2].cost.total_s == pytest.approx(1.24)
    again = [report for report in rounds(grid, loop, 1, 2)[0].reports if report.client == 2]
    assert all(report.start_s >= 1.24 for report in again)


def test_where_all_still_work_after_a_deadline_the_server_waits_for_the_first():
    """All are given up at 0.1 s; client 0 ends at 0.64 s and is sent out then, and not a minute later."""
    grid = edge(deadline_s=0.1)
    _, second, third = rounds(grid, BufferLoop(concurrency=4, buffer_size=4), 3)
    assert second.reports == ()
    assert [(report.client, report.start_s) for report in third.reports] == [(0, pytest.approx(0.64))]


def test_whoever_drops_out_makes_room_for_another():
    """Client 1 is online for half a second only: the next event at 0.5 s, and client 3 takes its place."""
    grid = edge(availability=windows({1: (0, 0.5)}))
    (first,) = rounds(grid, BufferLoop(concurrency=3, buffer_size=3), 1)
    assert 1 in {report.client for report in first.reports}
    assert next((r.client, r.outcome, r.cost.total_s) for r in first.reports) == (1, "offline", 0.5)
    assert 0.5 in {contact.start_s for _, contact in grid.in_flight}
    assert len(first.replies) == 3


def test_work_that_is_paused_goes_on_when_its_client_is_back():
    """Client 1 works 0.5 s, is away until 2 s, and needs 0.44 s more."""
    grid = edge(2, pauses=True, availability=Twice)
    (first,) = rounds(grid, BufferLoop(concurrency=2, buffer_size=4, on_offline="pause"), 1)
    paused = next(report for report in first.reports if report.client == 1)
    assert (paused.outcome, paused.metrics["paused_s"]) == ("completed", pytest.approx(1.5))
    assert paused.cost.total_s == pytest.approx(0.94)
    assert paused.start_s + paused.cost.total_s + 1.5 == grid.clock.now_s == pytest.approx(2.44)


def test_a_round_ends_where_nothing_comes_any_more():
    """Where nobody is online, the server tries again after a minute; what it has, it uses."""
    grid = edge(2, availability=windows({0: (0, 1), 1: (0, 1)}))
    first, second = rounds(grid, BufferLoop(concurrency=2, buffer_size=9), 2)
    assert first.accepted == (0, 1)
    assert (second.replies, second.reports) == ([], ())
    assert grid.clock.now_s == pytest.approx(61.0)  # client 0 had been sent out again, and left at 1 s


def test_clients_that_fail_in_the_work_that_they_planned_bring_nothing():
    """Both come, leave at 1 s, and train when nothing more is on its way."""
    planned: set[tuple[int, float]] = set()

    def fails_later(task: ClientTask) -> ClientAnswer:
        if (key := (task.client, task.repeat)) not in planned:
            planned.add(key)
            return update(task)
        return replace(update(task), outcome="failed", reason="as told", weights=None)

    grid = edge(2, fails_later, windows({0: (0, 1), 1: (0, 1)}), on_client_error="drop")
    grid.serving.engine.can_tell = True
    (first,) = rounds(grid, BufferLoop(concurrency=2, buffer_size=9), 1)
    assert (first.replies, first.accepted) == ([], ())
    assert {report.client for report in first.reports if report.outcome == "failed"} == {0, 1}


def test_only_changes_of_the_weights_make_replies_stale():
    """Clients 0 to 2 lack the memory, over and over: round 1 brings nothing, and client 3 comes fresh in round 2."""

    def only_3(task: ClientTask) -> ClientAnswer:
        told = update(task)
        return told if task.client == 3 else ClientAnswer(task.client, "out_of_memory", "as told", work=told.work)

    first, second = rounds(edge(answer=only_3), loop := BufferLoop(concurrency=4, buffer_size=1, max_staleness=0), 2)
    assert (first.replies, loop.unchanged) == ([], [1])
    assert second.accepted == (3,)
    assert [age for client, _, age in seen(second) if client == 3] == [0]


def test_one_that_fails_stops_the_run_when_it_arrives_or_is_counted():
    stopping, dropping = edge(answer=one_fails), edge(answer=one_fails, on_client_error="drop")
    loop = BufferLoop(concurrency=4, buffer_size=2)
    rounds(stopping, loop, 1)
    with pytest.raises(ClientError, match=r"client 2 .* failed in round 1"):
        rounds(stopping, loop, 1, 2)
    (first,) = rounds(dropping, BufferLoop(concurrency=4, buffer_size=3), 1)
    assert {r.client: r.outcome for r in first.reports}[2] == "failed"
    assert len(first.replies) == 3


def test_stale_replies_count_for_less():
    """(1 + 3)^-0.5 is a half; 1 / (0.5 (7 - 4) + 1) is 0.4."""
    weights = {
        kind: [BufferLoop(staleness_weight=kind).weight(s) for s in (0, 3, 7)]
        for kind in ("constant", "polynomial", "hinge")
    }
    assert weights["constant"] == [1, 1, 1]
    assert weights["polynomial"] == [1, 0.5, pytest.approx(8**-0.5)]
    assert weights["hinge"] == [1, 1, pytest.approx(0.4)]


def test_the_command_that_repeats_a_run_names_who_is_at_work_once():
    command = command_of(compose(["method=fedbuff", "loop.concurrency=7"]))
    assert command == "fedsim run method=fedbuff loop.concurrency=7"
