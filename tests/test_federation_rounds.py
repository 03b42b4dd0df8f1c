"""Rounds of a run: when it stops, when it judges, how long they last, and whom they ask."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_federation import MODEL_BYTES

from fedsim.grid.edge import NOT_NEEDED, TOO_LATE
from fedsim.report.files import read_all_rows
from fedsim.report.page import write_page
from fedsim.report.rounds import weights_sha256
from fedsim.report.text import closing_lines

# --- when a run stops and judges -------------------------------------------------------------------------------------


def test_run_stops_when_it_reaches_the_target(federation):
    reports = [report for report, _ in federation("rounds=50", "target_accuracy=0.7", "cohort=6").rounds()]
    accuracies = [report.metrics["accuracy"] for report in reports]
    assert 1 < len(reports) < 51
    assert max(accuracies[:-1]) < 0.7 <= accuracies[-1]


def judged(losses: list[float], *overrides: str, federation) -> list[int]:
    """The rounds of a run whose test losses are these (the last one for ever), in the order of evaluations."""
    run, left = federation("rounds=30", *overrides), list(losses)
    run.judge = lambda number: {"accuracy": 0.1, "loss": left.pop(0) if len(left) > 1 else left[0]}
    return [report.round for report, _ in run.rounds()]


@pytest.mark.parametrize(
    "losses, overrides, last",
    [
        ([3.0, 2.0, 1.0, 1.5], ["patience_rounds=4"], 6),  # lowest in round 2
        ([3.0, 2.0, 1.0, 1.5], ["patience_rounds=4", "evaluate_every=3"], 12),  # rounds 0, 3, 6; 9 is 3 old, 12 is 6
        ([1.0, 2.0], ["patience_rounds=3"], 3),  # the untrained model has the lowest
        ([3.0, 2.0, 2.0], ["patience_rounds=3"], 4),  # as low is no lower
        ([3.0, 2.0, float("nan")], ["patience_rounds=3"], 4),
        ([3.0, 2.0, 2.0], [], 30),
    ],
)
def test_run_stops_at_the_evaluation_at_which_its_lowest_loss_is_old(federation, losses, overrides, last):
    assert judged(losses, *overrides, federation=federation)[-1] == last


def test_run_stops_when_its_simulated_time_is_over(federation):
    """Rounds of equal length t; at 1.5 t the second one is still finished and judged."""
    (_, (first, _), *_) = federation("rounds=3").rounds()
    limited = federation("rounds=9", "evaluate_every=5", f"max_simulated_s={1.5 * first.now_s}")
    reports = [report for report, _ in limited.rounds()]
    assert [report.round for report in reports] == [0, 1, 2]
    assert ["accuracy" in report.metrics for report in reports] == [True, False, True]


def test_a_round_waits_for_its_time_and_nobody_pays_for_that(federation):
    """Rounds of t s, every 100 s: they begin at 0, 100, 200 and end t later; training and joules are as without."""
    usual, waiting = federation("rounds=3"), federation("rounds=3", "round_every_s=100")
    (_, *plain), (_, *spread) = ([*run.rounds()] for run in (usual, waiting))
    assert [round(report.now_s - report.round_s, 9) for report, _ in spread] == [0, 100, 200]
    assert [rows[0].start_s for _, rows in spread] == [0, 100, 200]
    for (report, _), (late, _) in zip(plain, spread, strict=True):
        assert late.round_s == pytest.approx(report.round_s)
        assert (late.joules, late.wait_joules) == (report.joules, report.wait_joules)
    assert weights_sha256(usual.arrays) == weights_sha256(waiting.arrays)


def test_a_round_that_is_longer_than_the_interval_starts_the_next_at_once(federation):
    usual, short = federation("rounds=3"), federation("rounds=3", "round_every_s=0.001")
    assert [r.now_s for r, _ in usual.rounds()] == [r.now_s for r, _ in short.rounds()]


@pytest.mark.parametrize(("limit_s", "last"), [(100.0, 1), (100.001, 2), (200.0, 2), (None, 4)])
def test_a_round_that_would_start_after_the_end_does_not_start(federation, limit_s: float | None, last: int):
    """Rounds start at 0, 100, 200 and 300 s; the last one is judged, whatever `evaluate_every` says."""
    run = federation("rounds=4", "round_every_s=100", f"max_simulated_s={limit_s or 'null'}", "evaluate_every=9")
    reports = [report for report, _ in run.rounds()]
    assert reports[-1].round == last
    assert ["accuracy" in report.metrics for report in reports] == [True, *[False] * (last - 1), True]


def test_model_is_judged_every_few_rounds_and_in_the_last(federation):
    reports = [report for report, _ in federation("rounds=5", "evaluate_every=2").rounds()]
    assert [report.round for report in reports if "accuracy" in report.metrics] == [0, 2, 4, 5]


def test_round_without_replies_leaves_the_weights_and_lets_time_pass(federation):
    run = federation("deadline_s=0.001")
    before = weights_sha256(run.arrays)
    _, (report, _), *_ = run.rounds()
    assert weights_sha256(run.arrays) == before
    assert (list(report.outcomes), report.round_s) == (["late"], 0.001)


# --- asking clients --------------------------------------------------------------------------------------------------


def test_clients_that_judge_pay_seconds_joules_and_bytes(federation):
    """Down 0.02 + 6952 / 1e7 s, one example of 2 * (16 * 64 + 64 * 10) = 3328 FLOPs at 1e10/s, 0.02 s up."""
    _, (report, clients), *_ = federation("evaluate_clients=2").rounds()
    judges = [c for c in clients if c.phase == "evaluate"]
    down_s, compute_s = 0.02 + MODEL_BYTES / 1e7, 3328 / 1e10
    assert len(judges) == 2
    for judge in judges:
        assert (judge.work.down_bytes, judge.work.up_bytes, judge.work.flops) == (MODEL_BYTES, 0, 3328)
        assert judge.cost.total_s == pytest.approx(down_s + compute_s + 0.02)
        assert judge.joules == pytest.approx(2 * down_s + 10 * compute_s + 0.04)
    assert report.down_bytes == 5 * MODEL_BYTES
    assert report.up_bytes == 3 * MODEL_BYTES
    assert report.round_s == pytest.approx(max(c.cost.total_s for c in clients[:3]) + judges[0].cost.total_s)
    assert {"client_accuracy", "client_loss"} <= set(report.metrics)
    assert report.cohort == tuple(c.client for c in clients[:3])


def test_clients_without_held_out_examples_judge_nothing(federation):
    _, (report, clients), *_ = federation("evaluate_clients=2", "workload.client_test_fraction=0").rounds()
    assert [c.outcome for c in clients if c.phase == "evaluate"] == ["completed"] * 2
    assert not [key for key in report.metrics if key.startswith("client_")]


@pytest.mark.parametrize(
    ("over_selection", "cohort", "asked"), [(1.3, 3, 4), (1.12, 25, 28), (1.5, 4, 6), (2.0, 20, 30)]
)
def test_over_selection_asks_more_clients_and_keeps_the_cohort(federation, over_selection, cohort: int, asked: int):
    """ceil(1.3 * 3) = 4, ceil(1.5 * 4) = 6, 1.12 * 25 = 28 (a little more in floats), and at most the 30 there are."""
    sizes = (f"over_selection={over_selection}", f"cohort={cohort}", "num_clients=30", "rounds=1")
    _, (report, clients) = federation("fleet.network_sigma=0.6", *sizes).rounds()
    done = [c for c in clients if c.outcome == "completed"]
    assert (len(report.cohort), len(done), len(report.outcomes["late"])) == (asked, cohort, asked - cohort)
    assert report.round_s == max(c.cost.total_s for c in done)
    assert all(c.cost.total_s >= report.round_s for c in clients if c.outcome == "late")


def test_who_was_not_needed_and_who_missed_the_deadline_can_be_told_apart(run, tmp_path: Path):
    """By the reason of each, and by a sentence where both are counted as late; without over-selection there is none."""
    wide = ["fleet=mixed", "num_clients=12", "cohort=3", "over_selection=3", "rounds=4"]
    summary = run(*wide, "deadline_s=0.3", out=tmp_path / "more")
    rows = read_all_rows(tmp_path / "more")
    late = rows[(rows["outcome"] == "late")]
    assert set(late["reason"]) == {NOT_NEEDED, TOO_LATE}
    assert ((late["total_s"] > 0.3) == (late["reason"] == TOO_LATE)).all()
    (line,) = [line for line in closing_lines(summary, tmp_path / "more") if line.startswith("late: ")]
    assert line == "late: the reply came after the first 3 of a round (over_selection), or after deadline_s"
    assert line in write_page(tmp_path / "more").read_text()
    summary = run("fleet=mixed", "num_clients=12", "cohort=9", "deadline_s=0.3", out=tmp_path / "all")
    assert set(read_all_rows(tmp_path / "all").query("outcome == 'late'")["reason"]) == {TOO_LATE}
    assert not any(line.startswith("late: ") for line in closing_lines(summary, tmp_path / "all"))
