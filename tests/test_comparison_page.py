"""The page of a comparison and of a study: what its first sentence claims, its pictures, its ways to other pages."""

from __future__ import annotations

import math
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from test_compare import made
from test_page import Page

from fedsim.report import strict_json
from fedsim.report.plots.compared import arm_styles, curves_of_arms, front, scores_against_costs
from fedsim.report.plots.study import study_figure
from fedsim.report.rounds import read_rounds
from fedsim.study.answer import answer
from fedsim.study.compare import compare
from fedsim.study.page import text_of
from fedsim.study.web_page import write_web_page

SEEDS = (1, 2, 3)


def runs(folder: Path, **scores: tuple[float, ...]) -> Path:
    """A run for each method and seed, judged once after 10 s, 2 J and 100 bytes."""
    for number, (method, values) in enumerate(scores.items()):
        for seed, value in enumerate(values, 1):
            made(folder / f"{number}-{seed}", method, seed, value)
    return folder


def test_who_is_ahead_is_said_with_interval_and_cost(tmp_path: Path):
    """Differences 0.19, 0.20, 0.21: mean 0.2, deviation 0.01, half width 4.3027 * 0.01 / sqrt 3 = 0.0248."""
    found = answer(compare([runs(tmp_path, plain=(0.5, 0.5, 0.5), other=(0.69, 0.7, 0.71))]))
    assert found == (
        "other is ahead of plain: 70.00 % against 50.00 %, +20.00 (+17.52 to +22.48), for the same time, energy and "
        "traffic."
    )
    behind = answer(compare([tmp_path], against="other"))
    assert behind.startswith("other is ahead of plain. The best of them, plain: 50.00 % against 70.00 %, -20.00 (")


def test_no_one_is_ahead_where_the_interval_includes_0(tmp_path: Path):
    found = answer(compare([runs(tmp_path, plain=(0.5, 0.5, 0.5), other=(0.4, 0.7, 0.6))]))
    assert found.startswith("None is known to be ahead of plain or behind it; the best, other, differs by +6.67 (")
    assert "which includes 0" in found


def test_no_one_is_ahead_where_holms_correction_takes_it_back(tmp_path: Path):
    """The interval of `a` alone leaves 0 out (p = 0.03), and not with the other four arms."""
    noise = dict.fromkeys("bcde", (0.5, 0.52, 0.47))
    found = answer(compare([runs(tmp_path, plain=(0.5, 0.5, 0.5), a=(0.56, 0.6, 0.62), **noise)], against="plain"))
    assert found.startswith("None is known to be ahead of plain")
    assert "which is not enough with 5 comparisons (Holm)" in found


def test_equal_scores_differ_in_nothing(tmp_path: Path):
    found = answer(compare([runs(tmp_path, plain=(0.5, 0.6, 0.7), same=(0.5, 0.6, 0.7))]))
    assert found == "None differs from plain: every seed has the same score."


def test_too_few_seeds_claim_nothing(tmp_path: Path):
    found = answer(compare([runs(tmp_path, plain=(0.5,), other=(0.6,))]))
    assert found == (
        "other has the best accuracy, 60.00 % against 50.00 % of plain, for the same time, energy and traffic; 1 seed "
        "cannot tell whether that is more than chance (3 can)."
    )


def test_equal_scores_of_few_seeds_are_said_to_be_equal(tmp_path: Path):
    """Equal as they are shown: 60.000 % and 60.001 %."""
    result = compare([runs(tmp_path, plain=(0.6,), other=(0.60001,))])
    assert answer(result) == (
        "plain and other have the same accuracy, 60.00 %, other for the same time, energy and traffic; 1 seed cannot "
        "tell whether they differ (3 can)."
    )
    made(tmp_path / "9", "third", 1, 0.2)
    assert answer(compare([tmp_path])).startswith("plain and other have the best accuracy, 60.00 %, other for the same")


def test_equal_points_do_not_hide_each_other(tmp_path: Path):
    result = compare([runs(tmp_path, a=(0.5,), b=(0.5,), c=(0.7,))])
    for drawn in scores_against_costs(result, arm_styles(result)):
        circles = ElementTree.fromstring(drawn).findall(".//{*}circle")
        first, second, _ = (float(circle.get("cx")) for circle in circles)
        assert 5 < second - first < 10
    points = replace(result, study=replace(result.study, x=("mb",)), columns={"mb": [1.0, 1.0, 2.0]})
    (panel,) = study_figure(points).axes
    sizes = [bars.lines[0].get_markersize() for bars in panel.containers]
    assert sizes == [5, 9, 5]  # a ring around the point that it would hide


def test_one_arm_says_what_it_reached(tmp_path: Path):
    result = compare([runs(tmp_path, plain=(0.5, 0.7))], target=0.6)
    assert answer(result) == (
        "plain: accuracy 60.00 % ± 14.14 for 10.0 s, 2.0 J and 100 B. No arm reaches 60.00 % with every seed."
    )


def test_the_cheapest_way_to_a_target_is_named_among_those_who_all_got_there(tmp_path: Path):
    made(tmp_path / "0", "slow", 1, 0.1, 0.6)
    made(tmp_path / "1", "fast", 1, 0.6, 0.6)
    made(tmp_path / "2", "never", 1, 0.1, 0.1)
    found = answer(compare([tmp_path], target=0.5))
    assert (
        "To 50.00 % for least, of the 2 that reach it with every seed, on the average: fast (10.0 s of time, " in found
    )


def test_where_less_is_better_the_lower_score_is_ahead(tmp_path: Path):
    result = compare([runs(tmp_path, plain=(0.5, 0.5, 0.5), other=(0.69, 0.7, 0.71))])
    metric = replace(result.metric, name="mse", unit="", higher_is_better=False)
    turned = replace(result, metric=metric, rows=[replace(row, metric=metric) for row in result.rows])
    assert answer(turned).startswith("plain is ahead of other.")


def test_the_front_joins_those_that_none_beats_in_both():
    """Of cost and gain: (1, 1) and (3, 5) are best; (2, 1) costs more for nothing, (3, 4) and (4, 5) are beaten."""
    assert front([3, 1, 2, 3, 4], [5, 1, 1, 4, 5]) == [1, 0]
    assert front([], []) == []


def test_costs_that_hardly_differ_are_one_place(tmp_path: Path):
    """Within a thousandth: one of them is best, and no axis is of their last digits."""
    result = compare([runs(tmp_path, a=(0.5,), b=(0.6,), c=(0.7,))])
    costs = (339.3921, 339.3922, 339.3920)
    rows = [replace(row, joules=cost) for row, cost in zip(result.rows, costs, strict=True)]
    _, drawn, _ = scores_against_costs(replace(result, rows=rows), arm_styles(result))
    picture = ElementTree.fromstring(drawn)
    assert len({circle.get("cx") for circle in picture.findall(".//{*}circle")}) == 1
    texts = [text.text for text in picture.findall(".//{*}text")]
    assert len(texts) == len(set(texts))
    (line,) = [path for path in picture.findall(".//{*}path") if path.find("{*}title").text == "not beaten in both"]
    assert "L" not in line.get("d")  # one point


def test_a_band_needs_three_seeds(tmp_path: Path):
    for count, expected in ((2, 0), (3, 1)):
        for seed in range(1, count + 1):
            made(tmp_path / str(count) / str(seed), "plain", seed, 0.1 * seed, 0.5)
        result = compare([tmp_path / str(count)])
        drawn = curves_of_arms(result, arm_styles(result))
        assert len(drawn) == 4
        assert all(str(picture).count("fill-opacity") == expected for picture in drawn)


def test_costs_far_apart_and_scores_that_are_no_number_are_drawn(tmp_path: Path):
    result = compare([runs(tmp_path, a=(0.5,), b=(0.6,), c=(0.7,))])
    rows = [replace(row, joules=10.0 ** (3 * n), traffic_bytes=0.0) for n, row in enumerate(result.rows)]
    rows[2] = replace(rows[2], scores={1: math.nan})
    for drawn in scores_against_costs(replace(result, rows=rows), arm_styles(result)):
        assert "nan" not in drawn
        assert len(ElementTree.fromstring(drawn).findall(".//{*}circle")) == 2


def test_the_page_leads_to_its_runs_and_loads_nothing(tmp_path: Path):
    folder = runs(tmp_path / "runs", plain=(0.5, 0.5, 0.5), other=(0.4, 0.7, 0.6))
    (folder / "0-1" / "report.html").touch()
    (tmp_path / "out").mkdir()
    result = compare([folder], target=0.5)
    path = write_web_page(result, {"x": "<b>broke</b>"}, tmp_path / "out", "comparison")
    page = Page(path.read_text())
    assert page.open == []
    assert page.texts["p"][0] == answer(result)
    assert "x failed: <b>broke</b>" in page.texts["p"]
    assert "accuracy, %, last evaluation" in page.texts["th"]
    assert page.texts["h2"] == [
        "Scores and costs", "What it took to reach 50.00 %", "What accuracy took", "The score against its cost", "Runs",
        "Commands", "Files",
    ]  # fmt: skip
    beside = {f"comparison.{ending}" for ending in ("md", "csv", "json", "png")}
    assert set(page.addresses) == {"data:,", "../runs/0-1/report.html", *beside}
    assert f"fedsim compare {folder} --against plain --target 0.5" in page.texts["pre"]
    again = write_web_page(compare([folder], target=0.5), {"x": "<b>broke</b>"}, tmp_path / "out", "comparison")
    assert again.read_text() == path.read_text()


def test_the_target_has_a_table_of_its_own_in_the_markdown(tmp_path: Path):
    result = compare([runs(tmp_path, plain=(0.5, 0.7), other=(0.7, 0.7))], target=0.6)
    assert "| arm | time to 60.00 % | energy to 60.00 % | traffic to 60.00 % |" in text_of(result, {})
    assert "| plain | 1 of 2 seeds | 1 of 2 seeds | 1 of 2 seeds |" in text_of(result, {})
    assert "| other | 10.0 s | 2.0 J | 100 B |" in text_of(result, {})


def copies(run: Path, folder: Path, arms: int, seeds: int, rounds: int) -> Path:
    """Folders as of so many runs, each with the rounds of a real one, over and over, and scores of its own."""
    settings, reports = yaml.safe_load((run / "config.yaml").read_text().partition("\n# ")[0]), read_rounds(run)
    for arm in range(arms):
        for seed in range(1, seeds + 1):
            place = folder / f"{arm}-{seed}"
            place.mkdir(parents=True)
            own = {**settings, "seed": seed, "rounds": rounds, "trainer": {**settings["trainer"], "lr": 0.1 + arm}}
            (place / "config.yaml").write_text(yaml.safe_dump(own))
            lines = []
            for number in range(rounds + 1):
                report = asdict(reports[min(number, 1) + number % (len(reports) - 1) if number else 0])
                metrics = {**report["metrics"], "accuracy": (arm + seed / 10 + number) / (arms + rounds)}
                lines.append(strict_json.dumps({**report, "round": number, "now_s": 2.0 * number, "metrics": metrics}))
            (place / "rounds.jsonl").write_text("\n".join(lines) + "\n")
            for name in ("summary.json", "split.json"):
                shutil.copy(run / name, place / name)
    return folder


@pytest.mark.slow
def test_a_hundred_runs_of_a_hundred_rounds_are_compared_in_ten_seconds(run, tmp_path: Path):
    run("rounds=3", "evaluate_clients=2", out=tmp_path / "run")
    folder = copies(tmp_path / "run", tmp_path / "copies", 20, 5, 100)
    begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [
        sys.executable,
        "-m",
        "fedsim",
        "compare",
        str(folder),
        "--target",
        "0.5",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun  # what else the host does is no fault of it
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"page: {tmp_path / 'out' / 'comparison.html'}"
    assert took < 10, took
    assert (tmp_path / "out" / "comparison.html").stat().st_size < 600_000
