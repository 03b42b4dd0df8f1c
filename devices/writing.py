"""Files that are there whole or not at all, also when the process is killed, the disk is full or the power fails."""

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
    """Replaces a file in one step, on the disk when this returns; nobody ever reads half of it.

    Raises:
        OSError: naming the file; what was there before is there still.
    """
    part = part_of(path)
    try:
        with naming(path):
            write_new(part, content)
            os.replace(part, path)
            sync_folder(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(part):
            error.filename = str(path)  # which the user knows
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def part_of(path: Path) -> Path:
    """Returns the path at which this process writes what becomes the file."""
    return path.with_name(f".{path.name}.{os.getpid()}{PART}")


def write_new(path: Path, content: str | bytes) -> None:
    """Writes a new file to the disk; what was there by that name, a link perhaps, is taken away first.

    Raises:
        OSError: naming the file.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with naming(path), open_new(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def try_place(path: Path) -> None:
    """Finds out whether a file can be written, as `write_atomic` will; what is there stays.

    Raises:
        OSError: with the system's reason: no permission, a disk that is full or only to be read, a name too long.
    """
    part = part_of(path)
    open_new(part).close()
    part.unlink()
    if path.exists():
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK))


def open_new(path: Path) -> IO[bytes]:
    """Opens a new file to write it; what was there by that name, a link or a pipe perhaps, is taken away first."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def open_lock(path: Path) -> IO[bytes]:
    """Opens a file that is there to be locked, or makes it; what is in it stays.

    Raises:
        OSError: naming the file; also for a link, a pipe or a device, which is not waited for.
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
    """Lets an OSError that names no file name this one: a full disk is seen when bytes are written."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


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
