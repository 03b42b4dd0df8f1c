"""The second door: Flower's own runtime gives the bytes of `fedsim run`, failures can be seen, nothing stays behind.

Starts real SuperLinks through `fedsim flwr`, one after the other.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import DAILY

from clients.app import serve
from devices.errors import FileError
from fedsim.cli import flower as cli_flower
from fedsim.engines.flower import runtime as flower_runtime
from fedsim.engines.flower.runtime import FlowerRuntime, Place, environment
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError, RunError
from fedsim.report.rounds import HOST_FIELDS, read_rounds
from fedsim.runs import flower_launch as flower_run
from fedsim.runs.flower_launch import anchored, failure
from fedsim.runs.writer import run
from fedsim.settings.compose import compose, from_run_config

PROJECT = Path(__file__).parent.parent
FEDSIM = Path(sys.executable).with_name("fedsim")
TINY = ["workload=blobs", "rounds=2", "num_clients=12", "cohort=6", "trainer.local_epochs=1", "engine.device=cpu"]
ENDLESS = ["workload=blobs", "rounds=1000000", "num_clients=6", "cohort=3", "engine.device=cpu"]
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


class Command:
    """A started `fedsim flwr`, and what is seen of it from outside: its processes, and where they listen."""

    def __init__(self, cwd: Path, *arguments: str):
        self.process = subprocess.Popen(
            [str(FEDSIM), "flwr", *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.seen: set[psutil.Process] = set()
        self.listening: set[tuple[str, str]] = set()
        self.folders: set[Path] = set()

    def look(self) -> None:
        try:
            tree = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in set(tree):
            try:
                home = process.environ().get("FLWR_HOME")
                self.folders |= {Path(home).parent} if home else set()
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        self.listening.add((process.name(), connection.laddr.ip))
            except psutil.Error:
                continue
        self.seen |= set(tree)

    def until(self, over: Callable[[], bool], timeout_s: float = 240) -> None:
        end = time.monotonic() + timeout_s
        while not over():
            assert time.monotonic() < end, f"not within {timeout_s} s"
            self.look()
            time.sleep(0.5)

    def ended(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        self.until(lambda: self.process.poll() is not None)
        out, err = self.process.communicate()
        return self.process.returncode, out, err

    def left(self) -> list[str]:
        """Processes and folders that are still there."""
        alive = [p for p in self.seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        return [f"{p.pid} {p.name()}" for p in alive] + [str(f) for f in self.folders if f.exists()]


@pytest.fixture
def flwr(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts `fedsim flwr ARGUMENTS` in an empty folder; what a failed test left is ended."""
    (tmp_path / "cwd").mkdir()
    started: list[Command] = []

    def start(*arguments: str) -> Command:
        started.append(Command(tmp_path / "cwd", *arguments))
        return started[-1]

    yield start
    for command in started:
        command.look()
        for process in [command.process, *command.seen]:
            if process.pid != os.getpid() and psutil.pid_exists(process.pid):
                process.kill()
        command.process.communicate()


def real(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that starts a SuperLink."""
    for mark in (pytest.mark.flower, pytest.mark.timeout(400)):
        test = mark(test)
    return test


@real
def test_gives_the_bytes_of_the_local_run_and_listens_on_loopback_only(flwr, tmp_path: Path):
    """Clients that answer a question first, keep what comes back, and may be late; momentum, and batch norm beside."""
    method = ["method=fedmix", "strategy@strategy.server=fedavgm", "model.norm=batch"]
    overrides = [*TINY, *DAILY, *method, "rounds=3", "deadline_s=0.3"]
    command = flwr(*overrides, "--workers", "2")
    code, out, err = command.ended()
    assert (code, err) == (0, "")
    folder = next((tmp_path / "cwd" / "runs").iterdir())
    assert f"run folder: runs/{folder.name}" in out
    assert "fedmix on blobs, fleet phones" in out

    local = run(compose(overrides), LocalEngine(serve), tmp_path / "local")
    assert all(local["outcomes"][outcome] for outcome in ("completed", "late", "offline"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights_sha256"] == local["weights_sha256"]
    assert lines(folder) == lines(tmp_path / "local")

    assert {"flower-superlin", "raylet", "gcs_server"} <= {name for name, _ in command.listening}
    assert {address for _, address in command.listening} <= LOOPBACK
    assert command.left() == []


@pytest.mark.slow
@real
def test_a_stream_of_tasks_gives_the_bytes_of_the_local_run(flwr, tmp_path: Path):
    """Coresets ride in the clients' state, and the question that ends a task is an exchange of its own."""
    overrides = [
        *("workload=digits", "partition=iid", "num_clients=4", "cohort=3", "rounds=5", "engine.device=cpu"),
        *("stream=split_classes", "stream.order=shuffled", "method=ocs", "trainer.local_epochs=1"),
        *("trainer.memory_size=20", "trainer.warm_start=2"),
    ]
    command = flwr(*overrides, "--workers", "2")
    code, _, err = command.ended()
    assert (code, err) == (0, "")
    folder = next((tmp_path / "cwd" / "runs").iterdir())
    local = run(compose(overrides), LocalEngine(serve), tmp_path / "local")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights_sha256"] == local["weights_sha256"]
    assert summary["continual"] == local["continual"]
    assert lines(folder) == lines(tmp_path / "local")
    assert max(report.storage_bytes for report in read_rounds(folder)) > 20 * 64  # the coresets were there
    assert command.left() == []


@pytest.mark.slow
@real
def test_a_bundle_that_fails_ends_with_the_sentence_and_its_log(flwr, tmp_path: Path):
    """The checkout's own bundle: its copies of the packages are what runs, on server and clients."""
    command = flwr(*TINY, "trainer.lr=1e30", "out=failed", "--app", str(PROJECT), "--workers", "1")
    code, _, err = command.ended()
    assert code == 1
    assert err.startswith("fedsim: client ")
    assert "NaN or infinite" in err
    assert err.count("\n") == 1
    assert json.loads((tmp_path / "cwd" / "failed" / "failure.json").read_text())["error"] == "ClientError"
    log = (tmp_path / "cwd" / "failed" / "flower.log").read_text()
    assert "/home/apps/fedsim.fedsim-edge." in log[log.index("Traceback") :]
    assert command.left() == []


@real
def test_sigterm_ends_everything_and_keeps_what_was_written(flwr, tmp_path: Path):
    command = flwr(*ENDLESS, "out=stopped")
    rounds = tmp_path / "cwd" / "stopped" / "rounds.jsonl"
    command.until(lambda: rounds.exists() and rounds.read_bytes().count(b"\n") > 3)
    started = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    code, _, err = command.ended()
    assert time.monotonic() - started < 10  # 4 s on an idle machine
    assert (code, err) == (143, "fedsim: terminated; everything written so far stays\n")
    assert read_rounds(rounds.parent)[3].round == 3
    assert json.loads((rounds.parent / "failure.json").read_text())["reason"] == "interrupted"
    assert command.left() == []


def lines(folder: Path) -> list[dict]:
    """`rounds.jsonl` without what only the host knows."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key not in HOST_FIELDS} for r in rounds]


# --- the bundle ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's
def test_the_bundle_holds_every_file_of_the_packages_and_stays_small():
    """Flower drops what is not .py, .toml, .md, .yaml or .json without a word: such a file needs another way."""
    from flwr.cli.build import build_fab_from_disk

    bundle = build_fab_from_disk(PROJECT)
    assert len(bundle) < 5e6  # Flower takes 10 MB
    packages = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    files = {
        str(path.relative_to(PROJECT))
        for package in packages["include"]
        for path in (PROJECT / package.rstrip("*")).rglob("*")
        if path.suffix in (".py", ".yaml") and "__pycache__" not in path.parts  # no page, no py.typed
    }
    bundled = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist())
    assert files <= bundled, f"not in the bundle: {sorted(files - bundled)}"
    assert bundled - files == {"pyproject.toml", ".info/CONTENT"}


def test_the_app_of_the_installed_packages_has_the_components_of_the_bundle():
    bundle, installed = (
        tomllib.loads(text)["tool"]["flwr"]["app"]
        for text in ((PROJECT / "pyproject.toml").read_text(), flower_runtime.APP)
    )
    assert installed["components"] == bundle["components"]
    assert installed["config"] == bundle["config"]


def test_run_config_composes_the_same_settings_as_the_command():
    overrides = ["rounds=2", "num_clients=12", "fleet=sbc"]
    settings = from_run_config({"overrides": " ".join(overrides), "config-json": ""})
    assert settings == compose(overrides)
    assert from_run_config({"overrides": "", "config-json": json.dumps(settings)}) == settings


# --- before anything starts ----------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path, monkeypatch, capsys) -> Callable[..., str]:
    """Calls `fedsim flwr` in this process with arguments that must be refused before Flower is started."""
    from fedsim.cli import main as cli

    def start(self: FlowerRuntime) -> FlowerRuntime:
        raise AssertionError("Flower was started")

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fedsim", "flwr", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert not list(tmp_path.iterdir())
        return str(said.err)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FlowerRuntime, "__enter__", start)
    return call


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["rounds=abc"], "rounds must be a whole number"),
        (["strategy=fedavgg"], "did you mean 'fedavg'"),
        (["cohort=10000"], "cohort must be at most the 20 clients there are"),
        (["workload=bundle", "workload.path=nowhere"], "no bundle 'nowhere'"),
        (["-m", "seed=1,2"], "does not know -m"),
        (["--ray-address", "auto"], "needs --workers"),
        (["--app", "nowhere"], "pyproject.toml"),
    ],
)
def test_a_wrong_setting_is_refused_before_flower_starts(refused, arguments: list[str], words: str):
    assert words in refused(*arguments)


def test_the_device_is_that_of_the_local_run():
    """Where a card is, `auto` does not always take it."""
    engine = cli_flower._composed([])["engine"]
    assert (engine["device"], engine["slots"]) == ("cpu", 0)


def test_another_engine_is_refused():
    with pytest.raises(ConfigError, match="leave out engine=ray"):
        cli_flower._composed(["engine=ray"])


def test_a_port_that_is_taken_is_refused(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"superlink-port={port} is taken"):
            FlowerRuntime(Place(workers=1, port=port)).__enter__()


def test_a_superlink_that_dies_at_once_leaves_nothing(monkeypatch):
    runtime = FlowerRuntime(Place(workers=1))
    popen = FlowerRuntime._popen
    monkeypatch.setattr(FlowerRuntime, "_popen", lambda self, command: popen(self, (command[0], "--nonsense")))
    with pytest.raises(RunError, match=r"flower-superlink ended with code 2; .*--nonsense"):
        runtime.__enter__()
    assert not runtime.folder.exists()
    assert runtime.session is not None
    assert runtime.session.leash.returncode is not None


# --- settings, environment, failures -------------------------------------------------------------------------------


def test_workers_and_their_share_of_the_gpus():
    assert Place(2).federation() == "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2"
    assert "client-resources-num-gpus=0.333 " in Place(3, gpus=1).federation()
    assert "client-resources-num-gpus=1.0 " in Place(1, gpus=4).federation()
    assert Place(8, ray_address="auto").federation() == "num-supernodes=8 client-resources-num-cpus=1"


def test_the_environment_is_not_that_of_another_runtime(tmp_path: Path, monkeypatch):
    for name in ("FLWR_HOME", "RAY_ADDRESS", "RAY_TMPDIR", "FLWR_LOCAL_CONTROL_API_PORT"):
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("FEDSIM_DATA", "bundles")
    monkeypatch.chdir(tmp_path)
    ours = environment(Path("/private"), Place(2, threads=3))
    assert "theirs" not in ours.values()
    assert (ours["FLWR_HOME"], ours["RAY_ADDRESS"], ours["OMP_NUM_THREADS"]) == ("/private/home", "local", "3")
    assert ours["FEDSIM_DATA"] == str(tmp_path / "bundles")
    assert environment(Path("/private"), Place(2, ray_address="head:6379"))["RAY_ADDRESS"] == "head:6379"


def test_relative_files_are_found_from_another_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    for name in ("mine.yaml", "weights", "data/known", "known", "phones"):
        (tmp_path / name).mkdir(parents=True)
    settings = {
        "name": "mine.yaml",
        "choices": {"fleet": "phones"},
        "fleet": {"_target_": "mine.yaml", "devices": {"mine.yaml": 1.0, "phones": 2.0}},
        "workload": {"path": "known", "root": "weights", "other": "phones", "sizes": [1, 2], "gone": "./absent.yaml"},
    }
    assert anchored(settings, tmp_path) == {
        "name": "mine.yaml",
        "choices": {"fleet": "phones"},
        "fleet": {"_target_": "mine.yaml", "devices": {str(tmp_path / "mine.yaml"): 1.0, "phones": 2.0}},
        "workload": {**settings["workload"], "root": str(tmp_path / "weights")},  # "known" is found below data first
    }


def test_a_failure_is_told_by_the_folder_then_by_the_log(tmp_path: Path):
    raised = "Traceback ...\nfedsim.errors.ConfigError: cohort must be at most 6, got 7\nINFO: more\n"
    by_log = failure(tmp_path, "finished:failed", raised)
    assert (type(by_log), str(by_log)) == (ConfigError, "cohort must be at most 6, got 7")
    assert str(failure(tmp_path, "finished:stopped", "a\n\nb\n")).endswith("the end of its log: a | b")
    (tmp_path / "failure.json").write_text(json.dumps({"error": "ClientError", "reason": "client 3 failed"}))
    assert (type(told := failure(tmp_path, "finished:failed", raised)), str(told)) == (RunError, "client 3 failed")
    (tmp_path / "failure.json").write_text(json.dumps({"error": "OSError", "reason": "no space"}))
    assert str(failure(tmp_path, "finished:failed", "")) == "OSError: no space"
    (tmp_path / "failure.json").write_text(json.dumps({"error": "FileError", "reason": "mine.yaml is no map"}))
    assert type(failure(tmp_path, "finished:failed", "")) is FileError  # as every error that a user can mend


def test_only_complete_lines_are_followed(tmp_path: Path):
    new, path = flower_run._new_lines(tmp_path / "rounds.jsonl"), tmp_path / "rounds.jsonl"
    assert next(new) == []
    path.write_text("one\ntwo\nthr")
    assert next(new) == ["one\n", "two\n"]
    path.write_text("one\ntwo\nthree\n")
    assert next(new) == ["three\n"]
    assert next(new) == []
