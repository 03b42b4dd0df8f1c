"""Runs one experiment with a bar and a closing table, for the commands that run one in this process."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from fedsim.runs.experiment import run_experiment

in_progress: list[Path] = []  # the folder of the run that is going on


def run_one(settings: dict[str, Any], unfinished: Path | None = None) -> dict[str, Any]:
    """Runs one experiment with a bar and a closing table; returns its summary.

    Args:
        settings: of the run.
        unfinished: the folder that holds its beginning; None for a new one.
    """
    from fedsim.report.rounds import read_rounds
    from fedsim.report.terminal import console
    from fedsim.report.text import closing_lines, closing_table
    from fedsim.workloads.metrics import Metric

    shown = console()
    folder, summary = run_experiment(settings, shown, unfinished, _begin)
    in_progress.clear()
    reports = read_rounds(folder)
    shown.print(closing_table(reports, Metric.named_in(summary)))
    for line in closing_lines(summary, folder, reports):
        shown.say(line)
    return summary


def _begin(folder: Path) -> None:
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    in_progress[:] = [folder]
