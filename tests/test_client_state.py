"""What a client keeps when the server does not take its reply, whatever the method."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from conftest import honest
from test_methods import NEEDS, STOOD_FOR

from clients.app import serve
from clients.trainers.base import WorkLog
from fedsim.engines.local import LocalEngine
from fedsim.messages.cohort import CohortAnswer, CohortTask
from fedsim.messages.records import OF_REPLY
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import options, preset
from fedsim.workloads.base import Tensors

# Two tasks with phases and parts, so that methods that rehearse have something to keep.
TINY = [
    *("workload=blobs", "workload.num_classes=4", "workload.input_shape=[6]", "workload.examples_per_client=12"),
    *("workload.test_examples=20", "model=mlp", "model.hidden=[5]", "fleet=uniform", "engine.device=cpu"),
    *("num_clients=4", "cohort=4", "rounds=4", "trainer.batch_size=4", "trainer.local_epochs=1"),
    *("stream=split_classes", "stream.tasks=2", "uplink=topk", "uplink.ratio=0.1"),
]
# Methods whose clients have something of their own that changes in the third round.
PERSONAL = ("apfl", "ditto", "fedbn", "fedproto", "fedrep", "lg_fedavg")
REHEARSING = ("agem", "coreset", "gss", "lwf", "ocs", "reservoir")

State = dict[str, bytes]


class Listener(LocalEngine):
    """The engine in this process; remembers the last state that each client has sent back."""

    def __init__(self) -> None:
        super().__init__(serve)
        self.computed: dict[int, State] = {}

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        for answer in super().run(task):
            self.computed |= {one.client: bytes_of(one.state) for one in answer.clients if one.state}
            yield answer


def bytes_of(state: Tensors) -> State:
    return {name: t.numpy().tobytes() for name, t in state.items()}


def own(state: State) -> State:
    return {name: data for name, data in state.items() if not name.startswith(OF_REPLY)}


def of_reply(state: State) -> State:
    return {name: data for name, data in state.items() if name.startswith(OF_REPLY)}


def federation_of(method: str, *overrides: str) -> Federation:
    needs = NEEDS.get(f"method={method}", [])
    settings = compose([*TINY, *honest([f"method={method}"]), f"method={method}", *needs, *overrides])
    return Federation(build_world(json.dumps(settings)), Listener())


def states(run: Federation) -> dict[int, State]:
    return {client: bytes_of(state) for client, state in run.grid.store.all().items()}


def after(method: str, *, averages: bool, rounds: int = 2) -> Federation:
    """A federation after some rounds in time."""
    run = federation_of(method)
    run.grid.averages &= averages
    for number in range(1, rounds + 1):
        run.train(number)
    run.grid.take_reports()
    return run


# Where updates arrive one by one, fewer: what is stored of a client does not hang on how updates are added up.
SINGLY = ("fedavg", "ditto", "ocs", "fedmix", "ewc")
LATE = [
    pytest.param(
        method,
        averages,
        marks=[pytest.mark.slow] if method in STOOD_FOR or not (averages or method in SINGLY) else [],
        id=f"{method}-{'sums' if averages else 'updates'}",
    )
    for method in options("method")
    for averages in (True, False)
    if preset(method).get("loop", "rounds") == "rounds"  # for others see test_buffer.py
    if method not in ("dp_client_adaptive", "dp_client_fedavg", "fltrust")  # which refuse this uplink, or a stream
]


@pytest.mark.parametrize("method, averages", LATE)
def test_a_late_client_keeps_what_it_has_computed_and_owes_what_it_owed(method: str, averages: bool):
    """Round 3 is the first of a new task: everything that can change in a state does."""
    run = after(method, averages=averages)
    before = states(run)
    run.grid.deadline_s = 1e-9
    run.train(3)
    reports = [r for r in run.grid.take_reports() if r.phase == "train"]
    assert {r.outcome for r in reports} == {"late"}
    computed, stored = run.grid.engine.computed, states(run)
    assert set(stored) == {r.client for r in reports}
    for client, state in stored.items():
        assert own(state) == own(computed[client])
        assert of_reply(state) == of_reply(before[client])
        assert (of_reply(state) == of_reply(computed[client])) == run.roles.keeps_all
        assert (own(state) != own(before[client])) == (method in (*PERSONAL, *REHEARSING, "moon"))


@pytest.mark.parametrize("method", ["ditto", "fedrep", "ocs", "fedmix"])
@pytest.mark.parametrize("ends", ["crash", "memory", "leave"])
def test_a_client_whose_work_did_not_end_stores_nothing(method: str, ends: str, monkeypatch):
    run = after(method, averages=True)
    before = states(run)
    if ends == "crash":
        monkeypatch.setattr(run.grid.fleet, "crash_s", lambda client, number: 1e-9)
    elif ends == "leave":
        monkeypatch.setattr(run.grid.fleet, "online_until", lambda client, now_s: now_s + 1e-9)
    else:
        monkeypatch.setattr("clients.worker.WorkLog", lambda memory_bytes: WorkLog(10))
    run.train(3)
    outcomes = {r.outcome for r in run.grid.take_reports()}
    assert outcomes == {{"crash": "failed", "memory": "out_of_memory", "leave": "offline"}[ends]}
    assert states(run) == before
