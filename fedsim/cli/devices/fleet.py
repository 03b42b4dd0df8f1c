"""`fedsim devices links` and `population`: what connects the devices of a fleet, and which phones people had."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.options import check_place


def links() -> None:
    """List the links: median speed, round trip, what a megabyte takes at that speed, and the radio's tail after it.

    Joules are those of the radio, beside the draw of the idle device.

    Example: fedsim devices links
    """
    from devices.links import link_names, load_link
    from fedsim.report.terminal import console, table

    columns = ("Mbit/s\ndown", "Mbit/s\nup", "RTT\nms", "J/MB\ndown", "J/MB\nup", "tail\nJ")
    rows = table("link", *columns, left=("link",))
    for name in link_names():
        link = load_link(name)
        rates = (link.down_bytes_per_s, link.up_bytes_per_s)
        speeds = [f"{rate * 8e-6:.1f}" for rate in rates]
        joules = (link.down_joules_per_mb, link.up_joules_per_mb, link.tail_watts * link.tail_s)
        drawn = [f"{value:.2f}" if value else "-" for value in joules]
        rows.add_row(link.name, *speeds, f"{1e3 * link.rtt_s:g}", *drawn)
    console().print(rows)
    print("use it: fedsim run fleet=phones fleet.link=lte_us")


def population(
    data: Annotated[Path, typer.Option(help="Folder with phones_ai_benchmark.csv.")],
    out: Annotated[Path, typer.Option(help="Table to write.")] = Path("population.yaml"),
) -> None:
    """Count the phones of a list by the shipped devices that have their SoC: the shares of fleet=phones.

    Example: fedsim devices population --data /data/devices --out devices/population.yaml
    """
    from devices.population import YEARS, from_list, read_list, shipped_socs
    from devices.writing import write_atomic

    check_place("--out", out)
    made = from_list(read_list(data), shipped_socs())
    write_atomic(out, made.as_yaml())
    years = f"{YEARS[0]} to {YEARS[1]}"
    print(f"{made.covered} of {made.listed} phones of {years} have the SoC of a shipped device: {made.coverage:.0%}")
    by_third = ", ".join(f"{part:.0%}" for part in made.covered_by_third)
    print(f"of the slowest, the middle and the fastest third: {by_third}")
    print(f"assumed: {made.phones('assumed') / made.phones():.0%} of the fleet")
    print(made.as_fleet(), end="")
    print(f"population: {out}")
