"""What a terminal of any width shows of a table: every name of a row, every unit."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len

from fedsim.report.terminal import PlainBar, PlainConsole, PlainProgress, console, table

ROWS = {
    "FedAvg": ("42.99 ± 0.21", "", "3.50 min", "5.40 kJ", "231.42 MB", "150"),
    "NaiveMix 0.1, groups of 5": ("39.78 ± 0.59", "-3.21 *", "5.44 min", "6.19 kJ", "749.20 MB", "150"),
    "FedMix 0.05": ("40.24 ± 0.54", "-2.76 *", "5.49 min", "8.31 kJ", "236.60 MB", "150"),
}


def shown(capsys: pytest.CaptureFixture[str], width: int | None, rows: dict = ROWS) -> list[str]:
    """The lines of a table in a terminal of some width; None: piped."""
    made = console() if width is None else PlainConsole(markup=False, emoji=False, width=width)
    headings = ("accuracy %", "difference", "time", "energy", "traffic", "rounds")
    printed = table("arm", *headings, left=("arm",), title="FedMix and its baselines", same_below=True)
    for name, cells in rows.items():
        printed.add_row(name, *cells)
    made.print(printed)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 120, None])
def test_no_width_loses_a_name_or_cuts_a_unit(
    capsys: pytest.CaptureFixture[str], width: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = shown(capsys, width)
    text = "\n".join(lines)
    assert all(cell_len(line) <= (width or 10**6) for line in lines)
    assert all(cell in text for cells in ROWS.values() for cell in cells)
    parts = text.count("┃ arm")
    assert parts >= 1
    assert text.count("FedAvg") == text.count("FedMix 0.05") == parts
    assert parts == 1 if width in (120, None) else parts > 1


@pytest.mark.parametrize("width", range(30, 90))
def test_short_names_leave_no_figure_cut(capsys: pytest.CaptureFixture[str], width: int):
    """A column of text is 8 columns wide where its texts are shorter."""
    lines = shown(capsys, width, dict(zip("ABC", ROWS.values(), strict=True)))
    assert all(cell_len(line) <= width for line in lines)
    assert all(cell in "\n".join(lines) for cells in ROWS.values() for cell in cells)
    assert all(line.rstrip()[-1] in "┓┃┩│┘┤" for line in lines if line[:1] in "┏┃┡│└├")


def test_what_is_the_same_in_all_rows_stands_below(capsys: pytest.CaptureFixture[str]):
    lines = shown(capsys, 120)
    assert lines[-1].strip() == "rounds: 150"
    assert not any("150 │" in line for line in lines)
    equal = shown(capsys, 120, {name: ("42.00", *cells[1:]) for name, cells in ROWS.items()})
    assert "".join(equal).count("42.00 │") == 3  # the score itself stays
    one = shown(capsys, 120, {"FedAvg": ROWS["FedAvg"]})
    assert "150 │" in "".join(one)  # of a single row nothing is the same


def test_what_is_piped_is_not_shrunk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    long = {"a" * 100: ROWS["FedAvg"], "b" * 90: ROWS["FedMix 0.05"]}
    text = "\n".join(shown(capsys, None, long))
    assert "a" * 100 in text
    assert "b" * 90 in text


def test_sections_and_titles_stay(capsys: pytest.CaptureFixture[str]):
    made = table("name", "first figure", "second figure", left=("name",), title="above")
    made.caption = "below"
    made.add_row("one", "1", "2")
    made.add_section()
    made.add_row("two", "3", "4")
    PlainConsole(markup=False, emoji=False, width=26).print(made)
    text = capsys.readouterr().out
    assert text.count("above") == text.count("below") == 1
    assert text.count("├") == 2  # the section, in both parts


def test_what_is_below_a_table_folds_where_the_terminal_ends(capsys: pytest.CaptureFixture[str]):
    made = table("name", "figure", left=("name",))
    made.caption = "a line below that is wider than the table"
    made.add_row("one", "1")
    PlainConsole(markup=False, emoji=False, width=60).print(made)
    assert capsys.readouterr().out.splitlines()[-1] == made.caption


@pytest.mark.parametrize("colours", [True, False])
def test_a_bar_has_no_gap(monkeypatch: pytest.MonkeyPatch, colours: bool):
    """Rich draws what is missing in a colour, or not at all."""
    if colours:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", "1")
    made = PlainConsole(markup=False, emoji=False, width=80, force_terminal=True, file=io.StringIO())
    with PlainProgress(PlainBar(), shown=made) as bar:
        bar.update(bar.add_task("", total=4), completed=1)
        bar.refresh()
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", made.file.getvalue())
    assert max(len(line.rstrip()) for line in re.split("[\r\n]", drawn)) == 40
    assert ("·" in drawn) is not colours


def test_names_stand_beside_texts_that_are_broken_between_words(capsys: pytest.CaptureFixture[str]):
    made = PlainConsole(markup=False, emoji=False, width=40)
    made.pairs([("a", "one two three four five six seven eight"), ("a" * 30, "nine")], indent=1, most=8)
    assert capsys.readouterr().out.splitlines() == [
        " a         one two three four five six",
        "           seven eight",
        " " + "a" * 30,
        "           nine",
    ]


@pytest.mark.parametrize("width", range(20, 60, 5))
def test_no_line_below_a_table_ends_between_a_number_and_its_unit(capsys: pytest.CaptureFixture[str], width: int):
    printed = table("arm", "score", left=("arm",))
    printed.add_row("one", "1")
    printed.caption = "time: 3.50 min, energy: 5.40 kJ, traffic: 231.42 MB, waiting: 12.5 s, memory: 3.1 GB, 150 rounds"
    PlainConsole(markup=False, emoji=False, width=width + 12).print(printed)
    lines = capsys.readouterr().out.splitlines()[5:]
    assert "".join("".join(lines).split()) == "".join(printed.caption.split())
    assert not any(re.search(r"\d\s*$", line) for line in lines)
    assert "\N{NO-BREAK SPACE}" not in "".join(lines)
