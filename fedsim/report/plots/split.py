"""A picture of how the examples are split over clients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from devices.figures import legend_label, new_figure, save_figure
from devices.texts import NAME_LETTERS, visible
from fedsim.workloads.base import Workload
from fedsim.workloads.describe import ClientRow, Split, split_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR = 0.85  # width of one, in clients
NAMED_COLOURS = 20  # classes that can be told apart by colour


def split_picture(workload: Workload, path: str | Path) -> None:
    """Draws the split as a PNG; see `draw_split`."""
    save_figure(draw_split(split_of(workload)), path)


def draw_split(split: Split) -> Figure:
    """Draws the labels of the first clients and the sizes of all.

    Up to 20 classes are stacked bars, more a map; sequences show the sizes only. Above 2000 clients the histogram shows
    2000 evenly spaced ones.
    """
    from matplotlib.ticker import MaxNLocator

    rows, num_classes = split.rows, len(split.class_names)
    figure = new_figure(12, 4.8, dpi=110)
    left, right = figure.subplots(1, 2, width_ratios=[2.4, 1])
    shown = f"first {len(rows)} clients" if len(rows) < split.num_clients else "every client"
    if not rows[0].label_counts:
        left.bar([row.client for row in rows], [row.train for row in rows], width=BAR)
        left.set(title=f"Training examples, {shown}", ylabel="sequences" if num_classes else "examples")
    elif num_classes <= NAMED_COLOURS:
        _draw_bars(left, rows, split.class_names)
        left.set(title=f"Labels, {shown}", ylabel="training examples")
    else:
        counts = np.array([row.label_counts for row in rows]).T  # [classes, clients]
        image = left.imshow(counts, aspect="auto", origin="lower", cmap="Blues", interpolation="nearest")
        figure.colorbar(image, ax=left, label="training examples", pad=0.01)
        left.set(title=f"Labels, {shown}", ylabel="class")
    left.set_xlabel("client")
    left.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    _draw_sizes(right, split.sizes, split.num_clients)
    name = visible(split.name, NAME_LETTERS)
    classes = f", classes {num_classes}" if num_classes else ""
    figure.suptitle(f"{name}: clients {split.num_clients}{classes}")
    return figure


def _draw_bars(axes: Axes, rows: Sequence[ClientRow], names: Sequence[str]) -> None:
    import matplotlib
    from matplotlib.collections import PolyCollection

    colours = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    left, bottom = np.array([row.client for row in rows]) - BAR / 2, np.zeros(len(rows))
    for label, name in enumerate(names):
        top = bottom + [row.label_counts[label] for row in rows]
        corners = np.array([[left, bottom], [left, top], [left + BAR, top], [left + BAR, bottom]])  # [4, 2, rows]
        bars = PolyCollection(list(corners.transpose(2, 0, 1)), facecolors=[colours(label)], label=legend_label(name))
        axes.add_collection(bars)  # a single artist: 10 classes of 20 clients would be 200 rectangles
        bottom = top
    axes.autoscale_view()
    axes.margins(x=0.01)
    axes.set_ylim(0, 1.05 * max(row.train for row in rows))
    axes.legend(
        title="class", loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False, reverse=True
    )


def _draw_sizes(axes: Axes, sizes: Sequence[int], num_clients: int) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = min(sizes), max(sizes)
    step = max(1, -(-(high - low + 1) // 25))  # whole numbers of examples per bin, at most 25 bins
    axes.hist(sizes, bins=[edge - 0.5 for edge in range(low, high + step + 1, step)], color="0.45", edgecolor="white")
    looked_at = f" ({len(sizes)} looked at)" if len(sizes) < num_clients else ""
    axes.set(title=f"Sizes, median {np.median(sizes):g}{looked_at}", ylabel="clients")
    axes.set(xlabel="training examples of a client", xlim=(low - 1.5 * step, high + 1.5 * step))
    axes.axvline(float(np.median(sizes)), color="tab:red", linestyle="--")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
