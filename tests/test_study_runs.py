"""The runs of a study: which are run again, where they lie, and how they end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_study import started
from test_writing import full_disk

from fedsim.study import runner as study_run


def test_a_second_call_runs_nothing_and_prints_the_same_table(file, fedsim):
    first = fedsim("study", file(), "--jobs", "2")
    assert len(started()) == 6
    again = fedsim("study", "mine.yaml")
    assert len(started()) == 6
    assert again[0] == 0
    assert first[1].endswith(again[1])
    assert again[1] == fedsim("study", "mine.yaml", "--report")[1]


def test_only_what_is_missing_is_run_and_an_unfinished_folder_is_set_aside(file, fedsim):
    fedsim("study", file(), "--seeds", "1")
    shutil.rmtree("runs/mine/plain/seed-1")
    Path("runs/mine/local-0.1/seed-1/summary.json").unlink()
    Path("started").unlink()
    assert fedsim("study", "mine.yaml", "--seeds", "1")[0] == 0
    assert started() == ["out=runs/mine/local-0.1/seed-1", "out=runs/mine/plain/seed-1"]
    assert Path("runs/mine/local-0.1/seed-1.unfinished-1/config.yaml").exists()


def test_a_run_with_a_checkpoint_goes_on_from_it(file, fedsim):
    fedsim("study", file(), "--seeds", "1")
    rows = fedsim("study", "mine.yaml", "--seeds", "1", "--report")[1]
    folder = Path("runs/mine/local-0.1/seed-1")
    (folder / "summary.json").rename(folder / "checkpoint")
    assert "unfinished" in fedsim("study", "mine.yaml", "--seeds", "1", "--dry-run")[1]
    Path("started").unlink()
    code, out, _ = fedsim("study", "mine.yaml", "--seeds", "1")
    assert (code, started()) == (0, [])  # nothing began anew
    assert out.endswith(rows)
    assert not folder.with_name("seed-1.unfinished-1").exists()


def test_a_checkpoint_of_other_settings_is_set_aside(file, fedsim):
    fedsim("study", file(), "--seeds", "1")
    for path in Path("runs/mine").glob("*/seed-1/summary.json"):
        path.rename(path.with_name("checkpoint"))
    assert fedsim("study", "mine.yaml", "--seeds", "1", "trainer.lr=0.3")[0] == 0
    assert len(list(Path("runs/mine").glob("*/seed-1.unfinished-1"))) == 3


def test_another_setting_in_the_same_folder_is_refused(file, fedsim):
    fedsim("study", file(), "--seeds", "1")
    code, _, err = fedsim("study", "mine.yaml", "--seeds", "1", "trainer.lr=0.3")
    assert code == 2
    assert "runs/mine/plain/seed-1 was run with trainer.lr=0.1, and the study now says 0.3; name another" in err
    assert fedsim("study", "mine.yaml", "--seeds", "1", "trainer.lr=0.3", "--out", "other")[0] == 0


def test_a_failing_run_is_named_and_stops_no_other(file, fedsim):
    arms = {"Plain": [], "Odd": ["name=fails"]}
    code, out, err = fedsim("study", file(arms=arms), "--jobs", "1")
    assert (code, err) == (1, "fedsim: 1 of 4 runs failed: Odd, seed 2: it broke\n")
    assert started() == ["out=runs/mine/odd/seed-1", "out=runs/mine/plain/seed-1", "out=runs/mine/plain/seed-2"]
    assert "Odd (1 of 2 seeds)" in out
    assert "FAILED Odd, seed 2: it broke" in out
    assert "it broke" in Path("runs/mine/odd/seed-2.log").read_text()
    tree = json.loads(Path("runs/mine/study.json").read_text())
    assert tree["failed"] == {"Odd, seed 2": "it broke"}
    assert (tree["arms"][1]["difference"], tree["arms"][1]["low"]) == (0, None)  # one seed in common: no interval


def test_a_dry_run_prints_the_commands_and_runs_nothing(file, fedsim):
    code, out, _ = fedsim("study", file(), "--dry-run", "--seeds", "1", "--out", "here")
    assert code == 0
    command = next(line for line in out.splitlines() if line.endswith("seed=1 out=here/local-0.2/seed-1"))
    assert command.startswith("fedsim run ")
    assert "method=local_mixup trainer.mix_ratio=0.2" in command, "whole, so that it can be copied"
    assert re.search(r"^\d+ runs: \d+ to run$", out, re.MULTILINE)
    assert not Path("here").exists()
    assert "mafl_digits" in fedsim("study", "--list")[1]


# --- its folder ------------------------------------------------------------------------------------------------------


def test_two_studies_cannot_run_in_one_folder(file, fedsim):
    with study_run.study_folder(Path("runs/mine")):
        code, _, err = fedsim("study", file())
    assert code == 2
    assert "a study is running in runs/mine just now" in err
    assert started() == []


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", [".lock", "study.png", "study.csv", "study.json", "plain/seed-1.log"])
def test_nothing_is_written_through_a_link_or_a_pipe(name: str, kind: str, file, fedsim):
    """The lock is refused; all else is the study's own to replace."""
    place = Path("runs/mine") / name
    place.parent.mkdir(parents=True)
    Path("victim").write_text("mine")
    place.symlink_to(Path("victim").resolve()) if kind == "link" else os.mkfifo(place)
    code, _, err = fedsim("study", file(seeds=[1]))
    assert Path("victim").read_text() == "mine"
    if name == ".lock":
        what = "it is a link" if kind == "link" else "it is no file"
        said = f"fedsim: --out=runs/mine cannot be made: {what} (runs/mine/.lock); name another folder\n"
        assert (code, err, started()) == (2, said, [])
    else:
        assert (code, err) == (0, "")
        assert place.is_file() == (not name.endswith(".log"))
        assert not place.is_symlink()


@pytest.mark.parametrize("name", ["plain", "plain/seed-1"])
def test_a_run_that_would_lie_outside_of_the_study_is_refused(name: str, file, fedsim):
    place = Path("runs/mine") / name
    place.parent.mkdir(parents=True)
    Path("elsewhere").mkdir()
    place.symlink_to(Path("elsewhere").resolve())
    code, _, err = fedsim("study", file(seeds=[1]))
    assert (code, err.count("\n"), started(), os.listdir("elsewhere")) == (2, 1, [], [])
    assert "runs/mine/plain/seed-1 is a link to something outside of runs/mine" in err


def test_a_file_in_the_place_of_an_arm_is_refused_before_anything_runs(file, fedsim):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/plain").touch()
    code, _, err = fedsim("study", file(seeds=[1]))
    assert (code, started()) == (2, [])
    assert err == "fedsim: runs/mine/plain is no folder; remove it, or name another --out\n"


def test_a_picture_that_the_disk_does_not_take_leaves_the_one_before(file, fedsim):
    assert fedsim("study", file(seeds=[1])).code == 0
    before = Path("runs/mine/study.png").read_bytes()
    with full_disk(8192):
        code, _, err = fedsim("study", file(seeds=[1]), "--report")
    assert (code, err) == (1, "fedsim: File too large: runs/mine/study.png\n")
    assert Path("runs/mine/study.png").read_bytes() == before


# --- real runs that are ended ----------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_study_and_its_runs_and_keeps_what_is_finished(file):
    """Real runs: the first ends at once, the second has more rounds than anybody waits for."""
    arms = {"Short": ["rounds=1"], "Long": ["rounds=1000000"]}
    command = [sys.executable, "-m", "fedsim", "study", file(arms=arms, seeds=[1]), "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        long, end = Path("runs/mine/long/seed-1/rounds.jsonl"), time.monotonic() + 120
        while not (long.exists() and long.read_bytes().count(b"\n") > 2) and time.monotonic() < end:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert err == "fedsim: interrupted; everything written so far stays\n"
    assert Path("runs/mine/short/seed-1/summary.json").exists()
    assert json.loads((long.parent / "failure.json").read_text())["error"] == "Terminated"
    left = [
        p for p in Path("/proc").glob("[0-9]*/cwd") if _links(p) == os.getcwd() and p.parent.name != str(os.getpid())
    ]
    assert left == []


@pytest.mark.slow
def test_kill_9_of_the_study_takes_its_runs_along(file):
    command = [sys.executable, "-m", "fedsim", "study", file(arms={"Long": ["rounds=1000000"]}, seeds=[1])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        folder, end = Path("runs/mine/long/seed-1"), time.monotonic() + 120
        rounds = folder / "rounds.jsonl"
        while not (rounds.exists() and rounds.stat().st_size) and time.monotonic() < end:  # its folder is made by then
            assert process.poll() is None
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    assert len(family) == 2  # what forks runs, and the run
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert json.loads((folder / "failure.json").read_text())["error"] == "Terminated"
    with study_run.study_folder(Path("runs/mine")):
        pass  # it can go on


def _links(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
