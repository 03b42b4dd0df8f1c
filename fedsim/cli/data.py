"""`fedsim data list` and `describe`: what there is to learn from, and how it is split over clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.options import MAX_COUNT, check_picture


def list_data() -> None:
    """List the workloads, and whether their data are here.

    Example: FEDSIM_DATA=/data/bundles fedsim data list
    """
    from fedsim.report.terminal import console
    from fedsim.report.text import workload_table
    from fedsim.settings.catalogue import list_workloads

    console().print(workload_table(list_workloads()))


def describe(
    ctx: typer.Context,
    picture: Annotated[Path, typer.Option(help="Where the picture of the split goes.")] = Path("split.png"),
    limit: Annotated[int, typer.Option(help="Clients in the table.", min=1, max=MAX_COUNT)] = 20,
) -> None:
    """Show how the examples are split over clients, as a table and a picture; takes the overrides of `fedsim run`.

    Example: fedsim data describe workload=digits partition=dirichlet partition.alpha=0.1 --picture split.png
    """
    import json

    from fedsim.report.plots.split import split_picture
    from fedsim.report.terminal import console
    from fedsim.report.text import split_table
    from fedsim.settings.build import build_world
    from fedsim.settings.compose import compose
    from fedsim.workloads.describe import split_table as split_rows
    from fedsim.workloads.describe import summary_lines

    check_picture(picture)
    settings = {**compose(ctx.args), "cohort": 1, "evaluate_clients": 0}  # a split of any size can be looked at
    workload = build_world(json.dumps(settings)).workload
    split_picture(workload, picture)
    shown = console()
    shown.print(split_table(split_rows(workload, limit), workload.num_clients))
    for line in summary_lines(workload):
        shown.say(line)
    shown.say(f"picture: {picture}")
