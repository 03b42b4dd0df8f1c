"""What tests share: tiny runs on made-up data, in this process, one thread each."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer.main
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from clients.app import serve
from clients.trainers.base import ClientContext
from clients.worker import Worker
from fedsim.cli import main as cli
from fedsim.engines.base import assume_task_identity
from fedsim.engines.cutting import cut
from fedsim.engines.local import LocalEngine
from fedsim.messages.cohort import ClientTask, CohortAnswer, CohortTask
from fedsim.messages.records import NUM_EXAMPLES, STATE, Instructions, record_of, tensors_of
from fedsim.messages.updates import Broadcast
from fedsim.messages.uplink import decompressed
from fedsim.runs import api, writer
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import Settings
from fedsim.workloads.arrays import ArrayWorkload, DataSet

# Their fixtures are taken by several files.
pytest_plugins = ("cut_short", "fake_study", "help_space", "ray_workers", "sent_folder", "small_bundles")

# Six clients with eight examples each, of which one is held out; three of them train for one epoch of two steps.
TINY = (
    "workload=blobs",
    "workload.examples_per_client=8",
    "workload.test_examples=40",
    "fleet=uniform",
    "latency=flops",  # one rate: hand-computed seconds
    "engine.device=cpu",
    "trainer.local_epochs=1",
    "trainer.batch_size=4",
    "num_clients=6",
    "cohort=3",
    "rounds=2",
)

SHORT = ["rounds=1", "cohort=2", "trainer.local_epochs=1", "fleet=uniform"]  # one short round of the default workload


class Given(ArrayWorkload):
    """A workload of arrays that a test has made."""

    def __init__(self, data: DataSet, **settings: Any):
        self.data = data
        super().__init__(**settings)

    def read(self) -> DataSet:
        return self.data


def array_workload(*given: Any, **settings: Any) -> Given:
    """Makes a workload of name, both parts, classes, kind, model, partition, number of clients and seed."""
    name, train, test, classes, kind, *rest = given
    named = dict(zip(("model", "partition", "num_clients", "seed"), rest, strict=False))
    return Given(DataSet(train, test, classes, kind, name), name=name, **named, **settings)


# Clients sleep eight hours a day, each at hours of its own.
DAILY = ("fleet.availability._target_=devices.availability.Diurnal", "+fleet.availability.hours=16")


def pytest_collection_finish() -> None:
    """Keeps what was imported out of the search for garbage, and out of what a fork would copy for it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_process():
    """It waits for no disk either: no test has the power fail."""
    torch.set_num_threads(1)
    assume_task_identity()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        # A process has one command line, which Typer makes anew at each call.
        patched.setattr("typer.main.get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    """Skips tests marked `gpu` where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none here")


class Ended(NamedTuple):
    """How a command ended: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def fedsim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `fedsim ARGS` in this process: importing torch anew would cost seconds each time."""

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["fedsim", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it; this takes it back after the test
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return Ended(int(ended.value.code or 0), shown.out, shown.err)

    return call


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with bundles in a sibling."""
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "bundles"))
    monkeypatch.delenv("FEDSIM_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def every_way(settings: Settings, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rounds of a run of three, without host times, by how it is made: at once, in parts, prolonged."""
    for name, engine in (("one", LocalEngine(serve)), ("parts", Parted(1)), ("alone", Parted(2, alone=True))):
        writer.run(settings, engine, folder / name)
    writer.run({**settings, "rounds": 1}, LocalEngine(serve), folder / "longer")
    api.resume(folder / "longer", rounds=3)
    return {name: rounds_in(folder / name) for name in ("one", "parts", "alone", "longer")}


def rounds_in(folder: Path) -> list[dict[str, Any]]:
    """The rounds of a run, without host times."""
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("host")} for row in rows]


def assert_refused(ended: Ended, *words: str, cwd: Path | None = None) -> None:
    """Exit code 2, one sentence on stderr that has the words, nothing on stdout and nothing written."""
    assert ended.code == 2, ended
    assert ended.err.startswith("fedsim: ")
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.endswith("\n")
    assert "Traceback" not in ended.err
    assert ended.out == ""
    for word in words:
        assert word in ended.err, f"{word!r} is not in {ended.err!r}"
    assert list((cwd or Path()).iterdir()) == []


@pytest.fixture
def settings():
    """Composes the settings of a tiny run: `settings("seed=2", "cohort=1")`."""

    def make(*overrides: str) -> Settings:
        return compose([*TINY, *honest(overrides), *overrides])

    return make


def honest(overrides: Sequence[str]) -> list[str]:
    """What some methods need of a cohort of three: it can bear no liar; where there are none, as many are at work."""
    heads = ("method", "strategy", "strategy@strategy.server")
    liars = {f"{head}={name}" for head in heads for name in ("krum", "multikrum", "bulyan")} & set(overrides)
    found = [f"strategy.{'server.' if '@' in name else ''}num_malicious_nodes=0" for name in liars]
    if {"method=fedbuff", "loop=buffer"} & set(overrides):
        found += ["loop.concurrency=${cohort}", "loop.buffer_size=2"]
    if {"method=fedasync", "strategy=fedasync"} & set(overrides):
        found += ["loop=buffer", "loop.concurrency=${cohort}", "loop.buffer_size=1"]
    return found


@pytest.fixture
def federation(settings):
    """A Federation in this process, from overrides of a tiny run."""

    def make(*overrides: str) -> Federation:
        return Federation(build_world(json.dumps(settings(*overrides))), LocalEngine(serve))

    return make


@pytest.fixture
def run(settings, tmp_path):
    """Runs a tiny experiment from top to bottom into `out` and returns its summary."""

    def make(*overrides: str, out: Path = tmp_path) -> dict[str, Any]:
        return writer.run(settings(*overrides), LocalEngine(serve), out)

    return make


@pytest.fixture
def data_folder() -> Path:
    """The real data bundles; tests that ask for it are marked `data`."""
    if "FEDSIM_DATA" not in os.environ:
        pytest.skip("FEDSIM_DATA names no folder with data bundles")
    return Path(os.environ["FEDSIM_DATA"])


def task_of(content: RecordDict, client: int, number: int) -> ClientTask:
    """What a client is to do in a round by the content of a strategy's message; its state may be in there."""
    state = content.get(STATE)
    kept = tensors_of(state) if isinstance(state, ArrayRecord) else {}
    return ClientTask(client, Instructions().broadcast(content, number), kept)


def sent_to(worker: Worker, client: ClientContext, content: RecordDict) -> Broadcast:
    """What the content of a strategy's message is for one client, on the worker's device."""
    return worker.broadcast(client, task_of(content, client.client_id, client.round))


def answered(worker: Worker, client: ClientContext, content: RecordDict, phase: str) -> RecordDict:
    """What a worker answers for one client, whose faults are raised; its state stands beside it."""
    task = task_of(content, client.client_id, client.round)
    answer = worker.answer(phase, client, task)
    numbers: Any = {NUM_EXAMPLES: answer.num_examples, **answer.metrics}
    records: dict[str, Any] = {name: record_of(tensors) for name, tensors in answer.extras.items()}
    if answer.weights is not None:
        model = task.broadcast.weights
        records["arrays"] = record_of(decompressed(answer.weights, model).by_name(model))
    if answer.state:
        records[STATE] = record_of(answer.state)
    return RecordDict({**records, "metrics": MetricRecord(numbers)})


class Parted(LocalEngine):
    """Serves the parts of a cohort from the last to the first, as several places might."""

    def __init__(self, clients: int, alone: bool = False):
        super().__init__(serve)
        self.clients, self.alone, self.parts = clients, alone, 0

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        places = -(-len(task.clients) // self.clients)
        for part in reversed(task.one_by_one() if self.alone else list(cut(task, places))):
            self.parts += 1
            yield CohortAnswer.joined(list(super().run(part)))
