"""The bar over the rounds of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedsim.report.rounds import RoundReport
from fedsim.report.text import NO_ACCURACY, simulated
from fedsim.workloads.metrics import NOT_FINITE


@contextmanager
def progress_bar(console: Console, rounds: int) -> Iterator[Any]:
    """A bar over rounds with accuracy and simulated time; yields (watch, observe) for `fedsim.runs.federation.run`."""
    columns = [
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("run", total=rounds, state="building data and fleet")
        shown = {"text": ""}

        def watch(report: RoundReport) -> None:
            if "accuracy" in report.metrics:
                shown["text"] = f"accuracy {report.metrics['accuracy']:.3f}"
            elif NOT_FINITE in report.metrics:
                shown["text"] = NO_ACCURACY
            progress.update(task, completed=report.round, state=f"{shown['text']}  simulated {simulated(report.now_s)}")

        def observe(client_id: int) -> None:
            progress.refresh()

        yield watch, observe
