"""The edge grid: seconds, joules and bytes of an exchange, and who is accepted.

The figures of clients 0..3 are derived in told_clients.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from flwr.app import Message, RecordDict
from told_clients import WEIGHTS, computing, edge, exchange, rounds_kept, update, windows

from devices.cost import Cost, Work
from devices.profile import SHIPPED
from fedsim.grid.edge import EMPTY_ROUND_S
from fedsim.grid.pricing import Prices, RadioTails
from fedsim.messages.cohort import ClientAnswer, ClientTask
from fedsim.messages.updates import Broadcast

# --- seconds, joules, bytes ------------------------------------------------------------------------------------------


def test_round_of_one_client_in_seconds_joules_and_bytes():
    grid = edge()
    accepted, reports = exchange(grid, [0])
    report = reports[0]
    assert accepted == [0]
    assert (report.cost.down_s, report.cost.compute_s, report.cost.up_s) == pytest.approx((0.12, 0.3, 0.22))
    assert (report.joules, grid.clock.now_s) == pytest.approx((3.68, 0.64))
    assert (report.work.down_bytes, report.work.up_bytes, report.work.peak_memory_bytes) == (1_000_000, 1_000_000, 1000)
    assert (report.outcome, report.reason, report.device, report.num_examples) == ("completed", "", "reference", 1)
    assert report.metrics == {"train_loss": 0.0}


def test_round_lasts_as_long_as_its_slowest_client_and_the_others_wait():
    """1.54 s; client 0 waits 1.54 - 0.64 = 0.9 s at 1 W, client 3 not at all."""
    grid = edge()
    accepted, reports = exchange(grid)
    assert accepted == [0, 1, 2, 3]
    assert grid.clock.now_s == pytest.approx(1.54)
    assert [reports[c].wait_s for c in range(4)] == pytest.approx([0.9, 0.6, 0.3, 0.0])
    assert [reports[c].wait_joules for c in range(4)] == pytest.approx([0.9, 0.6, 0.3, 0.0])


def test_second_exchange_starts_when_the_first_ended():
    grid = edge()
    exchange(grid)
    _, reports = exchange(grid, [0])
    assert (reports[0].start_s, grid.clock.now_s) == pytest.approx((1.54, 2.18))


# --- deadline and over-selection -------------------------------------------------------------------------------------


def test_reply_after_the_deadline_is_withheld_but_paid_for():
    """Client 3 needs 1.54 s and 0.24 + 12 + 0.44 J; its update went over the network for nothing."""
    grid = edge(deadline_s=1.3)
    accepted, reports = exchange(grid)
    assert (accepted, grid.clock.now_s) == ([0, 1, 2], 1.3)
    assert reports[3].outcome == "late"
    assert (reports[3].joules, reports[3].work.up_bytes, reports[3].wait_s) == (pytest.approx(12.68), 1_000_000, 0)


def test_deadline_that_all_meet_changes_nothing():
    grid = edge(deadline_s=2.0)
    accepted, _ = exchange(grid)
    assert (accepted, grid.clock.now_s) == ([0, 1, 2, 3], pytest.approx(1.54))


@pytest.mark.parametrize(("deadline_s", "timeout"), [(1.0, 5.0), (5.0, 1.0), (None, 1.0)])
def test_earlier_of_deadline_and_timeout_counts(deadline_s: float | None, timeout: float):
    grid = edge(deadline_s=deadline_s)
    messages = [Message(RecordDict({"arrays": WEIGHTS}), client, "train") for client in range(4)]
    assert len(grid.send_and_receive(messages, timeout=timeout)) == 2
    assert grid.clock.now_s == 1.0


def test_over_selection_takes_the_first_replies_and_closes_the_round_with_them():
    """Here the later clients are the faster ones: 3 (0.64 s) and 2 (0.94 s) come first."""

    def answer(task: ClientTask) -> ClientAnswer:
        return replace(update(task), work=replace(computing(3 - task.client), up_bytes=1_000_000))

    grid = edge(answer=answer, keep=2)
    accepted, reports = exchange(grid)
    assert (accepted, grid.clock.now_s) == ([2, 3], pytest.approx(0.94))
    assert [reports[c].outcome for c in range(4)] == ["late", "late", "completed", "completed"]
    assert reports[0].joules == pytest.approx(12.68)


def test_over_selection_does_not_cut_evaluations():
    accepted, _ = exchange(edge(keep=2), phase="evaluate")
    assert accepted == [0, 1, 2, 3]


def test_deadline_does_not_change_what_the_other_clients_draw():
    """On jittering phones, client 2 is as fast in round 1 whether a deadline cuts off others or not, and in round 2."""
    free, cut = edge(device="pixel3"), edge(device="pixel3", deadline_s=1.3)
    costs = []
    for grid in (free, cut):
        for grid.round in (1, 2):
            # The tail of a radio depends on when the next round begins, which is no draw.
            found = {client: report.cost for client, report in exchange(grid)[1].items()}
            costs.append({c: replace(cost, up_tail_s=0.0, compute_tail_s=0.0) for c, cost in found.items()})
    assert free.clock.now_s > cut.clock.now_s
    assert len({cost.down_s for cost in costs[0].values()}) == 4
    assert costs[0] != costs[1]
    assert costs[:2] == costs[2:]


# --- dropouts --------------------------------------------------------------------------------------------------------


def test_client_that_is_offline_at_the_start_gets_nothing_and_pays_nothing():
    asked = []
    grid = edge(
        answer=lambda task: asked.append(task.client) or update(task),
        availability=windows({1: (5.0, 9.0), 3: (0.0, 0.0)}),
    )
    accepted, reports = exchange(grid)
    assert accepted == asked == [0, 2]
    assert (reports[1].outcome, reports[1].reason) == ("offline", "offline when the round began")
    assert (reports[1].joules, reports[1].cost.total_s, reports[1].work) == (0, 0, Work())
    grid.clock.advance(4.0)
    assert exchange(grid)[0] == [0, 1, 2]


@pytest.mark.parametrize(("leaves_s", "down_bytes", "up_bytes"), [(0.03, 250_000, 0), (1.185, 1_000_000, 750_000)])
def test_transfer_that_is_cut_short_counts_the_bytes_that_went(leaves_s: float, down_bytes: int, up_bytes: int):
    """Client 2 leaves after 0.03 of its 0.12 s down, or after 0.12 + 0.9 s and 0.165 of its 0.22 s up."""
    _, reports = exchange(edge(availability=windows({2: (0.0, leaves_s)})))
    assert (reports[2].work.down_bytes, reports[2].work.up_bytes) == (down_bytes, up_bytes)


def test_client_that_goes_offline_pays_until_then_and_uploads_nothing():
    """Client 2 leaves at 0.57 s: after 0.12 s of download at 2 W and half of its 0.9 s of training at 10 W."""
    grid = edge(availability=windows({2: (0.0, 0.57)}))
    accepted, reports = exchange(grid)
    gone = reports[2]
    assert (accepted, gone.outcome, gone.reason) == ([0, 1, 3], "offline", "went offline during the round")
    assert (gone.cost.down_s, gone.cost.compute_s, gone.cost.up_s) == pytest.approx((0.12, 0.45, 0.0))
    assert gone.joules == pytest.approx(0.24 + 4.5)
    assert (gone.work.down_bytes, gone.work.up_bytes, gone.wait_s) == (1_000_000, 0, 0)
    assert (rounds_kept(grid), grid.clock.now_s) == ({0: 1, 1: 1, 3: 1}, pytest.approx(1.54))


def test_client_that_goes_offline_as_its_reply_arrives_made_it():
    grid = edge(availability=windows({0: (0.0, 0.65)}))
    assert exchange(grid, [0])[0] == [0]
    assert exchange(grid, [0])[0] == []


def test_crash_ends_the_clients_round_and_costs_what_it_spent(tmp_path):
    """A device that fails 60 times a minute: -log(u) seconds of work until the crash, by the fleet's own draw."""
    tree = yaml.safe_load((SHIPPED / "reference.yaml").read_text())
    tree["reliability"]["failures_per_min"]["value"] = 60
    (tmp_path / "brittle.yaml").write_text(yaml.safe_dump(tree))
    grid = edge(30, device=str(tmp_path / "brittle.yaml"))
    accepted, reports = exchange(grid, range(30))
    full_s = {client: 0.34 + 0.3 * (client + 1) for client in range(30)}
    crashed = {client: grid.fleet.crash_s(client, 1) for client in range(30)}
    assert 0 < len(accepted) < 30
    for client, report in reports.items():
        if crashed[client] < full_s[client]:
            assert (report.outcome, report.reason) == ("failed", "crashed during the round")
            assert report.cost.total_s == pytest.approx(crashed[client])
        else:
            assert report.outcome == "completed"
            assert report.cost.total_s == pytest.approx(full_s[client])
    assert sorted(rounds_kept(grid)) == [c for c in range(30) if crashed[c] >= full_s[c] - 0.22]


def test_client_without_memory_dies_after_its_download():
    """The device has 2**32 bytes; the trainer says it needs one more. No compute, no upload, no state."""

    def answer(task: ClientTask) -> ClientAnswer:
        told = update(task)
        return replace(told, work=replace(told.work, peak_memory_bytes=2**32 + (task.client == 0)))

    grid = edge(answer=answer)
    accepted, reports = exchange(grid)
    dead = reports[0]
    assert (accepted, dead.outcome) == ([1, 2, 3], "out_of_memory")
    assert dead.reason == f"needs {2**32 + 1} bytes at its peak"
    assert (dead.cost.down_s, dead.cost.compute_s, dead.cost.up_s) == (pytest.approx(0.12), 0, 0)
    assert (dead.joules, dead.work.down_bytes, dead.work.up_bytes) == (pytest.approx(0.24), 1_000_000, 0)
    assert rounds_kept(grid) == {1: 1, 2: 1, 3: 1}


def test_round_in_which_nobody_answers_takes_time():
    grid = edge(availability=windows(dict.fromkeys(range(4), (200.0, 300.0))))
    assert exchange(grid)[0] == []
    assert grid.clock.now_s == EMPTY_ROUND_S
    grid.deadline_s = 7.0
    exchange(grid)
    assert grid.clock.now_s == EMPTY_ROUND_S + 7.0


def test_exchange_with_nobody_takes_no_time():
    grid = edge()
    assert (grid.send_and_receive([]), grid.clock.now_s) == ([], 0.0)


# --- the radio's tail, and prices ------------------------------------------------------------------------------------


def test_rounds_that_follow_each_other_keep_a_radio_awake_once():
    """Tail 10 s at 2 W. Contacts of 1 s each at 0, 3 and 30 s: the second pays 10 s less the 8 that the first had
    paid for (its tail ran from 1 to 11 s), the third all of it; another client pays for itself.
    """
    tails = RadioTails()
    cost = Cost(down_s=0.5, up_s=0.5, up_tail_s=10.0, tail_watts=2.0)
    first, second, third = (tails.contact(7, start_s, cost) for start_s in (0.0, 3.0, 30.0))
    assert [c.tail_joules for c in (first, second, third)] == [20.0, 4.0, 20.0]
    assert tails.contact(8, 3.0, cost).tail_joules == 20.0
    tails.forget(41.0)
    assert tails.awake_until_s == {}


def test_what_overlaps_a_cut_upload_is_taken_from_the_tail_beside_the_computation():
    """The contact ended in its upload, so it has 3 s of tail beside the computation only: 2 of them were paid for."""
    tails = RadioTails()
    tails.awake_until_s[1] = 12.0
    cut = Cost(down_s=1.0, compute_s=3.0, up_s=0.2, compute_tail_s=3.0, tail_watts=1.0)
    assert tails.contact(1, 10.0, cut).tail_joules == 1.0
    assert tails.awake_until_s == {1: pytest.approx(14.2)}


@pytest.mark.parametrize("limit_s", [None, 1.0, 1.2])
def test_who_surely_arrives_is_not_priced_and_all_others_are_found_as_by_their_price(limit_s: float | None):
    """Client 2 goes offline after 1 s, client 3 needs more memory than there is; the others take 0.64 and 0.94 s."""
    grid = edge(availability=windows({2: (0.0, 1.0)}))
    prices = Prices(grid.fleet, grid.latency, 1, 0.0)
    answers = [update(ClientTask(client, Broadcast(1, {"w": torch.zeros(250_000)}))) for client in range(4)]
    answers = [replace(a, work=replace(a.work, down_bytes=1_000_000)) for a in answers]
    answers[3] = replace(answers[3], work=replace(answers[3].work, peak_memory_bytes=2**32 + 1))
    arrives = [priced.arrives(limit_s) for priced in prices.settle(answers)]
    assert prices.arrivals(answers, limit_s) == arrives == [True, True, False, False]
