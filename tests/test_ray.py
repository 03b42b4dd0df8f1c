"""The engine of Ray workers: the same bytes as in this process, whatever happens to workers, nodes and clients.

One private Ray serves the whole file, and one pair of workers most of the tests: each start costs seconds. What must
have a process of its own (signals, what is left behind, a cluster) runs in a subprocess.
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
from flwr.app import Context, Message

import clients.app
from clients.trainers.sgd import SGDTrainer
from fedsim import federation as federations
from fedsim.engines.local import LocalGrid
from fedsim.engines.ray import RayGrid
from fedsim.engines.ray_session import RaySession
from fedsim.errors import ClientError, ConfigError, RunError
from fedsim.report import HOST_FIELDS
from fedsim.settings import compose

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]
TESTS = Path(__file__).parent
SPIES = "FEDSIM_TEST_SPIES"  # the folder where workers write down what they did


# --- what runs in the workers ------------------------------------------------------------------------------------


def spied_app(message: Message, context: Context) -> Message:
    """The real client app; each process writes down the worlds it has built and the weights it has unpacked."""
    if not hasattr(clients.app, "unpacked"):
        clients.app.unpacked, plain = [], clients.app.tensors_of
        clients.app.tensors_of = lambda record, *a: clients.app.unpacked.append(id(record)) or plain(record, *a)
    reply = clients.app.app(message, context)
    counts = {"worlds": clients.app.worker_for.cache_info().misses, "unpacked": len(clients.app.unpacked)}
    (Path(os.environ[SPIES]) / str(os.getpid())).write_text(json.dumps(counts))
    return reply


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


# --- fixtures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spies")


@pytest.fixture(scope="module")
def session(spies: Path) -> Iterator[RaySession]:
    """A Ray whose workers find this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setenv(SPIES, str(spies))
        session = RaySession(None, num_cpus=3)
    yield session
    session.close()


@pytest.fixture(scope="module")
def shared(session: RaySession) -> Iterator[RayGrid]:
    with RayGrid(spied_app, workers=2) as grid:
        yield grid


@pytest.fixture
def pair(shared: RayGrid, monkeypatch: pytest.MonkeyPatch) -> RayGrid:
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
        summary = federations.run(compose([*TINY, "cohort=6", *overrides]), engine, out, **hooks)
        return summary["weights_sha256"], lines(out)

    return make


@pytest.fixture
def local(result) -> Callable[..., tuple[str, list[dict]]]:
    """The same in this process, where nothing happens to anybody."""
    return lambda *overrides: result(LocalGrid(clients.app.app), *overrides)


def unlucky(what: str, who: list[int], folder: Path, times: int = 1) -> list[str]:
    target = "trainer._target_=test_ray.Unlucky"
    return [
        target,
        f"+trainer.what={what}",
        f"+trainer.who={who}",
        f"+trainer.folder={folder}",
        f"+trainer.times={times}",
    ]


def workers() -> list[psutil.Process]:
    """The worker processes below this one."""
    every = psutil.Process().children(recursive=True)
    return [p for p in every if p.status() != psutil.STATUS_ZOMBIE and "ray::RayWorker" in " ".join(p.cmdline())]


def both_at_work(run: Callable[[], object], spies: Path) -> list[psutil.Process]:
    """Lets runs go by until both workers, which may just be starting, have had a part; they are the result."""
    end = time.monotonic() + 60
    while len(at_work := [p for p in workers() if (spies / str(p.pid)).exists()]) < 2:
        assert time.monotonic() < end
        run()
    return at_work


# --- the same bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavg", "krum", "fedmedian"])
def test_two_workers_give_the_bytes_of_one_process(pair, result, local, strategy: str):
    overrides = (f"strategy={strategy}", "fleet=phones", "evaluate_clients=2", "num_clients=20", "cohort=9")
    assert result(pair, *overrides) == local(*overrides)


def test_one_worker_gives_the_bytes_of_one_process(session, result, local):
    with RayGrid(clients.app.app, workers=1) as grid:
        assert result(grid, "rounds=3") == local("rounds=3")


def test_weights_are_put_once_and_unpacked_once_a_round_and_the_world_is_built_once(pair, result, spies, monkeypatch):
    """Four training rounds, no others: four puts; each worker unpacks at most four times, and some worker all four."""
    import ray

    puts, plain = [], ray.put
    monkeypatch.setattr(ray, "put", lambda value: puts.append(value) or plain(value))
    both_at_work(lambda: result(pair, "rounds=1"), spies)
    before = {p.pid: json.loads((spies / str(p.pid)).read_text()) for p in workers()}
    puts.clear()
    result(pair, "rounds=4", "num_clients=30", "cohort=30", "seed=78")
    after = {p.pid: json.loads((spies / str(p.pid)).read_text()) for p in workers()}
    assert len(puts) == 4
    assert all(after[pid]["worlds"] - before[pid]["worlds"] == 1 for pid in after)
    unpacked = [after[pid]["unpacked"] - before[pid]["unpacked"] for pid in after]
    assert max(unpacked) == 4


# --- faults ------------------------------------------------------------------------------------------------------


def test_worker_that_is_killed_while_it_trains_changes_nothing(pair, result, local, tmp_path):
    """Client 2 dies with its worker once, client 4 twice; nobody notices."""
    assert result(pair, *unlucky("die", [2], tmp_path)) == local()


def test_workers_that_are_killed_one_after_the_other_change_nothing(pair, result, local, spies):
    doomed = both_at_work(lambda: result(pair, "rounds=1"), spies)
    answers = []

    def observe(client: int) -> None:
        answers.append(client)
        if len(answers) in (2, 8):
            doomed.pop().kill()

    assert result(pair, observe=observe) == local()
    assert doomed == []


def test_client_that_always_kills_its_worker_is_named_and_nobody_is_blamed_in_its_place(pair, result, tmp_path):
    """One chance: the message is split at once, the client fails, those that waited behind it are served."""
    pair.retries = 1
    reason = r"^client 3 \(reference\) failed in round 1 \(seed 1\): its worker process died once while training it"
    with pytest.raises(ClientError, match=reason):
        result(pair, *unlucky("die", [3], tmp_path, times=9))
    _, rounds = result(pair, *unlucky("die", [3], tmp_path, times=9), "on_client_error=drop", "rounds=1")
    assert rounds[1]["outcomes"] == {"completed": [0, 1, 2, 4, 5], "failed": [3]}


def test_client_that_hangs_fails_after_its_time(pair, result, tmp_path):
    pair.client_timeout_s = 1.5
    _, rounds = result(pair, *unlucky("hang", [4], tmp_path, times=9), "on_client_error=drop", "rounds=1")
    assert rounds[1]["outcomes"] == {"completed": [0, 1, 2, 3, 5], "failed": [4]}
    with pytest.raises(ClientError, match=r"^client 4 .* round 1 .*: ran longer than engine.client_timeout_s=1.5"):
        result(pair, *unlucky("hang", [4], tmp_path, times=9))


def test_client_that_raises_stops_the_run_and_the_workers_live_on(pair, result, local, tmp_path):
    with pytest.raises(ClientError, match=r"^client 3 .*: ZeroDivisionError: as told") as caught:
        result(pair, *unlucky("raise", [3], tmp_path))
    assert "in fit" in caught.value.traceback
    assert result(pair) == local()


def test_client_that_diverges_is_a_counted_outcome(pair, result, tmp_path):
    _, rounds = result(pair, *unlucky("diverge", [1], tmp_path), "on_client_error=drop", "rounds=1")
    assert rounds[1]["outcomes"] == {"completed": [0, 2, 3, 4, 5], "failed": [1]}


def test_wrong_setting_that_a_worker_finds_is_the_users_own_error(pair, result, tmp_path):
    with pytest.raises(ConfigError, match=r"^trainer\.lr must be smaller$"):
        result(pair, *unlucky("misconfigured", [1], tmp_path))


def broken_app(message: Message, context: Context) -> Message:
    raise LookupError("no such thing")


def test_client_app_that_fails_as_a_whole_is_named(session, result):
    with RayGrid(broken_app, workers=1) as grid, pytest.raises(RunError, match="LookupError: no such thing"):
        result(grid)


# --- what is started, and what is left ---------------------------------------------------------------------------


def test_nothing_listens_beyond_this_machine(pair, result):
    result(pair, "rounds=1")
    every = psutil.Process().children(recursive=True)
    assert {"raylet", "gcs_server"} <= {p.name() for p in every}
    own = [psutil.Process(), *every]
    heard = [c.laddr.ip for p in own for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(heard) > 4
    assert {ip.removeprefix("::ffff:") for ip in heard} <= {"127.0.0.1", "::1"}
