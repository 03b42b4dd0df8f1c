"""What an object keeps from round to round, of which a resumed run must know: its attributes."""

from __future__ import annotations

from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial, type, np.ufunc)
IN_PLACE = (list, dict, set, np.ndarray, torch.Tensor)  # what may change though it belongs to the class


def memory_of(thing: object) -> dict[str, Any]:
    """Returns an object's attributes, but for functions and those that a class of it names in `derived`.

    Lists, maps, sets and arrays that belong to its class are among them: all rounds share them, too.
    """
    kinds = type(thing).__mro__
    derived = {name for kind in kinds for name in vars(kind).get("derived", ())}
    shared = {
        name: value
        for kind in reversed(kinds)
        for name, value in vars(kind).items()
        if isinstance(value, IN_PLACE) and not name.startswith("_")
    }
    found = {**shared, **vars(thing)}
    return {name: value for name, value in found.items() if name not in derived and not isinstance(value, FUNCTIONS)}
