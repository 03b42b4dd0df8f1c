"""Chooses and makes the folder of a run, which must hold nothing else."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from devices.texts import file_name
from devices.writing import make_folders, remove_empty, try_place
from fedsim.engines.locks import is_held
from fedsim.errors import ConfigError
from fedsim.settings.names import used, workload_name

if TYPE_CHECKING:
    from fedsim.settings.run_settings import RunSettings

MAX_NAMED = 6  # of the things in a folder that is taken
BY_ROUNDS = "goes_by_rounds"  # of a summary: what of the run depends on its number of rounds
CONFIG, SUMMARY, FAILURE, PAGE = "config.yaml", "summary.json", "failure.json", "report.html"
ROUNDS, CLIENTS, EVENTS, CHECKPOINT, PICTURES = "rounds.jsonl", "clients", "tensorboard", "checkpoint", "pictures"
SPLIT, SWEEP, CONFUSION = "split.json", "multirun.yaml", "confusion.parquet"
CODE = "code.json"  # hashes of the user's own files
LOGGED, WANDB = "logger.json", "wandb"  # ids of a run at its logger; what that keeps here
REPRICED = "repriced.json"  # of which run the folder holds the rounds on other devices
FAILED_CLIENT, FAILED_CLIENT_ARRAYS = "failed-client.json", "failed-client.safetensors"  # its instruction
RESERVE = ".reserved"  # room on the disk for the note of a failure
WRITTEN = (
    CONFIG,
    REPRICED,
    ROUNDS,
    CLIENTS,
    EVENTS,
    SUMMARY,
    FAILURE,
    CHECKPOINT,
    PICTURES,
    SPLIT,
    CODE,
    CONFUSION,
    PAGE,
    FAILED_CLIENT,
    FAILED_CLIENT_ARRAYS,
    LOGGED,
    WANDB,
)
ROWS = re.compile(r"rounds-(\d{6,})-(\d{6,})\.parquet")
# What is being written when a run is killed: a name of the run's own between a dot and the number of the process.
UNFINISHED = re.compile(
    r"\.(?:config\.yaml|(?:summary|split|code|repriced|failure|logger)\.json|report\.html|failed-client\.(?:json|safetensors)|[^/]+\.png"
    r"|flower\.log|confusion\.parquet|rounds-\d+-\d+\.parquet|round-\d+(?:\.old)?)(?:\.(\d+))?\.part|rounds-\d+-\d+\.part"
)


@contextmanager
def new_run_folder(settings: RunSettings) -> Iterator[Path]:
    """Makes the folder of a run: `out`, or `runs/<date>-<time>-<name>` with a number behind it when that is taken.

    What was made is taken away in the end if nothing came into it.

    Raises:
        ConfigError: if `out` is taken or cannot be made.
    """
    made: list[Path] = []
    try:
        if settings.out is not None:
            folder = Path(settings.out)
            check_free(folder)
            made += _make(folder)
        else:
            method = settings.choices.get("method") or used(settings, "strategy")
            folder = new_folder(Path("runs"), settings.name or f"{method}-{file_name(workload_name(settings))}", made)
        yield folder
    finally:
        remove_empty(made)


def new_folder(parent: Path, label: str, made: list[Path]) -> Path:
    """Makes `<parent>/<date>-<time>-<label>`, with a number behind it when that is taken, by another process perhaps.

    Args:
        parent: made too.
        label: how the name ends.
        made: gets the folders that were made.

    Raises:
        ConfigError: if it cannot be made.
    """
    first = parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{label}"
    made += _make(parent)
    for folder in (first, *(first.with_name(f"{first.name}-{number}") for number in range(2, 1000))):
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"{folder} cannot be made: {error.strerror}; name a folder with out=") from error
        made.append(folder)
        return folder
    raise ConfigError(f"{first} and 998 more like it are taken; name a folder with out=")


def make_sweep_folder(folder: Path, made: list[Path]) -> None:
    """Makes the folder of a sweep, where Hydra notes its settings; links in it are not followed.

    Args:
        folder: may be there.
        made: gets the folders that were made.

    Raises:
        ConfigError: if it cannot be made or written into.
    """
    made += _make(folder)
    note = folder / SWEEP
    if os.path.lexists(note) and (note.is_symlink() or not note.is_file()):
        raise ConfigError(f"out={folder} holds {SWEEP}, which is no file; name another folder, or remove that")
    try:
        try_place(note)
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be written: {error.strerror}; name another folder") from error


def _make(folder: Path) -> list[Path]:
    try:
        return make_folders(folder)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"out={folder} cannot be made: {reason}; name another folder") from error


def check_free(folder: Path, given: str = "out=") -> None:
    """Refuses a folder that holds anything, or is no folder; called before anything is built or written.

    What a run writes before its `config.yaml` does not count: it was killed in its first instant.

    Args:
        folder: which.
        given: how its name was typed.

    Raises:
        ConfigError: naming the folder and what is in it, or the run that it would lie in: that one's checkpoints go.
    """
    try:
        above = folder.resolve().parents
    except (OSError, RuntimeError, ValueError):  # said by the next line
        above = ()
    for outer in above:
        if (outer / CONFIG).is_file() and (outer / ROUNDS).exists():
            raise ConfigError(
                f"{given}{folder} lies in the folder of another run, {outer}; name a folder outside of it"
            )
    refuse_taken(folder, given)
    if (folder / ROUNDS).exists() and _is_locked(folder / ROUNDS):
        raise ConfigError(f"a run is beginning in {given}{folder} just now; name another folder")


def refuse_taken(folder: Path, given: str = "out=") -> None:
    """Refuses a folder that holds anything of another run, for the run that has begun to write there.

    Args:
        folder: which.
        given: how its name was typed.

    Raises:
        ConfigError: naming the folder and what is in it.
    """
    try:
        there = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        free = "is a file; name a folder that is new or empty"
        what = free if folder.exists() else f"cannot be made: {error.strerror}"
        raise ConfigError(f"{given}{folder} {what}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{given}{folder} cannot be read: {reason}; name another folder") from error
    taken = [name for name in there if not _precedes_config(folder / name)]
    if not taken:
        return
    run = [name for name in WRITTEN if name in taken]
    what = f"another run ({', '.join(run)})" if run else f"something else ({_listed(taken)})"
    raise ConfigError(f"{given}{folder} holds {what}; name a new folder{' or remove it' if run else ''}")


def _listed(names: list[str]) -> str:
    left = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {left} more" if left > 0 else "")


def _precedes_config(path: Path) -> bool:
    """Returns whether a run leaves this before its `config.yaml`: empty, or half written."""
    if path.is_symlink():
        return False
    if path.name == CLIENTS:
        return path.is_dir() and not any(path.iterdir())
    if path.name == ROUNDS:
        return path.is_file() and path.stat().st_size == 0
    return path.is_file() and (path.name == RESERVE or UNFINISHED.fullmatch(path.name) is not None)


def _is_locked(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return is_held(file)
    return False


def remove_unfinished(folder: Path) -> None:
    """Takes away what a run that was killed had half written, below the folder and those that it makes."""
    for place in (folder, *(folder / name for name in (CLIENTS, CHECKPOINT, PICTURES))):
        if place.is_symlink() or not place.is_dir():
            continue
        for path in place.iterdir():
            found = UNFINISHED.fullmatch(path.name)
            if found and not (found[1] and _is_alive(int(found[1]))):
                remove(path)


def remove(path: Path) -> None:
    """Takes away a file, a link, or a folder with what is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Returns whether another process by this number is there: it may be writing just now."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
