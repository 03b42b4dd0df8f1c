"""A study as a Markdown page: what was asked, the command, tables of at most eight columns, and how to read them."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from devices.texts import visible_lines
from devices.units import energy, simulated, size
from devices.writing import write_atomic
from fedsim.study.columns import BESIDE, beside_costs, figure, headings
from fedsim.study.compare import NAME, run_folders
from fedsim.study.paired import Row, span, unmatched
from fedsim.study.results import Result, cost_of_target, left_at_work
from fedsim.study.spec import Study
from fedsim.workloads.metrics import stops_at

PAGE = "study.md"
MAX_COLUMNS, MOST_NAMED, MOST_SEEDS = 8, 12, 3  # of a table; folders in a command; seeds by number


def write_page(result: Result, failed: Mapping[str, str], out: Path, name: str = PAGE) -> None:
    """Writes `study.md` into a folder, or by another name.

    Raises:
        OSError: if the file cannot be written.
    """
    write_atomic(out / name, visible_lines(text_of(result, failed)))


def text_of(result: Result, failed: Mapping[str, str]) -> str:
    """Returns the page as Markdown."""
    study, tables = result.study, _tables(result)
    rounds = "" if any("rounds" in table for table in tables) else _rounds_each(result.rows[0].rounds)
    command = compare_command(result) if study.name == NAME else study_command(study)
    parts = [
        f"# {_plain(study.title)}",
        study.question,
        f"```\n{command}\n```" if command else "",
        *map(_table, tables),
        _table({"arm": [row.label for row in result.rows], **columns}) if (columns := to_target(result)) else "",
        "  \n".join([*_notes(result), *([rounds] if rounds else [])]),
        "\n".join(f"- {_plain(name)} failed: {_plain(reason)}" for name, reason in failed.items()),
        study.reading if not study.own else "",
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def study_command(study: Study) -> str:
    """Returns the command that runs a study."""
    return shlex.join(["fedsim", "study", study.given or study.name, *study.own])


def compare_command(result: Result, target: str = "") -> str:
    """Returns the command that compares these runs; empty where there are too many to name.

    Args:
        result: of which.
        target: that is asked for instead, without the row that others are compared with.
    """
    study = result.study
    given = _given([str(run.run.folder) for runs in result.runs.values() for run in runs])
    against = ["--against", study.against] if study.name == NAME and not target else []
    last = ["--last", str(study.last)] if study.last is not None else []
    target = target or (f"{study.target:g}" if study.target is not None else "")
    return (
        shlex.join(["fedsim", "compare", *given, *against, *last, *(["--target", target] if target else [])])
        if given
        else ""
    )


def _given(folders: Sequence[str]) -> list[str]:
    """Returns the runs as a command takes them: the folder that holds them and no others, or each."""
    try:
        above = os.path.commonpath([os.path.dirname(folder) for folder in folders]) if folders else ""
    except ValueError:  # some absolute, some not
        above = ""
    here = Path.cwd()
    is_small = above and Path(above) not in (here, *here.parents)  # these may hold a whole disk
    if is_small and {str(folder) for folder in run_folders([Path(above)])} == set(folders):
        return [above]
    return list(folders) if len(folders) <= MOST_NAMED else []


def _tables(result: Result) -> list[dict[str, list[str]]]:
    """Returns cells by column, of as many tables as all columns need; each begins with the arms.

    Rounds that are the same in all rows have no table of their own.
    """
    study, compared = result.study, result.rows
    arms = [label(row, study) for row in compared]
    columns = {
        result.metric.label: [score(row) for row in compared],
        f"difference to {_plain(study.against)}": [_difference(row, study.against) for row in compared],
        "time": [simulated(row.simulated_s) for row in compared],
        "energy": [energy(row.joules) for row in compared],
        "traffic": [size(row.traffic_bytes) for row in compared],
    }
    own = _own(result)
    for path, heading in headings(own, result.metric).items():
        columns[heading] = [figure(path, value) for value in own[path]]
    room = MAX_COLUMNS - 1
    if len(columns) % room or len({row.rounds for row in compared}) > 1:
        columns["rounds"] = [f"{row.rounds:g}" for row in compared]
    names = list(columns)
    parts = [names[start : start + room] for start in range(0, len(names), room)]
    return [{"arm": arms, **{name: columns[name] for name in part}} for part in parts]


def _rounds_each(count: float) -> str:
    return f"{count:g} round{'' if count == 1 else 's'} each."


def _own(result: Result) -> dict[str, list[float]]:
    """Returns the figures of the page: a study's says no more of where energy went than its file asks for."""
    study = result.study
    hidden = set() if study.name == NAME else {*BESIDE} - {*study.columns}
    return {path: values for path, values in result.columns.items() if path not in hidden}


def label(row: Row, study: Study) -> str:
    """Returns the name of an arm; where seeds lack, how many of a study's it has, or of compared runs which ones."""
    own, planned = sorted(row.scores), len(study.seeds)
    if len(own) == planned:
        return row.label
    if study.name != NAME:
        return f"{row.label} ({len(own)} of {planned} seeds)"
    which = f"seed{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
    return f"{row.label} ({which if len(own) <= MOST_SEEDS else f'{len(own)} seeds'})"


def score(row: Row) -> str:
    """Returns the mean over the seeds in the metric's unit, with their standard deviation where there are several."""
    number = row.metric.number
    return number(row.mean) + (f" ± {number(row.deviation)}" if len(row.scores) > 1 else "")


def _difference(row: Row, against: str) -> str:
    """Returns the difference with its interval; bold where it is significant."""
    if row.label == against or math.isnan(row.difference):
        return ""
    interval = f" ({row.interval_text})" if math.isfinite(row.half_width) else ""
    text = f"{row.metric.change(row.difference)}{interval}"
    return f"**{text}**" if row.is_significant else text


def to_target(result: Result) -> dict[str, list[str]]:
    """Returns cells by column: what it took until the target was first reached; nothing without a target."""
    target, metric = result.study.target, result.metric
    if target is None:
        return {}
    name = f"to {metric.with_unit(target)}"
    rows = [_reached(cost_of_target(result, label), len(runs)) for label, runs in result.runs.items()]
    whats = ("time", "energy", "traffic")
    return {f"{what}\n{name}": list(cells) for what, cells in zip(whats, zip(*rows, strict=True), strict=True)}


def _reached(cost: Mapping[str, Any], seeds: int) -> tuple[str, str, str]:
    reached = cost["seeds_to_target"]
    if reached < seeds:
        text = f"{reached} of {seeds} seeds" if reached else "not reached"
        return text, text, text
    seconds, joules, traffic = (cost[f"{name}_to_target"] for name in ("simulated_s", "joules", "traffic_bytes"))
    return simulated(seconds), energy(joules), size(traffic)


def _notes(result: Result) -> list[str]:
    study = result.study
    many = len(study.seeds) > 1
    seeds = ", ".join(map(str, study.seeds))
    notes = [f"Mean ± standard deviation of seeds {seeds}." if many else f"Seed {seeds}."]
    if text := scores_are_of(result):
        notes.append(f"{text}.")
    if sum(not math.isnan(row.p) for row in result.rows) > 1:
        count = sum(not math.isnan(row.p) for row in result.rows)
        holm = f"p < 0.05 after Holm's correction for the {count} of the table"
        found = f"bold: {holm}" if any(row.is_significant for row in result.rows) else f"none has {holm}"
        notes.append(f"Differences are paired by seed, each with its own 95 % interval; {found}.")
    lines = [*unmatched(result.rows, study.against), *beside_costs(_own(result)), *left_at_work(result)]
    return [*notes, *(f"{line[0].upper()}{line[1:]}." for line in lines)]


def scores_are_of(result: Result) -> str:
    """Returns which evaluations make the scores of a table; empty where that is the last one by the study's word."""
    last, rows = result.study.last, result.rows
    if last is None or any(row.is_early for row in rows):
        return span(rows)
    name = rows[0].metric.title
    if last > 1:
        return f"{name}: mean of the last {last} evaluations of a run"
    stopped = any(stops_at(one.run.settings) is not None for runs in result.runs.values() for one in runs)
    return f"{name}: of the last evaluation of each run, as runs stop at a target" if stopped else ""


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    """Returns a Markdown table, its first column to the left and all others to the right."""
    rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows)


def _plain(text: str) -> str:
    """Returns text that stays within its line and cell."""
    return " ".join(text.split()).replace("|", "\\|")
