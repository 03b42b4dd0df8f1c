"""The README can be read: its tables are tables, and every method has a row."""

from __future__ import annotations

import itertools
import re
import unicodedata
from pathlib import Path

import pytest

from fedsim.settings.groups import options

README = Path(__file__).parent.parent / "README.md"
BOX = "┏┡├└┃│"


def prose_and_code(text: str) -> tuple[list[str], list[str]]:
    """The lines outside and inside of fenced blocks; each list has an empty line where the other one's are."""
    prose, code, fenced = [], [], False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        prose.append("" if fenced or fence else line)
        code.append(line if fenced and not fence else "")
    return prose, code


def blocks(lines: list[str], first: str) -> list[list[str]]:
    """Runs of neighbouring lines that begin with one of the characters."""
    groups = itertools.groupby(lines, key=lambda line: line.startswith(tuple(first)))
    return [list(group) for is_table, group in groups if is_table]


def cells(row: str) -> list[str]:
    return re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "code", row))[1:-1]


def width(line: str) -> int:
    """In a terminal's columns."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def faults(text: str) -> list[str]:
    """What is wrong with the tables of a page; empty where they render."""
    found, (prose, code) = [], prose_and_code(text)
    for table in blocks(prose, "|"):
        counts = {len(cells(row)) for row in table}
        if len(table) < 3 or not re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", table[1]):
            found.append(f"no table, or one that a blank line has cut off: {table[0]}")
        elif len(counts) > 1 or not all(row.rstrip().endswith("|") for row in table):
            found.append(f"rows of {sorted(counts)} columns below {table[0]}")
    for box in blocks(code, BOX):
        if len({width(line) for line in box}) > 1 or box[0][0] != "┏" or box[-1][0] != "└":
            found.append(f"a broken box: {box[0]}")
        counts = {len(re.split("[┃│]", line)) for line in box if line[0] in "┃│"}
        rules = {len(re.split("[┳╇┴┼╋╈]", line)) + 2 for line in box if line[0] not in "┃│"}
        if counts != rules:
            found.append(f"a box of {sorted(counts | rules)} columns: {box[0]}")
    return found


def test_every_table_of_the_readme_renders():
    text = README.read_text(encoding="utf-8")
    assert faults(text) == []
    prose, code = prose_and_code(text)
    assert len(blocks(prose, "|")) > 3
    assert len(blocks(code, BOX)) > 3


@pytest.mark.parametrize(
    "text",
    [
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n| 3 | 4 |",
        "| a | b |\n|---|---|\n| 1 | 2 | 3 |",
        "| a | b |\n|---|---|\n| 1 | 2 ",
        "```\n┏━━━┳━━━┓\n┃ a ┃ b ┃\n┡━━━╇━━━┩\n│ 1 │ 22 │\n└───┴───┘\n```",
        "```\n┏━━━┳━━━┓\n┃ a ┃ b ┃\n┡━━━╇━━━┩\n\n│ 1 │ 2 │\n└───┴───┘\n```",
    ],
    ids=["blank line", "a column too many", "an open row", "a box too wide", "a box with a blank line"],
)
def test_broken_tables_are_found(text: str):
    assert faults(text)


def test_every_method_has_one_row_in_one_table():
    prose, _ = prose_and_code(README.read_text(encoding="utf-8"))
    (table,) = [t for t in blocks(prose, "|") if "`method=`" in t[0]]
    named = [name for row in table[2:] for name in re.findall(r"`(\w+)`", re.split(r"(?<!\\)\|", row)[1])]
    assert sorted(named) == sorted(options("method"))
