"""Checks a group's settings against the constructor that its `_target_` names, before anything is built.

A constructor says what it takes in its annotations; a wrong key or type becomes one sentence that names the whole
setting, e.g. `trainer.lr`. Bounds stay with the constructors. May import: hydra (lazily),
devices.errors, fedsim.errors.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from devices.errors import unknown
from devices.texts import quoted
from fedsim.errors import ConfigError

PLAIN = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}


def check_parameters(where: str, tree: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Checks the keys and the types of `tree`, and of the trees with a `_target_` below it.

    Args:
        where: what errors put before a key, e.g. "trainer".
        tree: settings with a `_target_`.
        given: arguments that the caller adds.

    Raises:
        ConfigError: for an unknown, missing or mistyped setting.
    """
    from hydra.utils import get_object

    try:
        target = get_object(str(tree["_target_"]))
        known, open_ended = _parameters(target)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}._target_={tree.get('_target_')!r} cannot be used: {reason}") from error
    own = {str(key): value for key, value in tree.items() if not str(key).startswith("_")}
    for key, value in own.items():
        if key in known:
            _check_type(f"{where}.{key}", value, known[key][0])
            if isinstance(value, Mapping) and "_target_" in value:
                check_parameters(f"{where}.{key}", value)
        elif not open_ended:
            allowed = [f"{where}.{name}" for name in known if name not in given]
            raise ConfigError(unknown(f"setting for {getattr(target, '__name__', target)}", f"{where}.{key}", allowed))
    if not tree.get("_partial_"):
        for key, (_, required) in known.items():
            if required and key not in own and key not in given:
                raise ConfigError(f"{where}.{key} must be given, e.g. {where}.{key}=...")


def _parameters(target: Any) -> tuple[dict[str, tuple[Any, bool]], bool]:
    """(annotation, required) by name, and whether others are taken; `**rest` goes on to the next class above."""
    known: dict[str, tuple[Any, bool]] = {}
    makers = (
        [vars(c)["__init__"] for c in target.__mro__[:-1] if "__init__" in vars(c)] if isinstance(target, type) else []
    )
    for make in makers or [target]:
        try:
            hints = typing.get_type_hints(make)
        except Exception:  # names that exist for type checkers only
            hints = {}
        rest = False
        for name, p in inspect.signature(make).parameters.items():
            rest |= p.kind is p.VAR_KEYWORD
            if name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                known.setdefault(name, (hints.get(name, Any), p.default is p.empty))
        if not rest:
            return known, False
    return known, True


def _check_type(key: str, value: Any, hint: Any) -> None:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = [_name(option) for option in options]
    if "" in names or any(_fits(value, option) for option in options):
        return
    quotable = str in options and value is not None and not isinstance(value, dict | list)
    quote = f" (in quotes it is text: {key}='\"{value}\"')" if quotable else ""
    raise ConfigError(f"{key} must be {' or '.join(names)}, got {said(value)}{quote}")


def said(value: Any) -> str:
    """A value as it is written in a config: null, true and false are not Python's words for them."""
    text = quoted(value)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def _name(hint: Any) -> str:
    """How a sentence says the type; empty for what cannot be judged here."""
    origin = typing.get_origin(hint) or hint
    if origin in PLAIN:
        return PLAIN[origin]
    return {Mapping: "a map", dict: "a map", Sequence: "a list", list: "a list", tuple: "a list"}.get(origin, "")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in PLAIN:
        return isinstance(value, origin)
    return isinstance(value, dict if origin in (Mapping, dict) else list | tuple)
