"""`fedsim reprice`: a finished run on other devices, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def reprice(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
) -> None:
    """Write a finished run anew as it would have been on another fleet, latency model or deadline, without training.

    Clock, energy, outcomes and who is late are decided again from the work that clients recorded; what they learned
    stays. Where that would have been otherwise, the new run ends before that round and says why.

    Example: fedsim reprice runs/20261121-101500-fedavg-digits fleet=sbc deadline_s=20
    """
    from fedsim.report.files import read_summary
    from fedsim.report.place import PAGE
    from fedsim.report.rounds import read_rounds
    from fedsim.report.terminal import console
    from fedsim.report.text import closing_lines, closing_table
    from fedsim.runs.experiment import reprice_experiment
    from fedsim.workloads.metrics import Metric

    shown = console()
    folder, summary = reprice_experiment(run, ctx.args, shown)
    reports = read_rounds(folder)
    shown.print(closing_table(reports, Metric.named_in(summary)))
    shown.print(_costs(read_summary(run), summary))
    for line in closing_lines(summary, folder, reports):
        shown.say(line)
    shown.say(f"page: {folder / PAGE}")


def _costs(before: dict[str, Any], now: dict[str, Any]) -> Table:
    """What the run took, and what it would have taken."""
    from devices.units import energy, simulated, size
    from fedsim.report.terminal import table

    shown = table("", "rounds", "time", "energy", "traffic", "completed", "late", left=("",))
    for name, summary in (("as it was run", before), ("re-priced", now)):
        traffic, outcomes = summary["down_bytes"] + summary["up_bytes"], summary["outcomes"]
        costs = [simulated(summary["simulated_s"]), energy(summary["energy_j"]["total"]), size(traffic)]
        shown.add_row(name, str(summary["rounds"]), *costs, str(outcomes["completed"]), str(outcomes.get("late", 0)))
    return shown
