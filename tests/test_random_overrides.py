"""Real runs with one setting drawn at random and given an odd value: they run, or end in one sentence.

Each try is `fedsim run` in a fork of this process, which has imported everything; one that takes longer than a minute
must have said so before it began.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY
from test_methods import for_case
from test_values import AT_THE_TOP, NEEDED, leaves, places, settings_of

from fedsim.cli import main as cli

SEED, LONGEST_S = 20261127, 60.0
VALUES = ("1" + "0" * 18, "1e308", "1e-320", "1e-9", "-3", "-0.5", "nan", "inf", "''", "null", "true", "[]", "{}")
VALUES += ("1" + "0" * 399, "-1" + "0" * 399, "[/red]", "'[/red]$\\frac{$'", "x" * 20_000, "abc", "[[],[nan]]", "0")


def tries(number: int) -> list[tuple[str, ...]]:
    """Overrides: an option of a group with what it needs, and one of its settings with an odd value."""
    drawn = random.Random(SEED)
    settings: list[tuple[tuple[str, ...], str]] = [((), key) for key in AT_THE_TOP if key != "out"]
    for group, option in places():
        base = (f"{group}={option}", *NEEDED.get(f"{group}={option}", NEEDED.get(group, ())))
        settings += [(base, ".".join(path)) for path in leaves(settings_of(group, option)[group], (group,))]
    return [(*base, f"{key}={drawn.choice(VALUES)}") for base, key in drawn.choices(settings, k=number)]


def tried(overrides: tuple[str, ...], folder: Path) -> str:
    """What is wrong with how a run ended; empty where nothing is."""
    folder.mkdir()
    out, err = folder / "out.txt", folder / "err.txt"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            os.chdir(folder)
            for stream, file in ((1, out), (2, err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            sys.argv = ["fedsim", "run", *for_case(TINY, *overrides), *overrides]
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + LONGEST_S
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.05)
    if ended[0] == 0:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "" if "lie ahead" in out.read_text() else "took more than a minute unannounced"
    code, said = os.waitstatus_to_exitcode(ended[1]), err.read_text()
    lines = [line for line in said.splitlines() if not line.startswith("fedsim: warning: ")]
    if "Traceback" in said or code not in (0, 1, 2):
        return f"ended with {code}: {said[-600:]}"
    if code and not (len(lines) == 1 and lines[0].startswith("fedsim: ") and len(lines[0]) < 3000):
        return f"is no sentence: {said[:600]}"
    return "" if code or not lines else f"printed {said[:600]}"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_a_run_with_an_odd_value_runs_or_ends_in_a_sentence(number: int, tmp_path: Path):
    wrong = []
    for index, overrides in enumerate(tries(number)):
        if fault := tried(overrides, tmp_path / str(index)):
            wrong.append(f"{' '.join(o[:60] for o in overrides)} {fault}")
    assert not wrong, "\n".join(wrong)
