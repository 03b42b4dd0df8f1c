"""Draws the pictures of pages as SVG within their HTML: they take its font and colours, in the dark as well.

A picture is WIDTH units wide, about the pixels of a narrow screen, so that the same drawing is read there and on a wide
one, where pictures stand side by side. Colours are variables of the page; where there are none, such as in a notebook,
their defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape

from devices.texts import NAME_LETTERS, visible

Numbers = Sequence[float] | np.ndarray
WIDTH, HEIGHT = 420.0, 230.0
LETTERS = 120  # of a text in a picture
LETTER = 6.0  # units that one takes, on the average
MOST_POINTS = 150  # of a line: more are not seen
MOST_HOVERED = 120  # points of a picture that say their figures when pointed at
DASHES = ("", "6 3", "1.5 2.5")


def tag(name: str, *inside: str, **attributes: object) -> Markup:
    """Returns an element; every text that is no Markup is escaped, what cannot be seen in it too.

    Args:
        name: of the element.
        inside: its text and elements.
        attributes: `_` stands for `-`, and one at the end for nothing.
    """
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(_text(v))}"' for key, v in attributes.items())
    within = "".join(part if isinstance(part, Markup) else escape(visible(part, LETTERS)) for part in inside)
    return Markup(f"<{name}{given}>{within}</{name}>")


def _text(value: object) -> str:
    """Returns an attribute's value; a tenth of a unit is seen, less is not."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def fill(colour: str) -> str:
    """Returns the style of an area."""
    return f"fill:{colour}"


def word(x: float, y: float, text: str, anchor: str = "start", **attributes: object) -> Markup:
    """Returns a text on one line, its anchor at a place."""
    return tag("text", visible(text, 2 * NAME_LETTERS), x=x, y=y, text_anchor=anchor, **attributes)


def box(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> Markup:
    """Returns a rectangle that says its title when pointed at."""
    inside = [tag("title", title)] if title else []
    return tag("rect", *inside, x=x, y=y, width=width, height=height, style=fill(colour))


def picture(title: str, inside: Iterable[str], height: float = HEIGHT, width: float = WIDTH) -> Markup:
    """Returns a whole picture; its title is what is read aloud for it."""
    return tag(
        "svg",
        *inside,
        viewBox=f"0 0 {_text(width)} {_text(height)}",
        role="img",
        aria_label=visible(title),
        font_family="system-ui,sans-serif",
        font_size=11,
        fill="currentColor",
    )


def legend(entries: Iterable[tuple[str, str, str]]) -> Markup:
    """Returns the names of what is drawn, each behind a stroke of its colour and dashes."""
    items = []
    for name, colour, dash in entries:
        how = {"stroke_dasharray": dash} if dash else {}
        line = tag("line", x1=1, y1=5, x2=23, y2=5, stroke_width=3 if dash else 8, style=f"stroke:{colour}", **how)
        items.append(tag("li", tag("svg", line, viewBox="0 0 24 10", width=24, height=10, aria_hidden="true"), name))
    style = "list-style:none;display:flex;flex-wrap:wrap;gap:0 1rem;margin:.2rem 0;padding:0"
    return tag("ul", *items, class_="legend", style=style)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns round numbers between two, at most so many."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1, 2, 2.5, 5, 10, 20) if high // (power * f) - -(-low // (power * f)) < most)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def whole_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns the whole ones of `ticks`, for what is counted."""
    return [tick for tick in ticks(low, high, most) if tick == int(tick)]


@dataclass(frozen=True)
class Frame:
    """The part of a picture in which data are drawn.

    Attributes:
        x, y: the data's limits.
        left, right, top, bottom: room around it.
        height: of the whole picture.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 54.0
    right: float = 12.0
    top: float = 10.0
    bottom: float = 36.0
    height: float = HEIGHT

    def across(self, x: float) -> float:
        """Returns where a value of x is."""
        low, high = self.x
        return self.left + (x - low) / ((high - low) or 1.0) * (WIDTH - self.left - self.right)

    def down(self, y: float) -> float:
        """Returns where a value of y is."""
        low, high = self.y
        return self.height - self.bottom - (y - low) / ((high - low) or 1.0) * (self.height - self.top - self.bottom)

    @property
    def floor(self) -> float:
        """Returns the place of the lower edge."""
        return self.height - self.bottom

    def x_axis(
        self, label: str, at: Sequence[float] | None = None, text: Callable[[float], str] = "{:g}".format
    ) -> Markup:
        """Returns ticks with their numbers below the frame, and the axis' name."""
        places = ticks(*self.x) if at is None else at
        marks = [word(self.across(x), self.floor + 14, text(x), "middle") for x in places]
        name = word((self.left + WIDTH - self.right) / 2, self.floor + 30, label, "middle")
        return Markup().join([*marks, name])

    def y_axis(self, label: str, at: Sequence[float] | None = None, lined: bool = True) -> Markup:
        """Returns lines across the frame with their numbers, and the axis' name, which stands upright."""
        parts = []
        for y in ticks(*self.y) if at is None else at:
            there = self.down(y)
            stroke = {"stroke": "currentColor", "stroke_opacity": 0.16}
            if lined:
                parts.append(tag("line", x1=self.left, x2=WIDTH - self.right, y1=there, y2=there, **stroke))
            parts.append(word(self.left - 6, there + 4, f"{y:g}", "end"))
        middle = (self.top + self.floor) / 2
        parts.append(word(11, middle, label, "middle", transform=f"rotate(-90 11 {_text(middle)})"))
        return Markup().join(parts)


@dataclass(frozen=True)
class Line:
    """A line through points.

    Attributes:
        label: its name.
        x, y: of the points, [n] each; of them MOST_POINTS are drawn.
        titles: what each point says when it is pointed at.
        low, high: edges of a band around it, [n] each.
    """

    label: str
    x: Numbers
    y: Numbers
    colour: str
    dash: str = ""
    titles: Sequence[str] = ()
    low: Numbers = ()
    high: Numbers = ()
    entry: tuple[str, str, str] = field(init=False)  # of a legend

    def __post_init__(self) -> None:
        object.__setattr__(self, "entry", (self.label, self.colour, self.dash))


def limits(values: Iterable[float], room: float = 0.05) -> tuple[float, float]:
    """Returns the least and the most of finite values, with some room around them, but none below 0 where none is."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    more = room * ((high - low) or abs(high) or 1.0)
    return (max(0.0, low - more) if low >= 0 else low - more), high + more


def draw_lines(frame: Frame, lines: Sequence[Line], shade: float = 0.15) -> Markup:
    """Returns lines, the bands around them, and dots that say their figures."""
    bands, strokes, dots = [], [], []
    for line in lines:
        shown = spread(len(line.x), MOST_POINTS)
        if len(line.low):
            edge = [(line.x[i], line.high[i]) for i in shown] + [(line.x[i], line.low[i]) for i in reversed(shown)]
            style = f"{fill(line.colour)};fill-opacity:{shade:.2f}"
            bands.append(tag("path", d=_path(frame, edge) + "z", style=style))
        path = _path(frame, [(line.x[i], line.y[i]) for i in shown])
        how = {"stroke_dasharray": line.dash} if line.dash else {}
        style = f"fill:none;stroke:{line.colour};stroke-width:2;stroke-linejoin:round"
        strokes.append(tag("path", tag("title", line.label), d=path, style=style, **how))
        if len(line.titles):
            seen = len(line.x) <= 30
            for i in spread(len(line.x), MOST_HOVERED // len(lines)):
                style = fill(line.colour) + ("" if seen else ";opacity:0")
                place = {"cx": frame.across(line.x[i]), "cy": frame.down(line.y[i]), "r": 3 if seen else 6}
                dots.append(tag("circle", tag("title", line.titles[i]), style=style, **place))
    return Markup().join([*bands, *strokes, *dots])


def spread(count: int, most: int) -> list[int]:
    """Returns so many of the first whole numbers at most, evenly spaced, the last always."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _path(frame: Frame, points: Iterable[tuple[float, float]]) -> str:
    found = ((frame.across(x), frame.down(y)) for x, y in points if math.isfinite(x) and math.isfinite(y))
    return "M" + "L".join(f"{_text(x)} {_text(y)}" for x, y in found)
