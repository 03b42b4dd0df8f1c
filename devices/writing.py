"""Writes files whole or not at all, also when the process is killed, the disk is full or the power fails."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PART = ".part"  # how a file's name ends while it is written; a dot stands before it


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step; it is on the disk when this returns, and nobody ever reads half of it.

    Raises:
        OSError: naming the file, whose old content stays.
    """
    part = part_of(path)
    try:
        with naming(path):
            write_new(part, content)
            os.replace(part, path)
            sync_folder(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(part):
            error.filename = str(path)  # the name that the user knows
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def part_of(path: Path) -> Path:
    """Returns the path at which this process writes what becomes the file."""
    return path.with_name(f".{path.name}.{os.getpid()}{PART}")


def write_new(path: Path, content: str | bytes) -> None:
    """Writes a new file to the disk, after removing whatever has its name, such as a link.

    Raises:
        OSError: naming the file.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with naming(path), open_new(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def try_place(path: Path) -> None:
    """Finds out whether `write_atomic` can write a file; an old file of that name stays.

    Raises:
        OSError: with the system's reason: no permission, a disk that is full or only to be read, a name too long.
    """
    part = part_of(path)
    open_new(part).close()
    part.unlink()
    if path.exists():
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK))


def open_new(path: Path) -> IO[bytes]:
    """Opens a new file to write it, after removing whatever has its name, such as a link or a pipe."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def open_lock(path: Path) -> IO[bytes]:
    """Opens a file to lock it, or makes it; its content stays.

    Raises:
        OSError: naming the file; also for a link, a pipe or a device, none of which makes it wait.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "it is a link"
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "r+b", buffering=0)
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no file", str(path))


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks cannot, for folders
                raise
        finally:
            os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def make_folders(path: Path) -> list[Path]:
    """Makes a folder with its parents and returns the new ones, the outermost first.

    Raises:
        OSError: if one cannot be made.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()][::-1]
    path.mkdir(parents=True, exist_ok=True)
    return new


def remove_empty(folders: list[Path]) -> None:
    """Removes folders of `make_folders` that are empty, the innermost first."""
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()
