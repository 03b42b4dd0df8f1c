"""Settings that another class left behind: those of the old one, where the command line names a new one.

It does so by `_target_`, or by an option in the place of a preset's: with `method=fedasync loop=rounds` nobody takes
the `loop.buffer_size` of the method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from fedsim.errors import ConfigError
from fedsim.settings.groups import FORMAT, GROUPS, Settings, set_by_presets
from fedsim.settings.overrides import TARGET, parsed
from fedsim.settings.parameters import SPECIAL, parameter_names
from fedsim.settings.trust import locate


def without_leftovers(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Drops settings that a class does not take, wherever an override names it in the place of another.

    What overrides themselves give stays, to be checked; so does what an option's own file says, and all of a class that
    cannot be looked at.

    Args:
        settings: composed with these overrides.
        overrides: as Hydra took them.
    """
    every = [parsed(text) for text in overrides]
    given = {path: value for override in every for path, value in _given(override)}
    kept = deepcopy(settings)
    for group in filter(None, map(_group_of, every)):
        node, of_presets = _node(kept, [group]), set_by_presets(group, kept.get("choices") or {})
        if node and of_presets and TARGET in node:  # to look at a class may take an import
            _drop(node, (group,), given, of_presets)
    for path, name in given.items():
        node = _node(kept, path[:-1])
        if path[-1] != TARGET or node is None or node.get(TARGET) != name:
            continue
        _drop(node, path[:-1], given, {str(key) for key in node})
    return kept


def _drop(node: dict[str, Any], path: tuple[str, ...], given: Mapping[tuple[str, ...], Any], which: set[str]) -> None:
    """Drops from the settings at a path those of these that their class does not take and no override gives."""
    try:
        taken = parameter_names(locate(".".join((*path, TARGET)), node[TARGET]))
    except (ConfigError, TypeError, ValueError):  # whoever makes it says so, or it does not say what it takes
        return
    for key in [key for key in node if key in which and key not in (*SPECIAL, *taken, FORMAT)]:
        if not any(other[: len(path) + 1] == (*path, str(key)) for other in given):
            del node[key]


def _given(override: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the paths that an override sets, and their values; nothing of options of groups."""
    value = None if override.is_delete() else override.value()
    if override.package is None and not _group_of(override):
        yield from _leaves(tuple(override.key_or_group.split(".")), value)


def _group_of(override: Any) -> str:
    """Returns the group of which an override takes an option; empty where it takes none."""
    takes_one = override.key_or_group in GROUPS and not (override.is_delete() or isinstance(override.value(), Mapping))
    return str(override.key_or_group) if takes_one else ""


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
