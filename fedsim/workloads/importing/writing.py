"""Writes a bundle: whole or not at all, and the same bytes for the same examples and seed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from devices.writing import PART, make_folders, naming, remove_empty, sync_folder, write_new
from fedsim.errors import ConfigError
from fedsim.workloads.arrays import Arrays, DataSet
from fedsim.workloads.bundle import FILES
from fedsim.workloads.importing.found import Found
from fedsim.workloads.importing.splitting import split


class Bundled(NamedTuple):
    """A bundle that was written.

    Attributes:
        folder: where it is.
        data: what it holds.
        bytes: of its files.
        notes: sentences on what was done or left out.
        meta: what meta.json holds.
    """

    folder: Path
    data: DataSet
    bytes: int
    notes: list[str]
    meta: dict[str, object]


def check_out(out: Path, source: Path | None = None) -> None:
    """Refuses a folder for a bundle before the work that makes it.

    Args:
        out: where the bundle goes.
        source: folder that is read, if it is one.

    Raises:
        ConfigError: if there is something already, or it lies in the folder that is read.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise ConfigError(f"OUT={out} is there and is no folder; name another one")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"OUT={out} is there and not empty; name another folder or remove it")
    if source is not None and source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"OUT={out} lies in {source}, which is read; name a folder outside it")


def write_bundle(found: Found, out: Path, test_fraction: float = 0.2, seed: int = 0) -> Bundled:
    """Divides what was found into two parts and writes it as a bundle that `workload=bundle` reads.

    Args:
        found: by one of the importers.
        out: a folder that is not there, or empty.
        test_fraction: share of the examples to test on, where the files have no test part.
        seed: of that draw.

    Raises:
        ConfigError, DataError: if it cannot be a bundle; nothing is written.
        OSError: naming the file.
    """
    check_out(out)
    parts = split(found, test_fraction, seed)
    train, test = (_rows(found, rows) for rows in (parts.train, parts.test))
    data = DataSet(train, test, found.classes, found.kind, str(out)).checked()
    meta = {"name": out.absolute().name, "classes": found.classes, "kind": found.kind, **found.meta}
    size = _write(data, meta, out)
    return Bundled(out, data, size, [*found.notes, parts.how], meta)


def _rows(found: Found, rows: np.ndarray) -> Arrays:
    return Arrays(found.x[rows], found.y[rows], None if found.owners is None else found.owners[rows])


def _write(data: DataSet, meta: dict[str, object], out: Path) -> int:
    """Writes the files into a folder beside `out`, which then takes its name; returns their bytes."""
    part = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}{PART}")
    new = make_folders(part.parent)
    try:
        part.mkdir()
        for name, arrays in (("train.npz", data.train), ("test.npz", data.test)):
            held = {"x": arrays.x, "y": arrays.y} | ({} if arrays.owners is None else {"client": arrays.owners})
            with naming(part / name), (part / name).open("xb") as file:
                np.savez(file, **held)  # type: ignore[arg-type]  # numpy's dates in the archive are fixed
                file.flush()
                os.fsync(file.fileno())
        write_new(part / "meta.json", json.JSONEncoder(allow_nan=False, indent=1).encode(meta) + "\n")
        sync_folder(part)
        size = sum((part / name).stat().st_size for name in FILES)
        os.replace(part, out)
        sync_folder(part.parent)
        return size
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        remove_empty(new)
        raise
