"""The edge grid: seconds, joules and bytes of an exchange, who is accepted, and what is kept.

Most tests put a made-up engine behind the grid. On the reference device (1e10 FLOPs/s; 1e7 bytes/s down, 5e6 up, 0.02 s
before each; 10 W computing, 2 W on the radio, 1 W idle) a client that gets and sends `WEIGHTS` (1e6 bytes) takes
0.12 s down and 0.22 s up; client c computes (c + 1) * 3e9 FLOPs in 0.3 * (c + 1) s. So the replies of clients 0..3
arrive after 0.64, 0.94, 1.24 and 1.54 s, and client 0 spends 0.24 + 3.0 + 0.44 = 3.68 J.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ArrayRecord, Message, RecordDict

from clients.trainers.sgd import SGDTrainer
from devices.availability import Always, Availability
from devices.cost import Cost, FlopsLatency, ModelCost, Passes, Work
from devices.fleet import Fleet
from devices.profile import SHIPPED
from fedsim.engines.base import Engine, assume_task_identity
from fedsim.errors import ClientError, RunError
from fedsim.grid.edge import EMPTY_ROUND_S, EdgeGrid
from fedsim.grid.exchange import ClientReport
from fedsim.grid.pricing import Prices, RadioTails
from fedsim.messages.cohort import ClientAnswer, ClientTask, CohortAnswer, CohortTask
from fedsim.messages.records import from_array, to_array
from fedsim.messages.updates import Broadcast
from fedsim.messages.weights import named
from fedsim.workloads.blobs import Blobs

WEIGHTS = ArrayRecord({"w": to_array(np.zeros(250_000, np.float32))})
NETWORK = ModelCost("net", 1e6, 2e6, 0, 0)

Answer = Callable[[ClientTask], ClientAnswer]


def computing(client: int) -> Work:
    return Work((Passes(NETWORK, 10 * (client + 1), 100, 100),), peak_memory_bytes=1000 + client)


def update(task: ClientTask) -> ClientAnswer:
    """Sends the weights back with client + 1 examples, and counts its rounds in its state."""
    return ClientAnswer(
        task.client,
        work=replace(computing(task.client), up_bytes=1_000_000),
        num_examples=task.client + 1,
        metrics={"train_loss": float(task.client)},
        weights=named(task.broadcast.weights),
        state={"rounds": task.state.get("rounds", torch.tensor(0)) + 1},
    )


class Told(Engine):
    """Clients that answer as told, without a worker."""

    def __init__(self, answer: Answer):
        assume_task_identity()
        self.answer, self.phases = answer, []

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        self.phases.append(task.phase)
        for one in task.clients:
            told = self.answer(one)
            yield CohortAnswer((replace(told, work=replace(told.work, down_bytes=one.down_bytes)),))


def edge(
    clients: int = 4,
    answer: Answer = update,
    availability: Callable[..., Availability] = Always,
    device: str = "reference",
    **options,
) -> EdgeGrid:
    """An edge grid over `clients` equal devices whose clients answer as told."""
    fleet = Fleet("toy", {device: 1}, clients, 1, availability, speed_sigma=0, network_sigma=0)
    grid = EdgeGrid(Told(answer), fleet, FlopsLatency(), "{}", seed=1, **options)
    grid.round = 1
    return grid


def exchange(grid: EdgeGrid, clients=range(4), phase: str = "train") -> tuple[list[int], dict[int, ClientReport]]:
    """Sends the weights to `clients`: who was accepted, and the report of each."""
    messages = [Message(RecordDict({"arrays": WEIGHTS}), client, phase) for client in clients]
    replies = grid.send_and_receive(messages)
    return [reply.metadata.src_node_id for reply in replies], {r.client: r for r in grid.take_reports()}


def rounds_kept(grid: EdgeGrid) -> dict[int, int]:
    """How many rounds each client remembers."""
    states = {client: grid.store.get(client) for client in grid.get_node_ids()}
    return {client: int(state["rounds"]) for client, state in states.items() if state}


class Windows(Availability):
    """Client c is online during the c-th of `spells`, always when there is none."""

    def __init__(self, num_clients: int, seed: int, spells: dict[int, tuple[float, float]]):
        super().__init__(num_clients, seed)
        self.spells = spells

    def _end_s(self, client_id: int, now_s: float) -> float | None:
        opens_s, closes_s = self.spells.get(client_id, (0.0, math.inf))
        return closes_s if opens_s <= now_s < closes_s else None


def windows(spells: dict[int, tuple[float, float]]):
    return lambda num_clients, seed: Windows(num_clients, seed, spells)


# --- seconds, joules, bytes --------------------------------------------------------------------------------------


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


def test_replies_come_in_client_order_whatever_order_they_were_asked_in():
    accepted, reports = exchange(edge(), [2, 0, 3])
    assert (accepted, list(reports)) == ([0, 2, 3], [0, 2, 3])


def test_mean_of_a_round_comes_as_one_reply():
    """Examples 1 + 2 + 3 + 4 = 10; loss (1 * 0 + 2 * 1 + 3 * 2 + 4 * 3) / 10 = 2; weights (0 + 2 + 6 + 12) / 10 = 2."""

    def answer(task: ClientTask) -> ClientAnswer:
        return replace(update(task), weights=named({"w": torch.full([250_000], float(task.client))}))

    replies = edge(answer=answer, averages=True).send_and_receive(
        [Message(RecordDict({"arrays": WEIGHTS}), client, "train") for client in range(4)]
    )
    assert len(replies) == 1
    assert set(from_array(replies[0].content["arrays"]["w"]).tolist()) == {2.0}
    assert dict(replies[0].content["metrics"]) == {"num-examples": 10, "train_loss": 2.0}


# --- deadline and over-selection ---------------------------------------------------------------------------------


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


# --- dropouts ----------------------------------------------------------------------------------------------------


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


# --- failing clients ---------------------------------------------------------------------------------------------


def one_fails(task: ClientTask) -> ClientAnswer:
    if task.client == 2:
        return ClientAnswer(2, "failed", "as told", "TRACE", computing(2))
    return update(task)


def test_failing_client_stops_the_exchange_and_is_named():
    with pytest.raises(ClientError, match=r"^client 2 \(reference\) failed in round 1 \(seed 1\): as told$") as caught:
        exchange(edge(answer=one_fails))
    assert caught.value.traceback == "TRACE"


def test_dropped_client_pays_for_what_it_computed():
    """0.12 s down, 0.9 s computing, nothing up: 0.24 + 9 J."""
    accepted, reports = exchange(edge(answer=one_fails, on_client_error="drop"))
    assert (accepted, reports[2].outcome, reports[2].reason) == ([0, 1, 3], "failed", "as told")
    assert (reports[2].joules, reports[2].cost.up_s, reports[2].work.up_bytes) == (pytest.approx(9.24), 0, 0)


def test_engine_that_loses_a_client_is_an_error():
    grid = edge()
    run = grid.engine.run
    grid.engine.run = lambda task: run(task.of(task.clients[:-1]))
    with pytest.raises(ClientError, match=r"^the engine returned no reply for clients \[3\] in round 1 \(seed 1\)$"):
        exchange(grid)


class Picky(SGDTrainer):
    """Client 2 fails, in the way that the class says."""

    def fit(self, client, task):
        if client.client_id == 2:
            self.stumble(client)
        return super().fit(client, task)

    def stumble(self, client):
        raise ValueError("cannot learn\nthis")


class Diverging(Picky):
    def stumble(self, client):
        client.parameters[0].data[0] = math.nan


class Infinite(Picky):
    def stumble(self, client):
        client.parameters[0].data[0, 0] = math.inf
        client.parameters[0].data[0, 1] = -math.inf


class Halving(SGDTrainer):
    """Sends 1738 weights of 100 each in half precision, whose largest number is 65504."""

    def fit(self, client, task):
        update = super().fit(client, task)
        return replace(update, weights={n: torch.full_like(w, 100).half() for n, w in update.weights.items()})


class Hungry(Picky):
    def stumble(self, client):
        client.state["kept"] = torch.zeros(1)
        client.log.reserve(2**32 + 1)


NAN = "FloatingPointError: its update holds NaN or infinite weights; lower trainer.lr or set trainer.clip_norm"


@pytest.mark.parametrize(
    ("trainer", "reason"), [("Picky", "ValueError: cannot learn this"), ("Diverging", NAN), ("Infinite", NAN)]
)
def test_failing_trainer_stops_the_run_in_one_sentence(federation, trainer: str, reason: str):
    rounds = federation(f"trainer._target_=test_network.{trainer}", "cohort=6").rounds()
    with pytest.raises(ClientError) as caught:
        list(rounds)
    assert str(caught.value) == f"client 2 (reference) failed in round 1 (seed 1): {reason}"
    assert caught.value.traceback.startswith("Traceback")


@pytest.mark.parametrize("trainer", ["Picky", "Diverging", "Infinite"])
def test_failing_trainer_is_counted_and_dropped(federation, trainer: str):
    run = federation(f"trainer._target_=test_network.{trainer}", "cohort=6", "on_client_error=drop", "rounds=1")
    _, (report, clients) = run.rounds()
    assert report.outcomes == {"completed": (0, 1, 3, 4, 5), "failed": (2,)}
    assert all(np.isfinite(from_array(array)).all() for array in run.arrays.values())
    assert clients[2].work.up_bytes == 0


def test_finite_half_precision_update_is_accepted(federation):
    run = federation("trainer._target_=test_network.Halving", "rounds=1")
    list(run.rounds())
    assert {float(from_array(array).min()) for array in run.arrays.values()} == {100.0}


def test_memory_that_a_trainer_cannot_reserve_is_an_outcome_not_an_error(federation):
    run = federation("trainer._target_=test_network.Hungry", "cohort=6", "rounds=1")
    _, (report, clients) = run.rounds()
    assert report.outcomes == {"completed": (0, 1, 3, 4, 5), "out_of_memory": (2,)}
    assert clients[2].reason == f"needs {2**32 + 1} bytes at its peak, the device has {2**32}"
    assert (clients[2].cost.compute_s, clients[2].work.up_bytes, clients[2].cost.down_s > 0) == (0, 0, True)
    assert report.peak_memory_bytes == 2**32 + 1
    assert run.grid.store.get(2) == {}


class Lost(Blobs):
    """The data of client 2 cannot be read."""

    def client_data(self, client_id: int):
        if client_id == 2:
            raise OSError("disk is gone")
        return super().client_data(client_id)


def test_client_whose_data_cannot_be_read_is_a_failing_client(federation):
    lost = ("workload._target_=test_network.Lost", "cohort=6", "rounds=1")
    with pytest.raises(
        ClientError, match=r"^client 2 \(reference\) failed in round 1 \(seed 1\): OSError: disk is gone"
    ):
        list(federation(*lost).rounds())
    _, (report, _) = federation(*lost, "on_client_error=drop").rounds()
    assert report.outcomes["failed"] == (2,)


# --- state -------------------------------------------------------------------------------------------------------


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


# --- the grid as Flower sees it ----------------------------------------------------------------------------------


def test_nodes_are_the_clients_in_order():
    grid = edge(5)
    assert list(grid.get_node_ids()) == [0, 1, 2, 3, 4]
    assert (grid.client(3).client_id, grid.client(3).profile.name) == (3, "reference")


def test_two_messages_to_one_client_are_refused():
    with pytest.raises(ValueError, match=r"^a strategy sent one client two messages in one exchange; send one"):
        exchange(edge(), [0, 1, 0])


@pytest.mark.parametrize("client", [-1, 4])
def test_message_to_no_client_is_refused(client: int):
    with pytest.raises(ValueError, match=re.escape(f"no client {client}: the fleet has clients 0..3")):
        exchange(edge(), [0, client])


def test_pushed_messages_are_pulled_once():
    grid = edge()
    tickets = grid.push_messages([Message(RecordDict({"arrays": WEIGHTS}), client, "train") for client in (1, 0)])
    assert [m.metadata.src_node_id for m in grid.pull_messages(tickets)] == [0, 1]
    assert list(grid.pull_messages(tickets)) == []


def test_client_without_held_out_examples_judges_nothing():
    """Client 0 has no examples to judge on: it took part and paid, but its reply is left out."""

    def answer(task: ClientTask) -> ClientAnswer:
        return ClientAnswer(task.client, work=computing(task.client), num_examples=task.client)

    accepted, reports = exchange(edge(answer=answer), phase="evaluate")
    assert accepted == [1, 2, 3]
    assert (reports[0].outcome, reports[0].joules) == ("completed", pytest.approx(0.24 + 3.0 + 0.04))


def test_question_of_a_method_reaches_the_client_under_its_name():

    def answer(task: ClientTask) -> ClientAnswer:
        work = replace(computing(task.client), up_bytes=1_000_000)
        return ClientAnswer(task.client, work=work, extras={"mean": task.broadcast.weights})

    grid = edge(answer=answer)
    accepted, reports = exchange(grid, [0, 1], phase="query.mean")
    assert (accepted, grid.engine.phases) == ([0, 1], ["query.mean"])
    assert (reports[1].phase, reports[1].work.up_bytes) == ("query.mean", 1_000_000)


def test_stock_mean_refuses_extras_that_it_would_drop():
    def answer(task: ClientTask) -> ClientAnswer:
        return replace(update(task), extras={"prototypes": {"m": torch.zeros(2)}})

    with pytest.raises(RunError, match=r"^the clients sent \['prototypes'\] beside their weights"):
        exchange(edge(answer=answer, averages=True))


def test_stock_mean_refuses_metrics_that_only_some_clients_sent():
    def answer(task: ClientTask) -> ClientAnswer:
        told = update(task)
        return replace(told, metrics={**told.metrics, "gap": 1.0}) if task.client == 1 else told

    with pytest.raises(
        RunError, match=r"^client 1 reported metrics \['gap', 'train_loss'\], client 0 \['train_loss'\]"
    ):
        exchange(edge(answer=answer, averages=True))


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
