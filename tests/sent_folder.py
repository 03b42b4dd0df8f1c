"""A working folder, and in it a run folder and a study that somebody sent, with code that must not run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY

from fedsim.settings import permissions, plugins
from fedsim.settings.compose import compose

DOORS = {
    "resume": ["resume", "{run}"],
    "replay": ["replay", "{run}", "--round", "1", "--client", "0"],
    "repeat": ["run", "--config-path", "{run}", "--config-name", "config", "out=again"],
    "sweep": ["run", "-m", "--config-path={run}", "--config-name=config", "seed=1,2", "out=again"],
    "study": ["study", "{run}/study.yaml", "--out", "studied"],
}

MODULE = """
from pathlib import Path
from clients.trainers.sgd import SGDTrainer
Path({mark!r}).touch()
class Mine(SGDTrainer):
    "A trainer."
def make() -> SGDTrainer:
    return Mine()
def unsaid():
    return Mine()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; what was imported from it is forgotten."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    permissions.reset()
    yield folder
    permissions.reset()
    plugins.plugins.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mine_a", "nets", "sent", "given", "plugged"):
            del sys.modules[name]


def write_module(path: Path) -> Path:
    """A module with a trainer; the file that is there once it was imported."""
    mark = path.with_suffix(".ran")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MODULE.format(mark=str(mark)))
    return mark


@pytest.fixture
def sent(here: Path) -> Callable[..., Path]:
    """A run folder and a study that somebody sent, with a module and a `_target_` in one of its groups."""

    def make(group: str, target: str, **settings: Any) -> Path:
        folder = here / "sent"
        write_module(folder / "evil.py")
        tree = compose(TINY)
        tree[group] = {**tree[group], "_target_": target, **settings}
        (folder / "config.yaml").write_text(yaml.safe_dump({**tree, "out": None}))
        (folder / "rounds.jsonl").touch()
        more = [f"+{group}.{key}={value}" for key, value in settings.items()]
        arms = {"A": [*TINY, f"{group}._target_={target}", *more]}
        (folder / "study.yaml").write_text(yaml.safe_dump({"title": "T", "arms": arms}))
        return folder

    return make
