"""Clients that fail: they end the run in one sentence, or are counted, paid for and dropped."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from told_clients import edge, exchange, one_fails

from clients.trainers.sgd import SGDTrainer
from fedsim.errors import ClientError
from fedsim.messages.records import from_array
from fedsim.workloads.blobs import Blobs


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
    rounds = federation(f"trainer._target_=test_network_failures.{trainer}", "cohort=6").rounds()
    with pytest.raises(ClientError) as caught:
        list(rounds)
    assert str(caught.value) == f"client 2 (reference) failed in round 1 (seed 1): {reason}"
    assert caught.value.traceback.startswith("Traceback")


@pytest.mark.parametrize("trainer", ["Picky", "Diverging", "Infinite"])
def test_failing_trainer_is_counted_and_dropped(federation, trainer: str):
    run = federation(
        f"trainer._target_=test_network_failures.{trainer}", "cohort=6", "on_client_error=drop", "rounds=1"
    )
    _, (report, clients) = run.rounds()
    assert report.outcomes == {"completed": (0, 1, 3, 4, 5), "failed": (2,)}
    assert all(np.isfinite(from_array(array)).all() for array in run.arrays.values())
    assert clients[2].work.up_bytes == 0


def test_finite_half_precision_update_is_accepted(federation):
    run = federation("trainer._target_=test_network_failures.Halving", "rounds=1")
    list(run.rounds())
    assert {float(from_array(array).min()) for array in run.arrays.values()} == {100.0}


def test_memory_that_a_trainer_cannot_reserve_is_an_outcome_not_an_error(federation):
    run = federation("trainer._target_=test_network_failures.Hungry", "cohort=6", "rounds=1")
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
    lost = ("workload._target_=test_network_failures.Lost", "cohort=6", "rounds=1")
    with pytest.raises(
        ClientError, match=r"^client 2 \(reference\) failed in round 1 \(seed 1\): OSError: disk is gone"
    ):
        list(federation(*lost).rounds())
    _, (report, _) = federation(*lost, "on_client_error=drop").rounds()
    assert report.outcomes["failed"] == (2,)
