"""The table of a study or a comparison, as the terminal shows it."""

from __future__ import annotations

import math
from textwrap import wrap

from devices.units import energy, simulated, size
from fedsim.report.terminal import PlainTable, table
from fedsim.study.columns import beside_costs, figure, headings
from fedsim.study.page import label, score, scores_are_of, to_target
from fedsim.study.paired import correction, unmatched
from fedsim.study.results import Result, left_at_work

HEADING = 15  # characters of a line of a heading, so that the arms keep their room


def result_table(result: Result) -> PlainTable:
    """Returns the table of a comparison: scores, what they differ by, what a run took, and what its target cost."""
    columns = {**scores(result), **costs(result), **figures(result), **to_target(result)}
    study, many = result.study, len(result.study.seeds) > 1
    seeds = ", ".join(map(str, study.seeds))
    over = f"mean ± standard deviation of seeds {seeds}" if many else f"seed {seeds}"
    title = f"{study.title}\n{over}" + (f"; differences to {study.against}" if len(result.rows) > 1 else "")
    shown = table("arm", *columns, left=("arm",), title=title, same_below=True)
    notes = [text] if (text := scores_are_of(result)) else []
    if "difference" in columns and (note := correction(result.rows)):
        notes.append(note)
    notes += [*unmatched(result.rows, study.against), *beside_costs(result.columns), *left_at_work(result)]
    shown.caption = "\n".join(notes) or None
    for number, row in enumerate(result.rows):
        shown.add_row(label(row, study), *(cells[number] for cells in columns.values()))
    return shown


def scores(result: Result) -> dict[str, list[str]]:
    """Returns cells by column: the metric, and what it differs by."""
    metric = result.metric
    heading = metric.heading
    cells: dict[str, list[str]] = {heading: [], "difference": [], "95 % interval": []}
    for row in result.rows:
        compared = row.label != result.study.against and not math.isnan(row.difference)
        cells[heading].append(score(row))
        star = " *" if row.is_significant else ""
        cells["difference"].append(f"{metric.change(row.difference)}{star}" if compared else "")
        cells["95 % interval"].append(row.interval_text if compared and math.isfinite(row.half_width) else "")
    return {name: column for name, column in cells.items() if any(column)}


def costs(result: Result) -> dict[str, list[str]]:
    """Returns cells by column: what a run of each arm took."""
    return {
        "time": [simulated(row.simulated_s) for row in result.rows],
        "energy": [energy(row.joules) for row in result.rows],
        "traffic": [size(row.traffic_bytes) for row in result.rows],
        "rounds": [f"{row.rounds:g}" for row in result.rows],
    }


def figures(result: Result) -> dict[str, list[str]]:
    """Returns cells by column: what else is known of a run of each arm, the study's own columns first."""
    named = headings(result.columns, result.metric)
    return {_heading(named[path]): [figure(path, v) for v in values] for path, values in result.columns.items()}


def _heading(text: str) -> str:
    """Returns a heading in several narrow lines, its unit as the terminal has it."""
    return "\n".join(wrap(text.replace(", ", " "), HEADING))
