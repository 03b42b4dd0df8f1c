"""Runs of a study that are forked from a process which has imported everything: as if `fedsim` was started for each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import TINY, Ended
from cut_short import comparable
from test_start import HEAVY, modules_of

from fedsim.study import processes
from fedsim.study.processes import Processes
from fedsim.study.runner import study_folder

pytestmark = pytest.mark.skipif(not processes.CAN_FORK, reason="runs are not forked on this system")

# Trainers that leave nothing of their process as it was.
DIRTY = """
import gc, logging, os, random, sys, time, warnings
import numpy as np
import torch
from clients.trainers.sgd import SGDTrainer

class Dirty(SGDTrainer):
    def setup(self, *given):
        super().setup(*given)
        print("I was here")
        warnings.warn("look", stacklevel=2)
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(2)
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        warnings.simplefilter("error")
        logging.disable()
        sys.path.insert(0, "nowhere")
        sys.modules["clients.trainers.personal.ditto"] = None
        os.environ["FEDSIM_DATA"] = "nowhere"
        os.umask(0o177)
        self.end()
        torch.set_default_dtype(torch.float64)
        gc.disable()

    def end(self):
        os.chdir("/")

class Breaks(Dirty):
    def end(self):
        raise ValueError("it broke")

class Killed(Dirty):
    def end(self):
        os.kill(os.getpid(), 9)

class Orphaned(Dirty):
    def end(self):
        os.kill(os.getppid(), 9)
        time.sleep(60)
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fedsim) -> Callable[..., Ended]:
    """Runs a study with these arms, one at a time, in a working folder with trainers of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("dirty.py").write_text(DIRTY)

    def call(arms: dict[str, list[str]], *options: str) -> Ended:
        Path("s.yaml").write_text(yaml.safe_dump({"title": "T", "base": [*TINY], "arms": arms}, sort_keys=False))
        return fedsim("study", "s.yaml", "--jobs", "1", "--out", "studied", *options)

    yield call
    sys.modules.pop("dirty", None)


def test_each_is_what_it_is_in_a_process_of_its_own(study, fedsim):
    """Also after one that has changed all that the process has for everybody: the bytes, the settings, the files."""
    arms = {
        "Dirty": ["trainer._target_=dirty.Dirty"],
        "Ditto": ["method=ditto"],
        "Threads": ["engine.threads=2", "strategy=fedadam", "stream=permuted", "stream.tasks=2"],
        "Mixed": ["method=local_mixup", "name=mine", "evaluate_clients=2"],
    }
    assert "1 of 4 runs failed: Dirty, seed 1: No such file" in study(arms).err  # in the folder that it went to
    for label in ("Ditto", "Threads", "Mixed"):
        forked, own = Path("studied") / label.lower() / "seed-1", Path("own") / label
        assert fedsim("run", *TINY, *arms[label], "seed=1", f"out={own}").code == 0
        assert {p.relative_to(forked) for p in forked.glob("*")} == {p.relative_to(own) for p in own.glob("*")}
        assert (forked / "config.yaml").read_bytes() == (own / "config.yaml").read_bytes()
        assert comparable(forked) == comparable(own)


def test_one_that_breaks_or_is_killed_ends_alone(study, monkeypatch: pytest.MonkeyPatch):
    arms = {
        "Breaks": ["trainer._target_=dirty.Breaks"],
        "Killed": ["trainer._target_=dirty.Killed"],
        "Orphaned": ["trainer._target_=dirty.Orphaned"],
        "Plain": [],
    }
    code, _, err = study(arms)
    assert code == 1
    assert "3 of 4 runs failed" in err
    assert "Killed, seed 1: ended by SIGKILL, see studied/killed/seed-1.log" in err
    assert "Orphaned, seed 1: terminated" in err
    assert Path("studied/plain/seed-1/summary.json").exists()
    assert not Path("studied/plain/seed-1.log").exists()
    said = Path("studied/breaks/seed-1.log").read_text()
    assert "it broke" in said
    monkeypatch.setattr(processes, "CAN_FORK", False)
    study(arms, "--only", "Breaks", "--out", "alone")
    assert Path("alone/breaks/seed-1.log").read_text() == said.replace("studied", "alone")


def test_only_what_runs_in_one_process_is_forked(file, fedsim, monkeypatch: pytest.MonkeyPatch):
    """Ray starts threads, and processes of its own, which take longer than the imports."""
    forked = []
    monkeypatch.setattr(processes, "CAN_FORK", True)
    monkeypatch.setattr(processes._ForkServer, "fork", lambda server, arguments, *_: forked.append(arguments))
    assert fedsim("study", file(arms={"Local": [], "Ray": ["engine=ray"]}, seeds=[1])).code == 0
    assert [arguments[-1] for arguments in forked] == ["out=runs/mine/local/seed-1"]


def test_the_server_has_one_thread_and_ends_with_the_study(tmp_path: Path):
    """A fork has one thread only: what others hold, it would wait for forever."""
    with study_folder(tmp_path / "s") as lock:
        with Processes(lock) as started, (tmp_path / "log").open("wb") as log:
            process = started.start(["devices", "links"], log)
            server = psutil.Process(started.server.process.pid)
            assert server.num_threads() == 1
            while process.code is None:
                started.look()
            assert process.code == 0
            assert started.server.running == {}
        assert not server.is_running()
    assert "lte_us" in (tmp_path / "log").read_text()


def test_a_forked_run_imports_next_to_nothing(tmp_path: Path):
    code = "from fedsim.cli import fork_server as f, main; f.import_all(); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert not HEAVY & imported
    missing = modules_of(tmp_path, "run", "rounds=1", "out=run") - imported
    ours = {"clients", "strategies", "fedsim"}
    assert {name.partition(".")[0] for name in missing} <= {*ours, "antlr4", "hydra", "importlib", "omegaconf"}
