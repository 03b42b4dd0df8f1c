"""One experiment from its settings to its page: the engine with the client app in it, a bar, the run folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from fedsim.runs.writer import run
    from fedsim.settings.run_settings import RunSettings

    forget_worlds()
    typed = RunSettings.of(settings)
    with new_run_folder(typed) if unfinished is None else nullcontext(unfinished) as folder:
        began(folder)
        with (
            closing(build_engine(settings)) as engine,
            progress_bar(shown, typed.rounds, folder) as (watch, observe),
        ):
            resumed, announce = unfinished is not None, partial(shown.print, highlight=False, soft_wrap=True)
            summary = run(settings, engine, folder, watch, observe, resumed, announce)
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


def quiet_flower() -> None:
    """Silences Flower, which logs every round: the progress bar says it better, and `fedsim` itself prints warnings."""
    import logging

    logger = logging.getLogger("flwr")
    logger.propagate = False
    logger.setLevel(logging.ERROR)
