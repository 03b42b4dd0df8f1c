"""The tutorial of `strategies/README.md`, followed from top to bottom as a reader would in a folder of their own."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from page_files import steps, write

PAGE = Path(__file__).parent.parent / "strategies" / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page was followed: its files written, its commands run."""
    place = tmp_path_factory.mktemp("mine")
    for path, text in steps(PAGE):
        if path:
            write(place, path, text)
        elif text.startswith("fedsim run "):
            run(place, *shlex.split(text)[2:])
        else:
            command = shlex.split(text)
            python = command[1:] if command[0] == "python" else ["-m", *command]
            call(place, *python)
    return place


def call(folder: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """The summary of `fedsim run OVERRIDES` in that folder; what it was before is kept."""
    out = folder / "out" / "-".join(overrides).replace("=", "-")
    if not out.exists():
        call(folder, "-m", "fedsim", "run", *overrides, f"out={out}")
    return json.loads((out / "summary.json").read_text())


def test_the_page_has_all_of_a_method(folder: Path):
    kinds = [path or text.split()[1] for path, text in steps(PAGE)]
    assert kinds.count("new") == 3
    assert {"prototypes.py", "configs/strategy/prototypes.yaml", "configs/trainer/prototypes.yaml"} <= set(kinds)
    assert (folder / "test_shade.py").exists()


def test_the_pages_command_runs_the_pages_method(folder: Path):
    """10 clients a round: 10 means of 64 features and 10 counts, in float32, up in three rounds and down in two."""
    ours, plain = run(folder, "method=prototypes", "rounds=3"), run(folder, "strategy=edge_mean", "rounds=3")
    extra = 10 * (10 * 64 + 10) * 4
    assert ours["method"] == "prototypes"
    assert ours["up_bytes"] - plain["up_bytes"] == 3 * extra
    assert ours["down_bytes"] - plain["down_bytes"] == 2 * extra
    assert ours["weights_sha256"] != plain["weights_sha256"]


def test_the_pages_buffered_strategy_goes_another_way(folder: Path):
    """Replies are stale from the second round on; the rule and the attack beside it are run by the fixture."""
    assert {"damped.py", "turns.py"} <= {path.name for path in folder.iterdir()}
    ours = run(folder, "method=fedbuff", "strategy._target_=damped.Damped", "rounds=3")
    assert ours["weights_sha256"] != run(folder, "method=fedbuff", "rounds=3")["weights_sha256"]


def test_without_a_pull_it_is_federated_averaging(folder: Path):
    ours = run(folder, "method=prototypes", "trainer.pull=0", "rounds=3")
    assert ours["weights_sha256"] == run(folder, "strategy=edge_mean", "rounds=3")["weights_sha256"]
