"""The bar over the rounds of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from devices.units import simulated
from fedsim.report.rounds import RoundReport
from fedsim.report.split import primary_of
from fedsim.report.terminal import PlainBar, PlainProgress
from fedsim.report.text import NO_VALUE
from fedsim.workloads.metrics import NOT_FINITE


@contextmanager
def progress_bar(console: Console, rounds: int, folder: Path) -> Iterator[Any]:
    """Draws a bar over rounds with the primary metric and simulated time.

    Args:
        console: where it goes.
        rounds: how many there will be.
        folder: of the run, which says what its models are judged by.

    Yields:
        `watch` and `observe` for `fedsim.runs.writer.run`.
    """
    columns = [
        TextColumn("round"),
        MofNCompleteColumn(),
        PlainBar(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with PlainProgress(*columns, shown=console) as progress:
        task = progress.add_task("run", total=rounds, state="building data and fleet")
        shown = {"text": ""}
        judged_by = cache(primary_of)  # known when the first round has ended

        def watch(report: RoundReport) -> None:
            primary = judged_by(folder)
            if primary.name in report.metrics:
                shown["text"] = f"{primary.title} {primary.with_unit(report.metrics[primary.name])}"
            elif NOT_FINITE in report.metrics:
                shown["text"] = NO_VALUE
            progress.update(task, completed=report.round, state=f"{shown['text']}  simulated {simulated(report.now_s)}")

        def observe(client_id: int) -> None:
            progress.refresh()

        yield watch, observe
