"""A page as HTML that needs nothing else: a sentence that answers, figures, tables, pictures and commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from markupsafe import Markup

from devices.texts import visible, visible_lines
from fedsim.report.page_template import HTML

CELL_LETTERS = 100  # of a text in a table
WIDE = (4, 5, 3)  # cards beside each other on a wide screen, the first that leaves none alone


@dataclass(frozen=True)
class Table:
    """Rows of texts under a header; the first column stands to the left.

    Attributes:
        links: of the rows, an address of each first cell; empty where it leads nowhere.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    links: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """A section of a page.

    Attributes:
        pictures: elements, beside each other where there is room.
        legend: an element above them, for all.
        note: what to know when reading it.
    """

    title: str
    pictures: Sequence[Markup] = ()
    tables: Sequence[Table] = ()
    note: str = ""
    legend: str = ""


@dataclass(frozen=True)
class Page:
    """What a page says, in its order.

    Attributes:
        mark: tells of what it was made.
        where: the folder.
        answer: the first sentence.
        failure: why what was run did not end; empty where it did.
        prices: on how far prices are known, and whether that is a warning.
        figures: cards of a name, a figure, and what it is of.
        commands: what each does, and its line.
        files: beside the page, and what each holds.
        details: texts that are unfolded.
        made_by: versions.
    """

    title: str
    mark: str
    where: str
    answer: str
    parts: Sequence[Part]
    failure: str = ""
    warnings: Sequence[str] = ()
    lines: Sequence[str] = ()
    prices: tuple[str, bool] | None = None
    figures: Sequence[tuple[str, str, str]] = ()
    commands: Sequence[tuple[str, str]] = ()
    files: Sequence[tuple[str, str]] = ()
    details: Sequence[tuple[str, str]] = ()
    made_by: str = ""

    def as_html(self) -> str:
        """Returns the whole page; every text of it is escaped."""
        wide = next((n for n in WIDE if not len(self.figures) % n), None)
        wide = wide or next((n for n in WIDE if len(self.figures) % n > 1), WIDE[0])
        return visible_lines(_template().render(vars(self) | {"wide": wide}))


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = partial(visible, most=CELL_LETTERS)
    return environment.from_string(HTML)
