"""The method of `strategies/README.md`, taken from the page and run as a reader would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "strategies" / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the page's file alone."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    place = tmp_path_factory.mktemp("mine")
    (place / "fedproto.py").write_text(code)
    return place


def run(folder: Path, *arguments: str) -> dict:
    """The summary of `fedsim run ARGUMENTS` in that folder."""
    out = folder / f"run-{len(list(folder.iterdir()))}"
    command = [sys.executable, "-m", "fedsim", "run", *arguments, f"out={out}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    (out / "summary.json").rename(out / "read.json")
    return summary


def test_the_pages_command_runs_the_pages_method(folder: Path):
    """10 clients a round: 10 means of 64 features and 10 counts, in float32, up in three rounds and down in two."""
    (command,) = re.findall(r"^fedsim run (strategy\._target_=.*)$", PAGE.read_text(), re.MULTILINE)
    ours, plain = run(folder, *command.split()), run(folder, "rounds=3")
    extra = 10 * (10 * 64 + 10) * 4
    assert ours["up_bytes"] - plain["up_bytes"] == 3 * extra
    assert ours["down_bytes"] - plain["down_bytes"] == 2 * extra
    assert ours["weights_sha256"] != plain["weights_sha256"]


def test_without_a_pull_it_is_federated_averaging(folder: Path):
    halves = ["strategy._target_=fedproto.FedProto", "trainer._target_=fedproto.FedProtoTrainer", "+trainer.pull=0"]
    ours = run(folder, *halves, "rounds=2")
    plain = run(folder, "strategy._target_=strategies.edge.EdgeStrategy", "rounds=2")
    assert ours["weights_sha256"] == plain["weights_sha256"]
