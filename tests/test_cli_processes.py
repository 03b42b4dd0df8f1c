"""The installed command as a process: its streams, its working folder, and the signals that end it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import Ended, assert_refused

from fedsim.report.rounds import read_rounds

FEDSIM = Path(sys.executable).with_name("fedsim")


@pytest.mark.parametrize(
    "closed", [">&-", "<&- >&- 2>&-", *(pytest.param(text, marks=pytest.mark.slow) for text in ("<&-", "2>&-"))]
)
def test_a_stream_that_is_closed_leads_nowhere(closed: str, place: Path):
    """Also for what a run opens: its files do not get the numbers of the streams."""
    command = f"exec {FEDSIM} run workload=blobs rounds=1 cohort=2 num_clients=6 fleet=uniform out=here {closed}"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ("run folder: here" in ended.stdout) == (">" not in closed.replace("2>", ""))
    assert {path.name for path in Path("here").iterdir()} >= {"summary.json", "report.html"}
    assert [report.round for report in read_rounds(Path("here"))] == [0, 1]


@pytest.mark.parametrize(
    "command",
    ["run", "resume x", "report x", "doctor", "data list", "data describe", "devices list", "study --list", "paired x"],
)
def test_a_working_folder_that_was_removed_is_one_sentence(command: str, place: Path, fedsim: Callable[..., Ended]):
    folder = place / "gone"
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    assert_refused(fedsim(*command.split(" ")), "the working folder is not there any more", cwd=place / "cwd")


def test_the_installed_command_in_a_folder_that_was_removed(place: Path):
    command = f"mkdir gone && cd gone && rmdir ../gone && exec {FEDSIM} devices list"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert_refused(Ended(ended.returncode, ended.stdout, ended.stderr), "the working folder is not there any more")


def test_the_installed_command_refuses_in_one_sentence(place: Path):
    done = subprocess.run([FEDSIM, "run", "cohrt=5"], capture_output=True, text=True, timeout=60)
    assert_refused(Ended(done.returncode, done.stdout, done.stderr), "did you mean 'cohort'?")


SIGNALS = {
    "ctrl-c": (signal.SIGINT, 130, "interrupted", "KeyboardInterrupt"),
    "sigterm": (signal.SIGTERM, 143, "terminated", "Terminated"),
    "sighup": (signal.SIGHUP, 129, "the terminal was closed", "Terminated"),
}
OF_RAY = [pytest.mark.ray, pytest.mark.slow]
# Left to slow: SIGHUP, which is answered as SIGTERM is, and SIGTERM with Ray.
SENT = [
    *(pytest.param("local", *SIGNALS[name], id=f"local-{name}") for name in ("ctrl-c", "sigterm")),
    pytest.param("ray", *SIGNALS["ctrl-c"], marks=pytest.mark.ray, id="ray-ctrl-c"),
    pytest.param("local", *SIGNALS["sighup"], marks=pytest.mark.slow, id="local-sighup"),
    *(pytest.param("ray", *SIGNALS[n], marks=OF_RAY, id=f"ray-{n}") for n in ("sigterm", "sighup")),
]


@pytest.mark.parametrize(("engine", "sent", "code", "sentence", "error"), SENT)
def test_a_signal_ends_the_run_within_five_seconds_and_keeps_what_is_written(
    place: Path, engine: str, sent: signal.Signals, code: int, sentence: str, error: str
):
    """Ctrl-C reaches every process of the terminal, SIGTERM and SIGHUP the command alone."""
    run = subprocess.Popen(
        [FEDSIM, "run", "rounds=100000", "out=out", f"engine={engine}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        rounds, end = Path("out/rounds.jsonl"), time.monotonic() + 60
        while not (rounds.exists() and rounds.read_text().count("\n") > 2) and time.monotonic() < end:
            assert run.poll() is None, run.communicate()
            time.sleep(0.05)
        family = psutil.Process(run.pid).children(recursive=True)
        assert bool(family) == (engine == "ray")
        started = time.monotonic()
        (os.killpg if sent == signal.SIGINT else os.kill)(run.pid, sent)
        out, err = run.communicate(timeout=30)
        assert time.monotonic() - started < 5
    finally:
        run.kill()
        run.wait()
    _, alive = psutil.wait_procs(family, timeout=0.5)
    assert not alive
    assert run.returncode == code
    assert re.fullmatch(r"roughly \S+ (d|h) of training on one core lie ahead; .*\n", out)
    assert err == f"fedsim: {sentence}; everything written so far stays; go on with: fedsim resume out\n"
    assert [r.round for r in read_rounds(Path("out"))][:3] == [0, 1, 2]
    assert json.loads(Path("out/failure.json").read_text())["error"] == error
    assert not Path("out/summary.json").exists()
    assert list(Path("out/clients").glob("*.parquet"))
