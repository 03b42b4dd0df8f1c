"""Makes and saves all pictures, so that no text in one is taken for a formula."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from devices.texts import NAME_LETTERS, visible, visible_lines
from devices.writing import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

FORMATS = (".png", ".svg", ".pdf")
LINE_LETTERS, LINES = 120, 8  # of a text in a picture, so that room is left for the axes


def new_figure(width: float, height: float, dpi: float | None = None) -> Figure:
    """Makes an empty figure of so many inches that no window and no other figure knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, file: str | Path | IO[bytes], **how: Any) -> None:
    """Writes a figure with every text as it stands, apart from the numbers at the axes.

    Args:
        figure: any, also one that was not made here.
        file: where it goes; a path's ending says the format, PNG where there is none, and what was there by that
            name stays until the whole picture is.
        how: further arguments of matplotlib's `savefig`.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    if isinstance(file, str | Path):
        drawn = io.BytesIO()
        save_figure(figure, drawn, **{"format": Path(file).suffix.lstrip(".").lower() or "png", **how})
        write_atomic(Path(file), drawn.getvalue())
        return
    take_literally(figure)
    with box_missing_letters(), _laid_out(figure, how.get("format", "png")):
        figure.savefig(file, **how)


@contextmanager
def _laid_out(figure: Figure, kind: str) -> Iterator[None]:
    """Lays the figure out beforehand: matplotlib would draw all of it twice, the first time for its layout alone."""
    engine = figure.get_layout_engine()
    if engine is None or figure.canvas.get_default_filetype() != kind:
        yield
        return
    engine.execute(figure)
    figure.set_layout_engine(None)
    try:
        yield
    finally:
        figure.set_layout_engine(engine)


@contextmanager
def box_missing_letters() -> Iterator[None]:
    """Draws a box for each letter that the font lacks, without a warning: the box is seen, warnings are not read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Glyph .* missing from|Matplotlib currently does not support)")
        yield


def legend_label(name: object) -> str:
    """Returns a name for a legend, shortened; with a space in front where matplotlib would leave it out."""
    shown = visible(name, NAME_LETTERS)
    return shown if shown[:1] not in ("", "_") else f" {shown}"


def take_literally(figure: Figure) -> None:
    """Switches formulas off in all texts but the numbers at the axes; control characters and long lines go."""
    from matplotlib.text import Text

    numbers = {id(text) for text in _numbers(figure)}
    for text in figure.findobj(Text):
        if isinstance(text, Text) and id(text) not in numbers:
            text.set_parse_math(False)
            lines = visible_lines(text.get_text(), LINE_LETTERS).split("\n")
            text.set_text("\n".join(lines[:LINES]))


def _numbers(figure: Figure) -> Iterator[Text]:
    """Yields the texts that an axis makes of numbers, such as powers of ten."""
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            yield axis.get_offset_text()
            for formatter, ticks in (
                (axis.get_major_formatter(), axis.get_major_ticks()),
                (axis.get_minor_formatter(), axis.get_minor_ticks()),
            ):
                if isinstance(formatter, ScalarFormatter | LogFormatter):
                    for tick in ticks:
                        yield tick.label1
                        yield tick.label2
