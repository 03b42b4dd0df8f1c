"""`configs/README.md`, "Your own code": its files are written, and every command is run, as a reader would."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from page_files import steps, write_all
from test_readme import ROOT, commands

import fedsim as door

PAGE = ROOT / "configs" / "README.md"
NEEDS_DATA = "workload=cifar10"
COMMANDS = [words for words in commands(PAGE) if "rounds=5" in words or "mymodels.py:TinyTransformer" in words]


@pytest.fixture(autouse=True)
def written(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDSIM_DATA", str(here / "no data"))
    write_all(PAGE, here)
    yield
    for name in ("halfway", "mymodels"):
        sys.modules.pop(name, None)


def test_the_page_has_its_files_and_commands():
    assert {path for path, _ in steps(PAGE) if path} == {
        "mymodels.py",
        "halfway.py",
        "configs/strategy/halfway.yaml",
        "configs/method/halfway.yaml",
    }
    assert len(COMMANDS) == 5


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[2])
def test_its_commands_run(fedsim: Callable, words: list[str]):
    """Those of data that are not at hand end with what to do about it."""
    code, _, err = fedsim(*words[1:], *([] if "devices" in words else ["rounds=1", "out=A"]))  # fewer: it is quicker
    assert (code, err) == (0, "") if NEEDS_DATA not in words else (code == 2 and "workload.download=true" in err)


def test_its_method_goes_as_far_as_it_says():
    """All the way it is federated averaging, and not at all it stays where it was."""
    runs = {
        step: door.run("method=halfway", f"strategy.step={step}", "rounds=1", out=f"S{step}", progress=False)
        for step in (0, 1)
    }
    edge = door.run("strategy._target_=strategies.edge.EdgeStrategy", "rounds=1", out="E", progress=False)
    assert runs[1].summary["weights_sha256"] == edge.summary["weights_sha256"]
    assert runs[0].rounds["accuracy"].nunique() == 1
