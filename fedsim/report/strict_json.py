"""JSON as its standard has it: no NaN, no infinity, for readers in any language."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any


def finite(tree: Any) -> Any:
    """Returns the tree with null for numbers that JSON does not have."""
    if isinstance(tree, Mapping):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


_ENCODE = json.JSONEncoder(allow_nan=False).encode


def dumps(tree: Any, **how: Any) -> str:
    """Returns the tree as JSON text, with null for NaN and infinity.

    Args:
        tree: of dicts, lists, texts and numbers.
        how: arguments of `json.dumps`.
    """
    if not how:
        with suppress(ValueError, TypeError):  # most trees hold nothing that must be looked for
            return _ENCODE(tree)
    return json.dumps(finite(tree), allow_nan=False, **how)
