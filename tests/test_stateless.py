"""A trainer never changes after its set-up, and no client leaves a trace in what another one answers.

Over every method and trainer: two clients, four rounds of a stream of two tasks, in both orders. A new yaml is covered
by being there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import answered, honest, task_of
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from test_methods import NEEDS, STOOD_FOR, for_case, taken
from torch import nn

from clients.app import serve
from clients.trainers.base import OracleError
from clients.trainers.sgd import SGDTrainer
from clients.trainers.widths.ppp import OnDemand
from clients.worker import Worker
from fedsim.engines.local import LocalEngine
from fedsim.exchanges.slices import Slices
from fedsim.messages.cohort import ClientTask
from fedsim.messages.records import STATE, from_array
from fedsim.messages.updates import Broadcast
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import options

BASE = (
    *("workload=blobs", "workload.num_classes=4", "workload.input_shape=[6]", "workload.examples_per_client=24"),
    *("workload.test_examples=8", "workload.client_test_fraction=0.25", "stream=split_classes", "stream.tasks=2"),
    *("rounds=4", "num_clients=3", "cohort=3", "model=mlp", "model.hidden=[8,8]", "model.dropout=0.1"),
    *("fleet=uniform", "latency=flops", "engine.device=cpu", "trainer.batch_size=4", "trainer.local_epochs=2"),
)
NO_STREAM = ("fltrust",)  # its trainer is plain SGD
CASES = [
    pytest.param(case, marks=[pytest.mark.slow] if case.removeprefix("method=") in STOOD_FOR else [])
    for case in sorted(
        {
            *(taken("trainer", name) for name in options("trainer")),
            *(f"method={m}" for m in options("method") if m not in NO_STREAM),
        }
    )
]
# What is made when it is first needed, of the model and of weights alone; networks are loaded anew for each client.
ON_DEMAND = (Slices, OnDemand, nn.Module)


@pytest.fixture
def spoken(request: pytest.FixtureRequest) -> tuple[Federation, dict[int, RecordDict]]:
    """A federation, and what its strategy sends to each client in round 1."""
    case = request.param
    settings = compose([*for_case(BASE, case), *NEEDS.get(case, []), *honest([case]), case])
    federation = Federation(build_world(json.dumps(settings)), LocalEngine(serve))
    messages = federation.strategy.configure_train(1, federation.arrays, ConfigRecord(), federation.grid)
    return federation, {message.metadata.dst_node_id: message.content for message in messages}


def answers(worker: Worker, parts: dict[int, RecordDict], order: list[int]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What each client answers in four rounds of training and judging, and what it keeps, as plain values."""
    own = {client: parts[client] for client in order}
    for number in range(1, 5):
        for client in order:
            context = worker.context(task_of(own[client], client, number))
            answer = answered(worker, context, own[client], "train")
            if STATE in answer:
                own[client] = RecordDict({**own[client], STATE: answer[STATE]})
            judged = answered(worker, worker.context(task_of(own[client], client, number)), own[client], "evaluate")
            yield (client, number), {"train": plain(answer), "evaluate": plain(judged)}


def plain(records: RecordDict) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, record in records.items():
        if isinstance(record, MetricRecord | ConfigRecord):
            found[name] = dict(record)
        else:
            found[name] = {key: from_array(array).tobytes() for key, array in record.items()}
    return found


def attributes(thing: Any, seen: frozenset[int] = frozenset()) -> Any:
    """A copy of all that an object holds, of values that can be compared."""
    if isinstance(thing, torch.Tensor):
        return thing.detach().clone().numpy().tobytes()
    if isinstance(thing, ON_DEMAND) or id(thing) in seen:
        return type(thing).__name__
    seen |= {id(thing)}
    if isinstance(thing, dict):
        return {key: attributes(value, seen) for key, value in thing.items()}
    if isinstance(thing, list | tuple | set | frozenset):
        return [attributes(value, seen) for value in thing]
    return (type(thing).__name__, attributes(vars(thing), seen)) if hasattr(thing, "__dict__") else repr(thing)


@pytest.mark.parametrize("spoken", CASES, indirect=True)
def test_clients_leave_a_trainer_as_it_is_and_answer_alike_in_any_order(spoken: tuple[Federation, Any]):
    federation, parts = spoken
    first, second = Worker(federation.world), Worker(federation.world)
    before = attributes(vars(first.trainer))
    there = dict(answers(first, parts, [0, 1]))
    assert attributes(vars(first.trainer)) == before
    back = dict(answers(second, parts, [1, 0]))
    assert there.keys() == back.keys()
    for key, answer in there.items():
        assert answer == back[key], f"client and round {key}"


def test_a_trainer_that_is_no_oracle_sees_no_others_and_nothing_to_come():
    world = build_world(json.dumps(compose([*BASE, "method=finetune"])))
    worker = Worker(world)
    client = worker.context(ClientTask(1, Broadcast(2, {})))
    later = world.workload.part(4)
    assert torch.equal(client.workload.arrivals(1, 0), world.workload.arrivals(1, 0))
    for asks in (
        lambda w: w.client_data(0),
        lambda w: w.client_part(0, 0),
        lambda w: w.arrivals(1, later),
        lambda w: w.recall(2, torch.arange(1)),
        lambda w: w.test,
    ):
        with pytest.raises(OracleError, match=r"^client 1 in round 2 asks for .* takes them from client\.oracle\(\)"):
            asks(client.workload)
    assert not client.log.saw_everything
    client.oracle().client_data(0)
    assert client.log.saw_everything


@pytest.mark.parametrize(
    "look", [lambda w: w.test, lambda w: w.client_data(0), lambda w: w.client_part(0, 0), lambda w: w.arrivals(0, 0)]
)
def test_a_trainer_is_set_up_without_anybodys_examples(monkeypatch, look):
    monkeypatch.setattr(SGDTrainer, "setup", lambda self, workload, model, network: look(workload))
    with pytest.raises(OracleError, match=r"^the set-up of a trainer asks for .*, which it does not have"):
        Worker(build_world(json.dumps(compose([*BASE, "method=finetune"]))))


class Peeking(SGDTrainer):
    """An oracle that has a way of its own around the loop."""

    def fit(self, client, broadcast):
        client.oracle().client_data(0)
        return super().fit(client, broadcast)

    def evaluate(self, client, broadcast):
        client.oracle().client_data(0)
        return super().evaluate(client, broadcast)


@pytest.mark.parametrize(
    "overrides, marked",
    [
        (["method=joint"], ("oracle",)),
        (["method=global_mixup"], ("oracle",)),
        (["method=ppp", "trainer.controls=[other]"], ("client_oracle",)),
        (["method=ppp", "trainer.mask=global"], ("client_oracle",)),
        (["method=ppp", "trainer.controls=[random]"], ()),
        (["method=finetune"], ()),
        ([f"trainer._target_={__name__}.Peeking"], ("oracle", "client_oracle")),
    ],
    ids=str,
)
def test_results_of_an_oracle_say_so(overrides: list[str], marked: tuple[str, ...]):
    settings = compose([*BASE, *overrides, "evaluate_clients=3"])
    run = Federation(build_world(json.dumps(settings)), LocalEngine(serve))
    metrics = [report.metrics for report, _ in run.rounds()][-1]
    assert {name for name in metrics if "oracle" in name} == set(marked)
    assert all(metrics[name] == 1 for name in marked)
