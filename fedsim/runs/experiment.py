"""One experiment from its settings to its page: the engine with the client app in it, a bar, the run folder."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.runs.quiet import quiet_flower

if TYPE_CHECKING:
    from rich.console import Console


def run_experiment(
    settings: dict[str, Any],
    shown: Console,
    unfinished: Path | None = None,
    began: Callable[[Path], None] = lambda folder: None,
) -> tuple[Path, dict[str, Any]]:
    """Runs one experiment and writes its page; returns its folder and its summary.

    Args:
        settings: of the run.
        shown: where a bar over the rounds goes.
        unfinished: the folder that holds the run's beginning; None for a new one.
        began: told the folder.

    Raises:
        ConfigError, DataError: before anything is written.
        ClientError: when a client fails; what was written so far stays.
    """
    from fedsim.report.page import write_page
    from fedsim.report.place import new_run_folder
    from fedsim.report.progress import progress_bar
    from fedsim.runs.engine_choice import settled
    from fedsim.runs.writer import run
    from fedsim.settings.run_settings import RunSettings

    forget_worlds()
    (settings,), choice = settled([settings])
    if choice:
        shown.print(choice, highlight=False, soft_wrap=True)
    typed = RunSettings.of(settings)
    with new_run_folder(typed) if unfinished is None else nullcontext(unfinished) as folder:
        began(folder)
        with (
            closing(build_engine(settings)) as engine,
            progress_bar(shown, typed.rounds, folder) as (watch, observe),
        ):
            announce = partial(shown.print, highlight=False, soft_wrap=True)
            summary = run(settings, engine, folder, watch, observe, unfinished is not None, announce)
        write_page(folder)
    return folder, summary


def resumed(run: Path, overrides: Sequence[str], changed_code: bool = False) -> dict[str, Any]:
    """Returns the settings with which a run goes on; one that has finished and is given more `rounds` is prolonged.

    Args:
        run: its folder.
        overrides: `rounds=`, and settings of the engine.
        changed_code: whether it goes on where code of the user's is not what the run was begun with.

    Raises:
        ChangedCodeError: if it is not, and that was not said.
        ConfigError: for any other setting, or if the run cannot be prolonged.
    """
    from fedsim.errors import ConfigError
    from fedsim.report.files import read_summary
    from fedsim.report.place import SUMMARY
    from fedsim.runs.engine_choice import settled
    from fedsim.runs.own_code import check_code
    from fedsim.runs.prolong import prolong
    from fedsim.runs.recorded import refuse_repriced, settings_of_run
    from fedsim.settings.compose import check_address, of_rounds, on_engine
    from fedsim.settings.overrides import parsed
    from fedsim.settings.permissions import keep_out

    keep_out(run)
    quiet_flower()
    refuse_repriced(run)
    given = [(parsed(text), text) for text in overrides]
    rounds = [one.value() for one, _ in given if one.key_or_group == "rounds"]
    others = [text for one, text in given if one.key_or_group != "rounds"]
    (settings,), _ = settled([on_engine(settings_of_run(run), others)])
    check_address(settings, others, str(run / "config.yaml"))
    if not changed_code and (rounds or not (run / SUMMARY).exists()):
        check_code(run, settings)
    if rounds:
        if not read_summary(run):
            raise ConfigError(f"{run} is not finished; end it first: fedsim resume {shlex.quote(str(run))}")
        settings = of_rounds(settings, rounds[-1])
        prolong(run, settings)
    return settings


def reprice_experiment(run: Path, overrides: Sequence[str], shown: Console) -> tuple[Path, dict[str, Any]]:
    """Writes a finished run anew as it would have been on other devices; returns the new folder and its summary.

    Args:
        run: its folder.
        overrides: the settings that change.
        shown: where a bar over the rounds goes.

    Raises:
        ConfigError, DataError: before anything is written.
    """
    from fedsim.report.page import write_page
    from fedsim.report.place import new_run_folder
    from fedsim.report.progress import progress_bar
    from fedsim.runs.recorded import settings_of_run
    from fedsim.runs.reprice import reprice
    from fedsim.settings.compose import on_devices
    from fedsim.settings.permissions import keep_out
    from fedsim.settings.run_settings import RunSettings

    keep_out(run)
    forget_worlds()
    quiet_flower()
    before = settings_of_run(run)
    own = before["name"] and f"{before['name']}-repriced"  # another name than the run's, if none is given
    settings = on_devices({**before, "out": None, "name": own}, overrides)
    typed = RunSettings.of(settings)
    with new_run_folder(replace(typed, name=typed.name or f"{run.resolve().name}-repriced")) as folder:
        with progress_bar(shown, typed.rounds, folder) as (watch, _):
            summary = reprice(run, settings, folder, watch)
        write_page(folder)
    return folder, summary


def build_engine(settings: dict[str, Any]) -> Any:
    """Builds the engine that the settings name, with the worker of `clients.app`; the caller closes it."""
    from clients.app import serve
    from fedsim.settings.build import instantiate

    quiet_flower()
    return instantiate(settings, "engine", serve=serve)


def forget_worlds() -> None:
    """Forgets data and models of earlier runs, which a sweep would keep in memory."""
    import clients.app
    from fedsim.settings.build import build_world

    clients.app.worker_for.cache_clear()
    build_world.cache_clear()
