"""`fedsim new`: what it writes runs at once, is tidy, and never writes over anything."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import pytest
from conftest import Ended, assert_refused

from fedsim.cli.templates import PARTS, files_of

ROOT = Path(__file__).parent.parent
TAKEN = {part: f"{part}=shade" for part in PARTS} | dict.fromkeys(("strategy", "trainer"), "method=shade")
SHORT = ("rounds=1", "cohort=3", "fleet=uniform", "trainer.local_steps=1", "out=run")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, in which modules of its own are imported anew."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    path = sys.path.copy()
    yield tmp_path / "mine"
    sys.path[:] = path
    sys.modules.pop("shade", None)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_runs_at_once_by_the_command_that_is_printed(here: Path, fedsim: Callable[..., Ended], part: str):
    code, out, err = fedsim("new", "shade", f"--{part}")
    assert (code, err) == (0, "")
    assert f"run it: fedsim run {TAKEN[part]}\n" in out
    assert [line.removeprefix("wrote ") for line in out.splitlines()[:-2]] == list(files_of("shade", [part]))
    ended = fedsim("run", TAKEN[part], *SHORT)
    assert (ended.code, ended.err) == (0, "")
    assert (here / "run" / "summary.json").exists()


def test_without_a_part_it_begins_both_halves_of_a_method(here: Path, fedsim: Callable[..., Ended]):
    assert fedsim("new", "shade").code == 0
    assert contents(here) == files_of("shade", ["strategy", "trainer"])


def test_what_it_writes_passes_its_own_test(here: Path, fedsim: Callable[..., Ended], tmp_path: Path):
    """All parts at once; the method's tests are run in tests/test_tutorial.py, by pytest itself."""
    code, out, _ = fedsim("new", "shade", *(f"--{part}" for part in PARTS))
    assert code == 0
    assert out.endswith(
        "run it: fedsim run method=shade model=shade workload=shade participants=shade attack=shade\n"
        "test it: python -m pytest test_shade.py\n"
    )
    tests = {name: test for name, test in runpy.run_path("test_shade.py").items() if name.startswith("test_")}
    assert len(tests) == 6
    for name in [*tests][2:]:
        tests[name](tmp_path / name)


@pytest.mark.parametrize(
    "parts", [list(chosen) for count in (1, 2, len(PARTS)) for chosen in combinations(PARTS, count)], ids="-".join
)
def test_code_is_as_our_formatter_would_have_it(tmp_path: Path, parts: list[str]):
    for path, text in files_of("my_shade", parts).items():
        if path.endswith(".py"):
            (tmp_path / path).write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--ignore", "D,INP,S"], ["format", "--check"]):
        done = subprocess.run(
            [*ruff, *command, "--config", str(ROOT / "pyproject.toml"), str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my-method", "must be a name of a Python module"),
        ("2fast", "must be a name of a Python module"),
        ("Shade", "must be a name of a Python module"),
        ("class", "must be a name of a Python module"),
        ("../shade", "must be a name of a Python module"),
        ("queue", "a module of Python's own library"),
        ("fedprox", "is an option already (strategy=fedprox)"),
        ("ditto", "is an option already (trainer=ditto)"),
        ("numpy", "is an installed module"),
        ("clients", "is an installed module"),
    ],
)
def test_a_name_that_is_somebody_elses_is_refused(here: Path, fedsim: Callable[..., Ended], name: str, words: str):
    assert_refused(fedsim("new", name), words)


@pytest.mark.parametrize("there", files_of("shade", ["strategy", "trainer"]))
def test_no_file_is_written_over(here: Path, fedsim: Callable[..., Ended], there: str):
    """And none is written when one of them is there."""
    (here / there).parent.mkdir(parents=True, exist_ok=True)
    (here / there).write_text("mine")
    ended = fedsim("new", "shade")
    assert (ended.code, f"{there} is there already" in ended.err) == (2, True)
    assert contents(here) == {there: "mine"}


def test_a_folder_in_which_nothing_would_be_found_is_refused(here: Path, fedsim: Callable[..., Ended], monkeypatch):
    (here / "config.yaml").write_text("choices: {}")
    ended = fedsim("new", "shade")
    assert (ended.code, "the folder of a run or study" in ended.err) == (2, True)
    monkeypatch.chdir(ROOT)
    ended = fedsim("new", "shade")
    assert (ended.code, "the folder of fedsim itself" in ended.err) == (2, True)
