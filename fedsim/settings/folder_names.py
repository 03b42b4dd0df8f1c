"""Refuses names of folders that no disk takes, or that are too deep."""

from __future__ import annotations

import os

from devices.texts import VALUE_LETTERS, visible
from fedsim.errors import ConfigError

LONGEST_NAME, DEEPEST = 255, 100  # bytes of a folder's name; folders in each other that somebody may name


def check_folder(key: str, folder: str) -> None:
    """Refuses a path that no folder can have, or that is so deep that what makes or removes it gives up.

    Raises:
        ConfigError: naming the key or option, and what came.
    """
    parts = [part for part in folder.split("/") if part]
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        what = f"has a part that is longer than the {LONGEST_NAME} bytes of a folder's name"
        raise ConfigError(f"{key} {what}: {visible(repr(folder), VALUE_LETTERS)}")
    if len(parts) > DEEPEST:
        raise ConfigError(f"{key} must be at most {DEEPEST} folders in each other, got {len(parts)}")
