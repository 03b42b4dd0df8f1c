"""Paired differences between the runs of a sweep, against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from typer import Typer
from typer.testing import CliRunner

from fedsim.cli.paired import paired
from fedsim.errors import ConfigError
from fedsim.report.rounds import RoundReport
from fedsim.study.paired import compare, correction, half_width_of, holm, p_value, run_folders


def made(folder: Path, method: str, seed: int, *accuracies: float, **trainer: float) -> Path:
    """A run folder with one evaluation a round, each of 10 s and 100 bytes down."""
    folder.mkdir(parents=True)
    settings = {"seed": seed, "trainer": trainer, "choices": {"method": method}, "out": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    reports = [
        RoundReport(round=n, now_s=10.0 * n, round_s=10.0, down_bytes=100, joules=2.0, metrics={"accuracy": value})
        for n, value in enumerate(accuracies, 1)
    ]
    (folder / "rounds.jsonl").write_text("".join(report.to_json() + "\n" for report in reports))
    return folder


def test_difference_is_the_mean_over_seeds_of_the_last_evaluations(tmp_path):
    """Scores of the last two: 0.6, 0.7 for plain and 0.7, 0.9 for other; differences 0.1 and 0.2, t(1) = 12.706."""
    runs = [
        made(tmp_path / "0", "plain", 1, 0.0, 0.5, 0.7),
        made(tmp_path / "1", "plain", 2, 0.0, 0.6, 0.8),
        made(tmp_path / "2", "other", 2, 0.0, 0.9, 0.9),
        made(tmp_path / "3", "other", 1, 0.0, 0.7, 0.7),
    ]
    base, other = compare(runs, last=2)
    assert (base.label, base.mean, base.difference) == ("plain", pytest.approx(0.65), 0)
    assert other.difference == pytest.approx(0.15)
    assert other.half_width == pytest.approx(12.7062 * 0.0707107 / math.sqrt(2), rel=1e-4)
    assert (other.simulated_s, other.joules, other.traffic_bytes) == (30, 6, 300)


def test_one_seed_has_no_interval():
    assert half_width_of([0.3]) == math.inf


def test_p_values_are_those_of_the_paired_t_test():
    """Differences 1 and 3: t = 2 / 1 with one degree of freedom, p = 1 - 2 atan(2) / pi = 0.2952."""
    assert p_value([1.0, 3.0]) == pytest.approx(1 - 2 * math.atan(2.0) / math.pi)
    assert (p_value([0.0, 0.0]), p_value([2.0, 2.0])) == (1.0, 0.0)
    assert math.isnan(p_value([1.0]))


def test_holms_correction_by_hand():
    """0.01 x 3, then 0.02 x 2, then 0.04 x 1, which may not be below the one before; what is no comparison stays."""
    corrected = holm([0.04, math.nan, 0.01, 0.02])
    assert corrected[0] == pytest.approx(0.04)
    assert math.isnan(corrected[1])
    assert corrected[2:] == pytest.approx([0.03, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_comparisons_are_corrected_for_their_number(tmp_path):
    """Two rows at p 0.03 each stand alone; together only below 0.06."""
    seeds = range(1, 6)
    noise = [0.0, 0.02, -0.02, 0.01, -0.01]
    runs = [made(tmp_path / f"a{s}", "plain", s, 0.5) for s in seeds]
    runs += [made(tmp_path / f"b{s}", "b", s, 0.523 + noise[s - 1]) for s in seeds]
    alone = compare(runs, last=1)
    assert 0.025 < alone[1].p == alone[1].p_holm < 0.05
    assert alone[1].is_significant
    assert correction(alone) == ""
    runs += [made(tmp_path / f"c{s}", "c", s, 0.523 - noise[s - 1]) for s in seeds]
    base, *both = compare(runs, last=1)
    assert math.isnan(base.p)
    assert [row.p_holm for row in both] == pytest.approx([2 * alone[1].p] * 2)
    assert not any(row.is_significant for row in both)
    assert correction([base, *both]) == "intervals: of one difference each; *: p < 0.05 after Holm's correction for 2"


def test_rows_are_told_apart_by_the_settings_that_differ_within_a_method(tmp_path):
    runs = [
        made(tmp_path / "0", "a", 1, 0.5, lr=1.0, mix=0.1),
        made(tmp_path / "1", "a", 1, 0.5, lr=1.0, mix=0.2),
        made(tmp_path / "2", "b", 1, 0.5, lr=2.0),
    ]
    assert [row.label for row in compare(runs, 1)] == ["a trainer.mix=0.1", "a trainer.mix=0.2", "b"]
    assert compare(runs, 1, against="b")[0].label == "b"


def test_wrong_folders_and_rows_are_named(tmp_path):
    run, again = made(tmp_path / "a", "plain", 1, 0.5), made(tmp_path / "b", "plain", 1, 0.5)
    with pytest.raises(ConfigError, match=r"no row is called 'other'; there are: plain"):
        compare([run], 1, against="other")
    with pytest.raises(ConfigError, match=r"'plain' was run twice with seed 1"):
        compare([run, again], 1)
    with pytest.raises(ConfigError, match="no runs to compare"):
        compare([], 1)
    with pytest.raises(ConfigError, match="is not a run that can be read"):
        compare([tmp_path / "none"], 1)


def test_a_sweep_stands_for_its_runs_in_their_order(tmp_path):
    folders = [made(tmp_path / str(n), "plain", n, 0.5) for n in (10, 2, 1)]
    assert run_folders([tmp_path]) == folders[::-1]
    assert run_folders([folders[0]]) == [folders[0]]


def test_runs_that_share_no_seed_are_not_compared(tmp_path):
    made(tmp_path / "0", "plain", 1, 0.5)
    made(tmp_path / "1", "other", 2, 0.75)
    made(tmp_path / "2", "third", 1, 0.75)
    app = Typer()
    app.command()(paired)
    result = CliRunner().invoke(app, [str(tmp_path), "--last", "1"], env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    assert "nan" not in result.output
    assert result.output.count("+25.00") == 1
    assert "accuracy % by seed" in result.output
    assert result.output.splitlines()[-1] == "no seeds match those of plain, so there is no difference: other"


def test_command_prints_the_table(tmp_path):
    made(tmp_path / "0", "plain", 1, 0.5)
    made(tmp_path / "1", "other", 1, 0.75)
    app = Typer()
    app.command()(paired)
    result = CliRunner().invoke(app, [str(tmp_path), "--last", "1"], env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    assert "+25.00" in result.output
