"""`fedsim devices build` and `fedsim devices evaluate --tables`: the public tables behind the shipped devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fedsim.cli.options import check_folder_place
from fedsim.report import strict_json


def build(
    data: Annotated[Path, typer.Option(help="Folder of the public tables (devices.csv, ncnn.csv, …).")],
    out: Annotated[Path, typer.Option(help="Folder to write profiles/*.yaml and priors.yaml into.")] = Path(
        "built_devices"
    ),
) -> None:
    """Make all shipped device profiles from tables of public measurements, with row counts and errors.

    Takes about two minutes. Which devices there are stands in devices/catalogue.yaml, what no table says in
    devices/peaks.yaml.

    Example: fedsim devices build --data tables --out built_devices
    """
    from devices.build import Builder, write_all

    check_folder_place("--out", out, ["profiles"])
    with _spinner("learning priors") as watch:
        builder = Builder(data, watch)
        written = write_all(builder, out)
    from fedsim.report.terminal import console

    console().say(f"{len(written) - 1} profiles and {written[0].name} are in {out}")


def evaluate_tables(folder: Path, as_json: bool) -> None:
    """Prints how far the structured model is off on networks and devices that it has not seen."""
    from devices.latency.evaluate_tables import evaluate_tables as judge
    from fedsim.report.terminal import console, table

    with _spinner("judging") as watch:
        found = judge(folder, watch)
    if as_json:
        print(strict_json.dumps([asdict(figure) for figure in found]))
        return
    title = "error of the structured model on what it has not seen"
    rows = table("judged", "rows", "mean %", "median %", "quartiles %", title=title)
    for f in found:
        spread = "" if f.low is None or f.high is None else f"{100 * f.low:.1f}-{100 * f.high:.1f}"
        count = str(f.rows) if f.settings == 1 else f"{f.settings} settings"
        rows.add_row(f.what, count, f"{100 * f.mean:.1f}", f"{100 * f.median:.1f}", spread)
    shown = console()
    shown.print(rows)
    note = "Over several settings: the median of their means and medians. Every prior is that of the other devices."
    shown.note(note)


def evaluate_profiles(space: Any, as_json: bool) -> None:
    """Prints Spearman and error of the prices that runs are priced with, inside a search space."""
    from devices.latency.evaluate_tables import evaluate_profiles as judge
    from fedsim.report.terminal import console, table

    found = judge(space)
    if as_json:
        print(strict_json.dumps([{"device": d, "spearman": s, "mape": e} for d, s, e in found]))
        return
    title = f"shipped profiles on {space.name}, networks that none of them has"
    rows = table("device", "Spearman", "error after one scale, %", left=("device",), title=title)
    for device, spearman, error in found:
        rows.add_row(device, f"{spearman:.3f}", f"{100 * error:.1f}")
    console().print(rows)


@contextmanager
def _spinner(what: str) -> Iterator[Any]:
    """Shows a spinner that says what is being done; nothing when piped."""
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    from fedsim.report.terminal import PlainProgress, console

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with PlainProgress(*columns, shown=console()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda text: progress.update(task, description=text)
