"""A study: a named list of arms that are run with the same seeds and compared, read from one YAML file.

Methods have different settings, so a comparison is no product of settings: each arm has overrides of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from devices.errors import FileError, unknown
from devices.reading import read_yaml
from devices.texts import as_yaml, file_name, storable
from fedsim.errors import ConfigError, DataError
from fedsim.report.files import read_config
from fedsim.report.plots.style import AXES
from fedsim.runs.engine_choice import settled
from fedsim.runs.pairs import try_out
from fedsim.runs.recorded import data_of_summary
from fedsim.settings.build import build_workload
from fedsim.settings.compose import check_address, completed, compose
from fedsim.settings.groups import Settings, option_file, options, own_folders
from fedsim.settings.hydra_text import as_hydra, quoted
from fedsim.settings.permissions import keep_out_beside, real_path
from fedsim.settings.run_settings import RunSettings
from fedsim.study.figure_names import check_figure, check_metric
from fedsim.workloads.fingerprint import SEED, Fingerprint, difference, files_of

KEYS = ("title", "question", "base", "seeds", "arms", "against", "metric", "x", "last", "target", "columns", "reading")
ARM_KEYS = ("overrides", "grid", "of", "suffix")
MAX_ARMS = 1000
LARGEST = 2**63 - 1  # of whole numbers, as of a seed
# Of `summary.json`, known before a run.
WHOLE_FIGURES = ("down_bytes", "up_bytes", "peak_memory_bytes", "storage_bytes", "host_s")
SET_BY_STUDY = {"seed": "--seeds, or seeds in the file", "out": "--out"}  # settings that a study gives its runs
DRAWN_BY = ("seed", "num_clients", "partition")  # settings on which data depend that are made for a run
_FINGERPRINTS: dict[str, Fingerprint | None] = {}  # of this process, by what names the data


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes:
        label: what a reader sees.
        overrides: of `configs/run.yaml`, those of the study first.
        family: the label without values of a grid, or a number at its end; a picture joins the points of a family.
        of: label of the arm whose runs have this one's metrics too; empty for an arm with runs of its own.
        suffix: where `of` is given: how the names of these metrics end; without it they are named as usual.
    """

    label: str
    overrides: tuple[str, ...]
    family: str = ""
    of: str = ""
    suffix: str = ""

    @property
    def slug(self) -> str:
        """Returns the label as a folder's name."""
        return file_name(re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-.") or "arm")


@dataclass(frozen=True)
class Study:
    """The arms of a study, the seeds that they are run with, and what its table and picture show.

    Attributes:
        name: of the file.
        arms: in the order of the table, grids expanded.
        against: label of the arm that the others are compared with.
        metric: of the rounds, that the arms are judged by, with the unit and direction of the workload's primary one;
            empty: that one itself.
        x: axes of the picture: some of AXES, along which the metric is a line, or a value of `summary.json`
            (WHOLE_FIGURES, or by its dotted path), against which an arm's score is a point.
        last: evaluations that make a score; those of the last tenth of the rounds when None.
        differs: of runs that are there, a line for each setting that differs.
        left_out: of runs that are there, a line on those that are not compared; empty where all are.
        target: value of the metric for which the table says what it costs to reach it; no run stops there.
        columns: further values of `summary.json` by dotted path, or `metrics.NAME` of a metric of the rounds.
        question: what the study asks, for its page; Markdown.
        reading: how its table is to be read, for its page; Markdown.
        sources: arms that have no row, but whose runs have the metrics of some that do.
        own: the user's overrides for all arms, which do not stand in the file.
        given: how the user named it, by a path or by its name.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    against: str
    x: tuple[str, ...] = ("rounds", "simulated_s")
    last: int | None = None
    metric: str = ""
    columns: tuple[str, ...] = ()
    sources: tuple[Arm, ...] = ()
    own: tuple[str, ...] = ()
    target: float | None = None
    differs: tuple[str, ...] = ()
    left_out: str = ""
    question: str = ""
    reading: str = ""
    given: str = ""

    def only(self, labels: Sequence[str]) -> Study:
        """Returns the study with some arms: those with a label, or whose label begins with it; all when none is given.

        Raises:
            ConfigError: for a label that no arm has.
        """
        chosen: list[Arm] = []
        for label in labels:
            found = [a for a in self.arms if a.label == label] or [a for a in self.arms if a.label.startswith(label)]
            if not found:
                raise ConfigError(unknown(f"arm of study {self.name}", label, [a.label for a in self.arms]))
            chosen += found
        needed = {arm.of for arm in chosen} - {arm.label for arm in chosen}
        sources = tuple(a for a in (*self.arms, *self.sources) if a.label in needed)
        return replace(self, arms=tuple(a for a in self.arms if a in chosen), sources=sources) if labels else self

    @property
    def trained(self) -> tuple[Arm, ...]:
        """Returns the arms that have runs: those of the table, and those that only others are read from."""
        return tuple(arm for arm in (*self.arms, *self.sources) if not arm.of)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study: an arm with a seed.

    Attributes:
        settings: composed and checked.
        folder: where it goes.
    """

    arm: Arm
    seed: int
    settings: Settings
    folder: Path

    @property
    def name(self) -> str:
        """Returns what messages call the run."""
        return f"{self.arm.label}, seed {self.seed}"

    @property
    def typed(self) -> RunSettings:
        """Returns the settings by attribute."""
        return RunSettings.of(self.settings)

    @property
    def command(self) -> list[str]:
        """Returns the arguments of `fedsim` that make this run."""
        return ["run", *self.arm.overrides, f"seed={self.seed}", f"out={quoted(str(self.folder))}"]


# --- reading ---------------------------------------------------------------------------------------------------------


def studies() -> dict[str, str]:
    """Returns the title of every study of the config folders, by name."""
    return {name: str(_tree(option_file("study", name))["title"]) for name in options("study")}


def read_study(name: str, overrides: Sequence[str] = (), seeds: Sequence[int] = ()) -> Study:
    """Reads a study by its name in the config folders or the path of a file.

    Args:
        name: a path where it has a suffix or a folder in it.
        overrides: for all arms, after the arms' own.
        seeds: in the place of the file's.

    Raises:
        ConfigError: names the file, the key, what came and what is allowed.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not os.path.lexists(path):
            raise ConfigError(f"there is no study file {name}")
        if real_path(path).parent not in [folder / "study" for folder in own_folders()]:
            keep_out_beside(path)
    else:
        path = option_file("study", name)
        if not path.is_file():
            raise ConfigError(unknown("study", name, studies()))
    tree = _tree(path)
    arms: list[Arm] = []
    for label, entry in tree["arms"].items():
        arms += itertools.islice(_expanded(path, str(label), entry), MAX_ARMS + 1 - len(arms))
    if len(arms) > MAX_ARMS:
        raise ConfigError(f"{path}: arms with their grids are more than {MAX_ARMS}; take fewer values, or two studies")
    base = _texts(path, "base", tree.get("base", []))
    study = Study(
        name=path.stem,
        title=str(tree["title"]),
        arms=tuple(a if a.of else replace(a, overrides=(*base, *a.overrides, *overrides)) for a in arms),
        seeds=tuple(seeds) or _seeds(path, tree.get("seeds", [1])),
        against=str(tree.get("against", arms[0].label)),
        x=_texts(path, "x", tree.get("x", ["rounds", "simulated_s"])),
        last=tree.get("last"),
        metric=tree.get("metric", ""),
        target=_target(path, tree),
        columns=_texts(path, "columns", tree.get("columns", [])),
        own=tuple(overrides),
        question=_text(path, "question", tree),
        reading=_text(path, "reading", tree),
        given=name,
    )
    if "metric" in tree and not (isinstance(study.metric, str) and study.metric):
        raise ConfigError(
            f"{path}: metric must name a metric of the rounds, e.g. accuracy, got {as_yaml(study.metric)}"
        )
    return _checked(path, study)


def _tree(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path)
    except FileError as error:
        raise ConfigError(f"this cannot be read as a study: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a map with {', '.join(KEYS)}, got {as_yaml(tree)}")
    for key in tree:
        if key not in KEYS:
            raise ConfigError(f"{path}: {unknown('key of a study', key, KEYS)}")
        _check_numbers(f"{path}: {key}", tree[key])
    if not isinstance(tree.get("title"), str) or not tree["title"].strip():
        raise ConfigError(f"{path}: title must be text, got {as_yaml(tree.get('title'))}")
    for text in (tree["title"], *(tree["arms"] if isinstance(tree.get("arms"), dict) else ())):
        if not storable(str(text).replace("\n", " ")):
            raise ConfigError(f"{path}: a title or label holds letters that files cannot: {str(text)!r}")
    if not isinstance(tree.get("arms"), dict) or not tree["arms"]:
        raise ConfigError(f"{path}: arms must be a map of labels to overrides, got {as_yaml(tree.get('arms'))}")
    return tree


def _check_numbers(where: str, tree: Any) -> None:
    """Refuses whole numbers that no setting takes; Python does not even write those of thousands of digits."""
    left, seen = [tree], set()
    while left:
        value = left.pop()
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{where} must hold whole numbers of at most {LARGEST}, got {as_yaml(value)}")
        if isinstance(value, dict | list) and id(value) not in seen:  # an alias leads to the same again
            seen.add(id(value))
            left += [*value, *value.values()] if isinstance(value, dict) else value


def _checked(path: Path, study: Study) -> Study:
    labels = [arm.label for arm in study.arms]
    if study.against not in labels:
        raise ConfigError(f"{path}: {unknown('arm in against', study.against, labels)}")
    last = study.last
    if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 1):
        raise ConfigError(f"{path}: last must be a whole number of at least 1, or left out, got {as_yaml(last)}")
    if not study.x:
        raise ConfigError(f"{path}: x must name an axis at least: {', '.join(AXES)}, or a value of summary.json")
    for axis in study.x:
        if axis not in (*AXES, *WHOLE_FIGURES) and "." not in axis:
            raise ConfigError(
                f"{path}: {unknown('axis in x', axis, (*AXES, *WHOLE_FIGURES))}, or a dotted path in summary.json"
            )
    for path_of in study.columns:
        check_figure(f"{path}: columns", path_of)
    for axis in study.x:
        if axis not in (*AXES, *WHOLE_FIGURES):
            check_figure(f"{path}: x", axis)
    if study.metric:
        check_metric(f"{path}: metric", study.metric)
    folders: dict[str, str] = {}
    trained = [arm.label for arm in study.trained]
    for arm in study.arms:
        if arm.of and arm.of not in trained:
            raise ConfigError(f"{path}: {unknown(f'arm with runs in arms.{arm.label}.of', arm.of, trained)}")
    for arm in study.trained:
        if arm.slug in folders:
            both = f"{folders[arm.slug]!r} and {arm.label!r}"
            raise ConfigError(f"{path}: arms {both} would share the folder {arm.slug}; rename one")
        folders[arm.slug] = arm.label
        for override in arm.overrides:
            key = override.lstrip("+~").partition("=")[0]
            if key in SET_BY_STUDY:
                raise ConfigError(f"{arm.label}: {key}= belongs to the study; use {SET_BY_STUDY[key]}")
    if len(set(study.seeds)) < len(study.seeds):
        raise ConfigError(f"{path}: a seed is there twice in {list(study.seeds)}")
    return study


def _expanded(path: Path, label: str, entry: Any) -> Iterator[Arm]:
    """Yields the arms of an entry: one, or one for each point of its grid."""
    family = re.sub(r",?\s*(\{[^}]*\}|[0-9.]+$)", "", label).strip() or label
    if not isinstance(entry, dict):
        yield Arm(label, _texts(path, f"arms.{label}", entry), family)
        return
    for key in entry:
        if key not in ARM_KEYS:
            raise ConfigError(f"{path}: {unknown(f'key of arm {label!r}', key, ARM_KEYS)}")
    overrides, grid = _texts(path, f"arms.{label}.overrides", entry.get("overrides", [])), entry.get("grid", {})
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ConfigError(
            f"{path}: arms.{label}.grid must be a map of settings to lists of values, got {as_yaml(grid)}"
        )
    for key in grid:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: arms.{label}.grid must name settings, e.g. trainer.lr, got {as_yaml(key)}")
    of, suffix = entry.get("of", ""), entry.get("suffix", "")
    if not isinstance(of, str) or not isinstance(suffix, str) or bool(of) != bool(suffix) or (of and overrides):
        raise ConfigError(
            f"{path}: arms.{label} either has runs by overrides, or names an arm in `of` and in `suffix` how the "
            f"metrics end that its runs have for this one, got {as_yaml(entry)}"
        )
    for point in itertools.product(*grid.values()):
        values = dict(zip(grid, (as_hydra(v, str) for v in point), strict=True))
        name = _label_of(label, values)
        if of:
            yield Arm(name, (), family, _filled_in(of, values)[0], _filled_in(suffix, values)[0])
        else:
            yield Arm(name, (*overrides, *(f"{key}={value}" for key, value in values.items())), family)


def _label_of(label: str, values: Mapping[str, str]) -> str:
    """Returns the label with the values in the place of {key} (or the key's last word), others behind it."""
    label, others = _filled_in(label, values)
    return " ".join([label, *(f"{key.rpartition('.')[2]}={value}" for key, value in others.items())])


def _filled_in(text: str, values: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Returns the text with the values in their places, and the values that have no place in it."""
    others = {}
    for key, value in values.items():
        places = [p for p in (f"{{{key}}}", f"{{{key.rpartition('.')[2]}}}") if p in text]
        text = text.replace(places[0], value) if places else text
        if not places:
            others[key] = value
    return text, others


def _text(path: Path, key: str, tree: Mapping[str, Any]) -> str:
    value = tree.get(key, "")
    if not isinstance(value, str) or not storable(value.replace("\n", " ")):
        raise ConfigError(f"{path}: {key} must be text, got {as_yaml(value)}")
    return value


def _target(path: Path, tree: Mapping[str, Any]) -> float | None:
    value = tree.get("target")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{path}: target must be a number in the metric's own scale, e.g. 0.8, got {as_yaml(value)}")
    return float(value)


def _texts(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ConfigError(f"{path}: {key} must be a list of texts, got {as_yaml(value)}")
    return tuple(value)


def _seeds(path: Path, value: Any) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in value)
    if not whole or not value:
        raise ConfigError(f"{path}: seeds must be a list of whole numbers of at least 0, got {as_yaml(value)}")
    return tuple(value)


# --- planning --------------------------------------------------------------------------------------------------------


def plan(study: Study, out: Path, building: bool = True) -> list[PlannedRun]:
    """Lists the runs of a study, seed by seed, so that a study that is cut short has compared whole seeds.

    Args:
        study: its arms and seeds.
        out: folder of the study.
        building: tries out what costs nothing; without it nothing is made of what the study names.

    Raises:
        ConfigError: for the first arm whose settings are wrong; its sentence names the arm.
    """
    composed: dict[Arm, Settings] = {}
    for arm in study.trained:
        try:
            composed[arm] = compose([*arm.overrides, f"seed={study.seeds[0]}"])
            check_address(composed[arm], study.own, f"study {study.name}")
            if building:
                try_out(composed[arm])
        except ValueError as error:
            error.add_note(f"in arm {arm.label!r} of study {study.name}")
            raise
    _check_targets(study, composed.values())
    composed = dict(zip(composed, settled(list(composed.values()))[0], strict=True))  # one engine for all arms
    return [
        PlannedRun(arm, seed, _with_seed(arm, composed[arm], seed), out / arm.slug / f"seed-{seed}")
        for seed in study.seeds
        for arm in study.trained
    ]


def _check_targets(study: Study, composed: Iterable[Settings]) -> None:
    """Refuses columns and axes on what a run ended at, where no run of the study has such a target."""
    asked = next((path for path in (*study.columns, *study.x) if path.startswith("to_target.")), None)
    if asked and not any(s["target"] is not None or s["target_accuracy"] is not None for s in composed):
        raise ConfigError(
            f"study {study.name}: no run has {asked}, as no arm sets target=, where a run ends; a target in the study "
            "itself, e.g. target: 0.8, gives columns of what it costs and ends no run"
        )


def _with_seed(arm: Arm, settings: Settings, seed: int) -> Settings:
    """Returns the arm's settings with another seed; composed anew only where one may depend on it."""
    if any("${" in override for override in arm.overrides):
        return {**compose([*arm.overrides, f"seed={seed}"]), "engine": settings["engine"]}
    return {**settings, "seed": seed}


def is_finished(run: PlannedRun) -> bool:
    """Returns whether the run's folder holds it, finished.

    Raises:
        ConfigError: if the folder holds a finished run with other settings or other data.
    """
    if not (run.folder / "summary.json").is_file():
        return False
    try:
        changed = _changed(run)
    except FileError as error:
        raise ConfigError(f"{run.folder} is not a run that can be read: {error}") from error
    if changed:
        key, before, now = changed
        raise ConfigError(
            f"{run.folder} was run with {key}={before}, and the study now says {now}; "
            "name another folder with --out, or remove that one"
        )
    if other := _other_data(run):
        raise ConfigError(
            f"{run.folder} was run with other data than those here: {other}; bring those back, name another folder "
            "with --out, or remove that one"
        )
    return True


def _other_data(run: PlannedRun) -> str:
    """Says in what the data of a finished run differ from those here; empty where nothing does, or nobody can tell."""
    before = data_of_summary(run.folder)
    now = _data_here(run.settings, SEED in before) if before else None
    return difference(before, {**now, **files_of(run.settings)}) if before and now else ""


def _data_here(settings: Settings, drawn: bool) -> Fingerprint | None:
    """Returns the fingerprint of the data that these settings name here; None where they are not here.

    Args:
        settings: of a run.
        drawn: the seed decides on them; otherwise they are the same for all runs of a study that name them alike.
    """
    named = {key: settings[key] for key in ("workload", "stream", *(DRAWN_BY if drawn else ()))}
    key = json.dumps(named, sort_keys=True)
    if key not in _FINGERPRINTS:
        try:
            _FINGERPRINTS[key] = build_workload(settings).fingerprint()
        except DataError:
            _FINGERPRINTS[key] = None
    return _FINGERPRINTS[key]


def can_be_resumed(run: PlannedRun) -> bool:
    """Returns whether the run's folder holds its beginning, with a checkpoint."""
    try:
        return (run.folder / "checkpoint").exists() and _changed(run) is None
    except (FileError, ConfigError):
        return False


def _changed(run: PlannedRun) -> tuple[str, Any, Any] | None:
    """Returns the first setting in which what the folder holds differs from what the study asks for."""
    (there,), _ = settled([completed(read_config(run.folder))])
    return _difference(there, {**run.settings, "out": None})


def _difference(there: Any, asked: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    """Returns the first setting in which two trees differ: its key and both values."""
    if not isinstance(there, dict) or not isinstance(asked, dict):
        return None if there == asked else (prefix.rstrip("."), there, asked)
    pairs: Iterable[str] = {**asked, **there}
    found = (_difference(there.get(key), asked.get(key), f"{prefix}{key}.") for key in pairs)
    return next((one for one in found if one), None)
