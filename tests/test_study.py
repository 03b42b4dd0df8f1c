"""Studies: what a file expands to, what is refused before anything runs, what is run again, and the figures.

Runs are replaced by a command that writes a run folder at once, except in one test; its accuracy is 0.5 + ratio + seed
/ 100 in the last of two evaluations, and 0 in the first.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from test_writing import full_disk

from fedsim.errors import ConfigError
from fedsim.report.plots.study import MOST_LINES, curve, families, shown
from fedsim.report.rounds import RoundReport
from fedsim.settings.compose import compose
from fedsim.study import runner as study_run
from fedsim.study.paired import interval, rows
from fedsim.study.results import collect
from fedsim.study.spec import plan, read_study, studies
from fedsim.workloads.metrics import Metric

BASE = ["workload=blobs", "fleet=uniform", "latency=flops", "num_clients=6", "cohort=3", "rounds=2"]
FILE: dict[str, Any] = {
    "title": "Two methods",
    "base": BASE,
    "seeds": [1, 2],
    "last": 1,
    "arms": {
        "Plain": ["method=fedavg"],
        "Local {mix_ratio}": {"overrides": ["method=local_mixup"], "grid": {"trainer.mix_ratio": [0.1, 0.2]}},
    },
}
# Stands in for `python -m fedsim`: settings as the real command would compose them, reports made up.
FAKE = """
import json, sys, yaml
from pathlib import Path
from fedsim.settings.compose import compose
if sys.argv[1] == "resume":
    Path(sys.argv[2], "checkpoint").rename(Path(sys.argv[2], "summary.json"))
    sys.exit()
settings = compose(sys.argv[2:])
out, ratio, seed = Path(settings["out"]), settings["trainer"].get("mix_ratio", 0.0), settings["seed"]
if settings["name"] == "fails" and seed == 2:
    sys.exit("fedsim: it broke")
out.mkdir(parents=True)
(out / "config.yaml").write_text(yaml.safe_dump({**settings, "out": None}))
first = {"round": 0, "now_s": 0, "round_s": 0, "cohort": [], "outcomes": {}, "metrics": {"accuracy": 0}}
last = first | {"round": 1, "now_s": 10, "down_bytes": 60, "up_bytes": 40, "joules": 2.0}
last["metrics"] = {"accuracy": 0.5 + ratio + seed / 100, "accuracy_at_0.3": 0.3, "accuracy_at_0.7": 0.7}
last["metrics"]["ms_at_0.3"] = 3.0
summary = {
    **dict.fromkeys(("method", "workload", "fleet"), "made up"),
    **{"seed": seed, "rounds": 1, "final": {"accuracy": last["metrics"]["accuracy"]}, "outcomes": {"completed": 1}},
    **{"best": {"accuracy": last["metrics"]["accuracy"], "round": 1}, "to_target": None},
    **{"energy_j": {"total": 2.0, "max_client": 1.0, "waiting": 0.0}, "simulated_s": 10.0, "host_s": 1.0},
    **{"down_bytes": 60, "up_bytes": 40, "peak_memory_bytes": 10 * seed, "storage_bytes": 0},
}
(out / "rounds.jsonl").write_text("".join(json.dumps(r) + chr(10) for r in (first, last)))
(out / "summary.json").write_text(json.dumps(summary))
with open("started", "a") as file:
    print(sys.argv[-1], file=file)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a study file, with changes, in a working folder of its own; `fake.py` runs its runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(study_run, "COMMAND", (sys.executable, str(tmp_path / "fake.py")))
    monkeypatch.setattr(study_run, "POLL_S", 0.02)

    def write(**changes: Any) -> str:
        tree = {key: value for key, value in {**FILE, **changes}.items() if value is not None}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return "mine.yaml"

    return write


def started() -> list[str]:
    return sorted(Path("started").read_text().split()) if Path("started").exists() else []


# --- what a file says ------------------------------------------------------------------------------------------------


def test_a_grid_becomes_arms_with_labels_and_overrides_in_order(file):
    study = read_study(file(), ["trainer.lr=0.5"])
    assert [arm.label for arm in study.arms] == ["Plain", "Local 0.1", "Local 0.2"]
    assert study.arms[2].overrides == (*BASE, "method=local_mixup", "trainer.mix_ratio=0.2", "trainer.lr=0.5")
    assert (study.name, study.against, study.x) == ("mine", "Plain", ("rounds", "simulated_s"))


def test_values_of_a_grid_are_written_as_hydra_reads_them(file):
    grid = {"trainer.clip_norm": [None, 1.5], "model.hidden": [[8, 4]], "fleet.devices": [{"pixel3": 1}]}
    study = read_study(file(arms={"A": {"grid": grid}}))
    assert [arm.label for arm in study.arms] == [
        "A clip_norm=null hidden=[8,4] devices={pixel3: 1}",
        "A clip_norm=1.5 hidden=[8,4] devices={pixel3: 1}",
    ]
    first, second = (compose(arm.overrides) for arm in study.arms)
    assert (first["trainer"]["clip_norm"], second["trainer"]["clip_norm"]) == (None, 1.5)
    assert (first["model"]["hidden"], first["fleet"]["devices"]) == ([8, 4], {"pixel3": 1})


def test_runs_are_planned_seed_by_seed_in_folders_of_their_own(file):
    study = read_study(file(), seeds=[3, 4])
    runs = plan(study.only(["Plain", "Local 0.2"]), Path("a b"))
    assert [str(run.folder) for run in runs] == [
        "a b/plain/seed-3", "a b/local-0.2/seed-3", "a b/plain/seed-4", "a b/local-0.2/seed-4"
    ]  # fmt: skip
    assert {**compose(runs[3].command[1:]), "out": None} == runs[3].settings
    assert compose(runs[3].command[1:])["out"] == "a b/local-0.2/seed-4"


def test_every_shipped_study_can_be_planned():
    assert studies()
    for name in studies():
        study = read_study(name)
        assert len(plan(study, Path("out"))) == len(study.trained) * len(study.seeds)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"arm": {}}, r"mine\.yaml: unknown key of a study 'arm'; did you mean 'arms'\?"),
    "no title": ({"title": None}, "title must be text, got null"),
    "no arms": ({"arms": {}}, "arms must be a map of labels to overrides"),
    "arm as text": ({"arms": {"A": "method=fedavg"}}, r"arms\.A must be a list of texts, got 'method=fedavg'"),
    "key of an arm": ({"arms": {"A": {"gird": {}}}}, "unknown key of arm 'A' 'gird'; did you mean 'grid'"),
    "grid without list": ({"arms": {"A": {"grid": {"seed": 1}}}}, r"arms\.A\.grid must be a map of settings to lists"),
    "against": ({"against": "Plan"}, "unknown arm in against 'Plan'; did you mean 'Plain'"),
    "axis": ({"x": ["round"]}, r"unknown axis in x 'round'; did you mean 'rounds'\?.*dotted path"),
    "seeds": ({"seeds": [1, -2]}, "seeds must be a list of whole numbers of at least 0"),
    "seed twice": ({"seeds": [1, 1]}, "a seed is there twice"),
    "last": ({"last": 0}, "last must be a whole number of at least 1, got 0"),
    "one folder": ({"arms": {"A b": [], "a-b": []}}, "arms 'A b' and 'a-b' would share the folder a-b"),
    "of nobody": ({"arms": {"A": [], "B": {"of": "C", "suffix": "_x"}}}, r"arm with runs in arms\.B\.of 'C'"),
    "of a reading": (
        {"arms": {"A": [], "B": {"of": "A", "suffix": "_x"}, "C": {"of": "B", "suffix": "_y"}}},
        r"arm with runs in arms\.C\.of 'B' \(allowed: A\)",
    ),
    "of without suffix": ({"arms": {"A": [], "B": {"of": "A"}}}, r"arms\.B either has runs by overrides, or names"),
    "of with overrides": (
        {"arms": {"A": [], "B": {"of": "A", "suffix": "_x", "overrides": ["rounds=1"]}}},
        r"arms\.B either has runs by overrides, or names",
    ),
    "seed as override": ({"base": ["seed=3"]}, "seed= belongs to the study"),
    "setting": ({"arms": {"A": ["cohrt=3"]}}, "did you mean 'cohort'"),
    "trainer": ({"arms": {"A": ["trainer.lr=0"]}}, r"trainer\.lr must be greater than 0"),
    "strategy": ({"arms": {"A": ["method=fedmix", "strategy.group_size=4"]}}, r"strategy\.group_size must be all or"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_sentence_before_anything_runs(case: str, file, fedsim):
    changes, sentence = WRONG[case]
    name = file(**changes)
    with pytest.raises(ConfigError, match=sentence):
        plan(read_study(name), Path("runs/mine"))
    code, out, err = fedsim("study", name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not Path("runs").exists()


def test_a_wrong_setting_names_its_arm(file, fedsim):
    _, _, err = fedsim("study", file(arms={"A": [], "B": ["cohrt=3"]}))
    assert err.endswith("; in arm 'B' of study mine\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nope"], "unknown study 'nope'"),
        (["nope.yaml"], "there is no study file nope.yaml"),
        ([], "name a study"),
        (["mine.yaml", "--only", "Plian"], "did you mean 'Plain'"),
        (["mine.yaml", "--seeds", "1,x"], "--seeds must be whole numbers separated by commas, got '1,x'"),
        (["mine.yaml", "--nope"], "does not know --nope"),
        (["mine.yaml", "--report"], "no run of study mine is finished in runs/mine"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: list[str], words: str, file, fedsim):
    file()
    code, _, err = fedsim("study", *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err


def test_a_label_that_is_there_twice_is_refused(file):
    Path(file()).write_text("title: a\narms:\n  A: []\n  A: []\n")
    with pytest.raises(ConfigError, match="key 'A' is there twice"):
        read_study("mine.yaml")


# --- running ---------------------------------------------------------------------------------------------------------


def test_figures_are_those_worked_out_by_hand(file, fedsim):
    """Scores 0.51, 0.52 and 0.1 more: mean 0.515, deviation 0.01 / sqrt 2; both differences 0.1, their interval 0."""
    code, out, err = fedsim("study", file(columns=["final.accuracy", "metrics.accuracy"]), "--jobs", "3")
    assert (code, err) == (0, "")
    tree = json.loads(Path("runs/mine/study.json").read_text())
    plain, low, high = tree["arms"]
    assert (plain["mean"], plain["std"]) == (pytest.approx(0.515), pytest.approx(0.01 / math.sqrt(2)))
    assert (low["difference"], high["difference"]) == (pytest.approx(0.1), pytest.approx(0.2))
    assert (low["low"], low["high"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert (plain["simulated_s"], plain["joules"], plain["traffic_bytes"], plain["rounds"]) == (10, 2, 100, 1)
    assert plain["final.accuracy"] == plain["metrics.accuracy"] == pytest.approx(0.515)
    assert low["scores"] == {"1": pytest.approx(0.61), "2": pytest.approx(0.62)}
    table = pd.read_csv("runs/mine/study.csv")
    assert list(table["arm"]) == ["Plain", "Local 0.1", "Local 0.2"]
    assert table["score_seed_2"].tolist() == pytest.approx([0.52, 0.62, 0.72])
    assert Path("runs/mine/study.png").read_bytes().startswith(b"\x89PNG")
    assert "51.50 ± 0.71" in out
    assert "+10.00" in out


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


def test_without_the_arm_that_is_compared_with_there_are_no_differences(file, fedsim):
    code, out, _ = fedsim("study", file(), "--only", "Local", "--seeds", "7")
    assert code == 0
    assert "difference " not in out
    assert [arm["difference"] for arm in json.loads(Path("runs/mine/study.json").read_text())["arms"]] == [None, None]


def test_a_column_that_no_run_has_is_named_and_nothing_is_lost(file, fedsim):
    code, out, err = fedsim("study", file(columns=["final.acuracy"]), "--seeds", "1")
    assert code == 2
    assert "did you mean 'final.accuracy'?" in err
    assert "51.00" in out


def test_a_dry_run_prints_the_commands_and_runs_nothing(file, fedsim):
    code, out, _ = fedsim("study", file(), "--dry-run", "--seeds", "1", "--out", "here")
    assert code == 0
    assert "method=local_mixup trainer.mix_ratio=0.2 seed=1 out=here/local-0.2/seed-1" in " ".join(out.split())
    assert not Path("here").exists()
    assert "mafl_digits" in fedsim("study", "--list")[1]


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
        (run,) = psutil.Process(process.pid).children()
    finally:
        process.kill()
        process.wait()
    psutil.wait_procs([run], timeout=20)
    assert not run.is_running()
    assert json.loads((folder / "failure.json").read_text())["error"] == "Terminated"
    with study_run.study_folder(Path("runs/mine")):
        pass  # it can go on


def _links(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


# --- arms that are read from other arms' runs -------------------------------------------------------------------------

READ = {
    "Plain": ["method=fedavg"],
    "Cut {ratio}": {"of": "Plain", "suffix": "_at_{ratio}", "grid": {"ratio": [0.3, 0.7]}},
    "Local 0.2": ["method=local_mixup", "trainer.mix_ratio=0.2"],
}


def test_one_run_serves_every_arm_that_is_read_from_it(file, fedsim):
    """Two arms have runs; the others see the metrics that end with their suffix, and lack those that do not."""
    columns = ["metrics.ms", "peak_memory_bytes"]
    assert fedsim("study", file(arms=READ, seeds=[1, 2], columns=columns))[0] == 0
    assert len(started()) == 4
    plain, low, high, _ = json.loads(Path("runs/mine/study.json").read_text())["arms"]
    assert (low["arm"], low["of"], low["suffix"], low["overrides"]) == ("Cut 0.3", "Plain", "_at_0.3", [])
    assert (low["mean"], high["mean"]) == (pytest.approx(0.3), pytest.approx(0.7))
    assert low["difference"] == pytest.approx(0.3 - plain["mean"])
    assert (plain["metrics.ms"], low["metrics.ms"], high["metrics.ms"]) == (None, 3.0, None)
    assert low["peak_memory_bytes"] == plain["peak_memory_bytes"] == 15


def test_an_arm_that_is_read_brings_the_runs_of_its_source_with_it(file, fedsim):
    assert fedsim("study", file(arms=READ, seeds=[1]), "--only", "Cut 0.7")[0] == 0
    assert started() == ["out=runs/mine/plain/seed-1"]
    assert [arm["arm"] for arm in json.loads(Path("runs/mine/study.json").read_text())["arms"]] == ["Cut 0.7"]


# --- picture ---------------------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_over_seeds_at_each_evaluation(file, fedsim):
    fedsim("study", file())
    study = read_study("mine.yaml")
    result = collect(study, plan(study, Path("runs/mine")))
    x, mean, spread = curve(result.runs["Plain"], "traffic_bytes", "accuracy")
    assert x.tolist() == [0, 100]
    assert mean.tolist() == pytest.approx([0, 0.515])
    assert spread.tolist() == pytest.approx([0, 0.01 / math.sqrt(2)])


def test_with_many_arms_the_best_are_drawn_and_the_compared_one(file, fedsim):
    ratios = [round(0.05 * n, 2) for n in range(1, MOST_LINES + 3)]  # two more than are drawn
    grid = {"overrides": ["method=local_mixup"], "grid": {"trainer.mix_ratio": ratios}}
    arms = {"Plain": ["method=fedavg"], "R {mix_ratio}": grid}
    assert fedsim("study", file(arms=arms, seeds=[1], x=["joules", "peak_memory_bytes"]), "--jobs", "8")[0] == 0
    study = read_study("mine.yaml")
    result = collect(study, plan(study, Path("runs/mine")))
    assert set(result.columns["peak_memory_bytes"]) == {10.0}
    drawn = shown(result)
    assert drawn == ["Plain", *(f"R {ratio}" for ratio in ratios[3:])]


def test_points_of_one_family_are_joined(file, fedsim):
    """A family is a label without its grid values or the number at its end."""
    arms = {**READ, "Local 0.4": ["method=local_mixup", "trainer.mix_ratio=0.4"]}
    assert fedsim("study", file(arms=arms, seeds=[1, 2], x=["peak_memory_bytes"]))[0] == 0
    study = read_study("mine.yaml")
    found = families(collect(study, plan(study, Path("runs/mine"))))
    assert found == {"Plain": ["Plain"], "Cut": ["Cut 0.3", "Cut 0.7"], "Local": ["Local 0.2", "Local 0.4"]}


def test_one_seed_has_no_interval():
    assert interval([0.1]) == math.inf


def test_arms_are_judged_by_the_metric_that_the_study_names(tmp_path):
    rounds = [
        RoundReport.of(n, float(n), 1.0, [], {"accuracy": 0.5, "client_accuracy": value}, 0.0)
        for n, value in ((1, 0.2), (2, 0.6), (3, 0.8))
    ]
    (row,) = rows({"Plain": {1: rounds}}, 2, "Plain", Metric("client_accuracy"))
    assert row.mean == pytest.approx(0.7)
    with pytest.raises(ConfigError, match=r"metric of the runs 'client_acuracy'.*client_accuracy"):
        rows({"Plain": {1: rounds}}, 2, "Plain", Metric("client_acuracy"))


ENDLESS = "0x" + "f" * 700  # of so many digits that Python writes it; longer ones are refused by the reader
FEW = f"[{', '.join(map(str, range(11)))}]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arms: {A: {grid: {1: [2]}}}", "arms.A.grid must name settings, e.g. trainer.lr, got 1"),
        ("arms: {A: {grid: {null: [2]}}}", "arms.A.grid must name settings, e.g. trainer.lr, got null"),
        (f"arms: {{A: {{grid: {{trainer.lr: [{ENDLESS}]}}}}}}", "arms must hold whole numbers of at most"),
        (f"arms: {{? {ENDLESS} : []}}", "arms must hold whole numbers of at most"),
        (f"seeds: [{ENDLESS}]\narms: {{A: []}}", "seeds must hold whole numbers of at most"),
        (f"against: {ENDLESS}\narms: {{A: []}}", "against must hold whole numbers of at most"),
        (f"last: {ENDLESS}\narms: {{A: []}}", "last must hold whole numbers of at most"),
        (f"arms: {{A: {{grid: {{{', '.join(f'x{n}: {FEW}' for n in range(6))}}}}}}}", "are more than 1000"),
        (f"arms: {{A: {{grid: {{a: {FEW}, b: {FEW}, c: {FEW}}}}}}}", "are more than 1000"),
    ],
)
def test_odd_keys_numbers_and_grids_of_a_study_are_refused(tmp_path: Path, text: str, words: str):
    path = tmp_path / "s.yaml"
    path.write_text(f"title: T\n{text}\n")
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        read_study(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--seeds=" + "9" * 5000, "--seeds must be whole numbers"),
        ("--out=" + "x" * 300, "--out has a part that is longer than the 255 bytes"),
        ("--out=" + "x/" * 1900, "--out must be at most 100 folders in each other, got 1900"),
    ],
)
@pytest.mark.parametrize("report", [[], ["--report"]], ids=["run", "report"])
def test_odd_options_of_a_study_are_refused(tmp_path: Path, fedsim, option: str, words: str, report: list[str]):
    path = tmp_path / "s.yaml"
    path.write_text("title: T\narms: {A: []}\n")
    code, _, err = fedsim("study", str(path), *report, option)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
