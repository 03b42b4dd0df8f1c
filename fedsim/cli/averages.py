"""`fedsim data averages`: what a server would see of clients that share averages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.options import MAX_COUNT, check_picture


def averages(
    ctx: typer.Context,
    sizes: Annotated[str, typer.Option(help="Examples per average, separated by commas; all: one per client.")] = (
        "1,5,20,all"
    ),
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("averages.png"),
    clients: Annotated[int, typer.Option(help="Clients in the picture.", min=1, max=100)] = 5,
    looked_at: Annotated[int, typer.Option(help="Clients in the figures.", min=1, max=MAX_COUNT)] = 50,
) -> None:
    """Show what a server would see of clients that share averages, as a table and a picture; takes overrides.

    nearest: distance of an average to the closest example of its client, over the usual distance of two of its
    examples; 0 is the example itself.

    Example: fedsim data averages workload=digits --sizes 1,5,20,all --picture averages.png
    """
    import json

    from devices.units import size
    from fedsim.cli.options import parse_whole
    from fedsim.exchanges.averages import exposures
    from fedsim.report.plots.averages import averages_picture
    from fedsim.report.terminal import console, table
    from fedsim.settings.build import build_world
    from fedsim.settings.compose import compose
    from fedsim.workloads.classification import classification

    check_picture(picture)
    groups = [None if text.strip() == "all" else parse_whole("--sizes", text) for text in sizes.split(",")]
    settings = {**compose(ctx.args), "cohort": 1, "evaluate_clients": 0}
    world = build_world(json.dumps(settings))
    workload, seed = classification(world.workload), world.settings.seed
    found = exposures(workload, groups, looked_at, seed)
    averages_picture(workload, picture, groups, clients, seed)
    title = f"{workload.name}, {min(looked_at, workload.num_clients)} clients"
    rows = table("group size", "averages", "bytes", "nearest", "classes in one", title=title)
    for e in found:
        figures = (f"{e.pairs:,}", size(e.pairs * e.pair_bytes), f"{e.nearest:.2f}", f"{e.labels:.1f}")
        rows.add_row(str(e.group_size or "all"), *figures)
    shown = console()
    shown.print(rows)
    shown.say(f"picture: {picture}")
