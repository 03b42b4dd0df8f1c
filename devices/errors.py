"""Errors of the devices package and the sentence that every unknown name gets.

Everything above `devices` uses `unknown` too, so that a wrong name reads the same everywhere.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from devices.texts import VALUE_LETTERS, visible

MAX_LISTED, MAX_NEAREST = 50, 5  # names in one sentence


class UserError(ValueError):
    """An error that a user can mend in a setting, data or a file; its sentence says what to change."""


class DeviceError(UserError):
    """A device profile, fleet or trace file that cannot be used; the text says what to change."""


class FileError(DeviceError):
    """A file that cannot be read, of whatever kind (see `devices.reading`)."""


def unknown(what: str, name: object, options: Iterable[object]) -> str:
    """Says in one sentence that a name is not known, what is allowed and which name is nearest.

    Args:
        what: kind of the name, e.g. "device".
        name: the unknown one.
        options: the names that are allowed.
    """
    allowed = sorted(str(option) for option in options)
    name = visible(name, VALUE_LETTERS)
    near = get_close_matches(name, allowed, n=MAX_NEAREST)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if len(allowed) > MAX_LISTED:
        others = f", near it: {', '.join(near[1:])}" if near[1:] else ""
        return f"unknown {what} {name!r}{hint} ({len(allowed)} are allowed{others})"
    return f"unknown {what} {name!r}{hint} (allowed: {', '.join(allowed) or 'none'})"


def one_line(error: BaseException) -> str:
    """Returns the text of an error on one line."""
    return " ".join(str(error).split())
