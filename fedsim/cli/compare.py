"""`fedsim compare`: finished runs, sweeps and studies side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.options import MAX_COUNT

if TYPE_CHECKING:
    from fedsim.report.terminal import PlainConsole
    from fedsim.study.results import Result


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, sweeps or studies; patterns with * too.")],
    target: Annotated[
        float | None, typer.Option(help="Value of the metric, e.g. 0.8: what it cost to reach it.", min=-1e12, max=1e12)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder; runs/<time>-compare when left out.")] = None,
    against: Annotated[str | None, typer.Option(help="Row to compare with, or how it begins; else the first.")] = None,
    last: Annotated[
        int | None,
        typer.Option(
            help="Evaluations that make a score; the last tenth of the rounds when left out.", min=1, max=MAX_COUNT
        ),
    ] = None,
) -> None:
    """Compare runs that are there: what differs, what each reached for how much time, energy and traffic.

    Runs that differ in their seed alone are one row. Differences are paired by seed, with 95 % intervals from three
    seeds on. The folder gets a page (comparison.html), the table as CSV and a picture.

    Example: fedsim compare runs/20261121-101500-sweep --target 0.8

    Example: fedsim compare runs/a runs/b --against fedavg
    """
    import math

    from fedsim.errors import ConfigError
    from fedsim.report.terminal import console
    from fedsim.study.compare import compare as compared

    if target is not None and math.isnan(target):
        raise ConfigError("--target must be a number, e.g. 0.8, got nan")
    result = compared(runs, last, against, target)
    show(result, place(out), console())


def place(out: Path | None) -> Path:
    """Makes the folder of a comparison.

    Raises:
        ConfigError: if it is taken or cannot be made.
    """
    from devices.writing import make_folders
    from fedsim.report.place import check_free, new_folder
    from fedsim.settings.folder_names import check_folder

    if out is None:
        return new_folder(Path("runs"), "compare", [])
    check_folder("--out", str(out))
    check_free(out, "--out ")
    make_folders(out)
    return out


def show(result: Result, folder: Path, shown: PlainConsole) -> None:
    """Prints a comparison and writes it into its folder."""
    from fedsim.report.plots.study import draw_study
    from fedsim.study.compare import NAME
    from fedsim.study.page import write_page
    from fedsim.study.results import write_result
    from fedsim.study.tables import result_table
    from fedsim.study.web_page import write_web_page

    for line in result.study.differs:
        shown.note(line)
    if result.study.left_out:
        shown.note(result.study.left_out)
    shown.print(result_table(result))
    write_result(result, {}, folder, NAME)
    write_page(result, {}, folder, f"{NAME}.md")
    draw_study(result, folder / f"{NAME}.png")
    shown.say(f"comparison: {folder} ({NAME}.md, .csv, .json, .png)")
    shown.say(f"page: {write_web_page(result, {}, folder, NAME)}")
