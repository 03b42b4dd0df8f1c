"""Writes values as Hydra's override grammar reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

PLAIN = re.compile(r"[\w./-]+")


def quoted(text: str) -> str:
    """Returns a text that the grammar reads as it is."""
    return text if PLAIN.fullmatch(text) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def as_hydra(value: Any, text: Callable[[str], str] = quoted) -> str:
    """Returns a value as it stands behind `KEY=`.

    Args:
        value: of numbers, texts, lists and maps.
        text: how texts stand there; `str` for those that are in the grammar already.
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{as_hydra(key, text)}: {as_hydra(below, text)}" for key, below in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(as_hydra(below, text) for below in value) + "]"
    return str(value) if isinstance(value, int | float) else text(str(value))
