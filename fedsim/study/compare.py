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
from fedsim.settings.forms import MAP, WHOLE, check_tree
from fedsim.settings.groups import GROUPS
from fedsim.study.paired import common_metric, compare_rows
from fedsim.study.results import FinishedRun, Result
from fedsim.study.spec import Arm, PlannedRun, Study
from fedsim.workloads.fingerprint import DATA, TEST
from fedsim.workloads.metrics import Metric, judged

NAME = "comparison"  # of what is compared by itself, and of its files
IGNORED = ("seed", "out", "name", "choices", "checkpoint_s", "engine", "logger")  # in which runs of one row may differ
OF_METHOD = ("strategy", "trainer", "method", "experiment")  # groups that the name of a method stands for
ASIDE = ".unfinished-"  # in the name of what a study has put aside


@dataclass(frozen=True)
class ReadRun:
    """A run folder as it is compared.

    Attributes:
        settings: as they stand: earlier versions had fewer.
        summary: empty where the run is not finished.
    """

    folder: Path
    settings: dict[str, Any]
    rounds: list[RoundReport]
    summary: dict[str, Any]

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
    metric = common_metric(folders)
    runs = [_read(folder, metric) for folder in folders]
    groups: dict[str, dict[int, ReadRun]] = {}
    own = differing(runs)
    for run, label in zip(runs, labels(runs, own), strict=True):
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
        differs=tuple(differences_text(own)),
    )
    return _result(groups, study, metric)


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
    return Result(study, metric, compare_rows(rounds, study.last, study.against, metric, elsewhere), {}, finished)


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


def _read(folder: Path, metric: Metric) -> ReadRun:
    try:
        settings, rounds = read_config(folder), read_rounds(folder)
        check_rounds(folder)
        check_tree(settings, {"seed": WHOLE, "choices": MAP}, str(folder / "config.yaml"))
        summary = read_summary(folder)
    except (ConfigError, FileError) as error:
        raise ConfigError(f"{folder} is not a run that can be read: {error}") from error
    if not judged(rounds, metric):
        raise ConfigError(f"{folder} holds no evaluated round")
    return ReadRun(folder, settings, rounds, summary)


# --- what differs ----------------------------------------------------------------------------------------------------


def labels(runs: Sequence[ReadRun], own: Sequence[Mapping[str, str]]) -> list[str]:
    """Names each run by its method, and by the settings of `differing`."""
    short = _short(key for settings in own for key in settings)
    texts = ([f"{short[key]}={value}" for key, value in settings.items()] for settings in own)
    return [" ".join([run.method, *text]) for run, text in zip(runs, texts, strict=True)]


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
        below = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
        found.update(below)
    return found


def differences_text(own: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns a line for each setting of `differing`, with its values in the order of the runs."""
    every: dict[str, dict[str, None]] = {}
    for settings in own:
        for key, value in settings.items():
            every.setdefault(key, {})[value] = None
    return [f"{key}: {', '.join(values)}" for key, values in every.items()]
