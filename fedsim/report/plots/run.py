"""The pictures of a run's page: what the primary metric took, where the devices' time went, what became of clients."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from devices.figures import new_figure, save_figure
from devices.texts import NAME_LETTERS, visible
from fedsim.messages.cohort import OUTCOMES
from fedsim.report.files import Rows, select_rows
from fedsim.report.plots.style import COLOURS, NAMES, UNITS
from fedsim.report.rounds import RoundReport, running_costs
from fedsim.workloads.metrics import ACCURACY, CLIENTS, Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASES = ("down", "compute", "up", "wait")  # of a client's round; waiting for the others comes last
PHASE_COLOURS = dict(zip(PHASES, ("#56B4E9", "#0072B2", "#009E73", "#D9D9D9"), strict=True))
OUTCOME_COLOURS = dict(zip(OUTCOMES, ("#009E73", "#E69F00", "#BDBDBD", "#CC79A7", "#D55E00"), strict=True))
JUDGED = {"": "global model, test set", CLIENTS: "clients' models, their own held-out examples"}
BARS = 60  # rounds with a bar of their own; more are put together


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


def time_by_device(rows: Rows) -> Figure | None:
    """Draws the mean seconds of a client's round by device, in its phases; None where no client answered."""
    answered = select_rows(rows, np.isin(rows["outcome"].astype(str), ("completed", "late")))
    devices, device = np.unique(answered["device"], return_inverse=True)
    if not len(devices):
        return None
    clients = np.bincount(device)
    means = {phase: np.bincount(device, answered[f"{phase}_s"]) / clients for phase in PHASES}
    order = np.argsort(sum(means[phase] for phase in PHASES if phase != "wait"), kind="stable")
    figure = new_figure(9.6, 1.2 + 0.34 * len(devices))
    panel, left, places = figure.subplots(), np.zeros(len(devices)), np.arange(len(devices))
    for phase in PHASES:
        width = means[phase][order]
        panel.barh(places, width, left=left, color=PHASE_COLOURS[phase], label=phase, height=0.7)
        left += width
    panel.set_yticks(places, labels=[visible(device, NAME_LETTERS) for device in devices[order]])
    panel.set_xlabel("mean simulated seconds of a client and exchange")
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    _plain(panel, "x")
    return figure


def outcomes(rounds: Sequence[RoundReport]) -> Figure | None:
    """Draws what became of the clients that were asked, by round; None where none was."""
    asked = [r for r in rounds if r.cohort]
    if not asked:
        return None
    step = -(-len(asked) // BARS)
    groups = [asked[i : i + step] for i in range(0, len(asked), step)]
    figure = new_figure(9.6, 2.8)
    panel, bottom = figure.subplots(), np.zeros(len(groups))
    places = [group[0].round + (group[-1].round - group[0].round) / 2 for group in groups]
    for outcome in OUTCOMES:
        height = np.array([np.mean([len(r.outcomes.get(outcome, ())) for r in group]) for group in groups])
        if height.any():
            colour, label = OUTCOME_COLOURS[outcome], outcome.replace("_", " ")
            panel.bar(places, height, bottom=bottom, width=0.9 * step, color=colour, label=label)
            bottom += height
    panel.set(xlabel="round", ylabel="clients asked" if step == 1 else f"clients, mean of {step} rounds")
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    _plain(panel, "y")
    return figure


def as_svg(figure: Figure) -> str:
    """Returns the figure as the address of a picture within the page; equal figures give equal text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fedsim"}):
        save_figure(figure, buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plain(panel: Any, axis: str = "both") -> None:
    panel.grid(alpha=0.25, linewidth=0.6, axis=axis)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
