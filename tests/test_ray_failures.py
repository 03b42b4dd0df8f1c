"""A Ray that dies, does not start or is set up wrong ends in one sentence; nothing of it is left.

What is killed runs in a subprocess.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import TINY
from ray_workers import descendants, is_alive, lines

from clients.app import serve
from fedsim.engines.ray import session as ray_session
from fedsim.engines.ray.engine import RayEngine
from fedsim.engines.ray.session import RaySession
from fedsim.errors import ConfigError, RunError

pytestmark = pytest.mark.ray


# --- a Ray that dies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raylet", "gcs_server"])
def test_a_ray_that_has_died_is_one_sentence(kind: str, monkeypatch):
    """The real one is in the test below, marked slow."""
    from types import SimpleNamespace

    from ray._private import worker

    ended = [SimpleNamespace(process=SimpleNamespace(poll=lambda: -9))]
    monkeypatch.setattr(worker, "_global_node", SimpleNamespace(all_processes={kind: ended}))
    own = object.__new__(RaySession)
    own.private = True
    with pytest.raises(RunError, match=rf"^Ray's {kind} has ended \(killed, or out of memory\)"):
        own.check()
    own.private = False  # a cluster's are not ours to watch
    own.check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raylet", "gcs_server"])
def test_a_run_whose_ray_dies_ends_in_one_sentence_and_leaves_nothing(tmp_path: Path, kind: str):
    run = started_run(tmp_path / "a")
    try:
        until_lines(run, tmp_path / "a", 3)
        started = with_worker(run.pid)
        next(p for p in started if p.name() == kind).kill()
        _, said = run.communicate(timeout=60)
        assert (run.returncode, said.count("\n")) == (1, 1)
        assert said.startswith(f"fedsim: Ray's {kind} has ended")
        assert (tmp_path / "a" / "failure.json").exists()
        assert not [p for p in started if is_alive(p)]
    finally:
        run.kill()


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 1.0, 3.0])
def test_a_driver_that_is_killed_while_ray_starts_leaves_nothing(tmp_path: Path, delay_s: float):
    before = set(Path("/tmp").glob("fedsim-ray-*"))
    run = started_run(tmp_path / "a")
    try:
        end = time.monotonic() + 60
        while not (own := set(Path("/tmp").glob("fedsim-ray-*")) - before):
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(delay_s)
        started = descendants(run.pid)
    finally:
        run.kill()
        run.communicate()
    end = time.monotonic() + 15
    while (any(folder.exists() for folder in own) or any(map(is_alive, started))) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [folder for folder in own if folder.exists()]
    assert not [p for p in started if is_alive(p)]


def until_lines(run: subprocess.Popen[str], folder: Path, count: int) -> None:
    """Waits until a run has written so many rounds."""
    end = time.monotonic() + 100
    while not (folder / "rounds.jsonl").exists() or len(lines(folder)) < count:
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def started_run(out: Path) -> subprocess.Popen[str]:
    """An endless run of the command, a session of its own."""
    command = [str(Path(sys.executable).parent / "fedsim"), "run", "engine=ray", "engine.workers=1", *TINY]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "rounds=1000000", f"out={out}"], **silent, start_new_session=True)


def with_worker(pid: int) -> list[psutil.Process]:
    """The processes below another one, seen at a moment when a worker, which may just be replaced, is among them."""
    end = time.monotonic() + 30
    while True:
        below = descendants(pid)
        if any(is_alive(p, "ray::RayWorker") for p in below):
            return below
        assert time.monotonic() < end, below
        time.sleep(0.05)


# --- one that does not start -----------------------------------------------------------------------------------------


def test_address_where_nobody_answers_is_one_sentence(monkeypatch):
    monkeypatch.setattr(ray_session, "ANSWER_S", 0.5)
    with pytest.raises(RunError, match=r"^no Ray cluster answers at engine\.address=127\.0\.0\.1:9; start one with"):
        ray_session.answering("127.0.0.1:9")


@pytest.mark.parametrize("error", [Exception, RuntimeError, TimeoutError, ValueError, LookupError, AssertionError])
@pytest.mark.parametrize("address", [None, "127.0.0.1:9"])
def test_whatever_ray_raises_while_it_starts_is_one_sentence(address: str | None, error: type[Exception], monkeypatch):
    """A raylet that is killed while it starts gives a plain Exception: "The current node timed out"."""
    import ray

    def init(**settings: Any) -> None:
        raise error("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_session, "answering", lambda address: address)
    monkeypatch.setattr(ray_session, "_read_token_anew", lambda: None)  # other tests' Ray goes on
    with pytest.raises(RunError, match=r"^(Ray could not|the Ray cluster at).*: The current node timed out during st"):
        RaySession(address, num_cpus=1)


def test_address_where_nobody_answers_leaves_no_folder_and_the_corrected_command_runs(tmp_path, monkeypatch, fedsim):
    monkeypatch.setattr(ray_session, "ANSWER_S", 0.5)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test's session would be used
    given = ("run", *TINY, f"out={tmp_path / 'run'}")
    ended = fedsim(*given, "engine=ray", "engine.address=127.0.0.1:9")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert ended.err.startswith("fedsim: no Ray cluster answers at engine.address=127.0.0.1:9; ")
    assert not (tmp_path / "run").exists()
    assert fedsim(*given).code == 0


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"workers": 0}, "engine.workers must be null or at least 1, got 0"),
        ({"address": "ray://head:10001"}, "engine.address must be null, auto or HOST:PORT, got 'ray://head:10001'"),
        ({"cpus_per_worker": 0}, "engine.cpus_per_worker must be greater than 0, got 0"),
        ({"gpus_per_worker": 1.5}, "engine.gpus_per_worker must be a share in [0, 1] or a whole number, got 1.5"),
        ({"client_timeout_s": 0.0}, "engine.client_timeout_s must be null or greater than 0, got 0.0"),
        ({"retries": 0}, "engine.retries must be at least 1, got 0"),
        ({"device": "cuda"}, "engine.device=cuda needs engine.gpus_per_worker above 0, e.g. 0.5 for two workers a GPU"),
    ],
    ids=str,
)
def test_wrong_setting_is_one_sentence(setting: dict, sentence: str):
    with pytest.raises(ConfigError) as caught:
        RayEngine(serve, **setting)
    assert str(caught.value) == sentence
