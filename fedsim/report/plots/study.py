"""A study as a picture: its metric against what it took, a line per arm with a band over the seeds.

Where every axis is a figure of a run, such as a latency, an arm is a point, and the points of one family are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from devices.figures import legend_label, new_figure, save_figure
from devices.texts import NAME_LETTERS, visible
from fedsim.report.plots.style import AXES, COLOURS, NAMES, UNITS, axis_name
from fedsim.report.rounds import running_costs
from fedsim.workloads.metrics import shown_as

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedsim.study.results import FinishedRun, Result

MAX_LINES, MAX_FAMILIES = 12, 19  # in a panel; so many families can be told apart
LETTERS, TITLE_LETTERS = 11, 300  # of a title: to an inch, and at most
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))
MARKS = ("o", "s", "^")


def draw_study(result: Result, path: Path) -> None:
    """Draws `study_figure` as a PNG.

    Raises:
        OSError: if the file cannot be written.
    """
    save_figure(study_figure(result), path)


def study_figure(result: Result) -> Figure:
    """Draws a panel for each axis of the study; with many arms or families, the best of them."""
    study = result.study
    points = all(axis not in AXES for axis in study.x)
    chosen = families(result) if points else {label: [label] for label in drawn_labels(result)}
    columns = len(study.x) if len(study.x) <= 3 else 2
    down = -(-len(study.x) // columns)
    figure = new_figure(4.3 * columns + 2.6, 3.3 * down + 0.9, dpi=130)
    axes = figure.subplots(down, columns, sharey=True, squeeze=False)
    own = next((arm.family for arm in study.arms if arm.label == study.against), "") if points else study.against
    styles = _styles(list(chosen), own)
    for number, panel in enumerate(axes.flat):
        if number >= len(study.x):
            panel.set_axis_off()
            continue
        axis = study.x[number]
        if axis in AXES:
            _draw_lines(result, panel, axis, list(chosen), styles)
        else:
            _draw_points(result, panel, axis, chosen, styles)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        if number % columns == 0:
            panel.set_ylabel(visible(result.metric.label, NAME_LETTERS))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize="small", handlelength=2.6)
    left_out = len(result.rows) - sum(map(len, chosen.values()))
    worst = "lowest" if result.metric.higher_is_better else "highest"
    note = f"; the {left_out} arms with the {worst} scores are left out" if left_out else ""
    seeds = ", ".join(map(str, study.seeds))
    spread = f"{'bars' if points else 'bands'}: their standard deviation"
    over = f"means of seeds {seeds}; {spread}" if len(study.seeds) > 1 else f"seed {seeds}"
    wide = int(LETTERS * figure.get_figwidth())
    title = visible(study.title, TITLE_LETTERS)
    figure.suptitle("\n".join(fill(line, wide) for line in (title, over + note)), fontsize="medium")
    return figure


def drawn_labels(result: Result) -> list[str]:
    """Returns the labels of the lines, in the table's order: all, or the best MAX_LINES, the compared one always."""
    best = sorted(result.rows, key=lambda row: (row.label != result.study.against, -result.metric.gain(row.mean)))[
        :MAX_LINES
    ]
    return [row.label for row in result.rows if row in best]


def families(result: Result) -> dict[str, list[str]]:
    """Returns labels of the points by family, in the table's order: all, or the MAX_FAMILIES with the best points.

    The family of the arm that others are compared with is among them.
    """
    of = {arm.label: arm.family for arm in result.study.arms}
    best: dict[str, float] = {}
    found: dict[str, list[str]] = {}
    for row in result.rows:
        family = of[row.label]
        found.setdefault(family, []).append(row.label)
        gain = result.metric.gain(row.mean)
        best[family] = max(best.get(family, gain), gain)
    own = of.get(result.study.against)
    ranked = sorted(found, key=lambda family: (family != own, -best[family]))[:MAX_FAMILIES]
    return {family: labels for family, labels in found.items() if family in ranked}


def curve(runs: Sequence[FinishedRun], axis: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns means over seeds at each evaluation that all have: what it took, the metric, its deviation, [n] each."""
    judged: list[dict[int, tuple[float, float]]] = []
    for one in runs:
        took = running_costs(one.rounds)[axis]
        pairs = zip(one.rounds, took, strict=True)
        judged.append({r.round: (x, r.metrics[metric]) for r, x in pairs if metric in r.metrics})
    common = sorted(set.intersection(*(set(points) for points in judged)))
    points = np.array([[seed[number] for number in common] for seed in judged])  # [seeds, evaluations, 2]
    spread = points[..., 1].std(0, ddof=1) if len(runs) > 1 else np.zeros(len(common))
    return points[..., 0].mean(0), points[..., 1].mean(0), spread


def _styles(labels: Sequence[str], against: str) -> dict[str, dict[str, Any]]:
    styles = {}
    for number, label in enumerate(name for name in labels if name != against):
        style = DASHES[number // len(COLOURS) % len(DASHES)]
        mark = MARKS[number // len(COLOURS) % len(MARKS)]
        styles[label] = {"color": COLOURS[number % len(COLOURS)], "linestyle": style, "linewidth": 1.4, "marker": mark}
    return {**styles, against: {"color": "black", "linestyle": "-", "linewidth": 2.0, "marker": "*"}}


def _draw_lines(result: Result, panel: Axes, axis: str, labels: Sequence[str], styles: dict[str, Any]) -> None:
    scale = result.metric.scale
    curves = {label: curve(result.runs[label], axis, result.metric.name) for label in labels}
    most = max(x[-1] for x, _, _ in curves.values())
    units = UNITS.get(axis, ((1.0, ""),))
    unit, unit_name = next((u for u in units if most >= 2 * u[0]), units[-1])
    for label, (x, mean, spread) in curves.items():
        panel.plot(x / unit, scale * mean, label=legend_label(label), **{**styles[label], "marker": ""})
        if len(result.runs[label]) > 1:
            low, high = scale * (mean - spread), scale * (mean + spread)
            shade = min(0.15, 0.7 / len(curves))  # many bands on top of each other must stay light
            panel.fill_between(x / unit, low, high, color=styles[label]["color"], alpha=shade, linewidth=0)
    panel.set_xlabel(f"{NAMES[axis]}{', ' if unit_name else ''}{unit_name}")
    panel.set_xlim(left=0)


def _draw_points(
    result: Result, panel: Axes, axis: str, chosen: dict[str, list[str]], styles: dict[str, dict[str, Any]]
) -> None:
    """Draws a point per arm, its score with the deviation over the seeds: a figure of a run has no course."""
    scale = result.metric.scale
    metric = shown_as(axis)
    values = [(metric.scale if metric else 1.0) * value for value in result.columns[axis]]
    rows = {row.label: (x, row) for row, x in zip(result.rows, values, strict=True)}
    drawn: list[tuple[float, float]] = []
    for family, labels in chosen.items():
        points = sorted((rows[label] for label in labels if np.isfinite(rows[label][0])), key=lambda point: point[0])
        if points:
            error = [scale * row.deviation if len(row.scores) > 1 else 0.0 for _, row in points]
            x, y = [x for x, _ in points], [scale * row.mean for _, row in points]
            below = max(sum(np.allclose(one, each) for each in drawn) for one in zip(x, y, strict=True))
            ring: dict[str, Any] = {"markerfacecolor": "none"} if below else {}  # around what it would hide
            panel.errorbar(
                x,
                y,
                yerr=error,
                label=legend_label(family),
                markersize=5 + 4 * below,
                capsize=2,
                elinewidth=0.7,
                **styles[family],
                **ring,
            )
            drawn += zip(x, y, strict=True)
    panel.set_xlabel(visible(axis_name(axis), 2 * NAME_LETTERS), fontsize="small")
