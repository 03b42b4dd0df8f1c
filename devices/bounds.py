"""Bounds of settings: stated in the annotations of the constructors that take them, checked in one place.

A constructor says what it takes, and a reader finds it there:

    class Fading(Availability):
        def __init__(self, hours: Annotated[float, Interval(gt=0, le=24)], order: Literal["same", "shuffled"] = "same"):

Bounds are those of annotated_types. An `Interval` is shown to the user as a whole ("must be in (0, 24]"); of single
bounds, such as `Annotated[float, Gt(0), Le(1e30)]`, only the one that does not hold is shown. `Literal` lists allowed
values, `| None` allows null, and `MinLen(1)` refuses an empty list or map. Elements of a list or map have bounds of
their own, as in `Sequence[Annotated[float, Gt(0)]]`, and alternatives combine, as in
`Literal["all"] | Annotated[int, Ge(5)]`. Numbers without bounds have those of `WHOLE` and `NUMBER`.

`fedsim.settings.parameters` checks settings before anything is built of them. For objects that Python code makes by
itself, a family's base class derives from `Checked` and names its group, so that they are refused by the same sentence:

    class Availability(Checked, ABC, group="fleet.availability")  # fleet.availability.hours must be in (0, 24], got 0
    class LocalTrainer(Checked, group="trainer", error=ConfigError)

A dataclass, a function or a network without such a base class takes the decorator `@checked("compression")`, above
`@dataclass`. A rule about two arguments is checked by hand, in the constructor.
"""

from __future__ import annotations

import inspect
import math
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, wraps
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import BaseMetadata, Ge, Gt, Interval, Le, Lt, MinLen

from devices.errors import DeviceError, UserError, unknown
from devices.texts import as_yaml

Target = TypeVar("Target", bound=Callable[..., Any])

# Bounds of numbers that state none: nothing in a run is beyond them, and torch and numpy can count so far.
WHOLE, NUMBER = Interval(ge=-(2**31) + 1, le=2**31 - 1), Interval(ge=-1e9, le=1e9)
WORDS = {Gt: "greater than", Ge: "at least", Lt: "less than", Le: "at most"}
PLURAL = {int: "whole numbers", float: "finite numbers", bool: "true and false", str: "texts"}
PLAIN = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}
KINDS = {Mapping: "a map", dict: "a map", Sequence: "a list", list: "a list", tuple: "a list"}


# --- constructors -----------------------------------------------------------------------------------------------------


class Checked:
    """Base class of objects that settings make; constructors of classes below check the bounds that they state."""

    _group: str
    _error: type[UserError] = DeviceError

    def __init_subclass__(cls, group: str = "", error: type[UserError] | None = None, **rest: Any) -> None:
        """Wraps the constructor of a class below.

        Args:
            group: settings that make such objects, e.g. "trainer"; that of the class above where it is left out.
            error: class of error that a wrong argument raises; that of the class above where it is left out.
            rest: for other base classes.
        """
        super().__init_subclass__(**rest)
        cls._group, cls._error = group or cls._group, error or cls._error
        checked(cls._group, cls._error)(cls)


def checked(group: str, error: type[UserError] = DeviceError) -> Callable[[Target], Target]:
    """Makes a class or function check the bounds that its annotations state; see the module's docstring.

    Args:
        group: word before the name of an argument in the error, e.g. "trainer".
        error: class of error that a wrong argument raises.
    """

    def check(target: Target) -> Target:
        if not isinstance(target, type):
            return typing.cast(Target, _checking(target, group, error))
        if "__init__" in vars(target):
            target.__init__ = _checking(target.__init__, group, error)  # type: ignore[misc]
        return target

    return check


def _checking(make: Callable[..., Any], group: str, error: type[UserError]) -> Callable[..., Any]:
    names = list(inspect.signature(make).parameters)

    @wraps(make)
    def check_and_make(*args: Any, **kwargs: Any) -> Any:
        hints = hints_of(make)
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            if _states_bounds(hints.get(name)) and (sentence := problem(f"{group}.{name}", value, hints[name])):
                raise error(sentence)
        return make(*args, **kwargs)

    return check_and_make


@cache
def hints_of(make: Callable[..., Any]) -> dict[str, Any]:
    """Returns the annotations of a function's parameters with their bounds, as far as they can be evaluated."""
    try:
        return typing.get_type_hints(make, include_extras=True)
    except Exception:  # one annotation names a type that only type checkers import; the others count
        plain = inspect.unwrap(make)
        found: dict[str, Any] = {}
        for name, hint in inspect.get_annotations(plain).items():
            with suppress(Exception):
                alone, names = types.SimpleNamespace(__annotations__={name: hint}), vars(sys.modules[plain.__module__])
                found |= typing.get_type_hints(alone, names, include_extras=True)
        return found


def _states_bounds(hint: Any) -> bool:
    """Returns whether an annotation says more than a type."""
    noted = typing.get_origin(hint) is Literal or any(
        isinstance(note, BaseMetadata | Interval) for note in _notes(hint)
    )
    return noted or any(_states_bounds(part) for part in typing.get_args(hint))


def is_replaced(method: Callable[..., Any], default: Callable[..., Any]) -> bool:
    """Returns whether an object has another method in the place of its base class's, in its class or of its own.

    Args:
        method: of the object.
        default: that of the base class.
    """
    return not isinstance(method, types.MethodType) or method.__func__ is not default


# --- values -----------------------------------------------------------------------------------------------------------


def problem(key: str, value: Any, hint: Any = Any) -> str:
    """Says in one sentence why a value does not fit its annotation; empty where it does.

    Args:
        key: name of the value in the sentence, e.g. "trainer.lr".
        value: as settings hold it, or an argument.
        hint: the annotation, with its bounds.
    """
    options = options_of(hint)
    if not any(_is_kind(value, option) for option in options):
        return _wrong_kind(key, value, options)
    least = max((note.min_length for o in options for note in _notes(o) if isinstance(note, MinLen)), default=0)
    if (isinstance(value, Mapping) or _is_list(value)) and len(value) < least:
        return f"{key} must have at least {least} entr{'y' if least == 1 else 'ies'}, got {as_yaml(value)}"
    faults: Iterator[str] = iter(())
    if isinstance(value, Mapping):
        below = {} if "_target_" in value else value  # a constructor's own arguments have its own bounds
        faults = (problem(f"{key}.{name}", one, _element(options, 1)) for name, one in below.items())
    elif _is_list(value):
        faults = (problem(f"{key}[{number}]", one, _element(options, 0)) for number, one in enumerate(value))
    elif isinstance(value, Real) and not isinstance(value, bool):
        return _out_of_bounds(key, value, options)
    return next(filter(None, faults), "")


def _wrong_kind(key: str, value: Any, options: Sequence[Any]) -> str:
    literals = [member for option in options for member in _members(option)]
    if literals and all(isinstance(member, str) for member in literals) and set(map(_name, options)) <= {"", "null"}:
        allowed = [*literals, *("null" for option in options if option is type(None))]
        return unknown(f"value for {key}", "null" if value is None else value, allowed)
    names = [str(name) for option in options for name in _members(option) or (_full_name(option),)]
    quotable = str in options and value is not None and not isinstance(value, Mapping | list)
    quote = f" (in quotes it is text: {key}='\"{value}\"')" if quotable else ""
    return f"{key} must be {_either(names)}, got {as_yaml(value)}{quote}"


def _out_of_bounds(key: str, value: Real, options: Sequence[Any]) -> str:
    """Says which bounds of a number do not hold; empty where those of one alternative do."""
    allowed = ["null"] if type(None) in options else []
    for option in options:
        if not _is_kind(value, option):
            allowed += map(str, _members(option))
        elif broken := [limit for limit in _limits(option, value) if not _holds(value, limit)]:
            allowed.append(" and ".join(_in_words(limit, _bare(option) is int) for limit in broken))
        else:
            return ""
    return f"{key} must be {_either(allowed)}, got {as_yaml(value)}"


# --- annotations ------------------------------------------------------------------------------------------------------


def options_of(hint: Any) -> tuple[Any, ...]:
    """Returns the alternatives of an annotation."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _bare(hint: Any) -> Any:
    """Returns a type without the notes of its `Annotated`."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _notes(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()


def _members(hint: Any) -> tuple[Any, ...]:
    """Returns the values that a `Literal` allows."""
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _element(options: Sequence[Any], place: int) -> Any:
    """Returns the type of the elements of a list (0) or of the values of a map (1)."""
    for option in map(_bare, options):
        kinds = (Mapping, dict) if place else (Sequence, list, tuple)
        if typing.get_origin(option) in kinds and len(typing.get_args(option)) > place:
            return typing.get_args(option)[place]
    return Any


def _name(hint: Any) -> str:
    """Returns the words for a type in a sentence; empty for a type that cannot be checked here."""
    bare = _bare(hint)
    origin = typing.get_origin(bare) or bare
    if origin in PLAIN:
        return PLAIN[origin]
    within = _bare(_element([bare], 0))
    return f"{KINDS[origin]} of {PLURAL[within]}" if within in PLURAL else KINDS.get(origin, "")


def _full_name(hint: Any) -> str:
    """Returns `_name` with the interval of a number, or its lower bound: upper bounds are often far away."""
    notes = (note for note in _notes(hint) if isinstance(note, Interval | Gt | Ge))
    words = (_in_words(note, _bare(hint) is int) for note in notes)
    return " ".join([_name(hint), *(f"of {text}" if text.startswith("at ") else text for text in words)])


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)  # Hydra's own kind of list, too


def _is_kind(value: Any, hint: Any) -> bool:
    """Returns whether a value is of a type, whatever its bounds; True for a type that cannot be checked here."""
    if typing.get_origin(hint) is Literal:
        return any(value == member and isinstance(value, bool) == isinstance(member, bool) for member in _members(hint))
    bare = _bare(hint)
    origin = typing.get_origin(bare) or bare
    if isinstance(value, bool) and origin in (int, float):
        return False
    if origin is float:
        return isinstance(value, Integral) or (isinstance(value, Real) and math.isfinite(value))
    if origin is int:
        return isinstance(value, Integral)
    if origin in PLAIN:
        return isinstance(value, origin)
    if origin not in KINDS:
        return True
    if KINDS[origin] == "a map":
        return isinstance(value, Mapping)
    within = _bare(_element([bare], 0))
    return _is_list(value) and (within not in PLAIN or all(_is_kind(one, within) for one in value))


# --- bounds -----------------------------------------------------------------------------------------------------------


def _limits(option: Any, value: Real) -> list[Any]:
    """Returns the bounds that an annotation notes, with the usual ones where a side has none."""
    noted = [note for note in _notes(option) if isinstance(note, Gt | Ge | Lt | Le | Interval)]
    low, high = WHOLE if isinstance(value, Integral) and _bare(option) is not float else NUMBER
    kinds = {type(side) for note in noted for side in _sides(note)}
    return [*([] if kinds & {Gt, Ge} else [low]), *noted, *([] if kinds & {Lt, Le} else [high])]


def _sides(limit: Any) -> list[Any]:
    return list(limit) if isinstance(limit, Interval) else [limit]


def _bound(side: Any) -> Any:
    return getattr(side, type(side).__name__.lower())


def _holds(value: Any, limit: Any) -> bool:
    holds = {Gt: operator.gt, Ge: operator.ge, Lt: operator.lt, Le: operator.le}
    return all(holds[type(side)](value, _bound(side)) for side in _sides(limit))


def _in_words(limit: Any, whole: bool) -> str:
    sides = _sides(limit)
    if len(sides) == 1:
        return f"{WORDS[type(sides[0])]} {_digits(sides[0])}"
    low, high = sides
    if whole and (type(low), type(high)) == (Ge, Le):
        return f"from {_digits(low)} to {_digits(high)}"
    left, right = "(" if isinstance(low, Gt) else "[", ")" if isinstance(high, Lt) else "]"
    return f"in {left}{_digits(low)}, {_digits(high)}{right}"


def _digits(side: Any) -> str:
    """Returns a bound in digits, with an exponent where they would be many."""
    bound = _bound(side)
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _either(names: Sequence[str]) -> str:
    """Lists alternatives: "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
