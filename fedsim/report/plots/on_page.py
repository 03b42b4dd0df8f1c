"""The pictures of a run's page: what the score took, losses, where the devices' time went, what became of clients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from devices.texts import NAME_LETTERS, visible
from devices.units import energy, simulated, size
from fedsim.messages.cohort import OUTCOMES
from fedsim.report.files import Rows, select_rows
from fedsim.report.plots.style import CLASS_COLOURS, FAINT, FOREGROUND, ON_PAGE
from fedsim.report.plots.svg import (
    DASHES,
    LETTER,
    WIDTH,
    Frame,
    Line,
    box,
    draw_lines,
    fill,
    legend,
    limits,
    picture,
    spread,
    tag,
    ticks,
    whole_ticks,
    word,
)
from fedsim.report.rounds import RoundReport, running_costs
from fedsim.workloads.describe import Split
from fedsim.workloads.metrics import ACCURACY, ATTACK_SUCCESS, CLIENTS, LOSS, OF_ROUNDS, Metric

BLUE, RED, GREEN, PURPLE, ORANGE, SKY = ON_PAGE
PHASES = {"down": SKY, "compute": BLUE, "up": GREEN, "wait": FAINT}  # of an exchange; waiting for others comes last
OUTCOME_COLOURS = dict(zip(OUTCOMES, (GREEN, ORANGE, FAINT, PURPLE, RED), strict=True))
JUDGED = {"": "global model, test set", CLIENTS: "clients' models, their own held-out examples"}
LOSSES = {
    LOSS: "test set",
    CLIENTS + LOSS: "clients' models, held out",
    "train_loss": "training",
    "personal_loss": "training, personal models",
}
COSTS = {"time": ("simulated_s", simulated), "energy": ("joules", energy), "traffic": ("traffic_bytes", size)}
BARS, DEVICES = 60, 30  # rounds with a bar of their own, more are put together; devices that have one
TASK, MOST_TASKS = re.compile(r"task_\d+_accuracy"), 11  # metrics of a stream; tasks that have a line
LINE = 16.0  # units between lines of text
SHADES = 8  # of a map
NUMBERED = 12  # classes up to which a map holds its numbers
NAMED_COLOURS = 20  # classes that can be told apart by colour


def score_curve(rounds: Sequence[RoundReport], primary: Metric = ACCURACY) -> Markup | None:
    """Draws the primary metric over rounds, and what these took below; None where nothing was judged."""
    shown = {prefix + primary.name: label for prefix, label in JUDGED.items()}
    lines = _over_rounds(rounds, shown, primary)
    if not lines:
        return None
    took, end = running_costs(list(rounds)), max(rounds[-1].round, 1)
    frame = Frame((0, end), limits(y for line in lines for y in line.y), bottom=5 * LINE - 6, height=280)
    places = [r for r in whole_ticks(0, end, 4) if r < 0.78 * end] + [end]
    numbers = [r.round for r in rounds]
    rows = [word(2, frame.floor + LINE, "round")]
    rows += [word(frame.across(r), frame.floor + LINE, f"{r:g}", "middle") for r in places]
    for row, (name, (key, text)) in enumerate(COSTS.items(), 2):
        below = frame.floor + row * LINE
        rows.append(word(2, below, name))
        for r in places[1:]:
            cost = took[key][max(int(np.searchsorted(numbers, r, "right")) - 1, 0)]
            anchor = "end" if frame.across(r) > WIDTH - 30 else "middle"
            rows.append(word(min(frame.across(r), WIDTH - 2), below, text(cost), anchor))
    inside = [frame.y_axis(primary.label), *rows, draw_lines(frame, lines)]
    return _with_legend(picture(f"{primary.title} over rounds", inside, frame.height), lines)


def loss_curve(rounds: Sequence[RoundReport]) -> Markup | None:
    """Draws the losses of training and of judging over rounds; None where there are none."""
    lines = _over_rounds(rounds, LOSSES, Metric(LOSS))
    if not lines:
        return None
    frame = Frame((0, max(rounds[-1].round, 1)), limits(y for line in lines for y in line.y), height=280)
    inside = [frame.y_axis("loss"), frame.x_axis("round", whole_ticks(*frame.x)), draw_lines(frame, lines)]
    return _with_legend(picture("loss over rounds", inside, frame.height), lines)


def attack_curve(rounds: Sequence[RoundReport]) -> Markup | None:
    """Draws how far an attack came over rounds, beside the accuracy; None where nobody attacks a class."""
    if not any(ATTACK_SUCCESS in r.metrics for r in rounds):
        return None
    lines = _over_rounds(rounds, {ATTACK_SUCCESS: "attack success", ACCURACY.name: ACCURACY.title}, ACCURACY)
    frame = Frame((0, max(rounds[-1].round, 1)), (0, 100), height=280)
    inside = [frame.y_axis("attack success, %"), frame.x_axis("round", whole_ticks(*frame.x)), draw_lines(frame, lines)]
    return _with_legend(picture("attack success over rounds", inside, frame.height), lines)


def figure_curves(rounds: Sequence[RoundReport]) -> list[Markup]:
    """Draws what else methods say of their rounds, such as what privacy has been spent, each by itself."""
    drawn = []
    for name, metric in OF_ROUNDS.items():
        lines = _over_rounds(rounds, {name: metric.title}, metric) if name != ATTACK_SUCCESS else []
        if lines:
            frame = Frame((0, max(rounds[-1].round, 1)), limits(lines[0].y))
            axes = [frame.y_axis(metric.label), frame.x_axis("round", whole_ticks(*frame.x))]
            title = f"{metric.title} over rounds"
            drawn.append(tag("figure", picture(title, [*axes, draw_lines(frame, lines)])))
    return drawn


def task_curves(rounds: Sequence[RoundReport]) -> Markup | None:
    """Draws the accuracy of each task of a stream over rounds, and the mean of those so far; None without tasks."""
    names = sorted({n for r in rounds for n in r.metrics if TASK.fullmatch(n)}, key=lambda n: int(n.split("_")[1]))
    if not names:
        return None
    known = {name: f"task {name.split('_')[1]}" for name in spaced(names, MOST_TASKS)}
    lines = _over_rounds(rounds, known | {ACCURACY.name: "mean of tasks so far"}, ACCURACY)
    frame = Frame((0, max(rounds[-1].round, 1)), (0, 100), height=280)
    inside = [frame.y_axis(ACCURACY.label), frame.x_axis("round", whole_ticks(*frame.x)), draw_lines(frame, lines)]
    return _with_legend(picture("accuracy of each task over rounds", inside, frame.height), lines)


def task_map(matrix: Sequence[Sequence[float | None]]) -> Markup:
    """Draws the accuracy on each task (columns) after each (rows), which falls where one is forgotten."""
    table = np.array([[np.nan if value is None else value for value in row] for row in matrix], float)
    frame = _map_frame(table, 46.0, falling=True)
    parts: list[Markup] = [frame.y_axis("after task", whole_ticks(0, len(table) - 1), lined=False)]
    parts.append(frame.x_axis("accuracy on task, %", whole_ticks(0, table.shape[1] - 1)))
    parts += _cells(frame, np.ceil(SHADES * np.nan_to_num(table)))
    for (row, column), value in np.ndenumerate(table if len(table) <= NUMBERED else np.zeros((0, 0))):
        if np.isfinite(value):
            style = fill("var(--bg,#fff)" if value > 0.5 else FOREGROUND)
            parts.append(word(frame.across(column), frame.down(row) + 4, f"{100 * value:.0f}", "middle", style=style))
    title = "Accuracy on each task after each task"
    return tag("figure", tag("figcaption", title), picture(title, parts, frame.height))


def spaced(names: Sequence[str], most: int) -> list[str]:
    """Returns so many of the names at most, evenly spaced."""
    return [names[place] for place in spread(len(names), most)]


def _over_rounds(rounds: Sequence[RoundReport], names: dict[str, str], metric: Metric) -> list[Line]:
    lines = []
    order = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY)
    for number, (name, label) in enumerate(names.items()):
        colour, dash = order[number % len(order)], DASHES[number // len(order) % len(DASHES)]
        points = [(r.round, metric.scale * r.metrics[name]) for r in rounds if np.isfinite(r.metrics.get(name, np.nan))]
        if points:
            x, y = zip(*points, strict=True)
            titles = [f"{label}: {metric.with_unit(v / metric.scale)} in round {n}" for n, v in points]
            lines.append(Line(label, x, y, colour, dash, titles))
    return lines


def _with_legend(drawn: Markup, lines: Sequence[Line]) -> Markup:
    return tag("figure", legend(line.entry for line in lines), drawn)


def time_by_device(rows: Rows, title: str) -> Markup | None:
    """Draws the mean seconds of an exchange by device, in its phases; None where no client answered."""
    answered = select_rows(rows, np.isin(rows["outcome"].astype(str), ("completed", "late")))
    devices, device = np.unique(answered["device"], return_inverse=True)
    if not len(devices):
        return None
    clients = np.bincount(device)
    means = {phase: np.bincount(device, answered[f"{phase}_s"]) / clients for phase in PHASES}
    every = np.sum(list(means.values()), 0)
    own = every - means["wait"]
    order = np.argsort(-own, kind="stable")[:DEVICES]
    names = [visible(name, NAME_LETTERS // 2 + 4) for name in devices[order]]
    left, lane = 8 + LETTER * max(map(len, names)), 22.0
    most = max(float(every.max()), 1e-9)
    frame = Frame((0, most), (0, 1), left=left, right=46, top=4, height=4 + lane * len(order) + 36)
    parts = [frame.x_axis("mean simulated s", ticks(0, most, 4))]
    for row, (number, name) in enumerate(zip(order, names, strict=True)):
        top, at = 6 + lane * row, 0.0
        parts.append(word(left - 6, top + 12, name, "end"))
        for phase, colour in PHASES.items():
            took = float(means[phase][number])
            width = frame.across(took) - frame.across(0)
            parts.append(box(frame.across(at), top, width, 16.0, colour, f"{name}, {phase}: {took:.3g} s"))
            at += took
        parts.append(word(frame.across(at) + 4, top + 12, f"{own[number]:.3g}"))
    entries = [(phase, colour, "") for phase, colour in PHASES.items()]
    return tag("figure", tag("figcaption", title), legend(entries), picture(title, parts, frame.height))


def outcomes(rounds: Sequence[RoundReport]) -> Markup | None:
    """Draws what became of the clients that were asked to train, by round; None where none was."""
    asked = [r for r in rounds if r.cohort]
    if not asked:
        return None
    step = -(-len(asked) // BARS)
    groups = [asked[i : i + step] for i in range(0, len(asked), step)]
    most = max(np.mean([len(r.cohort) for r in group]) for group in groups)
    frame = Frame((asked[0].round - 0.6, asked[-1].round + 0.6), (0, float(most)))
    label = "clients" if step == 1 else f"clients, mean of {step} rounds"
    parts = [frame.y_axis(label, whole_ticks(*frame.y)), frame.x_axis("round", whole_ticks(*frame.x))]
    seen = []
    for group in groups:
        first, last, bottom = group[0].round, group[-1].round, 0.0
        left, right = frame.across(first - 0.45), frame.across(last + 0.45)
        for outcome in OUTCOMES:
            count = float(np.mean([len(r.outcomes.get(outcome, ())) for r in group]))
            if count:
                seen.append(outcome)
                top, name = frame.down(bottom + count), outcome.replace("_", " ")
                when = f"round {first}" if first == last else f"rounds {first} to {last}"
                height = frame.down(bottom) - top
                parts.append(
                    box(left, top, right - left, height, OUTCOME_COLOURS[outcome], f"{when}: {count:g} {name}")
                )
                bottom += count
    entries = [(o.replace("_", " "), OUTCOME_COLOURS[o], "") for o in OUTCOMES if o in seen]
    return tag("figure", legend(entries), picture("clients that were asked, by round", parts))


def histogram(
    values: Sequence[float],
    title: str,
    x_label: str,
    bins: Sequence[float],
    replies: Mapping[int, int] | None = None,
) -> Markup:
    """Draws how many clients have which value.

    Args:
        values: one for each client.
        title: of the picture.
        x_label: what the values are.
        bins: edges.
        replies: draws replies in their place: how many there are of each value.
    """
    what = "clients" if replies is None else "replies"
    weights = None if replies is None else [replies[int(value)] for value in values]
    counts, edges = np.histogram(values, bins, weights=weights)
    frame = Frame((float(edges[0]), float(edges[-1])), (0, float(max(counts.max(), 1))))
    parts = [frame.y_axis(what, whole_ticks(*frame.y)), frame.x_axis(x_label)]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            left, right, top = frame.across(low) + 0.5, frame.across(high) - 0.5, frame.down(float(count))
            said = f"{low:g} to {high:g}: {count} {what}"
            parts.append(box(left, top, right - left, frame.floor - top, BLUE, said))
    return tag("figure", tag("figcaption", title), picture(title, parts))


def split_sizes(split: Split) -> Markup:
    """Draws how many clients have how many training examples."""
    low, high = min(split.sizes), max(split.sizes)
    step = max(1, -(-(high - low + 1) // 25))  # whole numbers of examples per bin, at most 25 bins
    bins = [edge - 0.5 for edge in range(low, high + step + 1, step)]
    looked_at = f" ({len(split.sizes)} looked at)" if len(split.sizes) < split.num_clients else ""
    title = f"Sizes of the clients, median {np.median(split.sizes):g}{looked_at}"
    return histogram(split.sizes, title, "training examples of a client", bins)


def split_labels(split: Split) -> Markup:
    """Draws the labels of the first clients: up to 20 classes as bars, more as a map; sequences have sizes only."""
    rows, names = split.rows, split.class_names
    shown = f"first {len(rows)} of {split.num_clients} clients" if len(rows) < split.num_clients else "every client"
    if rows[0].label_counts and len(names) > NAMED_COLOURS:
        counts = np.array([row.label_counts for row in rows]).T.tolist()
        return heat_map(f"Training examples of each class, {shown}", counts, "class", "client")
    frame = Frame((-0.6, len(rows) - 0.4), (0, float(max(row.train for row in rows) or 1)))
    labelled = bool(rows[0].label_counts)
    parts = [frame.y_axis("training examples"), frame.x_axis("client", whole_ticks(*frame.x))]
    for place, row in enumerate(rows):
        left, bottom = frame.across(place - 0.43), 0
        width = frame.across(place + 0.43) - left
        for label, count in enumerate(row.label_counts if labelled else [row.train]):
            if count:
                title = f"client {row.client}: {count}" + (f" of class {names[label]}" if labelled else "")
                top = frame.down(bottom + count)
                colour = CLASS_COLOURS[label] if labelled else BLUE
                parts.append(box(left, top, width, frame.down(bottom) - top, colour, title))
                bottom += count
    title = f"{'Labels' if labelled else 'Training examples'}, {shown}"
    entries = [(visible(name, NAME_LETTERS), CLASS_COLOURS[i], "") for i, name in enumerate(names)] if labelled else []
    return tag("figure", tag("figcaption", title), legend(entries), picture(title, parts))


def heat_map(title: str, counts: Sequence[Sequence[float]], row_label: str, column_label: str) -> Markup:
    """Draws a table of counts, each the darker the more it is of the largest; the first row is at the bottom."""
    table = np.array(counts, float)
    frame = _map_frame(table, 46.0)
    shade = np.ceil(SHADES * table / (table.max() or 1.0))
    parts = [frame.y_axis(row_label, whole_ticks(0, len(table) - 1), lined=False)]
    parts += [frame.x_axis(column_label, whole_ticks(0, table.shape[1] - 1)), *_cells(frame, shade)]
    return tag("figure", tag("figcaption", title), picture(title, parts, frame.height))


def confusion_map(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Markup:
    """Draws how often each class (rows) was taken for each: as shares of its examples, with the counts of few classes.

    Args:
        counts: [classes, classes], true ones down.
        names: of the classes.
    """
    table, shown = np.array(counts, float), [visible(name, NAME_LETTERS // 4) for name in names]
    letters = max(map(len, shown))
    frame = _map_frame(table, 26 + LETTER * letters, 30 + (LETTER * letters if letters > 2 else 8.0), falling=True)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    parts: list[Markup] = [*_cells(frame, np.ceil(SHADES * share))]
    for place, name in enumerate(shown):
        parts.append(word(frame.left - 6, frame.down(place) + 4, name, "end"))
        x, y = frame.across(place), frame.floor + 14
        turn = {"transform": f"rotate(-90 {x + 4:.1f} {y:.1f})"} if letters > 2 else {}
        parts.append(word(x + 4 if turn else x, y - 4 if turn else y, name, "end" if turn else "middle", **turn))
    for (row, column), count in np.ndenumerate(table if len(table) <= NUMBERED else np.zeros((0, 0))):
        if count:
            style = fill("var(--bg,#fff)" if share[row, column] > 0.5 else FOREGROUND)
            parts.append(word(frame.across(column), frame.down(row) + 4, f"{count:g}", "middle", style=style))
    parts.append(word((frame.left + WIDTH - frame.right) / 2, frame.height - 4, "taken for", "middle"))
    middle = (frame.top + frame.floor) / 2
    parts.append(word(11, middle, "class", "middle", transform=f"rotate(-90 11 {middle:.1f})"))
    title = "Which class was taken for which, on the test set"
    return tag("figure", tag("figcaption", title), picture(title, parts, frame.height))


def reliability(bins: Sequence[tuple[float, float]]) -> Markup:
    """Draws how often predictions were right against how sure the model was of them: on the line they can be believed.

    Args:
        bins: confidence and accuracy of each bin that has predictions.
    """
    frame = Frame((0, 100), (0, 100), height=280)
    sure, right = ([100 * value for value in values] for values in zip(*bins, strict=True))
    titles = [f"{s:.0f} % sure, {r:.0f} % right" for s, r in zip(sure, right, strict=True)]
    lines = [
        Line("as sure as right", (0, 100), (0, 100), FAINT, "4 4"),
        Line("model", sure, right, BLUE, titles=titles),
    ]
    inside = [frame.y_axis("right, %"), frame.x_axis("how sure the model is, %"), draw_lines(frame, lines)]
    title = "How far its confidence can be believed"
    return tag("figure", tag("figcaption", title), picture(title, inside, frame.height))


def _map_frame(table: np.ndarray, left: float, bottom: float = 36.0, falling: bool = False) -> Frame:
    """Returns the frame of a map whose cells are no higher than wide; rows fall from the top, or rise."""
    down, across = table.shape
    height = 10 + bottom + (WIDTH - left - 12) * min(down / across, 1.0)
    y = (down - 0.5, -0.5) if falling else (-0.5, down - 0.5)
    return Frame((-0.5, across - 0.5), y, left=left, bottom=bottom, height=height)


def _cells(frame: Frame, shade: np.ndarray) -> Iterator[Markup]:
    """Yields the cells of a map, those of one shade at once, and its edge."""
    wide = frame.across(1) - frame.across(0)
    high = abs(frame.down(1) - frame.down(0))
    for level in range(1, SHADES + 1):
        corners = ((frame.across(x) - wide / 2, frame.down(y) - high / 2) for y, x in np.argwhere(shade == level))
        path = "".join(f"M{x:.1f} {y:.1f}h{wide:.2f}v{high:.2f}h-{wide:.2f}z" for x, y in corners)
        if path:
            yield tag("path", d=path, style=f"fill:{BLUE};fill-opacity:{level / SHADES:.2f}")
    edge = f"M{frame.left:.1f} {frame.top:.1f}H{WIDTH - frame.right:.1f}V{frame.floor:.1f}H{frame.left:.1f}z"
    yield tag("path", d=edge, style="fill:none;stroke:currentColor;stroke-opacity:.3")
