"""`fedsim resume`: goes on with a run that has not ended."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.experiment import run_one


def resume(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(help="Folder of a run that was interrupted or has failed; or a finished one.")],
    changed_code: Annotated[
        bool, typer.Option("--changed-code", help="Go on where own code is not what the run was begun with.")
    ] = False,
) -> None:
    """Go on with a run from its last checkpoint, to the same result as if it had never stopped.

    A finished run goes on to more rounds with rounds=N. Its engine may be another one; everything else is as it was,
    the data and own code too. A run without a checkpoint starts anew.

    Example: fedsim resume runs/20261121-101500-fedavg-digits engine=ray engine.workers=2

    Example: fedsim resume runs/20261121-101500-fedavg-digits rounds=200
    """
    from fedsim.report.terminal import console
    from fedsim.runs.experiment import resumed
    from fedsim.runs.own_code import ChangedCodeError

    try:
        settings = resumed(run, ctx.args, changed_code)
    except ChangedCodeError as error:
        if not sys.stdin.isatty():
            raise
        typer.confirm(f"{error}; go on?", abort=True)
        settings = resumed(run, ctx.args, changed_code=True)
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
    from fedsim.runs.recorded import settings_of_run
    from fedsim.runs.writer import kept_at_the_end
    from fedsim.settings.run_settings import RunSettings

    read_summary(run)
    remove_unfinished(run)
    (run / RESERVE).unlink(missing_ok=True)
    Checkpoints(run, None).keep(kept_at_the_end(RunSettings.of(settings_of_run(run))))
    if has_page(run):
        return "nothing is left to do"
    return f"only its page was missing, {write_page(run)}"
