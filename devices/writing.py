"""Files that are there whole or not at all, also when the process is killed, the disk is full or the power fails.

May import: the standard library only.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"  # how a file's name ends while it is written; a dot stands before it


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step, on the disk when this returns; nobody ever reads half of it.

    Raises:
        OSError: naming the file; what was there before is there still.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with naming(path):
            write_new(part, content)
            os.replace(part, path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_new(path: Path, content: str | bytes) -> None:
    """Writes a new file to the disk; what was there by that name, a link perhaps, is taken away first.

    Raises:
        OSError: naming the file.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with naming(path):
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


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
