"""The pictures of a comparison's page: a line per arm over what it took, and its score against its cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from devices.texts import NAME_LETTERS, visible
from fedsim.report.plots.study import curve, drawn_labels
from fedsim.report.plots.style import AXES, FAINT, FOREGROUND, ON_PAGE, UNITS, axis_name
from fedsim.report.plots.svg import DASHES, Frame, Line, draw_lines, fill, legend, limits, picture, tag, ticks
from fedsim.workloads.metrics import shown_as

if TYPE_CHECKING:
    from fedsim.study.results import Result

RADIUS = 5  # of a point, in a picture
FEWEST = 3  # seeds that a band needs
SAME_PLACE = 1e-3  # share by which costs may differ and still be drawn, and compared, as one
WIDE = 20.0  # from the least to the most: costs that are further apart are drawn by their logarithm


def arm_styles(result: Result) -> dict[str, tuple[str, str]]:
    """Returns colour and dashes of the arms that are drawn: all, or the best; the one compared with is plain."""
    labels, styles = drawn_labels(result), {}
    for number, label in enumerate(name for name in labels if name != result.study.against):
        styles[label] = ON_PAGE[number % len(ON_PAGE)], DASHES[number // len(ON_PAGE) % len(DASHES)]
    return {label: styles.get(label, (FOREGROUND, "")) for label in labels}


def arm_legend(styles: dict[str, tuple[str, str]]) -> Markup:
    """Returns the names of the arms that are drawn."""
    return legend((visible(label, NAME_LETTERS), *style) for label, style in styles.items())


def curves_of_arms(result: Result, styles: dict[str, tuple[str, str]]) -> list[Markup]:
    """Draws a panel for each axis: means over the seeds, with their deviation as a band from three seeds on."""
    drawn = []
    for axis in AXES:
        lines, metric = [], result.metric
        for label, (colour, dash) in styles.items():
            x, y, deviation = curve(result.runs[label], axis, metric.name)
            if not len(x):
                continue
            y, deviation = metric.scale * y, metric.scale * deviation
            banded = len(result.runs[label]) >= FEWEST
            low, high = (y - deviation, y + deviation) if banded else ((), ())
            last = f"{label}: {metric.with_unit(y[-1] / metric.scale)} in the end"
            lines.append(Line(last, x, y, colour, dash, low=low, high=high))
        if lines:
            drawn.append(_panel(lines, axis, metric.label))
    return drawn


def _panel(lines: Sequence[Line], axis: str, label: str) -> Markup:
    unit, name = _unit(axis, max(float(line.x[-1]) for line in lines))
    scaled = [Line(n.label, np.array(n.x) / unit, n.y, n.colour, n.dash, (), n.low, n.high) for n in lines]
    most = max(float(line.x[-1]) for line in scaled)
    every = (value for line in lines for values in (line.y, line.low, line.high) for value in values)
    frame = Frame((0.0, most or 1.0), limits(every))
    shade = min(0.18, 0.7 / len(lines))  # many bands on top of each other must stay light
    parts = [frame.y_axis(label), frame.x_axis(name), draw_lines(frame, scaled, shade)]
    return tag("figure", picture(f"{label} over {name}", parts))


def _unit(axis: str, most: float) -> tuple[float, str]:
    """Returns the unit in which an axis reads best, and the axis' name with it."""
    if metric := shown_as(axis):
        return 1 / metric.scale, metric.label
    units = UNITS.get(axis, ((1.0, ""),))
    size, unit = next((u for u in units if most >= 2 * u[0]), units[-1])
    return size, f"{axis_name(axis)}, {unit}" if unit else axis_name(axis)


def scores_against_costs(result: Result, styles: dict[str, tuple[str, str]]) -> list[Markup]:
    """Draws each arm's score against its cost; those that no other beats in both are joined."""
    costs = {axis: [float(getattr(row, axis)) for row in result.rows] for axis in AXES if axis != "rounds"}
    return [_scatter(result, axis, values, styles) for axis, values in costs.items()]


def scores_against_figures(result: Result, styles: dict[str, tuple[str, str]]) -> list[Markup]:
    """Draws each arm's score against the figures of a run that the study names as axes."""
    axes = [axis for axis in result.study.x if axis not in AXES]
    found = [(axis, result.columns[axis]) for axis in axes]
    return [_scatter(result, axis, values, styles, False) for axis, values in found if np.isfinite(values).any()]


def front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Returns the places of those that no other beats in cost and gain at once, by rising cost.

    Args:
        costs: the less the better.
        gains: the more the better.
    """
    best, found = -math.inf, []
    for place in sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i])):
        if gains[place] > best:
            best = gains[place]
            found.append(place)
    return found


def _scatter(
    result: Result, axis: str, costs: Sequence[float], styles: dict[str, tuple[str, str]], joined: bool = True
) -> Markup:
    there = [
        place for place, cost in enumerate(costs) if math.isfinite(cost) and math.isfinite(result.rows[place].mean)
    ]
    rows, x = [result.rows[place] for place in there], [costs[place] for place in there]
    metric, y = result.metric, [result.metric.scale * row.mean for row in rows]
    unit, name = _unit(axis, max(x, default=1.0))
    x = _as_one([value / unit for value in x])
    by_log = bool(x) and min(x) > 0 and max(x) / min(x) >= WIDE
    shown = [math.log10(value) for value in x] if by_log else x
    frame = Frame(limits(shown, 0.08), limits(y, 0.08))
    parts: list[Any] = [frame.y_axis(metric.label), frame.x_axis(name, *_scale(frame.x, by_log))]
    if joined:
        best = front(x, [metric.gain(row.mean) for row in rows])
        line = Line("not beaten in both", [shown[i] for i in best], [y[i] for i in best], FAINT)
        parts.append(draw_lines(frame, [line]))
    across = _side_by_side([(frame.across(left), frame.down(up)) for left, up in zip(shown, y, strict=True)])
    for place, row in enumerate(rows):
        title = f"{row.label}: {metric.with_unit(row.mean)}, {x[place]:.4g} ({name})"
        style = fill(styles[row.label][0] if row.label in styles else FAINT)
        place_of = {"cx": across[place], "cy": frame.down(y[place]), "r": RADIUS}
        parts.append(tag("circle", tag("title", title), style=style, **place_of))
    return tag("figure", picture(f"{metric.label} against {name}", parts))


def _as_one(costs: Sequence[float]) -> list[float]:
    """Returns costs of which those that hardly differ are equal to the least of them."""
    found, least = list(costs), -math.inf
    for place in sorted(range(len(costs)), key=lambda i: costs[i]):
        if costs[place] - least > SAME_PLACE * abs(costs[place]):
            least = costs[place]
        found[place] = least
    return found


def _side_by_side(places: Sequence[tuple[float, float]]) -> list[float]:
    """Returns where points stand across, moved apart where one would hide another."""
    groups: list[list[int]] = []
    for number, place in enumerate(places):
        near = (group for group in groups if math.dist(places[group[0]], place) < RADIUS)
        found = next(near, None)
        if found is None:
            groups.append([number])
        else:
            found.append(number)
    moved = [across for across, _ in places]
    for group in groups:
        for order, number in enumerate(group):
            moved[number] = places[group[0]][0] + 1.5 * RADIUS * (order - (len(group) - 1) / 2) * (len(group) > 1)
    return moved


def _scale(between: tuple[float, float], by_log: bool) -> tuple[Any, ...]:
    """Returns ticks and how they are written, where an axis is a logarithm."""
    if not by_log:
        return ()
    low, high = (10.0**edge for edge in between)
    powers = range(math.floor(between[0]), math.ceil(between[1]) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        at = [math.log10(step * 10.0**power) for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(at) <= 6:
            break
    return at or ticks(*between), lambda value: f"{10**value:.3g}"
