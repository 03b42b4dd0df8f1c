"""Checks a group's settings against the constructor that its `_target_` names, before anything is built.

A constructor says what it takes in its annotations; a wrong key or type becomes one sentence that names the whole
setting, e.g. `trainer.lr`. So do bounds: `lr: Annotated[float, Interval(gt=0, le=1e3)]` holds for `trainer.lr`, and a
number without any has those of `WHOLE` and `NUMBER`.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from annotated_types import BaseMetadata, Ge, Gt, Interval, Le, Lt

from devices.errors import one_line, unknown
from devices.texts import as_yaml
from fedsim.errors import ConfigError, no_exit

# Of numbers that have no bounds of their own: nothing in a run is beyond them, and torch and numpy can count so far.
WHOLE, NUMBER = Interval(ge=-(2**31) + 1, le=2**31 - 1), Interval(ge=-1e9, le=1e9)
# What says how an object is made, beside its arguments; any other key is one of these.
SPECIAL = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
SIGNS = {Gt: "above", Ge: "at least", Lt: "below", Le: "at most"}
STOCK = "strategies.stock.BOUNDS"  # of constructors that are not ours to annotate
PLURAL = {int: "whole numbers", float: "finite numbers", bool: "true and false", str: "texts"}
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
        with no_exit():
            target = get_object(str(tree["_target_"]))
        known, open_ended = _parameters(target)
        mro = getattr(target, "__mro__", ())
        stock: Mapping[str, Any] = next((bounds for of, bounds in get_object(STOCK).items() if of in mro), {})
    except Exception as error:
        reason = one_line(error)
        raise ConfigError(f"{where}._target_={tree.get('_target_')!r} cannot be used: {reason}") from error
    own = {str(key): value for key, value in tree.items() if key not in SPECIAL}
    for key, value in own.items():
        if key in known:
            hint = stock.get(key, known[key][0])
            _check_type(f"{where}.{key}", value, hint)
            if callable_only(hint) and not (isinstance(value, Mapping) and "_target_" in value):
                raise ConfigError(f"{where}.{key} must be settings with a _target_, got {as_yaml(value)}")
            check_bounds(f"{where}.{key}", value, hint)
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
            hints = typing.get_type_hints(make, include_extras=True)
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
    options = [_bare(option) for option in _options(hint)]
    names = [_name(option) for option in options]
    if "" in names or any(_fits(value, option) for option in options):
        return
    quotable = str in options and value is not None and not isinstance(value, dict | list)
    quote = f" (in quotes it is text: {key}='\"{value}\"')" if quotable else ""
    raise ConfigError(f"{key} must be {' or '.join(names)}, got {as_yaml(value)}{quote}")


def callable_only(hint: Any) -> bool:
    """Whether a parameter takes nothing but a function or class."""
    return all(typing.get_origin(_bare(option)) is Callable for option in _options(hint))


def check_bounds(key: str, value: Any, hint: Any = Any) -> None:
    """Checks every number in a setting against the bounds of its annotation.

    Raises:
        ConfigError: with the bounds.
    """
    if isinstance(value, Mapping):
        if "_target_" not in value:  # a constructor's own are checked with it
            for name, below in value.items():
                check_bounds(f"{key}.{name}", below, _element(hint, 1))
    elif isinstance(value, list | tuple):
        for number, below in enumerate(value):
            check_bounds(f"{key}[{number}]", below, _element(hint, 0))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        whole = isinstance(value, int)
        usual = WHOLE if whole and float not in map(_bare, _options(hint)) else NUMBER
        limits = _both_sides([limit for option in _options(hint) for limit in _limits(option)], usual)
        if not (whole or math.isfinite(value)) or not all(_holds(value, limit) for limit in limits):
            bounds = " and ".join(f"{SIGNS[type(limit)]} {_plain(limit)}" for limit in limits)
            raise ConfigError(f"{key} must be {bounds}, got {as_yaml(value)}")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _bare(hint: Any) -> Any:
    """A type without what is noted beside it."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _limits(hint: Any) -> Iterator[BaseMetadata]:
    for note in typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ():
        yield from note if isinstance(note, Interval) else [note]


def _both_sides(limits: list[BaseMetadata], usual: Interval) -> list[BaseMetadata]:
    """The limits, with the usual ones where a side has none."""
    low, high = usual
    below = [] if any(isinstance(x, Gt | Ge) for x in limits) else [low]
    return [*below, *limits, *([] if any(isinstance(x, Lt | Le) for x in limits) else [high])]


def _element(hint: Any, place: int) -> Any:
    """The type of what a list (0) or a map (1) holds."""
    for option in map(_bare, _options(hint)):
        origin = typing.get_origin(option)
        kinds = (Mapping, dict) if place else (Sequence, list, tuple)
        if origin in kinds and len(typing.get_args(option)) > place:
            return typing.get_args(option)[place]
    return Any


def _holds(value: float, limit: Any) -> bool:
    bound: Any = _bound(limit)
    return bool({Gt: value > bound, Ge: value >= bound, Lt: value < bound, Le: value <= bound}[type(limit)])


def _bound(limit: Any) -> Any:
    return getattr(limit, type(limit).__name__.lower())


def _plain(limit: Any) -> str:
    """A bound in digits, or, where that is long, with an exponent."""
    bound = _bound(limit)
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _name(hint: Any) -> str:
    """How a sentence says the type; empty for what cannot be judged here."""
    origin = typing.get_origin(hint) or hint
    if origin in PLAIN:
        return PLAIN[origin]
    named = {Mapping: "a map", dict: "a map", Sequence: "a list", list: "a list", tuple: "a list"}.get(origin, "")
    within = _bare(typing.get_args(hint)[0]) if named == "a list" and typing.get_args(hint) else None
    return f"{named} of {PLURAL[within]}" if within in PLURAL else named


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
        return right and (isinstance(value, int) or math.isfinite(value))
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in PLAIN:
        return isinstance(value, origin)
    if origin in (Mapping, dict):
        return isinstance(value, dict)
    within = _bare(_element(hint, 0))
    return isinstance(value, list | tuple) and (within not in PLAIN or all(_fits(one, within) for one in value))
