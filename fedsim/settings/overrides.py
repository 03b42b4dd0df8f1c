"""Overrides as a user types them, KEY=VALUE: read with Hydra's own parser, checked, spread into the runs of a sweep."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from devices.errors import one_line, unknown
from devices.texts import FILE_BYTES, VALUE_LETTERS, quoted, storable, visible
from fedsim.errors import ConfigError
from fedsim.settings.check import known_keys
from fedsim.settings.groups import FREE_MAPS, GROUPS, options
from fedsim.settings.run_settings import TEXTS

TARGET = "_target_"


def check_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides as Hydra is to read them; see `_for_hydra`.

    Raises:
        ConfigError: for an override that cannot be read, or a group that is given something else than a name.
    """
    read = [(text, parsed(text)) for text in overrides]
    remade = {place for _, override in read if (place := _remade(override))}
    return [checked for text, override in read for checked in _for_hydra(text, override, remade)]


def _remade(override: Any) -> str:
    """Returns the place for which an override names another `_target_`; empty where it names none."""
    if override.key_or_group == "model" and any(character in str(override.input_line) for character in ".:"):
        return "model"  # a network that is named as code
    above, _, last = str(override.key_or_group).rpartition(".")
    names_it = not override.is_delete() and isinstance(override.value(), dict) and TARGET in override.value()
    return above if last == TARGET else str(override.key_or_group) if names_it else ""


def _for_hydra(text: str, override: Any, remade: Collection[str]) -> list[str]:
    """Returns an override, checked, as Hydra is to read it.

    One of `FREE_MAPS` replaces the map instead of adding to it; what is deleted may be null; below a place that gets
    another `_target_` there may be new keys.
    """
    key, value = override.key_or_group, override.value()
    plain = not text.startswith(("+", "~"))
    if any(len(part) > FILE_BYTES for part in re.split("[./@]", key)):
        raise ConfigError(unknown("setting", key, known_keys()))  # Hydra would look for a file of that name
    if plain and key in GROUPS and not (isinstance(value, str | dict) or override.is_sweep_override()):
        raise ConfigError(unknown(key, "null" if value is None else value, options(key)))
    if plain and key in GROUPS and isinstance(value, str) and (len(value) > FILE_BYTES or not storable(value)):
        raise ConfigError(unknown(key, value, options(key)))  # no name of a file, which it would be taken for
    if plain and key in TEXTS and isinstance(value, int | float) and not isinstance(value, bool):
        text = f'{key}="{text.partition("=")[2].strip()}"'  # name=1e-3 is a name, not 0.001
    if plain and key in FREE_MAPS and (isinstance(value, dict) or override.is_sweep_override()):
        return [f"~{key}", f"+{text}"]
    if override.is_delete() and value is None and "." in key and not re.search("[/@]", key) and not is_of_hydra(text):
        return [f"{key}=0", text]  # Hydra takes null for what is not there
    below = any(key.startswith(f"{place}.") for place in remade) and not key.endswith(f".{TARGET}")
    if not override.is_delete() and (below or (key == _remade(override) and isinstance(value, dict))):
        return [f"++{text.lstrip('+')}"]
    return [text]


def is_of_hydra(text: str) -> bool:
    """Returns whether an override is of Hydra's own settings, or puts something there."""
    override = parsed(text)
    return any(re.match(r"hydra\b", place or "") for place in (override.key_or_group, override.package))


def sweep_overrides(overrides: Sequence[str]) -> list[list[str]]:
    """Returns the overrides of each run of a sweep, in order; empty where only Hydra can tell (globs, its plug-ins)."""
    choices: dict[str, list[str]] = {}  # as Hydra does it: a key given twice keeps its first place and its last value
    for text in overrides:
        override = parsed(text)
        if is_of_hydra(text) or (override.is_sweep_override() and not override.is_discrete_sweep()):
            return []
        try:
            values = [str(v) for v in override.sweep_string_iterator()] if override.is_sweep_override() else None
        except Exception:  # a glob asks the config folder
            return []
        key = override.get_key_element()
        choices[key] = [text] if values is None else [f"{key}={value}" for value in values]
    return [list(run) for run in itertools.product(*choices.values())]


@lru_cache(maxsize=1024)
def parsed(text: str) -> Any:
    """Returns an override as Hydra reads it; the same object each time, which nobody changes.

    Raises:
        ConfigError: for a text that is none.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError) as error:
        reason = one_line(error).partition(" See https://")[0].replace(f"Error parsing override {text!r} ", "")
        reason = visible(reason, VALUE_LETTERS)
        raise ConfigError(
            f"cannot read the setting {quoted(text)} ({reason}); write KEY=VALUE, and special characters in quotes "
            f"that the shell leaves alone: {_quoted_for_a_shell(text)}"
        ) from error
    if not override.key_or_group:
        raise ConfigError(f"cannot read the setting {quoted(text)}; write KEY=VALUE, e.g. rounds=20")
    return override


def _quoted_for_a_shell(text: str) -> str:
    """Returns the setting as one types it in a shell, with its value in quotes that reach Hydra."""
    key, _, value = visible(text, VALUE_LETTERS).partition("=")
    return shlex.quote(f'{key}="{value}"') if value else "KEY='\"VALUE\"'"
