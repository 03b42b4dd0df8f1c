"""What a person sees of a run in the terminal: a progress bar and a closing table. May import: rich, fedsim.report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedsim.report import RoundReport

TABLE_ROWS = 10


def simulated(seconds: float) -> str:
    """Simulated time in the unit that reads best."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds:.1f} s"


def energy(joules: float) -> str:
    """Energy in J, kJ or MJ."""
    for unit, size in (("MJ", 1e6), ("kJ", 1e3)):
        if joules >= size:
            return f"{joules / size:.2f} {unit}"
    return f"{joules:.1f} J"


def size(count: float) -> str:
    """Bytes in decimal units, as networks and phones count them."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count:.0f} B"


@contextmanager
def progress_bar(console: Console, rounds: int) -> Iterator[Any]:
    """A bar over rounds with accuracy and simulated time; yields (watch, observe) for `fedsim.federation.run`."""
    columns = [
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("run", total=rounds, state="building data and fleet")
        judged = {"text": ""}

        def watch(report: RoundReport) -> None:
            if "accuracy" in report.metrics:
                judged["text"] = f"accuracy {report.metrics['accuracy']:.3f}"
            progress.update(task, completed=report.round, state=f"{judged['text']}  simulated {simulated(report.now_s)}")

        def observe(client_id: int) -> None:
            progress.refresh()

        yield watch, observe


def closing_table(reports: Sequence[RoundReport]) -> Table:
    """Up to ten evaluated rounds, evenly spread and always the last; sums since the start."""
    table = Table(title=None, header_style="bold")
    for name in ("round", "accuracy", "loss", "time", "energy", "down", "up", "peak memory", "completed", "not completed"):
        table.add_column(name, justify="right")
    sums = {"joules": 0.0, "down": 0, "up": 0, "peak": 0, "done": 0, "lost": 0}
    rows = []
    for report in reports:
        sums["joules"] += report.joules
        sums["down"] += report.down_bytes
        sums["up"] += report.up_bytes
        sums["peak"] = max(sums["peak"], report.peak_memory_bytes)
        sums["done"] += len(report.outcomes.get("completed", ()))
        sums["lost"] += len(report.cohort) - len(report.outcomes.get("completed", ()))
        if "accuracy" in report.metrics:
            rows.append((report, dict(sums)))
    step = max(1, -(-(len(rows) - 1) // (TABLE_ROWS - 1))) if len(rows) > 1 else 1
    shown = rows[::step] if (len(rows) - 1) % step == 0 else [*rows[::step], rows[-1]]
    for report, total in shown:
        table.add_row(
            str(report.round),
            f"{report.metrics['accuracy']:.4f}",
            f"{report.metrics['loss']:.4f}",
            simulated(report.now_s),
            energy(total["joules"]),
            size(total["down"]),
            size(total["up"]),
            size(total["peak"]),
            str(total["done"]),
            str(total["lost"]),
        )
    return table


def closing_lines(summary: dict[str, Any], folder: Path) -> list[str]:
    """One sentence of results, one of outcomes, one that says where the folder is."""
    accuracy = summary["final"]["accuracy"]
    text = f"{accuracy:.4f}" if accuracy is not None else "not evaluated"
    traffic = f"{size(summary['down_bytes'])} down, {size(summary['up_bytes'])} up"
    joules = energy(summary["energy_j"]["total"])
    lines = [
        f"{summary['method']} on {summary['workload']}, fleet {summary['fleet']}: test accuracy {text} after "
        f"{summary['rounds']} rounds, {simulated(summary['simulated_s'])} simulated, {joules}, {traffic}"
    ]
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in summary["outcomes"].items() if count)
    lines.append(f"clients: {counts}; the busiest spent {energy(summary['energy_j']['max_client'])}")
    target = summary["to_target"]
    if target:
        lines.append(
            f"accuracy {target['accuracy']:g} reached in round {target['round']}: {simulated(target['simulated_s'])}, "
            f"{energy(target['energy_j'])}, {size(target['down_bytes'] + target['up_bytes'])}"
        )
    lines.append(f"run folder: {folder}  ({summary['host_s']:.1f} s on this host)")
    return lines
