"""What tests of `engine=ray` share: a private Ray with two workers, what happens to clients there, and their processes.

One Ray serves a whole file: each start costs seconds.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import TINY

from clients.app import serve
from clients.live_model import LiveModel
from clients.trainers.sgd import SGDTrainer
from clients.worker import worker_for
from fedsim.engines.local import LocalEngine
from fedsim.engines.ray.engine import RayEngine
from fedsim.engines.ray.session import RaySession
from fedsim.errors import ConfigError
from fedsim.messages.cohort import CohortAnswer, CohortTask
from fedsim.report.rounds import HOST_FIELDS
from fedsim.runs import writer
from fedsim.settings.compose import compose
from fedsim.workloads.base import Tensors

TESTS = Path(__file__).parent
SPIES = "FEDSIM_TEST_SPIES"  # the folder where workers write down what they did

# --- what runs in the workers ----------------------------------------------------------------------------------------


def spied_serve(task: CohortTask) -> Iterator[CohortAnswer]:
    """The real worker; each process writes down the worlds it has built, and how often it took over weights."""
    if not hasattr(LiveModel, "taken"):
        LiveModel.taken, plain = [], LiveModel.received

        def received(self: LiveModel, weights: Tensors) -> Tensors:
            if weights and self._received[0] is not weights:
                LiveModel.taken.append(id(weights))
            return plain(self, weights)

        LiveModel.received = received
    yield from serve(task)
    counts = {"worlds": worker_for.cache_info().misses, "unpacked": len(LiveModel.taken)}
    (Path(os.environ[SPIES]) / str(os.getpid())).write_text(json.dumps(counts))


class Unlucky(SGDTrainer):
    """Something happens to some clients: the first `times` times they train, they die, hang, raise or diverge."""

    def __init__(self, what: str, who: list[int], folder: str, times: int = 1, **sgd: Any):
        super().__init__(**sgd)
        self.what, self.who, self.folder, self.times = what, who, Path(folder), times

    def fit(self, client, task):
        mark = self.folder / f"{self.what}-{client.client_id}"
        seen = len(mark.read_text()) if mark.exists() else 0
        if client.client_id not in self.who or seen >= self.times:
            return super().fit(client, task)
        mark.write_text("x" * (seen + 1))
        if self.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "hang":
            time.sleep(1000)
        if self.what == "raise":
            raise ZeroDivisionError("as told")
        if self.what == "misconfigured":
            raise ConfigError("trainer.lr must be smaller")
        for weights in client.weights.values():
            weights.fill_(torch.nan)
        return super().fit(client, task)


def unlucky(what: str, who: list[int], folder: Path, times: int = 1) -> list[str]:
    target = "trainer._target_=ray_workers.Unlucky"
    return [
        target,
        f"+trainer.what={what}",
        f"+trainer.who={who}",
        f"+trainer.folder={folder}",
        f"+trainer.times={times}",
    ]


# --- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spies")


def is_rays(process: psutil.Process) -> bool:
    """Whether it is still running, and not the helper that Python starts for processes of other tests."""
    try:
        return "multiprocessing" not in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def session(spies: Path) -> Iterator[RaySession]:
    """A Ray whose workers find this module."""
    others = set(descendants())  # of tests before in this process
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setenv(SPIES, str(spies))
        session = RaySession(None, num_cpus=3)
    yield session
    started = [p for p in descendants() if p not in others and is_rays(p)]
    session.close()
    assert not [p for p in started if is_alive(p)]


@pytest.fixture(scope="module")
def shared(session: RaySession) -> Iterator[RayEngine]:
    with RayEngine(spied_serve, workers=2) as grid:
        yield grid


@pytest.fixture
def pair(shared: RayEngine, monkeypatch: pytest.MonkeyPatch) -> RayEngine:
    """The two workers; what a test sets of their grid is undone."""
    for name in ("retries", "client_timeout_s"):
        monkeypatch.setattr(shared, name, getattr(shared, name))
    return shared


def lines(folder: Path) -> list[dict]:
    """`rounds.jsonl` without what only the host knows."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key not in HOST_FIELDS} for r in rounds]


@pytest.fixture
def result(tmp_path: Path) -> Callable[..., tuple[str, list[dict]]]:
    """Runs a tiny experiment on an engine: the hash of its weights, and its rounds."""

    def make(engine: Any, *overrides: str, **hooks: Any) -> tuple[str, list[dict]]:
        out = tmp_path / f"{type(engine).__name__}-{time.monotonic_ns()}"
        summary = writer.run(compose([*TINY, "cohort=6", *overrides]), engine, out, **hooks)
        return summary["weights_sha256"], lines(out)

    return make


@pytest.fixture
def local(result) -> Callable[..., tuple[str, list[dict]]]:
    """The same in this process, where nothing happens to anybody."""
    return lambda *overrides: result(LocalEngine(serve), *overrides)


# --- processes -------------------------------------------------------------------------------------------------------


def descendants(pid: int | None = None) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def is_alive(process: psutil.Process, name: str = "") -> bool:
    """Whether it runs, and is called so."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and name in " ".join(process.cmdline())
    except psutil.Error:
        return False


def workers() -> list[psutil.Process]:
    """The worker processes below this one."""
    return [p for p in descendants() if is_alive(p, "ray::RayWorker")]


def both_at_work(run: Callable[[], object], spies: Path) -> list[psutil.Process]:
    """Lets runs go by until both workers, which may just be starting, have had a part; they are the result."""
    end = time.monotonic() + 60
    while len(at_work := [p for p in workers() if (spies / str(p.pid)).exists()]) < 2:
        assert time.monotonic() < end
        run()
        time.sleep(0.2)
    return at_work
