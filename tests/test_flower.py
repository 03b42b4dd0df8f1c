"""The second door: `flwr run` on Flower's own runtime gives the same bytes as `fedsim run`, and failures can be seen.

Starts a real SuperLink with its own home and ports in a neutral folder, and ends it by its pid.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clients.app import app as client_app
from fedsim.engines.local import LocalGrid
from fedsim.federation import run
from fedsim.report import HOST_FIELDS
from fedsim.settings import compose, from_run_config

PROJECT = Path(__file__).parent.parent
OVERRIDES = ["rounds=2", "num_clients=12", "cohort=6", "trainer.local_epochs=1", "engine.device=cpu"]
FEDERATION = "num-supernodes=2 client-resources-num-cpus=1"
Flwr = Callable[..., dict]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def flwr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flwr]:
    """Calls `flwr ARGS --format json` in a neutral folder, with what the README exports."""
    folder = tmp_path_factory.mktemp("flower")
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
    }

    def call(*arguments: str) -> dict:
        command = ["flwr", *arguments, "--format", "json"]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        answer: dict = json.loads(done.stdout[done.stdout.index("{") :])
        return answer

    yield call
    home = f"FLWR_HOME={folder / 'home'}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if home in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def status_of(flwr: Flwr, *overrides: str) -> str:
    """Starts a run and waits until it is over; the exit code of `flwr run` says nothing about that."""
    text = " ".join(overrides)
    started = flwr("run", str(PROJECT), "--federation-config", FEDERATION, "--run-config", f'overrides="{text}"')
    end = time.monotonic() + 240
    while time.monotonic() < end:
        status = str(flwr("ls", "--run-id", started["run-id"])["runs"][0]["status"])
        if status.startswith("finished"):
            return status
        time.sleep(2)
    raise AssertionError("the run did not end within 240 s")


@pytest.mark.flower
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc").exists(), reason="ends the SuperLink by looking into /proc")
def test_flower_run_equals_the_local_run_and_a_failed_run_is_visible(flwr, tmp_path):
    assert status_of(flwr, *OVERRIDES, f"out={tmp_path / 'flower'}") == "finished:completed"
    local = run(compose(OVERRIDES), LocalGrid(client_app), tmp_path / "local")
    flower = json.loads((tmp_path / "flower" / "summary.json").read_text())
    assert flower["weights_sha256"] == local["weights_sha256"]
    assert lines(tmp_path / "flower") == lines(tmp_path / "local")
    assert status_of(flwr, "strategy=fedavgg") == "finished:failed"


def test_run_config_composes_the_same_settings_as_the_command():
    overrides = ["rounds=2", "num_clients=12", "fleet=sbc"]
    settings = from_run_config({"overrides": " ".join(overrides), "config-json": ""})
    assert settings == compose(overrides)
    assert from_run_config({"overrides": "", "config-json": json.dumps(settings)}) == settings


def lines(folder: Path) -> list[dict]:
    """`rounds.jsonl` without what only the host knows."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key not in HOST_FIELDS} for r in rounds]
