"""Pictures of a continual run: the accuracy matrix as a heat map, and the accuracy of each task over the rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from devices.figures import new_figure
from devices.texts import NAME_LETTERS, visible
from fedsim.workloads.streams.figures import Matrix, key_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedsim.report.rounds import RoundReport

NUMBERED = 12  # tasks up to which the cells of the map hold their numbers, and the curves their names


def heat_map(matrix: Matrix, name: str) -> Figure:
    """Draws accuracy in percent: rows are after which task, columns on which task, grey is not judged."""
    import matplotlib

    figure = new_figure(6.4, 5.4, dpi=110)
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.92")
    image = axes.imshow(np.ma.masked_invalid(100 * matrix), cmap=colours, vmin=0, vmax=100, aspect="auto")
    figure.colorbar(image, ax=axes, label="test accuracy [%]", pad=0.02)
    if len(matrix) <= NUMBERED:
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                shade = "white" if value < 0.6 else "black"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=shade, fontsize=9)
    _whole(axes.xaxis, axes.yaxis)
    axes.set(
        xlabel="accuracy on task",
        ylabel="after task",
        title=f"{visible(name, NAME_LETTERS)}: accuracy on each task after each task",
    )
    return figure


def task_curves(reports: Sequence[RoundReport], tasks: int, rounds_per_task: int, one_order: bool = True) -> Figure:
    """Draws test accuracy of every task over the rounds; dotted before its own phase, where clients have one order."""
    import matplotlib

    figure = new_figure(9.0, 4.8, dpi=110)
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, tasks))
    for task in range(tasks):
        points = [(r.round, 100 * r.metrics[key_of(task)]) for r in reports if key_of(task) in r.metrics]
        begins = task * rounds_per_task if one_order else 0
        before = [p for p in points if begins - rounds_per_task <= p[0] <= begins]
        after = [p for p in points if p[0] >= begins]
        for part, style, label in ((before, ":", None), (after, "-", f"task {task}")):
            if part:
                axes.plot(*zip(*part, strict=True), style, color=colours[task], label=label, linewidth=1.6)
    for border in range(1, tasks):
        axes.axvline(border * rounds_per_task, color="0.85", linewidth=0.8, zorder=0)
    mean = [(r.round, 100 * r.metrics["accuracy"]) for r in reports if "accuracy" in r.metrics]
    if mean:
        axes.plot(*zip(*mean, strict=True), color="black", linewidth=2.2, label="mean of tasks so far")
    _whole(axes.xaxis)
    axes.set(xlabel="round", ylabel="test accuracy [%]", title="Accuracy of each task", ylim=(0, 101))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False, ncols=1 + tasks // 16)
    return figure


def _whole(*axes: object) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))  # type: ignore[attr-defined]
