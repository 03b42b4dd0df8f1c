"""Runs one experiment with a bar and a closing table, for the commands that run one in this process."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from fedsim.runs.experiment import run_experiment

in_progress: list[Path] = []  # the folder of the run that is going on


def run_one(
    settings: dict[str, Any], unfinished: Path | None = None, brief: str | None = None
) -> tuple[dict[str, Any], Path]:
    """Runs one experiment with a bar and a closing table; returns its summary and its folder.

    Args:
        settings: of the run.
        unfinished: the folder that holds its beginning; None for a new one.
        brief: of a run among several, what tells it from the others; of its end only result and folder are printed.
    """
    from fedsim.report.place import PAGE
    from fedsim.report.repeat import next_steps
    from fedsim.report.rounds import read_rounds
    from fedsim.report.terminal import console
    from fedsim.report.text import closing_lines, closing_table
    from fedsim.workloads.metrics import Metric

    shown = console()
    folder, summary = run_experiment(settings, shown, unfinished, _begin)
    in_progress.clear()
    reports = read_rounds(folder)
    lines = closing_lines(summary, folder, reports)
    if brief:
        shown.say(brief)
    if brief is None:
        shown.print(closing_table(reports, Metric.named_in(summary)))
    for line in lines:
        if brief is None or line in (lines[0], lines[-1]) or line.startswith("warning: "):
            shown.say(line)
    if brief is None:
        shown.say(f"next: {'; '.join(line for _, line in next_steps(folder, settings, summary))}")
        shown.say(f"page: {folder / PAGE}")
    return summary, folder


def _begin(folder: Path) -> None:
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    in_progress[:] = [folder]
