"""The terminal, on which a text from outside is only a text; every command prints here."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import Progress, ProgressColumn
from rich.table import Table

from devices.texts import visible_lines

CELL_LETTERS = 400  # of a line in a cell; commands and paths are the longest


class PlainConsole(Console):
    """A terminal on which a text is only a text: no markup, no emoji names, no control characters."""

    def print(self, *objects: Any, **how: Any) -> None:
        """Prints as rich does, with what cannot be seen written as escapes."""
        super().print(*(visible_lines(o) if isinstance(o, str) else o for o in objects), **how)

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line, such as a path or a command, that only the terminal itself breaks."""
        self.print(text, style=style, highlight=False, soft_wrap=True)

    def note(self, text: str, style: str | None = None) -> None:
        """Prints a text that is broken between words where the line ends, as below a table."""
        self.print(text, style=style, highlight=False)


class PlainTable(Table):
    """A table whose cells are only texts; a long one is shortened."""

    def add_row(self, *cells: RenderableType | None, **how: Any) -> None:
        """Adds a row as rich does."""
        super().add_row(*(visible_lines(c, CELL_LETTERS) if isinstance(c, str) else c for c in cells), **how)


def console(piped_width: int | None = None) -> PlainConsole:
    """Returns the terminal that every command prints to.

    Args:
        piped_width: columns where the output goes to a file or a pipe and COLUMNS does not say; rich's 80 when None.
    """
    made = PlainConsole(markup=False, emoji=False)
    if piped_width is None or made.is_terminal or "COLUMNS" in os.environ:
        return made
    return PlainConsole(markup=False, emoji=False, width=piped_width)


def table(*columns: str, left: Collection[str] = (), title: str | None = None) -> PlainTable:
    """Returns an empty table.

    Args:
        columns: their headings.
        left: those of text, which start at the left and may be broken; the others are figures, to the right.
        title: above the table.
    """
    made = PlainTable(title=None if title is None else visible_lines(title, CELL_LETTERS), header_style="bold")
    for name in columns:
        made.add_column(
            visible_lines(name, CELL_LETTERS),
            justify="left" if name in left else "right",
            overflow="fold",
            no_wrap=name not in left,
            min_width=8 if name in left else None,
        )
    return made


class PlainProgress(Progress):
    """A bar that goes when the work is done and leaves nothing in files and pipes, where it is not drawn.

    Args:
        columns: what it shows; rich's usual ones when none are given.
        shown: where it goes.
    """

    def __init__(self, *columns: str | ProgressColumn, shown: Console):
        super().__init__(*columns, console=shown, transient=True, disable=not shown.is_terminal)

    def stop(self) -> None:
        """Ends it; older versions of rich would print an empty line where there was none."""
        if not self.disable:
            super().stop()


def work_bar(shown: PlainConsole) -> Progress:
    """Returns rich's usual bar."""
    return PlainProgress(shown=shown)
