"""A study as a Markdown page: what was asked, the command, a table of at most eight columns, and how to read it."""

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
from fedsim.report.plots.style import METRICS
from fedsim.study.compare import NAME, run_folders
from fedsim.study.paired import Row, span, unmatched
from fedsim.study.results import Result, cost_of_target
from fedsim.study.spec import Study

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
    study = result.study
    command = compare_command(result) if study.name == NAME else study_command(study)
    parts = [
        f"# {_plain(study.title)}",
        study.question,
        f"```\n{command}\n```" if command else "",
        _table(_columns(result)),
        _table({"arm": [row.label for row in result.rows], **columns}) if (columns := to_target(result)) else "",
        "  \n".join(_notes(result)),
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


def _columns(result: Result) -> dict[str, list[str]]:
    study, compared = result.study, result.rows
    columns = {
        "arm": [label(row, study) for row in compared],
        result.metric.label: [score(row) for row in compared],
        f"difference to {_plain(study.against)}": [_difference(row, study.against) for row in compared],
        "time": [simulated(row.simulated_s) for row in compared],
        "energy": [energy(row.joules) for row in compared],
        "traffic": [size(row.traffic_bytes) for row in compared],
    }
    own = {_heading(path): [figure(path, value) for value in values] for path, values in result.columns.items()}
    for name, cells in [*own.items(), ("rounds", [f"{row.rounds:g}" for row in compared])]:
        if len(columns) < MAX_COLUMNS:
            columns[name] = cells
    return columns


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
    if text := scores_are_of(study.last, result.rows):
        notes.append(f"{text}.")
    if sum(not math.isnan(row.p) for row in result.rows) > 1:
        count = sum(not math.isnan(row.p) for row in result.rows)
        holm = f"p < 0.05 after Holm's correction for the {count} of the table"
        found = f"bold: {holm}" if any(row.is_significant for row in result.rows) else f"none has {holm}"
        notes.append(f"Differences are paired by seed, each with its own 95 % interval; {found}.")
    return [*notes, *(f"{line[0].upper()}{line[1:]}." for line in unmatched(result.rows, study.against))]


def scores_are_of(last: int | None, rows: Sequence[Row]) -> str:
    """Returns which evaluations make the scores of a table; empty where that is the last one of each run."""
    if last is None or any(row.is_early for row in rows):
        return span(rows)
    return f"{rows[0].metric.title}: mean of the last {last} evaluations of a run" if last > 1 else ""


def _heading(path: str) -> str:
    return in_words(path).replace(".", " ")


def in_words(path: str) -> str:
    """Returns the path of a figure as a heading, without the unit that its cells have."""
    return path.removeprefix(METRICS).removesuffix("_bytes").replace("_", " ")


def figure(path: str, value: float) -> str:
    """Returns a figure of a run: bytes, seconds and joules in the unit that reads best, else four digits.

    It is empty where there is none.
    """
    if math.isnan(value):
        return ""
    if path.startswith("energy_j.") or path.endswith(("_joules", "energy_j")):
        return energy(value)
    if path.endswith(("_bytes", "_s")):
        return size(value) if path.endswith("_bytes") else simulated(value)
    return f"{value:.4g}"


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    """Returns a Markdown table, its first column to the left and all others to the right."""
    rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows)


def _plain(text: str) -> str:
    """Returns text that stays within its line and cell."""
    return " ".join(text.split()).replace("|", "\\|")
