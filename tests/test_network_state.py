"""What clients keep: their own stays when a reply is not taken, and what is of the reply rolls back.

The seconds of clients 0..3 are derived in told_clients.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from told_clients import WEIGHTS, edge, exchange, one_fails, rounds_kept, update, windows

from fedsim.grid.edge import EdgeGrid
from fedsim.messages.cohort import ClientAnswer, ClientTask
from fedsim.messages.records import to_array


def test_state_travels_with_the_reply_and_comes_back():
    grid = edge()
    exchange(grid, [0, 1])
    exchange(grid, [1])
    assert rounds_kept(grid) == {0: 1, 1: 2}


def owing(task: ClientTask) -> ClientAnswer:
    """Counts its rounds twice: for itself, and in what is of the reply."""
    told, taken = update(task), task.state.get("reply.rounds", torch.tensor(0))
    return replace(told, state={**told.state, "reply.rounds": taken + 1})


def rounds_taken(grid: EdgeGrid) -> dict[int, int]:
    """How many accepted replies each client remembers."""
    taken = {client: state.get("reply.rounds") for client, state in grid.store.all().items()}
    return {client: int(rounds) for client, rounds in taken.items() if rounds is not None}


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("phase", ["train", "query.sums"])
def test_late_client_keeps_its_own_and_what_is_of_the_reply_rolls_back(averages: bool, phase: str):
    """Client 3 is late at 1.3 s, in time at 1.6 s."""
    grid = edge(answer=owing, deadline_s=1.3, averages=averages)
    exchange(grid, phase=phase)
    assert rounds_taken(grid) == {0: 1, 1: 1, 2: 1}
    grid.deadline_s = 1.6
    exchange(grid, phase=phase)
    grid.deadline_s = 1.3
    exchange(grid, phase=phase)
    assert rounds_kept(grid) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert rounds_taken(grid) == {0: 3, 1: 3, 2: 3, 3: 1}


def test_client_that_was_not_among_the_first_keeps_its_own():
    grid = edge(answer=owing, keep=2)
    exchange(grid)
    assert (rounds_kept(grid), rounds_taken(grid)) == ({0: 1, 1: 1, 2: 1, 3: 1}, {0: 1, 1: 1})


@pytest.mark.parametrize(("gone_s", "kept"), [(0.11, {}), (0.41, {}), (0.43, {0: 1}), (0.63, {0: 1})])
@pytest.mark.parametrize("outcome", ["offline", "failed"])
def test_client_that_leaves_or_crashes_while_it_sends_has_learned(outcome, gone_s: float, kept, monkeypatch):
    """Client 0 receives until 0.12 s, computes until 0.42 s, sends until 0.64 s."""
    grid = edge(answer=owing, availability=windows({0: (0.0, gone_s)} if outcome == "offline" else {}))
    if outcome == "failed":
        monkeypatch.setattr(grid.fleet, "crash_s", lambda client, round: gone_s)
    _, reports = exchange(grid, [0])
    assert reports[0].outcome == outcome
    assert (rounds_kept(grid), rounds_taken(grid)) == (kept, {})


def test_failing_and_dropped_clients_store_nothing():
    grid = edge(answer=one_fails, on_client_error="drop", deadline_s=1.0)
    exchange(grid)
    assert rounds_kept(grid) == {0: 1, 1: 1, 3: 1}


def test_older_checkpoints_name_what_is_of_the_reply_otherwise():
    names = {"uplink.residual": "reply.residual", "pool_x": "reply.pool_x", "private.pool_x": "private.pool_x"}
    grid = edge()
    grid.restore({"now_s": 3.0, "clients": {2: ArrayRecord({name: to_array(np.zeros(1)) for name in names})}})
    assert list(grid.store.get(2)) == list(names.values())


def test_state_is_not_traffic_and_not_shown_to_the_strategy():
    grid = edge()
    for _ in range(2):
        replies = grid.send_and_receive([Message(RecordDict({"arrays": WEIGHTS}), 0, "train")])
    assert sorted(replies[0].content) == ["arrays", "metrics"]
    assert [(r.work.down_bytes, r.work.up_bytes) for r in grid.take_reports()] == [(1_000_000, 1_000_000)] * 2
