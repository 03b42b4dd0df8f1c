"""The results of a study: a row per arm with differences to one of them, as a table's figures, JSON and CSV."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from devices.errors import unknown
from devices.writing import write_atomic
from fedsim.errors import ConfigError
from fedsim.report import strict_json
from fedsim.report.files import read_summary
from fedsim.report.rounds import RoundReport, read_rounds
from fedsim.study.columns import TAIL, paths_of
from fedsim.study.paired import Row, common_metric, compare_rows
from fedsim.study.spec import Arm, PlannedRun, Study, is_finished
from fedsim.workloads.metrics import ASYNCHRONY, METRICS, Metric, judged, stops_at, to_target


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        rounds: its reports.
        summary: its `summary.json`.
    """

    run: PlannedRun
    rounds: list[RoundReport]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """The finished runs of a study, compared.

    Attributes:
        metric: that makes the scores.
        rows: one per arm that has a finished run, in the study's order; scores as in rounds, seconds, joules, bytes.
        columns: by path, the mean over the seeds of each row; nan where no run of the row has the value.
        runs: by label, for the picture.
        lacking: what the study names and no run has, a phrase for each.
    """

    study: Study
    metric: Metric
    rows: list[Row]
    columns: dict[str, list[float]]
    runs: dict[str, list[FinishedRun]]
    lacking: tuple[str, ...] = ()


def collect(study: Study, runs: Sequence[PlannedRun]) -> Result:
    """Reads the runs that are finished and compares them.

    Raises:
        ConfigError: if one was run with other settings, or they are judged by different metrics.
    """
    finished_runs = [run for run in runs if is_finished(run)]
    metric = common_metric([run.folder for run in finished_runs]).named(study.metric)
    study = where_runs_stop(study, [run.settings for run in finished_runs])
    found: dict[str, list[FinishedRun]] = {}
    for run in finished_runs:
        one = FinishedRun(run, read_rounds(run.folder), read_summary(run.folder))
        found.setdefault(run.arm.label, []).append(one)
    found = {
        arm.label: [_read_as(arm, one) for one in found[arm.of or arm.label]]
        for arm in study.arms
        if (arm.of or arm.label) in found
    }
    rounds = {label: {f.run.seed: f.rounds for f in finished} for label, finished in found.items()}
    lacking = []
    if without := _without(metric, rounds):
        own = common_metric([run.folder for run in finished_runs])
        if metric != own and not _without(own, rounds):
            known = {
                name for runs in rounds.values() for reports in runs.values() for r in reports for name in r.metrics
            }
            arms = "" if len(without) == len(rounds) else f" (arms without it: {', '.join(without)})"
            lacking.append(f"{unknown('metric of the runs', metric.name, known)}{arms}, so scores are {own.title}")
            metric = own
    compared = compare_rows(rounds, study.last, study.against, metric)
    columns = columns_of(study, found)
    missing = [path for path, values in columns.items() if found and all(map(math.isnan, values))]
    known = {path for finished in found.values() for one in finished for path in figures(one)} if missing else set()
    lacking += [unknown("value of a run", path, known) for path in missing]
    columns = {path: values for path, values in columns.items() if path not in missing or path in study.x}
    return Result(study, metric, compared, columns, found, tuple(lacking))


def where_runs_stop(study: Study, settings: Iterable[Mapping[str, Any]]) -> Study:
    """Returns a study whose runs stop at a target with that as its own, and scores of their last evaluation.

    A mean over several would be of a model that was still learning. What the study says itself stays.

    Args:
        study: of the runs.
        settings: of each run.
    """
    targets = {target for one in settings if (target := stops_at(one)) is not None}
    if not targets:
        return study
    one = targets.pop() if len(targets) == 1 else None
    return replace(study, target=one if study.target is None else study.target, last=study.last or 1)


def columns_of(study: Study, runs: Mapping[str, Sequence[FinishedRun]]) -> dict[str, list[float]]:
    """Returns what `Result.columns` holds: the study's own, and those that every comparison shows.

    Args:
        study: whose runs these are.
        runs: by the label of their row.
    """
    every = [[figures(one) for one in finished] for finished in runs.values()]
    known = {path for group in every for one in group for path in one}
    return {path: [mean_of(path, group) for group in every] for path in paths_of(study, known)}


def _without(metric: Metric, rounds: Mapping[str, Mapping[int, Sequence[RoundReport]]]) -> list[str]:
    """Returns the labels of arms with a run that was never judged by a metric."""
    return [label for label, runs in rounds.items() if not all(judged(reports, metric) for reports in runs.values())]


def _read_as(arm: Arm, finished: FinishedRun) -> FinishedRun:
    """Returns a run as its arm reads it: an arm without runs has the metrics with its suffix, by their usual names."""
    if not arm.of:
        return finished
    rounds = [
        replace(r, metrics={n.removesuffix(arm.suffix): v for n, v in r.metrics.items() if n.endswith(arm.suffix)})
        for r in finished.rounds
    ]
    return replace(finished, rounds=rounds)


def check_lacking(result: Result) -> None:
    """Refuses a study that names a metric or column for which no run has a value, after all else is shown.

    Raises:
        ConfigError: naming the nearest that there is.
    """
    if result.lacking:
        raise ConfigError(f"study {result.study.name}: {'; '.join(result.lacking)}")


def left_at_work(result: Result) -> list[str]:
    """Returns a line on the clients that were still at work when runs ended; none where nobody was."""
    path = f"{ASYNCHRONY}.in_flight"
    counts = {label: mean_of(path, [*map(figures, runs)]) for label, runs in result.runs.items()}
    rows = "; ".join(f"{label} {count:.4g}" for label, count in counts.items() if count > 0)
    return [f"clients at work at the end of a run, whose energy and bytes are in no round: {rows}"] if rows else []


def mean_of(path: str, runs: Sequence[Mapping[str, float]]) -> float:
    """Returns the mean of a figure over the `figures` of runs, by its dotted path; nan where none has it."""
    values = [one[path] for one in runs if path in one]
    return float(np.mean(values)) if values else math.nan


def figures(finished: FinishedRun) -> dict[str, float]:
    """Returns the numbers of a run by dotted path.

    They are those of its summary, the last value of each metric of its rounds, and the joules of radio tails, which all
    rounds together have.
    """
    tail = sum(report.tail_joules for report in finished.rounds)
    last = {f"{METRICS}{name}": value for report in finished.rounds for name, value in report.metrics.items()}
    return dict(_numbers(finished.summary)) | ({TAIL: tail} if tail else {}) | last


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


# --- files -----------------------------------------------------------------------------------------------------------


def write_result(result: Result, failed: Mapping[str, str], out: Path, name: str = "study") -> None:
    """Writes `study.json` and `study.csv` into a folder, or by another name; missing figures are null and empty."""
    import pandas as pd

    study, arms = result.study, records(result)
    tree = {
        "study": study.name,
        "title": study.title,
        "against": study.against,
        "metric": result.metric.name,
        "last": study.last,
        **({"target": study.target} if study.target is not None else {}),
        "seeds": study.seeds,
        "arms": arms,
        "failed": dict(failed),
    }
    write_atomic(out / f"{name}.json", strict_json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    write_atomic(out / f"{name}.csv", pd.DataFrame(flat(arms)).to_csv(index=False))


def records(result: Result) -> list[dict[str, Any]]:
    """Returns the figures of each row, as `study.json` has them."""
    return [_record(result, number) for number in range(len(result.rows))]


def flat(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the figures of `records` under names of one level, scores by seed among them."""
    hidden = ("overrides", "of", "suffix", "scores")
    return [{**{k: v for k, v in arm.items() if k not in hidden}, **_by_seed(arm)} for arm in arms]


def _record(result: Result, number: int) -> dict[str, Any]:
    row = result.rows[number]
    arm = next(arm for arm in result.study.arms if arm.label == row.label)
    return {
        "arm": row.label,
        "overrides": arm.overrides,
        **({"of": arm.of, "suffix": arm.suffix} if arm.of else {}),
        "scores": {str(seed): score for seed, score in row.scores.items()},
        "mean": row.mean,
        "std": row.deviation,
        "difference": row.difference,
        "low": row.interval[0],
        "high": row.interval[1],
        "p": row.p,
        "p_holm": row.p_holm,
        "simulated_s": row.simulated_s,
        "joules": row.joules,
        "traffic_bytes": row.traffic_bytes,
        "rounds": row.rounds,
        **{path: values[number] for path, values in result.columns.items()},
        **cost_of_target(result, row.label),
    }


def cost_of_target(result: Result, label: str) -> dict[str, Any]:
    """Returns how many seeds reach the target, and the means of what it took; nothing without a target.

    What the untrained model reaches, in round 0, is no cost of learning: it counts from the first round on.
    A mean over the seeds stands only where all of them got there: that of the others would flatter a row.
    """
    target, runs = result.study.target, result.runs[label]
    if target is None:
        return {}
    trained = [[r if r.round else replace(r, metrics={}) for r in run.rounds] for run in runs]
    reached = [found for rounds in trained if (found := to_target(rounds, target, result.metric)) is not None]
    every = len(reached) == len(runs)
    costs = {
        "simulated_s": [one["simulated_s"] for one in reached],
        "joules": [one["energy_j"] for one in reached],
        "traffic_bytes": [one["down_bytes"] + one["up_bytes"] for one in reached],
    }
    means = {f"{name}_to_target": float(np.mean(values)) if every else None for name, values in costs.items()}
    return {"seeds_to_target": len(reached), **means}


def _by_seed(arm: dict[str, Any]) -> dict[str, float]:
    return {f"score_seed_{seed}": score for seed, score in arm["scores"].items()}
