"""`fedsim paired`: the runs of a sweep against each other, seed by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.options import MAX_COUNT


def paired(
    folders: Annotated[list[Path], typer.Argument(help="Folder of a sweep, or folders of runs.")],
    last: Annotated[int, typer.Option(help="Evaluations whose mean is a run's score.", min=1, max=MAX_COUNT)] = 4,
    against: Annotated[str | None, typer.Option(help="Row to compare with; the first if left out.")] = None,
) -> None:
    """Compare the runs of a sweep: paired differences over the seeds with 95 % intervals, and what each row cost.

    Example: fedsim paired runs/20261121-101500-sweep --against fedavg
    """
    from fedsim.report.terminal import console, table
    from fedsim.report.text import energy, simulated, size
    from fedsim.study.paired import compare, correction, run_folders

    rows = compare(run_folders(folders), last, against)
    metric = rows[0].metric
    columns = (f"{metric.heading} by seed", "mean", "difference", "95 % interval", "time", "energy", "traffic")
    title = f"mean of the last {last} evaluations; differences to {rows[0].label}"
    compared_rows = table("overrides", *columns, left=("overrides",), title=title)
    for number, row in enumerate(rows):
        star = " *" if row.is_significant else ""
        matched = number and rows[0].scores.keys() & row.scores.keys()
        compared = [f"{metric.change(row.difference)}{star}", row.interval_text] if matched else ["", ""]
        costs = [simulated(row.simulated_s), energy(row.joules), size(row.traffic_bytes)]
        scores = " ".join(metric.number(s, 1) for s in row.scores.values())
        compared_rows.add_row(row.label, scores, metric.number(row.mean), *compared, *costs)
    compared_rows.caption = correction(rows) or None
    shown = console()
    shown.print(compared_rows)
    if alone := [row.label for row in rows[1:] if not rows[0].scores.keys() & row.scores.keys()]:
        text = f"no seeds match those of {rows[0].label}, so there is no difference: {', '.join(alone)}"
        shown.say(text)
