"""Runs that are there, side by side: what differs between their settings, what each reached, and at what cost."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices.errors import FileError
from fedsim.errors import ConfigError
from fedsim.report.checksums import check_rounds
from fedsim.report.files import read_config, read_summary
from fedsim.report.plots.style import AXES
from fedsim.report.rounds import RoundReport, read_rounds
from fedsim.report.split import primary_of
from fedsim.settings.forms import MAP, WHOLE, check_tree
from fedsim.settings.groups import GROUPS
from fedsim.settings.hydra_text import as_hydra
from fedsim.study.paired import common_metric, compare_rows
from fedsim.study.results import FinishedRun, Result, columns_of, where_runs_stop
from fedsim.study.spec import Arm, PlannedRun, Study
from fedsim.workloads.fingerprint import DATA, TEST
from fedsim.workloads.metrics import Metric, judged

NAME = "comparison"  # of what is compared by itself, and of its files
IGNORED = ("seed", "out", "name", "choices", "checkpoint_s", "engine", "logger")  # in which runs of one row may differ
OF_METHOD = ("strategy", "trainer", "method", "experiment")  # groups that the name of a method stands for
ASIDE = ".unfinished-"  # in the name of what a study has put aside
NAMED = 3  # rows behind a value; more are counted


@dataclass(frozen=True)
class ReadRun:
    """A run folder as it is compared.

    Attributes:
        settings: as they stand: earlier versions had fewer.
        summary: empty where the run is not finished.
        is_judged: a round of it was evaluated.
    """

    folder: Path
    settings: dict[str, Any]
    rounds: list[RoundReport]
    summary: dict[str, Any]
    is_judged: bool

    @property
    def method(self) -> str:
        """Names what ran."""
        chosen = self.settings["choices"]
        usual = chosen.get("method") or f"{chosen.get('strategy')}+{chosen.get('trainer')}"
        return str(self.summary.get("method") or usual)

    @property
    def test_data(self) -> dict[str, Any]:
        """Returns what its fingerprint says of the data that models are judged by; nothing where it has none."""
        found = self.summary.get(DATA)
        return {key: value for key, value in found.items() if TEST in key} if isinstance(found, dict) else {}


def compare(
    given: Iterable[Path], last: int | None = None, against: str | None = None, target: float | None = None
) -> Result:
    """Compares runs: a row for each method and setting, over its seeds.

    Args:
        given: folders of runs, sweeps and studies, or patterns of such.
        last: evaluations that make a score; those of the last tenth of the rounds when None.
        against: label (or its beginning) of the row that the others are compared with; the first when None.
        target: value of the metric whose cost is asked for.

    Raises:
        ConfigError: if there are no runs, they are judged by different metrics, one was given twice, or no row is
            called `against`.
    """
    folders = run_folders(given)
    if not folders:
        raise ConfigError("there are no runs to compare; give folders of runs, of a sweep or of a study")
    every = [_read(folder) for folder in folders]
    runs = [run for run in every if run.is_judged]
    without = ", ".join(str(run.folder) for run in every if not run.is_judged)
    if not runs:
        raise ConfigError(f"there is nothing to compare: no round was evaluated in {without}")
    metric = common_metric([run.folder for run in runs])
    groups: dict[str, dict[int, ReadRun]] = {}
    own = differing(runs)
    names = labels(runs, own)
    for run, label in zip(runs, names, strict=True):
        seed, group = run.settings["seed"], groups.setdefault(label, {})
        if seed in group:
            raise ConfigError(
                f"{run.folder} and {group[seed].folder} are the same but for their names: {label!r} with seed {seed}; "
                "leave one out"
            )
        group[seed] = run
    first = next((name for name in groups if name.startswith(against or "")), None)
    if first is None:
        raise ConfigError(f"no row is called {against!r}; there are: {', '.join(groups)}")
    groups = {first: groups[first], **groups}
    study = Study(
        name=NAME,
        title=f"{len(runs)} run{'s' if len(runs) > 1 else ''}",
        arms=tuple(Arm(label, (), label) for label in groups),
        seeds=tuple(sorted({run.settings["seed"] for run in runs})),
        against=first,
        x=AXES,
        last=last,
        target=target,
        differs=tuple(differences_text(own, names)),
        left_out=f"left out, as no round was evaluated: {without}" if without else "",
    )
    return _result(groups, where_runs_stop(study, [run.settings for run in runs]), metric)


def _result(groups: Mapping[str, Mapping[int, ReadRun]], study: Study, metric: Metric) -> Result:
    rounds = {label: {seed: run.rounds for seed, run in group.items()} for label, group in groups.items()}
    finished = {
        arm.label: [
            FinishedRun(PlannedRun(arm, seed, run.settings, run.folder), run.rounds, run.summary)
            for seed, run in groups[arm.label].items()
        ]
        for arm in study.arms
    }
    base = groups[study.against]
    elsewhere = {
        label: {seed for seed, run in group.items() if seed in base and not _is_judged_alike(run, base[seed])}
        for label, group in groups.items()
    }
    rows = compare_rows(rounds, study.last, study.against, metric, elsewhere)
    return Result(study, metric, rows, columns_of(study, finished), finished)


def _is_judged_alike(run: ReadRun, base: ReadRun) -> bool:
    """Returns whether two runs were judged on the same test data; where they do not tell, on the same workload."""
    own, other = run.test_data, base.test_data
    if common := own.keys() & other.keys():
        return all(own[key] == other[key] for key in common)
    return bool(run.settings["choices"].get("workload") == base.settings["choices"].get("workload"))


def run_folders(given: Iterable[Path]) -> list[Path]:
    """Returns the run folders among the given ones and below them, in their order, those of a sweep by number.

    Args:
        given: folders, or patterns with * and ? where no shell has spread them.

    Raises:
        ConfigError: for one that holds no run.
    """
    found: dict[Path, None] = {}
    for folder in (each for one in given for each in _spread(one)):
        below = [folder] if (folder / "rounds.jsonl").is_file() else _below(folder)
        if not below:
            what = "holds no run" if folder.exists() else "is not there"
            raise ConfigError(f"{folder} {what}; give folders of runs, of a sweep or of a study")
        found.update(dict.fromkeys(below))
    return list(found)


def _spread(pattern: Path) -> list[Path]:
    if pattern.exists() or not glob.has_magic(str(pattern)):
        return [pattern]
    return [Path(name) for name in sorted(glob.glob(str(pattern))) if Path(name).is_dir()]


def _below(folder: Path) -> list[Path]:
    return sorted(_runs_in(folder), key=lambda p: [(len(part), part) for part in p.relative_to(folder).parts])


def _runs_in(folder: Path) -> Iterator[Path]:
    """Yields all runs below a folder, single ones and those of sweeps and studies; a link to a run is one of them."""
    for above, names, _ in os.walk(folder):
        names[:] = [name for name in names if ASIDE not in name and not name.startswith(".")]
        runs = [name for name in names if (Path(above) / name / "rounds.jsonl").is_file()]
        yield from (Path(above) / name for name in runs)
        names[:] = [name for name in names if name not in runs]


def _read(folder: Path) -> ReadRun:
    try:
        settings, rounds = read_config(folder), read_rounds(folder)
        check_rounds(folder)
        check_tree(settings, {"seed": WHOLE, "choices": MAP}, str(folder / "config.yaml"))
        summary, metric = read_summary(folder), primary_of(folder)
    except (ConfigError, FileError) as error:
        raise ConfigError(f"{folder} is not a run that can be read: {error}") from error
    return ReadRun(folder, settings, rounds, summary, bool(judged(rounds, metric)))


# --- what differs ----------------------------------------------------------------------------------------------------


def labels(runs: Sequence[ReadRun], own: Sequence[Mapping[str, str]]) -> list[str]:
    """Names each run by what its row alone is named or by its method, and by as few of `differing` as tell it apart."""
    short = _short(key for settings in own for key in settings)
    rows: dict[str, dict[tuple[tuple[str, str], ...], None]] = defaultdict(dict)  # by method
    names: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for run, settings in zip(runs, own, strict=True):
        rows[run.method][tuple(settings.items())] = None
        names[str(run.settings.get("name") or "")].add((run.method, *settings.items()))
    own_names = {next(iter(of)): name for name, of in names.items() if name and len(of) == 1 and name not in rows}
    of_row = [(run.method, *settings.items()) for run, settings in zip(runs, own, strict=True)]
    own_names = {row: name for row, name in own_names.items() if _is_named(runs, of_row, row, name)}
    needed = {method: _telling([dict(row) for row in found]) for method, found in rows.items()}
    found = []
    for run, settings, row in zip(runs, own, of_row, strict=True):
        texts = [f"{short[key]}={settings[key]}" for key in needed[run.method] if key in settings]
        found.append(own_names.get(row) or " ".join([run.method, *texts]))
    return found


def _is_named(runs: Sequence[ReadRun], of_row: Sequence[tuple[Any, ...]], row: tuple[Any, ...], name: str) -> bool:
    """Returns whether all runs of a row have its name."""
    return all(run.settings.get("name") == name for run, own in zip(runs, of_row, strict=True) if own == row)


def _telling(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns few settings by which rows that all differ are told apart, in their order: each the one that tells most.

    A row without a setting is told from those that have it.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    chosen: list[str] = []

    def apart(more: str) -> tuple[int, bool]:
        told = len({tuple(row.get(key) for key in (*chosen, more)) for row in rows})
        return told, all(row.get(more, "null") != "null" for row in rows)  # a value says more than none

    while len({tuple(row.get(key) for key in chosen) for row in rows}) < len(rows):
        chosen.append(max((key for key in keys if key not in chosen), key=apart))
    return [key for key in keys if key in chosen]


def differing(runs: Sequence[ReadRun]) -> list[dict[str, str]]:
    """Returns of each run the settings in which others differ from it, beside those that its method stands for.

    Where runs take another option of a group, its name stands for all of its settings; of a group, only runs with the
    same option are compared.
    """
    chosen = [run.settings["choices"] for run in runs]
    flat = [_flat({k: v for k, v in run.settings.items() if k not in IGNORED}) for run in runs]
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for settings, choices in zip(flat, chosen, strict=True):
        for key, value in settings.items():
            values[_kind(key, choices), key].add(value)
    options = {group: {str(choices.get(group)) for choices in chosen} for group in GROUPS}
    found = []
    for settings, choices in zip(flat, chosen, strict=True):
        own = {g: str(choices.get(g)) for g, names in options.items() if len(names) > 1 and g not in OF_METHOD}
        own |= {key: value for key, value in settings.items() if len(values[_kind(key, choices), key]) > 1}
        found.append({key: value for key, value in own.items() if key != "private"})
    return found


def _short(keys: Iterable[str]) -> dict[str, str]:
    """Returns each setting's last word, or all of it where others end in the same."""
    every = sorted(set(keys))
    ends = [key.rpartition(".")[2] for key in every]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(every, ends, strict=True)}


def _kind(key: str, choices: Mapping[str, Any]) -> str:
    """Names the runs among which a setting is compared: those with the same option of its group."""
    group = key.partition(".")[0]
    if group in OF_METHOD:
        return f"{choices.get('method')} {choices.get(group)}"
    return str(choices.get(group)) if group in GROUPS else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in tree.items():
        below = (
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": as_hydra(value, str)}
        )
        found.update(below)
    return found


def differences_text(own: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """Returns a line for each setting of `differing`, with its values in the order of the runs.

    Behind a value that its rows' labels do not have, it says which these are.
    """
    short = _short(key for settings in own for key in settings)
    every: dict[str, dict[str, dict[str, None]]] = {}
    for settings, name in zip(own, names, strict=True):
        for key, value in settings.items():
            every.setdefault(key, {}).setdefault(value, {})[name] = None
    lines = []
    for key, values in every.items():
        texts = []
        for value, rows in values.items():
            told = all(f"{short[key]}={value}" in row for row in rows)
            more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
            texts.append(value if told else f"{value} ({', '.join(list(rows)[:NAMED])}{more})")
        lines.append(f"{key}: {', '.join(texts)}")
    return lines
