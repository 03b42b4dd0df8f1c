"""A picture of what a server would see of clients that share averages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from devices.figures import new_figure, save_figure
from devices.texts import NAME_LETTERS, visible
from fedsim.exchanges.averages import averages_of_client
from fedsim.workloads.base import Tensors
from fedsim.workloads.classification import ClassificationWorkload

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def averages_picture(
    workload: ClassificationWorkload, path: str | Path, group_sizes: list[int | None], clients: int, seed: int
) -> None:
    """Draws the first mean of each client (rows) for each group size (columns), with its classes, as a PNG."""
    shown = range(min(clients, workload.num_clients))
    figure = new_figure(1.9 * len(group_sizes) + 0.4, 2.1 * len(shown) + 0.5, dpi=110)
    axes = figure.subplots(len(shown), len(group_sizes), squeeze=False)
    names = workload.class_names()
    for row, client in enumerate(shown):
        for column, size in enumerate(group_sizes):
            pairs = averages_of_client(workload, client, size, seed)
            _draw(axes[row][column], pairs, names)
            if row == 0:
                axes[row][column].set_title(f"groups of {size or 'all'}")
        axes[row][0].set_ylabel(f"client {client}")
    figure.suptitle(f"{visible(workload.name, NAME_LETTERS)}: what a server would see")
    save_figure(figure, path)


def _draw(axes: Axes, pairs: Tensors, names: list[str]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if not len(pairs["x"]):
        axes.text(0.5, 0.5, "too few\nexamples", ha="center", va="center", transform=axes.transAxes)
        return
    x, y = pairs["x"][0], pairs["y"][0]
    if x.dim() == 3 and len(x) == 3:
        low, high = float(x.min()), float(x.max())
        axes.imshow(((x.permute(1, 2, 0) - low) / ((high - low) or 1.0)).numpy())
    elif x.dim() == 3:
        axes.imshow(x[0].numpy(), cmap="gray")
    else:
        axes.imshow(x.reshape(1, -1).numpy(), cmap="gray", aspect="auto")
    top = y.argsort(descending=True, stable=True)[:3].tolist()
    axes.set_xlabel(
        ", ".join(f"{visible(names[k], NAME_LETTERS // 2)} {y[k]:.0%}" for k in top if y[k] > 0), fontsize="x-small"
    )
