"""The terminal, on which a text from outside is only a text; every command prints here."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from devices.texts import visible, visible_lines

CELL_LETTERS = 400  # of a line in a cell; commands and paths are the longest
NAME_WIDTH = 24  # columns that a column of text needs at most: what is longer may be broken
LEAST_WIDTH = 8  # columns that rich leaves a column of text at least, so that its words are not broken to letters
EDGE, BETWEEN = 1, 3  # columns that a frame takes: once, and for each column
BAR_WIDTH = 40  # columns
NUMBER = re.compile(r"(\d) (?=\S)")
PIPED_WIDTH = 100_000  # of what is not printed to a terminal: nothing is shrunk there


class PlainConsole(Console):
    """A terminal on which a text is only a text: no markup, no emoji names, no control characters."""

    def print(self, *objects: Any, **how: Any) -> None:
        """Prints as rich does, with what cannot be seen written as escapes, and wide tables in parts."""
        if len(objects) == 1 and isinstance(objects[0], PlainTable):
            for part in objects[0].parts(self.width):
                below, part.caption = part.caption, None  # rich would fold it to the width of the table
                super().print(part, **how)
                if below:
                    self.note(_unbroken(str(below), self.width))
            return
        super().print(*(visible_lines(o) if isinstance(o, str) else o for o in objects), **how)

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line, such as a path or a command, that only the terminal itself breaks."""
        self.print(text, style=style, highlight=False, soft_wrap=True)

    def note(self, text: str, style: str | None = None) -> None:
        """Prints a text that is broken between words where the line ends, as below a table."""
        self.print(text, style=style, highlight=False)

    def indented(self, text: str, indent: int = 2) -> None:
        """Prints the lines of a text further to the right, broken between words where the line ends."""
        for line in visible_lines(text).split("\n"):
            own = indent + len(line) - len(line.lstrip())
            for part in textwrap.wrap(line.strip(), max(self.width - own, NAME_WIDTH), break_on_hyphens=False) or [""]:
                self.say((" " * own + part).rstrip())

    def pairs(self, rows: Iterable[tuple[str, str]], indent: int = 0, most: int = NAME_WIDTH) -> None:
        """Prints names and, beside each, a text that is broken between words.

        Args:
            rows: the names with their texts.
            indent: columns to the left of them.
            most: columns of the names; a longer one has a line of its own.
        """
        rows = [(visible(name), visible(text)) for name, text in rows]
        column = indent + 2 + min(max((cell_len(name) for name, _ in rows), default=0), most)
        for name, text in rows:
            lines = textwrap.wrap(text, max(self.width - column, NAME_WIDTH), break_on_hyphens=False) or [""]
            name = " " * indent + name
            if cell_len(name) + 2 > column:
                self.say(name)
            else:
                lines[0] = name + " " * (column - cell_len(name)) + lines[0]
            for number, line in enumerate(lines):
                self.say((line if line.startswith(name) and not number else " " * column + line).rstrip())


class PlainTable(Table):
    """A table whose cells are only texts; a long one is shortened.

    Where it is wider than the terminal, it is printed in parts that each begin with its first column: no name of a row
    is ever left out, and no unit cut.

    Args:
        headings: of its columns.
        left: those of text, which start at the left and may be broken; the others are figures, to the right.
        title: above it.
        same_below: columns that are the same in all rows go below it, as a line; names and scores (the first two) stay.
    """

    def __init__(
        self,
        headings: Sequence[str],
        left: Collection[str] = (),
        title: str | None = None,
        caption: str | None = None,
        same_below: bool = False,
    ):
        super().__init__(title=title, caption=caption, header_style="bold")
        self.headings, self.left, self.same_below = list(headings), left, same_below
        self.lines: list[tuple[list[RenderableType | None], dict[str, Any]]] = []
        for name in headings:
            of_text = name in left
            self.add_column(
                visible_lines(name, CELL_LETTERS),
                justify="left" if of_text else "right",
                overflow="fold",
                no_wrap=not of_text,
                min_width=LEAST_WIDTH if of_text else None,
            )

    def add_row(self, *cells: RenderableType | None, **how: Any) -> None:
        """Adds a row as rich does."""
        shown = [visible_lines(c, CELL_LETTERS) if isinstance(c, str) else c for c in cells]
        self.lines.append((shown, how))
        super().add_row(*shown, **how)

    def add_section(self) -> None:
        """Draws a line below the last row."""
        if self.lines:
            self.lines[-1][1]["end_section"] = True
        super().add_section()

    def parts(self, width: int) -> list[PlainTable]:
        """Returns tables that together say the same, each as narrow as this if its own columns allow it."""
        moved = [n for n in range(2, len(self.headings)) if self.same_below and self._is_same(n)]
        shown = [n for n in range(len(self.headings)) if n not in moved]
        notes = [f"{_in_line(self.headings[n])}: {self._text(self.lines[0][0], n)}" for n in moved]
        caption = "\n".join([*([str(self.caption)] if self.caption else []), *([", ".join(notes)] if notes else [])])
        groups: list[list[int]] = [[]]
        taken = first = EDGE + self._needed(0)
        for number in shown[1:]:
            needed = self._needed(number)
            if groups[-1] and taken + needed > width:
                groups.append([])
                taken = first
            groups[-1].append(number)
            taken += needed
        return [
            self._only([0, *group], caption or None if group == groups[-1] else None, group == groups[0])
            for group in groups
        ]

    def _only(self, columns: Sequence[int], caption: str | None, is_first: bool) -> PlainTable:
        """Returns the table of some columns."""
        title = self.title if is_first else None
        part = PlainTable([self.headings[n] for n in columns], self.left, str(title) if title else None, caption)
        part.show_header, part.box, part.show_lines = self.show_header, self.box, self.show_lines
        for cells, how in self.lines:
            part.add_row(*(cells[n] if n < len(cells) else None for n in columns), **how)
        return part

    def _is_same(self, column: int) -> bool:
        """Whether all of several rows have the same text there."""
        return len(self.lines) > 1 and len({self._text(cells, column) for cells, _ in self.lines}) == 1

    def _text(self, cells: Sequence[RenderableType | None], column: int) -> str:
        return str(cells[column] or "") if column < len(cells) else ""

    def _needed(self, column: int) -> int:
        """Returns how wide a column must be."""
        texts = [self.headings[column], *(self._text(cells, column) for cells, _ in self.lines)]
        widest = max(cell_len(line) for text in texts for line in [*text.splitlines(), ""])
        return BETWEEN + (min(max(widest, LEAST_WIDTH), NAME_WIDTH) if self.headings[column] in self.left else widest)


def _unbroken(text: str, width: int) -> str:
    """Returns a text in lines of a width, none of which ends between a number and its unit."""
    glued = NUMBER.sub("\\1\N{NO-BREAK SPACE}", text)
    lines = (textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in glued.split("\n"))
    return "\n".join(part for wrapped in lines for part in wrapped or [""]).replace("\N{NO-BREAK SPACE}", " ")


def _in_line(heading: str) -> str:
    return " ".join(heading.split())


def console() -> PlainConsole:
    """Returns the terminal that every command prints to; what is piped is as wide as it needs to be, or COLUMNS."""
    made = PlainConsole(markup=False, emoji=False)
    if made.is_terminal or "COLUMNS" in os.environ:
        return made
    return PlainConsole(markup=False, emoji=False, width=PIPED_WIDTH)


def table(*columns: str, left: Collection[str] = (), title: str | None = None, same_below: bool = False) -> PlainTable:
    """Returns an empty table.

    Args:
        columns: their headings.
        left: those of text, which start at the left and may be broken; the others are figures, to the right.
        title: above the table.
        same_below: columns that are the same in all rows go below it, as a line; names and scores (the first two) stay.
    """
    return PlainTable(columns, left, None if title is None else visible_lines(title, CELL_LETTERS), None, same_below)


class PlainBar(BarColumn):
    """A bar whose missing part is seen without colours too, where rich leaves a gap."""

    def render(self, task: Task) -> Any:
        """Draws the bar of a task."""
        if "NO_COLOR" not in os.environ:
            return super().render(task)
        share = min(1.0, task.completed / task.total) if task.total else 0.0
        width = self.bar_width or BAR_WIDTH
        return Text("━" * round(share * width) + "·" * (width - round(share * width)))


class PlainProgress(Progress):
    """A bar that goes when the work is done and leaves nothing in files and pipes, where it is not drawn.

    Args:
        columns: what it shows; rich's usual ones when none are given.
        shown: where it goes.
    """

    def __init__(self, *columns: str | ProgressColumn, shown: Console):
        usual = (TextColumn("{task.description}"), PlainBar(), TaskProgressColumn(), TimeRemainingColumn())
        super().__init__(*(columns or usual), console=shown, transient=True, disable=not shown.is_terminal)

    def stop(self) -> None:
        """Ends it; older versions of rich would print an empty line where there was none."""
        if not self.disable:
            super().stop()


def work_bar(shown: PlainConsole) -> Progress:
    """Returns rich's usual bar."""
    return PlainProgress(shown=shown)
