"""Checks the class of an object against its place: what a group of settings makes, or an annotation names."""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedsim.errors import ConfigError
from fedsim.settings.permissions import FLAG

# What each group makes, as MODULE:CLASS, so that nothing is imported to say it.
KINDS = {
    "workload": "fedsim.workloads.base:Workload",
    "model": "torch.nn:Module",
    "partition": "fedsim.workloads.partition:Partition",
    "stream": "fedsim.workloads.base:Workload",
    "fleet": "devices.fleet:Fleet",
    "latency": "devices.cost:LatencyModel",
    "compression": "devices.compression.plan:CompressionPlan",
    "uplink": "devices.compression.updates:UpdateCompressor",
    "strategy": "flwr.serverapp.strategy:Strategy",
    "trainer": "clients.trainers.base:LocalTrainer",
    "architecture": "strategies.architectures:Architecture",
    "participants": "fedsim.grid.participants:Participants",
    "loop": "fedsim.grid.loops:Loop",
    "attack": "fedsim.attacks.base:Attack",
    "engine": "fedsim.engines.base:Engine",
}
FACTORIES = ("model", "stream")  # groups that are called later, with more arguments
WITHIN = ("devices.availability:Availability",)  # made inside others, beside the groups
Kinds = tuple[Any, ...] | None  # classes, of which an object must be one; None where the place does not say


def group_kinds(group: str) -> Kinds:
    """Returns what a group of settings makes."""
    return (class_at(KINDS[group]),)


def kinds_of(hint: Any, partial: bool) -> Kinds:
    """Returns what may stand where an annotation is `hint`; `Callable` stands for any object that can be called."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, str | typing.TypeVar):
        return None
    if origin in (typing.Union, types.UnionType):
        found = [kinds_of(part, partial) for part in arguments if part is not type(None)]
        return None if None in found else tuple(kind for kinds in found for kind in kinds or ())
    if Callable in (origin, hint):
        return kinds_of(arguments[-1] if arguments else Any, False) if partial else (Callable,)
    if inspect.isclass(origin) and issubclass(origin, Mapping | Sequence):
        return kinds_of([part for part in arguments if part is not ...][-1], partial)
    return (hint,) if inspect.isclass(hint) else ()


def takes_factory(hint: Any) -> bool:
    """Returns whether what is called later may stand where an annotation is `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(map(takes_factory, arguments))
    if inspect.isclass(origin) and issubclass(origin, Mapping | Sequence):
        return any(map(takes_factory, arguments))
    return Callable in (origin, hint) or not inspect.isclass(origin or hint)


def is_partial(value: Any) -> bool:
    """Returns whether settings are of what is called later."""
    return isinstance(value, Mapping) and value.get("_partial_") is True


def annotations_of(target: Any) -> dict[str, Any]:
    """Returns annotations by parameter: of a function, or of the constructors of a class and those above it."""
    makers = [vars(c)["__init__"] for c in target.__mro__[:-1] if "__init__" in vars(c)] if is_class(target) else []
    found: dict[str, Any] = {}
    for make in makers or [target]:
        try:
            hints = typing.get_type_hints(make)
        except Exception:  # names that exist for type checkers only
            hints = {}
        for name, hint in hints.items():
            found.setdefault(name, hint)
    return found


def check_kind(key: str, name: str, found: Any, kinds: Kinds, partial: bool) -> None:
    """Refuses a class or function that does not make what its place takes.

    Args:
        key: where the name stands.
        name: as it was written.
        found: what it names.
        kinds: what it must be or make.
        partial: whether it is called later.

    Raises:
        ConfigError: says what the place takes.
    """
    wanted = tuple(map(class_at, (*KINDS.values(), *WITHIN))) if kinds is None else kinds
    makes: Any = found
    if not is_class(found):
        try:
            makes = typing.get_type_hints(found).get("return")
        except Exception:  # names that exist for type checkers only
            makes = None
    for kind in wanted:
        if kind is Callable:
            if is_class(found) and not partial and any("__call__" in vars(c) for c in found.__mro__[:-1]):
                return
        elif is_class(makes) and issubclass(makes, kind):
            return
    needed = " or ".join("a callable object" if kind is Callable else kind.__name__ for kind in kinds or ())
    parts = "what fedsim is made of: a Workload, a Module, a Strategy ..."
    needed = needed or ("plain values" if kinds == () else parts)
    makers = "CLASS" if kinds is None else " | ".join(kind.__name__ for kind in kinds if kind is not Callable)
    says = f" (a function says what it makes in its annotation, -> {makers})"
    hint = says if makers and not is_class(found) else ""
    what = f"{key}={name!r} cannot be used: this place takes {needed}, which it is not{hint}"
    raise ConfigError(f"{what}; if you trust it, add {FLAG} {name}")


def is_class(value: Any) -> typing.TypeGuard[type]:
    """Returns whether a value is a class, and not one with parameters, such as list[int]."""
    return inspect.isclass(value) and typing.get_origin(value) is None


def class_at(text: str) -> Any:
    """Returns the class at MODULE:CLASS."""
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)
