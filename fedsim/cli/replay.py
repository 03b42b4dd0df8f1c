"""`fedsim replay`: one client of one round, run again alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedsim.runs.experiment import build_engine


def replay(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    round_number: Annotated[int, typer.Option("--round", help="Round, from 1.", min=1, max=10**7)],
    client: Annotated[int, typer.Option(help="Client id.", min=0, max=10**9)],
    changed_code: Annotated[
        bool, typer.Option("--changed-code", help="Run where own code is not what the run was begun with.")
    ] = False,
) -> None:
    """Run just one client of one round again, in this process, and print its metrics or its traceback.

    A client that stopped the run starts at once: what it was sent was kept. For any other, the rounds before are run
    again first.

    Example: fedsim replay runs/20261121-101500-fedavg-digits --round 3 --client 17
    """
    from rich.progress import track

    from fedsim.report.terminal import console
    from fedsim.runs.own_code import check_code
    from fedsim.runs.replay import instruction_of, settings_of
    from fedsim.runs.replay import replay as again
    from fedsim.settings.permissions import keep_out

    keep_out(run)
    settings = settings_of(run)
    if not changed_code:
        check_code(run, settings)
    shown, engine = console(), build_engine(settings)
    bar = iter(track(range(round_number), "rounds before", console=shown, transient=True, disable=round_number == 1))
    instruction = instruction_of(settings, engine, run, round_number, client, lambda _: next(bar, None))
    result = again(settings, engine, instruction)
    if result.traceback:
        print(result.traceback, end="", file=sys.stderr)
    reason = f": {result.reason}" if result.reason else ""
    shown.say(f"client {client} in round {round_number}: {result.outcome}{reason}")
    for name, value in result.metrics.items():
        shown.say(f"  {name} {value:.6g}")
    raise typer.Exit(0 if result.outcome == "completed" else 1)
