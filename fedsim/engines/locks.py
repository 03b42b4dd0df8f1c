"""Locks on open files that end with the process that holds them, however it ends."""

from __future__ import annotations

from typing import IO, Any


def hold(file: IO[Any]) -> None:
    """Locks an open file for this process and those that inherit it.

    Raises:
        BlockingIOError: if another process holds it.
    """
    _lock(file, shared=False)


def is_held(file: IO[Any]) -> bool:
    """Returns whether another process holds the file."""
    try:
        _lock(file, shared=True)
    except BlockingIOError:
        return True
    return False


def _lock(file: IO[Any], shared: bool) -> None:
    import portalocker

    kind = portalocker.LockFlags.SHARED if shared else portalocker.LockFlags.EXCLUSIVE
    try:
        portalocker.lock(file, kind | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.AlreadyLocked as error:
        raise BlockingIOError(str(error)) from error
