"""`fedsim report`: the page of a run, written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.options import check_folder_place


def report(run: Annotated[Path, typer.Argument(help="Folder of the run.")]) -> None:
    """Write the page of a run anew, as far as it is: report.html in its folder, which needs nothing else.

    Example: fedsim report runs/20261121-101500-fedavg-digits
    """
    from fedsim.report.page import write_page
    from fedsim.report.terminal import console
    from fedsim.runs.recorded import settings_of_run

    settings_of_run(run)
    check_folder_place("RUN", run)
    console().say(f"page: {write_page(run)}")
