"""A run as a picture: what the primary metric took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from devices.figures import new_figure
from fedsim.report.plots.on_page import JUDGED
from fedsim.report.plots.style import COLOURS, NAMES, UNITS
from fedsim.report.rounds import RoundReport, running_costs
from fedsim.workloads.metrics import ACCURACY, Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(rounds: Sequence[RoundReport], primary: Metric = ACCURACY) -> Figure | None:
    """Draws the primary metric against rounds, simulated time, energy and traffic; None where nothing was judged."""
    labels = {prefix + primary.name: label for prefix, label in JUDGED.items()}
    shown = [key for key in labels if any(key in r.metrics for r in rounds)]
    if not shown:
        return None
    figure, took = new_figure(9.6, 5.6), running_costs(list(rounds))
    panels = figure.subplots(2, 2, sharey=True)
    for panel, axis in zip(panels.flat, ("rounds", "simulated_s", "joules", "traffic_bytes"), strict=True):
        most, units = took[axis][-1], UNITS.get(axis, ((1.0, ""),))
        size, unit = next((u for u in units if most >= 2 * u[0]), units[-1])
        for key, colour in zip(shown, COLOURS, strict=False):
            points = [
                (x / size, primary.scale * r.metrics[key])
                for x, r in zip(took[axis], rounds, strict=True)
                if key in r.metrics
            ]
            marker = "o" if len(points) < 30 else None
            panel.plot(
                *zip(*points, strict=True), color=colour, linewidth=1.6, marker=marker, markersize=3, label=labels[key]
            )
        panel.set_xlabel(f"{NAMES[axis]}{', ' if unit else ''}{unit}")
        panel.set_xlim(left=0)
        _plain(panel)
    for panel in panels[:, 0]:
        panel.set_ylabel(primary.label)
    if len(shown) > 1:
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=len(shown),
            frameon=False,
            fontsize="small",
        )
    return figure


def _plain(panel: Any) -> None:
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
