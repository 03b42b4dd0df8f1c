"""Who is on time, and how long a round takes."""

import pytest

from fedsim.grid.clock import SimClock


def test_round_lasts_until_the_slowest_reply():
    clock = SimClock(now_s=10.0)
    timing = clock.close_round({1: 3.0, 0: 2.0, 2: 8.0})
    assert (timing.on_time, timing.late, timing.round_s, clock.now_s) == ((0, 1, 2), (), 8.0, 18.0)


def test_reply_after_the_deadline_is_late_and_the_round_ends_at_the_deadline():
    clock = SimClock()
    timing = clock.close_round({3: 2.0, 7: 9.0}, deadline_s=5.0)
    assert (timing.on_time, timing.late, timing.round_s, clock.now_s) == ((3,), (7,), 5.0, 5.0)


def test_reply_at_the_deadline_is_on_time():
    timing = SimClock().close_round({3: 5.0}, deadline_s=5.0)
    assert (timing.on_time, timing.late) == ((3,), ())


def test_round_without_late_replies_ends_before_its_deadline():
    assert SimClock().close_round({3: 2.0, 7: 4.0}, deadline_s=5.0).round_s == 4.0


def test_over_selection_ends_the_round_with_the_last_reply_it_keeps():
    clock = SimClock()
    timing = clock.close_round({0: 4.0, 1: 1.0, 2: 3.0, 3: 2.0}, keep=2)
    assert (timing.on_time, timing.late, clock.now_s) == ((1, 3), (0, 2), 2.0)


def test_equal_arrivals_are_kept_by_client_id():
    timing = SimClock().close_round({9: 1.0, 4: 1.0, 6: 1.0}, keep=2)
    assert (timing.on_time, timing.late) == ((4, 6), (9,))


def test_order_in_which_the_host_hands_in_replies_does_not_matter():
    arrival_s = {5: 1.0, 2: 2.0, 8: 2.0, 1: 3.0}
    backwards = dict(reversed(arrival_s.items()))
    assert SimClock().close_round(arrival_s, 2.5, keep=2) == SimClock().close_round(backwards, 2.5, keep=2)


@pytest.mark.parametrize(
    ("keep", "on_time", "round_s"),
    [
        (2, (0, 1), 2.0),  # filled before the deadline
        (3, (0, 1, 2), 4.0),  # just filled; client 3 is not waited for
        (4, (0, 1, 2), 5.0),  # one is missing at the deadline
    ],
)
def test_deadline_counts_only_while_kept_replies_are_missing(keep: int, on_time: tuple, round_s: float):
    timing = SimClock().close_round({0: 1.0, 1: 2.0, 2: 4.0, 3: 9.0}, deadline_s=5.0, keep=keep)
    assert (timing.on_time, timing.round_s) == (on_time, round_s)


def test_nobody_on_time_costs_the_whole_deadline():
    clock = SimClock()
    timing = clock.close_round({0: 6.0, 1: 7.0}, deadline_s=5.0)
    assert (timing.on_time, timing.late, clock.now_s) == ((), (0, 1), 5.0)


def test_round_without_replies_takes_no_time():
    clock = SimClock(3.0)
    timing = clock.close_round({}, deadline_s=5.0)
    assert (timing.on_time, timing.late, timing.round_s, clock.now_s) == ((), (), 0.0, 3.0)


def test_rounds_begin_a_while_after_each_other():
    """Every 10 s: rounds of 4, 13 and 1 s begin at 0, 10, 23 (the second one was longer) and 33 s."""
    clock, began_s = SimClock(), []
    for round_s in (4.0, 13.0, 1.0, 1.0):
        clock.begin_round(10.0)
        began_s.append(clock.now_s)
        clock.advance(round_s)
    assert began_s == [0.0, 10.0, 23.0, 33.0]
    assert (clock.now_s, clock.next_round_s(10.0), clock.next_round_s(None)) == (34.0, 43.0, 34.0)


def test_without_an_interval_rounds_follow_at_once():
    clock = SimClock(3.0)
    clock.begin_round()
    clock.advance(2.0)
    clock.begin_round(None)
    assert clock.now_s == 5.0


def test_advance_lets_time_pass():
    clock = SimClock(1.5)
    clock.advance(2.0)
    assert clock.now_s == 3.5
