"""The pages can be read: short, their tables are tables, their links lead somewhere, their commands are commands."""

from __future__ import annotations

import itertools
import re
import shlex
import unicodedata
from pathlib import Path

import pytest
from page_files import write_all

from fedsim.settings.groups import options
from fedsim.study.spec import read_study

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FOLDERS = ("clients", "configs", "devices", "fedsim", "strategies", "tests")
PAGES = [README, *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md")))]
STUDY_PAGES = [path for path in PAGES if path.parent.name == "study" and path.stem != "README"]
MOST_BYTES = 14_000
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


def test_the_readme_is_short():
    assert len(README.read_bytes()) < MOST_BYTES


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_render_and_links_lead_to_files(page: Path):
    text = page.read_text(encoding="utf-8")
    assert faults(text) == []
    prose = "\n".join(prose_and_code(text)[0])
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", prose):
        assert not link or (page.parent / link).exists(), link


def test_the_pages_have_tables_at_all():
    lines = [prose_and_code(page.read_text(encoding="utf-8")) for page in PAGES]
    assert sum(len(blocks(prose, "|")) for prose, _ in lines) > 15
    assert sum(len(blocks(code, BOX)) for _, code in lines) > 4


def commands(page: Path) -> list[list[str]]:
    """The words of every `fedsim` command in the fenced blocks of a page."""
    _, code = prose_and_code(page.read_text(encoding="utf-8"))
    lines = (line.removeprefix("$ ").partition("  #")[0].strip() for line in code)
    return [shlex.split(line) for line in lines if line.startswith("fedsim ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_on_a_page_is_one(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its options are known, and its settings compose, with the options that the page itself writes; nothing is run."""
    import typer.main

    from fedsim.cli.main import app
    from fedsim.settings.compose import compose

    write_all(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for _, *words in commands(page):
        command = typer.main.get_command(app)
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, words
            command = command.commands[words.pop(0)]
        known = {name for option in command.params for name in option.opts} | {"-m", "--config-path", "--config-name"}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known | {"--cfg"}, words
        if command.name in ("run", "flwr", "describe") and not {"-m", "--config-path"} & set(words):
            compose([word for word in words if re.match(r"[^-/][^/]*=", word)])


@pytest.mark.parametrize("page", STUDY_PAGES, ids=lambda path: path.stem)
def test_a_study_page_is_of_its_study(page: Path):
    """What surrounds the table is what the study's file says today; with other settings, up to the command."""
    study = read_study(page.stem.partition("-")[0])
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {study.title}\n\n{study.question.strip()}\n\n```\nfedsim study {study.name}")
    if page.stem == study.name:
        assert text.endswith(f"\n\n{study.reading.strip()}\n")
    prose, _ = prose_and_code(text)
    tables = blocks(prose, "|")
    assert len(tables) >= (1 if study.target is None else 2)
    for table in tables:
        assert len(cells(table[0])) <= 8
        labels = [re.sub(r" \(\d+ of \d+ seeds\)", "", row.split("|")[1].strip()) for row in table[2:]]
        assert labels == [arm.label for arm in study.arms]


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
