"""`fedsim study`: a whole comparison by one command: methods x settings x seeds, a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedsim.report.terminal import PlainConsole
    from fedsim.study.results import Result
    from fedsim.study.runner import Progress, Watch
    from fedsim.study.spec import PlannedRun

SEED_DIGITS = 19  # of 2**63 - 1


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

    NAME is one of --list (your own lie in configs/study of the working folder), or a YAML file like those. Runs that
    are finished are not run again, so a study that was interrupted goes on where it was. Settings behind the name hold
    for all arms.

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

    from fedsim.report.terminal import console
    from fedsim.settings.folder_names import check_folder
    from fedsim.study.results import collect
    from fedsim.study.spec import plan, read_study

    if out is not None:
        check_folder("--out", str(out))
    name, *overrides = ctx.args
    chosen = read_study(name, overrides, _seeds(seeds)).only(only or [])
    folder = out or Path("runs") / chosen.name
    runs, shown = plan(chosen, folder, building=not report), console()
    if dry_run:
        _tell_plan(runs, shown)
        return None
    failed: dict[str, str] = {}
    if not report:
        failed = _run(runs, jobs, folder, shown)
    elif folder.is_dir():
        check_folder_place("--out", folder)
    result = collect(chosen, runs)
    if result.rows:
        _tell(result, failed, folder, shown)
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(f'{n}: {r}' for n, r in failed.items())}")
    if not result.rows:
        raise ConfigError(f"no run of study {chosen.name} is finished in {folder}")
    return None


def _tell(result: Result, failed: dict[str, str], folder: Path, shown: PlainConsole) -> None:
    """Prints, draws and writes what came of a study."""
    from fedsim.study.page import write_page
    from fedsim.study.results import check_lacking, write_result
    from fedsim.study.web_page import write_web_page

    _show(result, failed, folder, shown)
    write_result(result, failed, folder)
    write_page(result, failed, folder)
    _draw(result, folder)
    shown.say(f"page: {write_web_page(result, failed, folder, 'study')}")
    check_lacking(result)


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
    console().print(shown)


def _tell_plan(runs: Sequence[PlannedRun], shown: PlainConsole) -> None:
    """Prints what would be run, each command on a line of its own, to be copied."""
    import shlex
    from collections import Counter

    from fedsim.settings.permissions import flags
    from fedsim.study.spec import is_finished

    states = Counter[str]()
    for run in runs:
        state = "finished" if is_finished(run) else "unfinished" if run.folder.exists() else "to run"
        states[state] += 1
        shown.note(f"{run.arm.label}, seed {run.seed}: {state}", style="bold")
        shown.say(f"fedsim {shlex.join([*run.command, *flags()])}")
    shown.say(f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in states.items())}")


def _run(runs: Sequence[PlannedRun], jobs: int | None, folder: Path, shown: PlainConsole) -> dict[str, str]:
    """Runs what is missing; returns the sentences of the runs that failed, by their names."""
    from fedsim.engines.host import usable_cores
    from fedsim.study.runner import run_study, study_folder

    with study_folder(folder) as lock, _bar(shown) as watch:
        return run_study(runs, jobs or usable_cores(), lock, watch).failed


@contextmanager
def _bar(shown: PlainConsole) -> Iterator[Watch]:
    """Shows a bar over the rounds of all runs; where there is no terminal, a line for each run that has ended."""
    from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from fedsim.report.terminal import PlainBar, PlainProgress

    columns: list[Any] = [TextColumn("{task.fields[state]}"), PlainBar(), TextColumn("{task.percentage:>3.0f} %")]
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
    """Prints the table."""
    from fedsim.study.tables import result_table

    shown.print(result_table(result))
    for name, reason in failed.items():
        shown.say(f"FAILED {name}: {reason}")
    shown.say(f"study folder: {folder} (study.md, study.json, study.csv, study.png)")


def _draw(result: Result, folder: Path) -> None:
    from fedsim.report.plots.study import draw_study

    draw_study(result, folder / "study.png")
