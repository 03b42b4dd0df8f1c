"""Files that are there whole or not at all, as `devices.writing` makes them, and the folders that they lie in."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from devices.writing import PART, naming, sync_folder, write_atomic, write_new

__all__ = ["PART", "make_folders", "naming", "remove_empty", "sync_folder", "write_atomic", "write_new"]


def make_folders(path: Path) -> list[Path]:
    """Makes a folder with its parents; those that were not there, the outermost first.

    Raises:
        OSError: if one cannot be made.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()][::-1]
    path.mkdir(parents=True, exist_ok=True)
    return new


def remove_empty(folders: list[Path]) -> None:
    """Takes away folders of `make_folders`, the innermost first, as far as nothing is in them."""
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()
