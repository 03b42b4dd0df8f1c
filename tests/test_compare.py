"""Runs side by side: scores, paired differences and costs, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer import Typer
from typer.testing import CliRunner

import fedsim
from fedsim.cli.compare import compare as command
from fedsim.cli.compare import place
from fedsim.errors import ConfigError
from fedsim.report.rounds import RoundReport
from fedsim.study import compare as comparisons
from fedsim.study.compare import run_folders
from fedsim.study.page import text_of, to_target
from fedsim.study.paired import Row, correction, half_width_of, holm, p_value, scored, span
from fedsim.study.results import flat, records
from fedsim.study.tables import result_table
from fedsim.study.web_page import page_of
from fedsim.workloads.metrics import COMPARED


def compare(runs, last=None, against=None) -> list[Row]:
    """The rows of a comparison."""
    return comparisons.compare(runs, last, against).rows


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
    """Scores of the last two: .6, .7, .8 for plain and .7, .9, .8 for other; differences .1, .2, 0, t(2) = 4.3027."""
    runs = [
        made(tmp_path / "0", "plain", 1, 0.0, 0.5, 0.7),
        made(tmp_path / "1", "plain", 2, 0.0, 0.6, 0.8),
        made(tmp_path / "2", "other", 2, 0.0, 0.9, 0.9),
        made(tmp_path / "3", "other", 1, 0.0, 0.7, 0.7),
        made(tmp_path / "4", "other", 3, 0.0, 0.8, 0.8),
        made(tmp_path / "5", "plain", 3, 0.0, 0.8, 0.8),
    ]
    base, other = compare(runs, last=2)
    assert (base.label, base.mean, base.difference) == ("plain", pytest.approx(0.7), 0)
    assert other.difference == pytest.approx(0.1)
    assert other.half_width == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-4)
    assert (other.simulated_s, other.joules, other.traffic_bytes) == (30, 6, 300)


def test_less_than_three_seeds_have_no_interval_and_no_mark(tmp_path):
    assert half_width_of([0.3]) == half_width_of([0.3, 0.3]) == math.inf
    assert math.isnan(p_value([1.0]))
    assert math.isnan(p_value([1.0, 1.0]))
    runs = [made(tmp_path / f"{m}{s}", m, s, a) for m, a in (("plain", 0.5), ("other", 0.6)) for s in (1, 2)]
    rows = compare(runs)
    assert not any(row.is_significant for row in rows)
    assert correction(rows) == "2 seeds: no interval"


def test_p_values_are_those_of_the_paired_t_test():
    """Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.4641 with two degrees of freedom, p = 1 - t / sqrt(2 + t^2)."""
    t = 2 * math.sqrt(3)
    assert p_value([1.0, 2.0, 3.0]) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert (p_value([0.0] * 3), p_value([2.0] * 3)) == (1.0, 0.0)


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
    assert correction(alone) == "*: p < 0.05"
    runs += [made(tmp_path / f"c{s}", "c", s, 0.523 - noise[s - 1]) for s in seeds]
    base, *both = compare(runs, last=1)
    assert math.isnan(base.p)
    assert [row.p_holm for row in both] == pytest.approx([2 * alone[1].p] * 2)
    assert not any(row.is_significant for row in both)
    assert correction([base, *both]) == (
        "intervals: of one difference each; none has p < 0.05 after Holm's correction for 2"
    )
    both = [replace(row, p_holm=0.01) for row in both]
    assert correction([base, *both]) == "intervals: of one difference each; *: p < 0.05 after Holm's correction for 2"
    assert correction([base, replace(both[0], p_holm=0.2, p=0.2)]) == ""  # no star, no word on it


def test_rows_are_told_apart_by_the_settings_that_differ_within_a_method(tmp_path):
    runs = [
        made(tmp_path / "0", "a", 1, 0.5, lr=1.0, mix=0.1),
        made(tmp_path / "1", "a", 1, 0.5, lr=1.0, mix=0.2),
        made(tmp_path / "2", "b", 1, 0.5, lr=2.0),
    ]
    assert [row.label for row in compare(runs, 1)] == ["a mix=0.1", "a mix=0.2", "b"]
    assert compare(runs, 1, against="b")[0].label == "b"


def test_a_label_has_as_few_settings_as_tell_its_row_apart(tmp_path):
    """Of three settings that differ, `lr` tells the rows of `a` apart; the others are said once, with their rows."""
    runs = [
        made(tmp_path / "0", "a", 1, 0.5, lr=1.0, mix=0.1, clip=None),
        made(tmp_path / "1", "a", 1, 0.5, lr=2.0, mix=0.2, clip=None),
        made(tmp_path / "2", "a", 1, 0.5, lr=3.0, mix=0.2, clip=True),
        made(tmp_path / "3", "b", 1, 0.5, lr=1.0),
    ]
    result = comparisons.compare(runs)
    assert [row.label for row in result.rows] == ["a lr=1.0", "a lr=2.0", "a lr=3.0", "b"]
    assert result.study.differs == (
        "trainer.clip: null (a lr=1.0, a lr=2.0), true (a lr=3.0)",
        "trainer.lr: 1.0, 2.0, 3.0",
        "trainer.mix: 0.1 (a lr=1.0), 0.2 (a lr=2.0, a lr=3.0)",
    )


def test_a_name_that_is_one_rows_alone_is_its_label(tmp_path):
    names = {"0": "mine", "1": "mine", "2": "shared", "3": "shared", "4": "b", "5": None}
    given = [("a", 1, 1.0), ("a", 2, 1.0), ("a", 1, 2.0), ("a", 1, 3.0), ("a", 1, 4.0), ("b", 1, 1.0)]
    for (number, name), (method, seed, lr) in zip(names.items(), given, strict=True):
        run = made(tmp_path / number, method, seed, 0.5, lr=lr)
        settings = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump({**settings, "name": name}))
    assert [row.label for row in compare([tmp_path])] == ["mine", "a lr=2.0", "a lr=3.0", "a lr=4.0", "b"]


def test_a_run_without_an_evaluated_round_is_left_out_and_said(tmp_path):
    made(tmp_path / "0", "a", 1, 0.5)
    made(tmp_path / "1", "b", 1)
    result = comparisons.compare([tmp_path])
    assert [row.label for row in result.rows] == ["a"]
    assert result.study.left_out == f"left out, as no round was evaluated: {tmp_path / '1'}"
    with pytest.raises(ConfigError, match=r"nothing to compare: no round was evaluated in .*/1$"):
        comparisons.compare([tmp_path / "1"])


def test_runs_of_python_stand_for_their_folders(tmp_path):
    run = fedsim.Run(made(tmp_path / "0", "a", 1, 0.5))
    assert fedsim.compare(run, str(made(tmp_path / "1", "b", 1, 0.5))).table["arm"].tolist() == ["a", "b"]
    for call in (fedsim.resume, fedsim.reprice):
        with pytest.raises(ConfigError) as by_run:
            call(run)
        with pytest.raises(ConfigError) as by_path:
            call(run.folder)
        assert str(by_run.value) == str(by_path.value)


def test_wrong_folders_and_rows_are_named(tmp_path):
    run, again = made(tmp_path / "a", "plain", 1, 0.5), made(tmp_path / "b", "plain", 1, 0.5)
    with pytest.raises(ConfigError, match=r"no row is called 'other'; there are: plain"):
        compare([run], 1, against="other")
    with pytest.raises(ConfigError, match=r"are the same but for their names: 'plain' with seed 1; leave one out"):
        compare([run, again], 1)
    with pytest.raises(ConfigError, match="no runs to compare"):
        compare([], 1)
    with pytest.raises(ConfigError, match="none is not there; give folders of runs"):
        compare([tmp_path / "none"], 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds no run; give folders of runs"):
        compare([tmp_path / "empty"], 1)


def test_a_sweep_a_study_and_a_pattern_stand_for_their_runs_in_their_order(tmp_path):
    folders = [made(tmp_path / "sweep" / str(n), "plain", n, 0.5) for n in (10, 2, 1)]
    assert run_folders([tmp_path / "sweep"]) == folders[::-1]
    assert run_folders([folders[0]]) == [folders[0]]
    assert run_folders([tmp_path / "sweep" / "1*"]) == [folders[2], folders[0]]
    arms = [made(tmp_path / "study" / arm / f"seed-{seed}", arm, seed, 0.5) for arm in "ab" for seed in (1, 2)]
    made(tmp_path / "study" / "a" / "seed-2.unfinished-1", "a", 2, 0.5)
    assert run_folders([tmp_path / "study"]) == arms


def test_all_runs_below_a_folder_are_found_at_any_depth(tmp_path):
    """Single runs beside a sweep and a study; not what is put aside, hidden, or in a run's own folder; links are."""
    made(tmp_path / "away", "plain", 1, 0.5)
    names = ("runs/a", "runs/sweep/0", "runs/study/Arm/seed-1", "runs/more/study/Arm/seed-1")
    runs = [made(tmp_path / name, "plain", 1, 0.5) for name in names]
    for left_out in ("runs/.hidden", "runs/a/inner", "runs/study/Arm/seed-2.unfinished-1"):
        made(tmp_path / left_out, "plain", 1, 0.5)
    (tmp_path / "runs" / "z").symlink_to(tmp_path / "away")
    assert set(run_folders([tmp_path / "runs"])) == {*runs, tmp_path / "runs" / "z"}


SUMMARY = {
    **dict.fromkeys(("method", "workload", "fleet"), ""),
    **dict.fromkeys(("seed", "rounds", "down_bytes", "up_bytes", "peak_memory_bytes", "storage_bytes"), 1),
    **dict.fromkeys(("simulated_s", "host_s"), 1.0),
    **{"final": {"accuracy": 0.5}, "best": {"accuracy": 0.5, "round": 1}, "outcomes": {"completed": 1}},
    **{"energy_j": {"total": 2.0, "max_client": 1.0, "waiting": 0.0}, "to_target": None},
}


def judged_on(run: Path, workload: str, **data: str) -> Path:
    """Has a run say on which data it was judged; without any it is not finished."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["choices"]["workload"] = workload
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    if data:
        figures = {**SUMMARY, "data": {f"test {key}": value for key, value in data.items()}}
        (run / "summary.json").write_text(json.dumps(figures))
    return run


@pytest.mark.parametrize(
    ("one", "other", "is_compared"),
    [
        (("digits", {"x": "A", "y": "B"}), ("digits", {"x": "A", "y": "B"}), True),
        (("digits", {"x": "A", "y": "B"}), ("mine", {"x": "A", "y": "B"}), True),  # the same data by another name
        (("digits", {"x": "A", "y": "B"}), ("digits", {"x": "A", "y": "C"}), False),
        (("digits", {"x": "A", "y": "B"}), ("blobs", {"y": "C"}), False),
        (("digits", {"x": "A", "y": "B"}), ("blobs", {}), False),
        (("digits", {}), ("digits", {"x": "A"}), True),
    ],
)
def test_scores_on_other_test_data_have_no_difference(tmp_path, one, other, is_compared):
    for name, (workload, data) in (("a", one), ("b", other)):
        for seed in (1, 2, 3):
            judged_on(made(tmp_path / f"{name}{seed}", name, seed, 0.5 + 0.01 * seed), workload, **data)
    result = comparisons.compare([tmp_path])
    row = result.rows[1]
    assert math.isnan(row.difference) == math.isnan(row.p) == (not is_compared)
    words = "judged on other test data than a"
    assert (words in str(result_table(result).caption)) == (words.capitalize() in text_of(result, {})) != is_compared


def test_the_pages_command_is_the_one_that_compares(tmp_path):
    for seed in (1, 2):
        made(tmp_path / "sweep" / str(seed), "plain", seed, 0.5)
    result = comparisons.compare([tmp_path / "sweep"], last=1, target=0.4)
    assert f"```\nfedsim compare {tmp_path / 'sweep'} --against plain --last 1 --target 0.4\n```" in text_of(result, {})


def test_a_target_that_the_untrained_model_reaches_counts_from_round_1(tmp_path):
    run = made(tmp_path / "0", "a", 1, 0.5, 0.6)
    untrained = RoundReport(round=0, now_s=0.0, round_s=0.0, metrics={"accuracy": 0.5})
    (run / "rounds.jsonl").write_text(untrained.to_json() + "\n" + (run / "rounds.jsonl").read_text())
    found = to_target(comparisons.compare([run], target=0.5))
    assert list(found.values()) == [["10.0 s"], ["2.0 J"], ["100 B"]]


def test_rows_name_seeds_of_their_own_and_one_row_has_no_difference(tmp_path):
    made(tmp_path / "0", "plain", 1, 0.5)
    alone = comparisons.compare([tmp_path])
    assert alone.study.title == "1 run"
    assert "differences" not in str(result_table(alone).title)
    made(tmp_path / "1", "other", 1, 0.5)
    made(tmp_path / "2", "other", 2, 0.5)
    shown = text_of(comparisons.compare([tmp_path], against="plain"), {})
    assert "| plain (seed 1) |" in shown
    assert "| other |" in shown


def test_a_folder_that_is_taken_is_named_as_it_was_typed(tmp_path):
    made(tmp_path / "run", "plain", 1, 0.5)
    with pytest.raises(ConfigError, match=rf"^--out {tmp_path}/run holds another run"):
        place(tmp_path / "run")


def reports(count: int, every: int) -> list[RoundReport]:
    """Rounds of which every so-many-th was judged: its accuracy is its number."""
    judged = [{"accuracy": float(n)} if n % every == 0 else {} for n in range(count + 1)]
    return [RoundReport(round=n, now_s=n, round_s=1, metrics=metrics) for n, metrics in enumerate(judged)]


@pytest.mark.parametrize(
    "rounds, every, last, expected",
    [
        (100, 1, None, [91, 92, 93, 94, 95, 96, 97, 98, 99, 100]),
        (95, 1, None, [86, 87, 88, 89, 90, 91, 92, 93, 94, 95]),  # ceil(9.5) = 10 rounds
        (10, 2, None, [10]),
        (100, 30, None, [90]),  # none in the last tenth: the last there is
        (10, 2, 4, [4, 6, 8, 10]),
    ],
)
def test_a_score_is_over_the_last_tenth_of_the_rounds(rounds: int, every: int, last: int | None, expected: list[int]):
    assert [r.round for r in scored(reports(rounds, every), last)] == expected


def test_the_caption_names_the_rounds_and_warns_of_early_ones(tmp_path):
    late = compare([made(tmp_path / "0", "a", 1, *[0.5] * 20)])
    assert span(late) == "accuracy: mean of rounds 19 and 20"
    early = span(compare([made(tmp_path / "1", "a", 1, *[0.5] * 10)], last=6))
    assert early == (
        "accuracy: mean of rounds 5 to 10; it reaches back to round 5 of 10, before the middle: a mean over learning, "
        "not of its end"
    )


def test_scores_of_runs_of_unequal_lengths_say_how_many_evaluations_make_them(tmp_path):
    """The last tenths of 10, 20 and 30 rounds."""
    runs = [made(tmp_path / str(n), name, 1, *[0.5] * n) for name, n in (("a", 10), ("b", 20), ("c", 30))]
    assert span(compare(runs[:1])) == "accuracy: of round 10"
    assert span(compare(runs)) == "accuracy: mean of the last evaluations, 1 to 3, of each run"
    assert span(compare(runs, last=2)) == "accuracy: mean of the last 2 evaluations of each run"
    seeds = [made(tmp_path / f"s{n}", "a", n, *[0.5] * n) for n in (3, 4)]
    assert span(compare(seeds)) == "accuracy: of the last evaluation of each run"


@pytest.mark.parametrize("key", ["target", "target_accuracy"])
def test_runs_that_stop_at_a_target_are_compared_by_it_and_by_their_last_evaluation(tmp_path, key: str):
    """A mean over the last tenth, 20 rounds, would be of a model that was still learning."""
    for seed in (1, 2):
        run = made(tmp_path / str(seed), "a", seed, *[0.1] * 18, 0.3, 0.4 + seed / 10)
        settings = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(settings | {key: 0.6}))
    result = comparisons.compare([tmp_path])
    assert result.rows[0].scores == {1: pytest.approx(0.5), 2: pytest.approx(0.6)}
    assert to_target(result)["time\nto 60.00 %"] == ["1 of 2 seeds"]
    caption = str(result_table(result).caption)
    assert "accuracy: of the last evaluation of each run, as runs stop at a target" in caption
    asked = comparisons.compare([tmp_path], last=2, target=0.2)
    assert (asked.study.target, asked.rows[0].scores[1]) == (0.2, pytest.approx(0.4))


MORE = {
    "final.attack_success": ({"final": {"accuracy": 0.5, "attack_success": 0.25}}, "attack success, %", "25.00"),
    "privacy.epsilon": ({"privacy": {"epsilon": 684.99, "delta": 0.01}}, "epsilon", "685"),
    "asynchrony.mean_staleness": (
        {
            "asynchrony": {
                **{"staleness": {"1": 1, "2": 1}, "unused": 0, "busy": {"all": 1.0}, "at_work": 4.0},
                **{"server_idle_s": 0.0, "in_flight": 3},
            }
        },
        "mean staleness",
        "1.5",
    ),
}


@pytest.mark.parametrize("path", COMPARED)
def test_a_figure_that_some_run_has_is_a_column(tmp_path, path: str):
    """In the terminal, as Markdown, on the page and in the files, under the words and in the unit declared for it."""
    more, heading, cell = MORE[path]
    for name, tree in (("plain", {}), ("other", more)):
        run = made(tmp_path / name, name, 1, 0.5)
        (run / "summary.json").write_text(json.dumps(SUMMARY | tree))
    result = comparisons.compare([tmp_path], against="plain")
    shown = result_table(result)
    headings = [" ".join(column.header.split()) for column in shown.columns]
    place = headings.index(heading.replace(",", ""))
    assert list(shown.columns[place].cells) == ["", cell]
    page = text_of(result, {})
    assert f"| {heading} |" in page
    assert f"| {cell} |" in page
    assert f">{heading.replace(',', '')}<" in page_of(result, {}, tmp_path, "comparison").as_html()
    assert COMPARED[path].scale * flat(records(result))[1][path] == pytest.approx(float(cell), rel=1e-3)
    others = {words for _, words, _ in MORE.values()} - {heading}
    assert not any(f"| {words} |" in page for words in others)
    at_the_end = "clients at work at the end of a run, whose energy and bytes are in no round: other 3"
    assert (at_the_end in str(shown.caption)) == (path == "asynchrony.mean_staleness")


def test_where_energy_went_and_who_was_never_met_are_columns(tmp_path):
    for number, name in enumerate(("plain", "other"), 1):
        run = made(tmp_path / name, name, 1, 0.5)
        (run / "rounds.jsonl").write_text(
            RoundReport(1, 1.0, 1.0, joules=2.0, tail_joules=1.0 * number, metrics={"accuracy": 0.5}).to_json() + "\n"
        )
        spent = {"total": 2.0, "max_client": 1.0, "waiting": 0.5}
        seen = {"population": 9, "took_part": 2, "never": 7}
        (run / "summary.json").write_text(json.dumps(SUMMARY | {"energy_j": spent, "clients": seen}))
    result = comparisons.compare([tmp_path], against="plain")
    page = text_of(result, {})
    assert "| traffic | radio tails | waiting |" in page
    assert "| 0 B | 2.0 J | 500 mJ |" in page
    assert "| arm | never took part | rounds |" in page
    assert "| other | 7 | 1 |" in page
    assert "Radio tails are a part of the energy; waiting is not." in page


def test_the_cost_of_a_target_is_a_mean_only_where_all_seeds_reach_it(tmp_path):
    """A reaches 0.5 in rounds 2 and 3 of 10 s and 2 J each: 25 s, 5 J, 250 bytes; b with one seed of two, c never."""
    made(tmp_path / "0", "a", 1, 0.1, 0.5, 0.9)
    made(tmp_path / "1", "a", 2, 0.1, 0.2, 0.5)
    made(tmp_path / "2", "b", 1, 0.5, 0.5, 0.5)
    made(tmp_path / "3", "b", 2, 0.1, 0.1, 0.1)
    made(tmp_path / "4", "c", 1, 0.1, 0.1, 0.1)
    result = comparisons.compare([tmp_path], target=0.5)
    time, energy, traffic = to_target(result).values()
    assert time == ["25.0 s", "1 of 2 seeds", "not reached"]
    assert energy == ["5.0 J", "1 of 2 seeds", "not reached"]
    assert traffic == ["250 B", "1 of 2 seeds", "not reached"]
    assert list(to_target(result)) == ["time\nto 50.00 %", "energy\nto 50.00 %", "traffic\nto 50.00 %"]


def test_rows_without_a_seed_in_common_are_named(tmp_path):
    made(tmp_path / "0", "plain", 1, 0.5)
    made(tmp_path / "1", "plain", 2, 0.5)
    made(tmp_path / "2", "other", 3, 0.75)
    made(tmp_path / "3", "third", 2, 0.75)
    table = result_table(comparisons.compare([tmp_path]))
    assert "no seed in common with plain, so no difference: other" in str(table.caption)
    assert "difference of third: over the seeds in common, 2" in str(table.caption)


def test_what_differs_is_named_by_the_option_of_a_group(tmp_path):
    """Of a fleet its name, not each of its settings."""
    for number, (fleet, sigma) in enumerate((("phones", 0.6), ("sbc", 0.2))):
        run = made(tmp_path / str(number), "plain", 1, 0.5)
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings |= {"fleet": {"network_sigma": sigma}, "choices": {"method": "plain", "fleet": fleet}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    result = comparisons.compare([tmp_path])
    assert [row.label for row in result.rows] == ["plain fleet=phones", "plain fleet=sbc"]
    assert result.study.differs == ("fleet: phones, sbc",)


def test_the_command_prints_a_table_and_writes_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "sweep" / "0", "plain", 1, 0.5)
    made(tmp_path / "sweep" / "1", "other", 1, 0.75)
    app = Typer()
    app.command()(command)
    result = CliRunner().invoke(app, ["sweep", "--out", "there"])
    assert result.exit_code == 0, result.output
    assert "+25.00" in result.output
    assert result.output.splitlines()[-2].startswith("comparison: there (")
    assert result.output.splitlines()[-1] == "page: there/comparison.html"
    files = {path.name for path in (tmp_path / "there").iterdir()}
    assert files == {f"comparison.{end}" for end in ("html", "md", "csv", "json", "png")}
