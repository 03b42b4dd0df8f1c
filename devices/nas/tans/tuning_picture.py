"""Draws how accuracy grows with training steps, and with joules, by the way of beginning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from devices.figures import new_figure, save_figure

Line = tuple[Sequence[float], Sequence[float]]  # places on the axis, and accuracies


def tuning_picture(path: str | Path, title: str, panels: Mapping[str, Mapping[str, Sequence[Line]]]) -> None:
    """Writes the picture: thin lines are tasks, thick ones their means.

    Args:
        path: file to write; its ending says the format.
        title: above it.
        panels: by the label of their axis, the lines of each way, one for each task.
    """
    from matplotlib.ticker import LogLocator

    figure = new_figure(10, 4.5)
    figure.suptitle(title)
    places = figure.subplots(1, len(panels), sharey=True)
    for axes, (label, ways) in zip(np.atleast_1d(places), panels.items(), strict=True):
        for number, (way, lines) in enumerate(ways.items()):
            for x, y in lines:
                axes.plot(x, y, color=f"C{number}", lw=0.7, alpha=0.35)
            # Where tasks end at different places, their mean ends with the first.
            first, last = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
            common = np.geomspace(first, last, 50) if first < last else np.array([first])
            mean = np.mean([np.interp(common, x, y) for x, y in lines], axis=0)
            axes.plot(common, mean, color=f"C{number}", lw=2.5, label=way)
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    first_axes = np.atleast_1d(places)[0]
    first_axes.set_ylabel("accuracy on held-out images, %")
    first_axes.legend(fontsize=8, loc="lower right", framealpha=1.0)
    save_figure(figure, path, dpi=120)
