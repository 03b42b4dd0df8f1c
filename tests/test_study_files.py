"""A study's file: what it expands to, and what is refused before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fake_study import BASE

from fedsim.errors import ConfigError
from fedsim.runs.engine_choice import settled
from fedsim.settings.compose import compose
from fedsim.study.spec import plan, read_study, studies


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
    (asked,), _ = settled([compose(runs[3].command[1:])])
    assert {**asked, "out": None} == runs[3].settings
    assert compose(runs[3].command[1:])["out"] == "a b/local-0.2/seed-4"


def test_every_shipped_study_can_be_planned():
    assert studies()
    for name in studies():
        study = read_study(name)
        assert len(plan(study, Path("out"))) == len(study.trained) * len(study.seeds)


# --- what is refused -------------------------------------------------------------------------------------------------


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"arm": {}}, r"mine\.yaml: unknown key of a study 'arm'; did you mean 'arms'\?"),
    "no title": ({"title": None}, "title must be text, got null"),
    "no arms": ({"arms": {}}, "arms must be a map of labels to overrides"),
    "arm as text": ({"arms": {"A": "method=fedavg"}}, r"arms\.A must be a list of texts, got 'method=fedavg'"),
    "key of an arm": ({"arms": {"A": {"gird": {}}}}, "unknown key of arm 'A' 'gird'; did you mean 'grid'"),
    "grid without list": ({"arms": {"A": {"grid": {"seed": 1}}}}, r"arms\.A\.grid must be a map of settings to lists"),
    "against": ({"against": "Plan"}, "unknown arm in against 'Plan'; did you mean 'Plain'"),
    "axis": ({"x": ["round"]}, r"unknown axis in x 'round'; did you mean 'rounds'\?.*dotted path"),
    "column": ({"columns": ["final.acuracy"]}, r"columns: unknown figure of a run 'final.acuracy'; did you mean 'fin"),
    "column of metrics": ({"columns": ["metrics.client_acuracy"]}, "did you mean 'metrics.client_accuracy'"),
    "map in columns": ({"columns": ["energy_j"]}, r"unknown figure of a run 'energy_j'.*energy_j\.total"),
    "head of a column": ({"columns": ["outcome.late"]}, r"did you mean 'outcomes\.late'"),
    "key of a column": ({"columns": ["energy_j.totl"]}, r"did you mean 'energy_j\.total'"),
    "half a column": ({"columns": ["final."]}, "columns must name a figure by its dotted path"),
    "figure": ({"columns": ["peak_memory_byte"]}, "did you mean 'peak_memory_bytes'"),
    "dotted axis": ({"x": ["final.acuracy"]}, r"x: unknown figure of a run.*did you mean 'final\.accuracy'"),
    "no target": ({"columns": ["to_target.simulated_s"]}, r"no run has to_target\.simulated_s, as no arm sets target="),
    "metric": ({"metric": "acuracy"}, r"metric: unknown figure of a run 'acuracy'; did you mean 'accuracy'"),
    "metric as path": ({"metric": "final.accuracy"}, r"must name a metric of the rounds alone, e\.g\. accuracy, got"),
    "seeds": ({"seeds": [1, -2]}, "seeds must be a list of whole numbers of at least 0"),
    "seed twice": ({"seeds": [1, 1]}, "a seed is there twice"),
    "last": ({"last": 0}, "last must be a whole number of at least 1, or left out, got 0"),
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


def test_names_that_own_code_may_bring_pass(file):
    """Nobody knows before a run what a workload or strategy of the user's reports."""
    columns = ["metrics.mine", "final.macro_f2", "metrics.accuracy_at_0.5", "facts.mine", "mine", "to_target.round"]
    study = read_study(file(columns=columns, metric="mine_at_0.5", base=[*BASE, "target_accuracy=0.9"]))
    assert plan(study, Path("runs/mine"))


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
