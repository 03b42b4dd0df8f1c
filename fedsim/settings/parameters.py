"""Checks a group's settings against the constructor that its `_target_` names, before anything is built.

A constructor says what it takes in its annotations (see `devices.bounds`); a wrong key, type or value becomes one
sentence that names the whole setting, e.g. `trainer.lr`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from devices.bounds import hints_of, options_of, problem
from devices.errors import one_line, unknown
from devices.reading import read_yaml
from devices.texts import as_yaml
from fedsim.errors import ConfigError, no_exit

# What says how an object is made, beside its arguments; any other key is one of these.
SPECIAL = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
STOCK = "strategies.stock.BOUNDS"  # of constructors that are not ours to annotate


def check_parameters(where: str, tree: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Checks the keys and the values of `tree`, and of the trees with a `_target_` below it.

    Args:
        where: what errors put before a key, e.g. "trainer".
        tree: settings with a `_target_`.
        given: arguments that the caller adds.

    Raises:
        ConfigError: for a setting that is unknown, missing, or not what its annotation allows.
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
    if inspect.isabstract(target):
        lacks = ", ".join(sorted(target.__abstractmethods__))
        raise ConfigError(f"{where}._target_={tree['_target_']!r} is abstract: name a class below it that has {lacks}")
    own = {str(key): value for key, value in tree.items() if key not in SPECIAL}
    for key, value in own.items():
        if key in known:
            hint = stock.get(key, known[key][0])
            if sentence := problem(f"{where}.{key}", value, hint):
                raise ConfigError(sentence)
            if takes_only_callables(hint) and not (isinstance(value, Mapping) and "_target_" in value):
                raise ConfigError(f"{where}.{key} must be settings with a _target_, got {as_yaml(value)}")
            if isinstance(value, Mapping) and "_target_" in value:
                check_parameters(f"{where}.{key}", value)
        elif not open_ended:
            allowed = [f"{where}.{name}" for name in known if name not in given]
            raise ConfigError(unknown(f"setting for {getattr(target, '__name__', target)}", f"{where}.{key}", allowed))
    if not tree.get("_partial_"):
        for key, (_, required) in known.items():
            if required and key not in own and key not in given:
                raise ConfigError(f"{where}.{key} must be given, {way_to_give(where, tree, key)}")


def way_to_give(group: str, tree: Mapping[str, Any], key: str) -> str:
    """Says how to give a setting that is missing: by an option for a class above its own, where one has it.

    Args:
        group: of which the settings are, or where in a group they stand.
        tree: the settings, with a `_target_`.
        key: of the missing one.
    """
    from hydra.utils import get_object

    from fedsim.settings.groups import GROUPS, option_file, options, target_of

    above = getattr(get_object(str(tree["_target_"])), "__mro__", ())[1:]
    names = {kind.__name__: kind for kind in above} if group in GROUPS else {}
    begun: dict[type, str] = {}
    for option in options(group) if names else ():
        target = target_of(group, option) or ""
        kind = names.get(target.rpartition(".")[2])
        if kind is not None and get_object(target) is kind and key in (read_yaml(option_file(group, option)) or {}):
            begun.setdefault(kind, option)
    for kind in above:
        if kind in begun:
            begin = f"{group}={begun[kind]}"
            return (
                f"as {begin} gives it to {kind.__name__}, from which yours derives: begin from that, {begin} "
                f"{group}._target_={tree['_target_']}, or in a file of options 'defaults: [{begun[kind]}, _self_]'"
            )
    return f"e.g. {group}.{key}=..."


def takes(tree: Mapping[str, Any], name: str) -> bool:
    """Returns whether the constructor that settings name has an argument of that name."""
    from hydra.utils import get_object

    return name in parameter_names(get_object(str(tree["_target_"])))


def parameter_names(target: Any) -> frozenset[str]:
    """Returns the arguments that a class or function names, those of the classes above it among them.

    Raises:
        TypeError, ValueError: if it does not say what it takes.
    """
    return frozenset(_parameters(target)[0])


def _parameters(target: Any) -> tuple[dict[str, tuple[Any, bool]], bool]:
    """Returns (annotation, required) by name, and whether others are taken; `**rest` goes on to the class above.

    What a class above requires may be given it by the one below, so it is no longer required of the settings.
    """
    known: dict[str, tuple[Any, bool]] = {}
    makers = (
        [vars(c)["__init__"] for c in target.__mro__[:-1] if "__init__" in vars(c)] if isinstance(target, type) else []
    )
    rest = False
    for make in makers or [target]:
        hints, is_above, rest = hints_of(make), rest, False
        for name, p in inspect.signature(make).parameters.items():
            rest |= p.kind is p.VAR_KEYWORD
            if name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                known.setdefault(name, (hints.get(name, Any), p.default is p.empty and not is_above))
        if not rest:
            return known, False
    return known, True


def takes_only_callables(hint: Any) -> bool:
    """Returns whether a parameter takes nothing but a function or class."""
    return all(typing.get_origin(option) is Callable for option in options_of(hint))
