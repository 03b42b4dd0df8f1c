"""The figures of a study: its table, arms that are read from other arms' runs, and the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from fake_study import started

from fedsim.errors import ConfigError
from fedsim.report.plots.study import MAX_LINES, curve, drawn_labels, families
from fedsim.report.rounds import RoundReport
from fedsim.study.paired import compare_rows, half_width_of
from fedsim.study.results import collect
from fedsim.study.spec import plan, read_study
from fedsim.workloads.metrics import Metric


def test_figures_are_those_worked_out_by_hand(file, fedsim):
    """Scores 0.51, 0.52 and 0.1 more: mean 0.515, deviation 0.01 / sqrt 2; two seeds have no interval."""
    code, out, err = fedsim("study", file(columns=["final.accuracy", "metrics.accuracy"]), "--jobs", "3")
    assert (code, err) == (0, "")
    tree = json.loads(Path("runs/mine/study.json").read_text())
    plain, low, high = tree["arms"]
    assert (plain["mean"], plain["std"]) == (pytest.approx(0.515), pytest.approx(0.01 / math.sqrt(2)))
    assert (low["difference"], high["difference"]) == (pytest.approx(0.1), pytest.approx(0.2))
    assert (low["low"], low["high"], low["p"]) == (None, None, None)
    assert (plain["simulated_s"], plain["joules"], plain["traffic_bytes"], plain["rounds"]) == (10, 2, 100, 1)
    assert plain["final.accuracy"] == plain["metrics.accuracy"] == pytest.approx(0.515)
    assert low["scores"] == {"1": pytest.approx(0.61), "2": pytest.approx(0.62)}
    table = pd.read_csv("runs/mine/study.csv")
    assert list(table["arm"]) == ["Plain", "Local 0.1", "Local 0.2"]
    assert table["score_seed_2"].tolist() == pytest.approx([0.52, 0.62, 0.72])
    assert Path("runs/mine/study.png").read_bytes().startswith(b"\x89PNG")
    assert "51.50 ± 0.71" in out
    assert "+10.00" in out


def test_without_the_arm_that_is_compared_with_there_are_no_differences(file, fedsim):
    code, out, _ = fedsim("study", file(), "--only", "Local", "--seeds", "7")
    assert code == 0
    assert "difference " not in out
    assert [arm["difference"] for arm in json.loads(Path("runs/mine/study.json").read_text())["arms"]] == [None, None]


def test_a_column_that_no_run_has_is_named_and_nothing_is_lost(file, fedsim):
    """The table is whole, and every name that no run has is said once: typos of names that nobody knows beforehand."""
    columns = ["metrics.msat", "rounds", "of_my_own.value"]
    code, out, err = fedsim("study", file(columns=columns, metric="ms_of_all"), "--seeds", "1")
    assert code == 2
    assert "51.00" in out
    assert "msat" not in out
    assert err.startswith("fedsim: study mine: unknown metric of the runs 'ms_of_all'")
    assert "so scores are accuracy; " in err
    for name in ("ms_of_all", "metrics.msat", "of_my_own.value"):
        assert err.count(repr(name)) == 1
    assert [arm["rounds"] for arm in json.loads(Path("runs/mine/study.json").read_text())["arms"]] == [1, 1, 1]


def test_figures_are_in_the_unit_of_elsewhere_and_commands_name_the_file(file, fedsim):
    columns = ["peak_memory_bytes", "simulated_s", "energy_j.total", "metrics.accuracy"]
    name = f"./{file(columns=columns)}"
    assert fedsim("study", name, "--seeds", "1")[0] == 0
    page = Path("runs/mine/study.md").read_text()
    assert f"```\nfedsim study {name}\n```" in page
    assert "| 10 B | 10.0 s |" in page
    assert "peak memory |" in page
    assert f"fedsim study {name}" in Path("runs/mine/study.html").read_text()


def test_columns_beyond_eight_are_in_a_table_of_their_own(file, fedsim):
    columns = ["final.accuracy", "metrics.accuracy", "peak_memory_bytes", "up_bytes", "energy_j.waiting"]
    assert fedsim("study", file(columns=columns), "--seeds", "1")[0] == 0
    page = Path("runs/mine/study.md").read_text()
    first, second = (line for line in page.splitlines() if line.startswith("| arm |"))
    scores = "accuracy, % | difference to Plain | time | energy | traffic | final accuracy, % | last accuracy, %"
    assert first == f"| arm | {scores} |"
    assert "| 71.00 | 71.00 |" in page
    assert second == "| arm | peak memory | up | waiting | rounds |"
    assert page.count("| Local 0.2 |") == 2
    assert fedsim("study", file(columns=columns[:2]), "--report", "--seeds", "1")[0] == 0
    page = Path("runs/mine/study.md").read_text()
    assert page.count("| arm |") == 1
    assert page.rstrip().endswith("1 round each.")


def test_one_seed_has_no_interval():
    assert half_width_of([0.1]) == math.inf


def test_arms_are_judged_by_the_metric_that_the_study_names(tmp_path):
    rounds = [
        RoundReport.of(n, float(n), 1.0, [], {"accuracy": 0.5, "client_accuracy": value}, 0.0)
        for n, value in ((1, 0.2), (2, 0.6), (3, 0.8))
    ]
    (row,) = compare_rows({"Plain": {1: rounds}}, 2, "Plain", Metric("client_accuracy"))
    assert row.mean == pytest.approx(0.7)
    with pytest.raises(ConfigError, match=r"metric of the runs 'client_acuracy'.*client_accuracy"):
        compare_rows({"Plain": {1: rounds}}, 2, "Plain", Metric("client_acuracy"))


# --- arms that are read from other arms' runs ------------------------------------------------------------------------


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
    ratios = [round(0.05 * n, 2) for n in range(1, MAX_LINES + 3)]  # two more than are drawn
    grid = {"overrides": ["method=local_mixup"], "grid": {"trainer.mix_ratio": ratios}}
    arms = {"Plain": ["method=fedavg"], "R {mix_ratio}": grid}
    assert fedsim("study", file(arms=arms, seeds=[1], x=["joules", "peak_memory_bytes"]), "--jobs", "8")[0] == 0
    study = read_study("mine.yaml")
    result = collect(study, plan(study, Path("runs/mine")))
    assert set(result.columns["peak_memory_bytes"]) == {10.0}
    drawn = drawn_labels(result)
    assert drawn == ["Plain", *(f"R {ratio}" for ratio in ratios[3:])]


def test_points_of_one_family_are_joined(file, fedsim):
    """A family is a label without its grid values or the number at its end."""
    arms = {**READ, "Local 0.4": ["method=local_mixup", "trainer.mix_ratio=0.4"]}
    assert fedsim("study", file(arms=arms, seeds=[1, 2], x=["peak_memory_bytes"]))[0] == 0
    study = read_study("mine.yaml")
    found = families(collect(study, plan(study, Path("runs/mine"))))
    assert found == {"Plain": ["Plain"], "Cut": ["Cut 0.3", "Cut 0.7"], "Local": ["Local 0.2", "Local 0.4"]}
