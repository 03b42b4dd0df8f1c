"""Settings that another class left behind: those of the old `_target_`, where the command line names a new one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from fedsim.errors import ConfigError
from fedsim.settings.groups import FORMAT, GROUPS, Settings
from fedsim.settings.overrides import TARGET, parsed
from fedsim.settings.parameters import SPECIAL, parameter_names
from fedsim.settings.trust import locate


def without_leftovers(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Drops settings of an old `_target_` that the new one does not take, wherever an override names a new one.

    What overrides themselves give stays, to be checked; so does all of a class that cannot be looked at.

    Args:
        settings: composed with these overrides.
        overrides: as Hydra took them.
    """
    given = {path: value for text in overrides for path, value in _given(parsed(text))}
    kept = deepcopy(settings)
    for path, name in given.items():
        node = _node(kept, path[:-1])
        if path[-1] != TARGET or node is None or node.get(TARGET) != name:
            continue
        try:
            taken = parameter_names(locate(".".join(path), name))
        except (ConfigError, TypeError, ValueError):  # whoever makes it says so, or it does not say what it takes
            continue
        for key in [key for key in node if key not in (*SPECIAL, *taken, FORMAT)]:
            if not any(other[: len(path)] == (*path[:-1], str(key)) for other in given):
                del node[key]
    return kept


def _given(override: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the paths that an override sets, and their values; nothing of options of groups."""
    value = None if override.is_delete() else override.value()
    if override.package is None and not (override.key_or_group in GROUPS and not isinstance(value, Mapping)):
        yield from _leaves(tuple(override.key_or_group.split(".")), value)


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _leaves((*path, str(key)), below)
    else:
        yield path, value


def _node(tree: Any, path: Sequence[str]) -> dict[str, Any] | None:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None
