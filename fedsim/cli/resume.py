"""`fedsim resume`: goes on with a run that has not ended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.experiment import run_one


def resume(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(help="Folder of a run that was interrupted, killed or has failed.")],
) -> None:
    """Go on with a run from its last checkpoint, to the same result as if it had never stopped.

    Its engine may be another one; everything else is as it was, the data too. A run without a checkpoint starts anew.

    Example: fedsim resume runs/20261121-101500-fedavg-digits engine=ray engine.workers=2
    """
    from fedsim.report.terminal import console
    from fedsim.runs.recorded import settings_of_run
    from fedsim.settings.compose import check_address, on_engine
    from fedsim.settings.permissions import keep_out

    keep_out(run)
    settings = on_engine(settings_of_run(run), ctx.args)
    check_address(settings, ctx.args, str(run / "config.yaml"))
    if (run / "summary.json").exists():
        console().say(f"{run} has finished: {_completed(run)}")
        return
    run_one(settings, run)


def _completed(run: Path) -> str:
    """Does the last steps of a run that was killed before them; says what it did."""
    from fedsim.report.files import read_summary
    from fedsim.report.page import has_page, write_page
    from fedsim.report.place import RESERVE, remove_unfinished
    from fedsim.runs.checkpoint import Checkpoints

    read_summary(run)
    remove_unfinished(run)
    (run / RESERVE).unlink(missing_ok=True)
    Checkpoints(run, None).keep(1)
    if has_page(run):
        return "nothing is left to do"
    return f"only its page was missing, {write_page(run)}"
