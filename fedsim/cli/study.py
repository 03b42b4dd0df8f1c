"""`fedsim study`: a whole comparison by one command: methods x settings x seeds, a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from fedsim.report.terminal import PlainConsole
    from fedsim.study.results import Result
    from fedsim.study.runner import Progress, Watch
    from fedsim.study.spec import PlannedRun, Study

PRINTED = 150  # columns of what is not printed to a terminal
SEED_DIGITS = 19  # of 2**63 - 1
HEADING = 15  # characters of a line of a heading, so that the arms keep their room


def study(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; runs/<study> when left out.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time; the cores of this host when left out.", min=1, max=4096)
    ] = (None),
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas, in the place of the study's.")] = "",
    only: Annotated[list[str] | None, typer.Option(help="Arm by its label, or how labels begin; can be repeated.")] = (
        None
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs, and run nothing.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Compare what is finished, and run nothing.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the studies.")] = False,
) -> None:
    """Run every arm of a study with every seed, several at a time, and compare them: fedsim study NAME [KEY=VALUE...].

    NAME is one of --list, or a YAML file like those in configs/study. Runs that are finished are not run again, so a
    study that was interrupted goes on where it was. Settings behind the name hold for all arms.

    Example: fedsim study mafl_digits --jobs 2 --only FedAvg --only FedMix
    """
    from fedsim.cli.options import check_folder_place
    from fedsim.errors import ConfigError, RunError

    if listed:
        return _list()
    flags = [argument for argument in ctx.args if argument.startswith("-")]
    if flags:
        raise ConfigError(f"fedsim study does not know {flags[0]} (see fedsim study --help)")
    if not ctx.args:
        raise ConfigError("name a study, or the YAML file of one (see fedsim study --list)")

    import logging

    from fedsim.report.terminal import console
    from fedsim.settings.folder_names import check_folder
    from fedsim.study.page import write_page
    from fedsim.study.results import check_columns, collect, write_result
    from fedsim.study.spec import plan, read_study

    if out is not None:
        check_folder("--out", str(out))
    name, *overrides = ctx.args
    chosen = read_study(name, overrides, _seeds(seeds)).only(only or [])
    folder = out or Path("runs") / chosen.name
    logging.getLogger("flwr").setLevel(logging.ERROR)  # strategies that are only tried out have no say
    runs, shown = plan(chosen, folder, building=not report), console(PRINTED)
    if dry_run:
        shown.print(_runs_table(chosen, runs))
        return None
    failed: dict[str, str] = {}
    if not report:
        failed = _run(runs, jobs, folder, shown)
    elif folder.is_dir():
        check_folder_place("--out", folder)
    result = collect(chosen, runs)
    if result.rows:
        _show(result, failed, folder, shown)
        write_result(result, failed, folder)
        write_page(result, failed, folder)
        _draw(result, folder)
        check_columns(result)
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(f'{n}: {r}' for n, r in failed.items())}")
    if not result.rows:
        raise ConfigError(f"no run of study {chosen.name} is finished in {folder}")
    return None


def _seeds(text: str) -> list[int]:
    from devices.texts import as_yaml
    from fedsim.errors import ConfigError

    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and len(part) <= SEED_DIGITS for part in parts):
        most = f", of at most {SEED_DIGITS} digits" if len(text) > SEED_DIGITS else ""
        raise ConfigError(f"--seeds must be whole numbers separated by commas{most}, got {as_yaml(text)}")
    return [int(part) for part in parts]


def _list() -> None:
    from fedsim.report.terminal import console, table
    from fedsim.study.spec import studies

    shown = table("study", "title", left=("study", "title"))
    for name, title in studies().items():
        shown.add_row(name, title)
    console(PRINTED).print(shown)


def _runs_table(study: Study, runs: Sequence[PlannedRun]) -> Table:
    """Returns a table of what would be run, and as which command."""
    import shlex

    from fedsim.report.terminal import table
    from fedsim.study.spec import is_finished

    shown = table("arm", "seed", "state", "command", left=("arm", "state", "command"), title=study.title)
    for run in runs:
        state = "finished" if is_finished(run) else "unfinished" if run.folder.exists() else "to run"
        shown.add_row(run.arm.label, str(run.seed), state, f"fedsim {shlex.join(run.command)}")
    return shown


def _run(runs: Sequence[PlannedRun], jobs: int | None, folder: Path, shown: PlainConsole) -> dict[str, str]:
    """Runs what is missing; returns the sentences of the runs that failed, by their names."""
    from fedsim.engines.host import usable_cores
    from fedsim.study.runner import run_study, study_folder

    with study_folder(folder) as lock, _bar(shown) as watch:
        return run_study(runs, jobs or usable_cores(), lock, watch).failed


@contextmanager
def _bar(shown: PlainConsole) -> Iterator[Watch]:
    """Shows a bar over the rounds of all runs; where there is no terminal, a line for each run that has ended."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from fedsim.report.terminal import PlainProgress

    columns: list[Any] = [TextColumn("{task.fields[state]}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")]
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False)]
    with PlainProgress(*columns, shown=shown) as bar:
        task = bar.add_task("study", total=None, state="")

        def watch(progress: Progress, ended: PlannedRun | None) -> None:
            lost = f", {len(progress.failed)} failed" if progress.failed else ""
            state = f"runs {progress.done}/{progress.total}{lost}"
            bar.update(task, total=progress.rounds_total, completed=progress.rounds_done, state=state)
            if ended and not shown.is_terminal:
                how = "FAILED" if ended.name in progress.failed else "finished"
                shown.say(f"{state}: {ended.name} {how}")

        yield watch


def _show(result: Result, failed: dict[str, str], folder: Path, shown: PlainConsole) -> None:
    """Prints the table, in two where the terminal is too narrow for one."""
    scores, costs = _scores(result), _costs(result)
    whole = _table(result, {**scores, **costs})
    if shown.measure(whole).maximum <= shown.width:
        shown.print(whole)
    else:
        shown.print(_table(result, scores))
        shown.print(_table(result, costs))
    for name, reason in failed.items():
        shown.say(f"FAILED {name}: {reason}")
    shown.say(f"study folder: {folder} (study.md, study.json, study.csv, study.png)")


def _table(result: Result, columns: dict[str, list[str]]) -> Table:
    from fedsim.report.terminal import table
    from fedsim.study.page import label
    from fedsim.study.paired import correction

    study, many = result.study, len(result.study.seeds) > 1
    seeds = ", ".join(map(str, study.seeds))
    over = f"mean ± standard deviation of seeds {seeds}" if many else f"seed {seeds}"
    title = f"{study.title}\n{over}; differences to {study.against}"
    shown = table("arm", *columns, left=("arm",), title=title)
    notes = [f"{result.metric.name}: mean of the last {study.last} evaluations of a run"] if study.last > 1 else []
    if "difference" in columns and (note := correction(result.rows)):
        notes.append(note)
    shown.caption = "\n".join(notes) or None
    for number, row in enumerate(result.rows):
        shown.add_row(label(row, len(study.seeds)), *(cells[number] for cells in columns.values()))
    return shown


def _scores(result: Result) -> dict[str, list[str]]:
    """Returns cells by column: the metric, and what it differs by."""
    from fedsim.study.page import score

    metric = result.metric
    heading = metric.heading
    cells: dict[str, list[str]] = {heading: [], "difference": [], "95 % interval": []}
    for row in result.rows:
        compared = row.label != result.study.against and not math.isnan(row.difference)
        cells[heading].append(score(row))
        star = " *" if row.is_significant else ""
        cells["difference"].append(f"{metric.change(row.difference)}{star}" if compared else "")
        cells["95 % interval"].append(row.interval_text if compared and math.isfinite(row.half_width) else "")
    return {name: column for name, column in cells.items() if any(column)}


def _costs(result: Result) -> dict[str, list[str]]:
    """Returns cells by column: what a run of each arm took, and the study's own columns."""
    from fedsim.report.text import energy, simulated, size
    from fedsim.study.page import figure

    columns = {_heading(path): [figure(v) for v in values] for path, values in result.columns.items()}
    return {
        "time": [simulated(row.simulated_s) for row in result.rows],
        "energy": [energy(row.joules) for row in result.rows],
        "traffic": [size(row.traffic_bytes) for row in result.rows],
        "rounds": [f"{row.rounds:g}" for row in result.rows],
        **columns,
    }


def _heading(path: str) -> str:
    """Returns a value's path as a narrow heading of several lines."""
    from textwrap import wrap

    from fedsim.report.plots.style import METRICS

    return "\n".join(wrap(path.removeprefix(METRICS).replace("_", " "), HEADING))


def _draw(result: Result, folder: Path) -> None:
    from fedsim.report.plots.study import draw_study

    draw_study(result, folder / "study.png")
