"""Permissions of this command: names behind `--allow-target`, and folders from elsewhere, which are not trusted.

A folder behind `--config-dir` is searched for options, and is from elsewhere all the same.

The processes that fedsim starts are told the same by environment variables.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from fedsim.errors import ConfigError

FLAG, CONFIG_FLAG = "--allow-target", "--config-dir"
# What fedsim tells the processes that it starts.
ALLOWED, FOLDER, KEPT_OUT = "FEDSIM_ALLOW_TARGET", "FEDSIM_WORKING_FOLDER", "FEDSIM_KEEP_OUT"

_allowed: set[str] = set()
_untrusted: list[Path] = []
_searched: list[Path] = []
_everything = False


def reset(allowed: Iterable[str] = ()) -> None:
    """Forgets what an earlier command of this process was told, and allows the names behind `--allow-target`."""
    global _everything
    _allowed.clear()
    _allowed.update(allowed)
    _untrusted.clear()
    _searched.clear()
    _everything = False


def allow(name: str) -> None:
    """Allows a name as if it stood behind `--allow-target`."""
    _allowed.add(name)


def search(folder: Path) -> None:
    """Has options looked up in a folder that the command line names, too; what it holds is not trusted for that.

    Raises:
        ConfigError: if it is none.
    """
    if not folder.is_dir():
        raise ConfigError(f"{CONFIG_FLAG}={folder} must be a folder")
    keep_out(folder)
    _searched.append(folder.resolve())


def searched() -> list[Path]:
    """Returns the folders behind `--config-dir`."""
    return list(_searched)


def keep_out(folder: Path) -> None:
    """Notes a folder that a command was given: modules below it, or beside it in a deeper place, are not the user's.

    Args:
        folder: as it was given; a link counts as where it stands and as where it leads.
    """
    resolved, here = real_path(folder), working_folder()
    _untrusted.append(resolved)
    as_written = Path(os.path.abspath(folder))
    for place in (resolved, *map(real_path, (as_written, *as_written.parents))):
        if place != here and place.is_relative_to(here):
            _untrusted.append(here / place.relative_to(here).parts[0])


def keep_out_beside(file: Path) -> None:
    """Keeps the folder of a given file out, too, unless it is the working folder itself or one above it."""
    for folder in (Path(os.path.abspath(file)).parent, real_path(file).parent):
        if not working_folder().is_relative_to(real_path(folder)):
            keep_out(folder)


def allow_everything() -> None:
    """Has this process check nothing: it is a worker, whose settings its driver has checked."""
    global _everything
    _everything = True


def everything_is_allowed() -> bool:
    """Returns whether this process checks nothing."""
    return _everything


def flags() -> list[str]:
    """Returns the arguments that allow another `fedsim` what this one was allowed, and have it search the same."""
    return [*(f"{FLAG}={name}" for name in sorted(allowed())), *(f"{CONFIG_FLAG}={folder}" for folder in _searched)]


def environment() -> dict[str, str]:
    """Returns the variables that allow the processes of a study or of Flower what this one was allowed, and no more."""
    folders = sorted({str(folder) for folder in kept_out()})
    return {ALLOWED: ",".join(sorted(allowed())), FOLDER: str(working_folder()), KEPT_OUT: json.dumps(folders)}


def allowed() -> set[str]:
    """Returns the names behind `--allow-target`."""
    return _allowed | {name for name in os.environ.get(ALLOWED, "").split(",") if name}


def kept_out() -> list[Path]:
    """Returns folders whose modules are not the user's own: this command's, and those of the one that started it."""
    return [*_untrusted, *map(Path, json.loads(os.environ.get(KEPT_OUT) or "[]"))]


def working_folder() -> Path:
    """Returns the user's working folder: of the command that started this process, or of this one."""
    return real_path(Path(os.environ.get(FOLDER) or Path.cwd()))


def real_path(path: Path) -> Path:
    """Returns where a path leads; `Path.resolve` fails for links that lead to each other, before Python 3.13."""
    return Path(os.path.realpath(path))
