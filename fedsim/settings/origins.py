"""Finds where a module comes from without importing it, and judges it by its file.

A configuration may name what comes with fedsim, Flower's strategies, `torch.nn`, `torchvision.models`, plug-ins and
modules of the user's working folder; not other packages, Python's library, run and study folders and what came with
them.
"""

from __future__ import annotations

import importlib
import os
import re
import site
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

from fedsim.settings.permissions import kept_out, real_path, working_folder
from fedsim.settings.plugins import plugins

OWN = ("fedsim", "clients", "strategies", "devices")
LIBRARIES = ("flwr.serverapp.strategy", "torch.nn", "torchvision.models")
MAX_LOOKS = 5  # into a folder that changes meanwhile


def module_files(name: str) -> Iterator[tuple[str, str | None]]:
    """Yields the modules along a dotted path with their files, found without importing any.

    Packages without code of their own are left out.
    """
    parts = name.split(".")
    spec = _root(parts[0])
    for number in range(1, len(parts) + 1):
        if spec is None:
            return
        if spec.origin is not None or number == len(parts):
            yield ".".join(parts[:number]), spec.origin
        places = spec.submodule_search_locations
        if places is None or number == len(parts):
            return
        spec = PathFinder.find_spec(parts[number], list(places))  # by its whole name, it would import what is above


def _root(name: str) -> ModuleSpec | None:
    try:
        spec = find_spec(name)
    except ValueError:  # a main script has none
        file = getattr(sys.modules.get(name), "__file__", None)
        spec = spec_from_file_location(name, file) if file else None
    return spec or PathFinder.find_spec(name, [str(working_folder())])


def reach_working_folder(root: str) -> None:
    """Lets modules of the working folder be imported, behind everything that is installed."""
    folder = str(working_folder())
    if root not in sys.modules and folder not in sys.path and find_spec(root) is None:
        sys.path.append(folder)
        importlib.invalidate_caches()


def may_be_named(module: str, file: str | None) -> bool:
    """Returns whether a configuration may name what a module defines."""
    root = module.partition(".")[0]
    if root in OWN:
        return file is not None and _is_below(Path(file), Path(__file__).resolve().parents[2] / root)
    if any(module == library or module.startswith(f"{library}.") for library in LIBRARIES) or root in plugins():
        return True
    return file is not None and os.path.isabs(file) and is_the_users(real_path(Path(file)))  # not "frozen"


def leads_to_library(module: str) -> bool:
    """Returns whether a module is a package around one that may be named."""
    return any(library.startswith(f"{module}.") for library in LIBRARIES)


def own_configs() -> Path | None:
    """Returns the folder `configs` of the working folder; None where it has none, or one that is not the user's."""
    folder = working_folder() / "configs"
    if not folder.is_dir():
        return None
    if came_with_a_run(folder / "x"):
        what = f"no option is looked up in {folder}: it lies in the folder of a run or study"
        warnings.warn(f"{what}; change to a folder of your own", stacklevel=2)
    return real_path(folder) if is_the_users(folder / "x") else None


def is_the_users(file: Path) -> bool:
    """Returns whether a file is in the working folder, not installed there, in no folder that came from elsewhere."""
    if not _is_below(file, working_folder()) or any(_is_below(file, folder) for folder in (*kept_out(), *_installed())):
        return False
    return not any(part in ("site-packages", "dist-packages") for part in file.parts) and not came_with_a_run(file)


def came_with_a_run(file: Path) -> bool:
    """Returns whether a file lies in the folder of a run or study."""
    return any(is_run_folder(folder) or is_study_folder(folder) for folder in file.parents)


def is_run_folder(folder: Path) -> bool:
    """Returns whether a run was written here."""
    config = folder / "config.yaml"
    if not config.is_file():
        return False
    if any((folder / name).exists() for name in ("rounds.jsonl", "summary.json", "failure.json", "checkpoint")):
        return True
    text = config.read_text(errors="replace")
    return re.search(r"""(^|[{,])\s*["']?choices["']?\s*:""", text, re.MULTILINE) is not None


def is_study_folder(folder: Path) -> bool:
    """Returns whether the runs of a study were written here."""
    return (folder / "study.json").exists() or (folder / "study.csv").exists() or _has_arms(folder)


def _has_arms(folder: Path) -> bool:
    """Returns whether arms lie below, for as long as they do: what others remove meanwhile is looked for again."""
    for _ in range(MAX_LOOKS):
        with suppress(OSError):
            return any(folder.glob("*/seed-*/*.yaml"))
    return True  # never still: what lies here is not called


@cache
def _installed() -> tuple[Path, ...]:
    """Returns the folders in which packages and Python itself are installed."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = {sysconfig.get_paths()[name] for name in names} | {site.getusersitepackages(), *site.getsitepackages()}
    return tuple(real_path(Path(path)) for path in found)


def _is_below(path: Path, folder: Path) -> bool:
    return real_path(path).is_relative_to(folder)


def describe(origin: str | None) -> str:
    """Says where a module is that may not be named."""
    if origin is None or not os.path.isabs(origin):  # "built-in", "frozen"
        return "a part of Python"
    file = real_path(Path(origin))
    if any(_is_below(file, folder) for folder in _installed()):
        return "another package"
    if any(_is_below(file, folder) for folder in kept_out()) or _is_below(file, working_folder()):
        return "in a folder that came with the configuration"
    return f"in {file.parent}, which is not below the working folder"
