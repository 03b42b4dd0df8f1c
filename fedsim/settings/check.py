"""Checks composed settings as a whole, before anything is built of them."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

from devices.errors import unknown
from devices.texts import FILE_BYTES, as_yaml, storable
from fedsim.errors import ConfigError
from fedsim.settings.build import check_trusted, instantiate, memory_format, model_factory
from fedsim.settings.folder_names import check_folder
from fedsim.settings.groups import (
    NEEDED,
    PRIMARY,
    Settings,
    config_dir,
    left_out_group,
    options,
)
from fedsim.settings.run_settings import TEXTS, check_bounds


def check_choices(choices: Any, where: str = "") -> None:
    """Checks which options an earlier run took: texts, by which it is named, and no path."""
    from devices.errors import FileError
    from fedsim.settings.forms import CHOSEN, NAME, check_tree

    try:
        check_tree(choices, {**dict.fromkeys(choices if isinstance(choices, dict) else (), NAME), **CHOSEN}, "choices")
    except FileError as error:
        raise ConfigError(f"{where}{error}; fedsim fills choices in by itself") from error
    method = choices.get("method")
    if method is not None and not re.fullmatch(r"\w[\w.-]*", method):  # somebody's own need not be here
        raise ConfigError(f"{where}{unknown('method in choices', method, options('method'))}")


def check(settings: Settings) -> Settings:
    """Checks the settings that every run has.

    Raises:
        ConfigError: names the key, what came and what is allowed.
    """
    known = known_keys()
    for key in settings:
        if key not in known:
            raise ConfigError(left_out_group(str(key), settings) or unknown("setting", key, known))
    for key in known:
        if key not in settings:
            raise ConfigError(f"{key} is missing from the settings; it is in configs/{PRIMARY}.yaml")
    for key in NEEDED:
        if not isinstance(settings[key], dict) or "_target_" not in settings[key]:
            raise ConfigError(unknown(key, settings[key], options(key)))
    private = settings["private"]
    if not isinstance(private, list) or not all(isinstance(name, str) and name for name in private):
        raise ConfigError(f"private must be a list of roles or patterns, e.g. [head], got {as_yaml(private)}")
    check_bounds(settings)
    memory_format(settings)
    for key in TEXTS:
        _check_text(key, settings[key])
    name = str(settings["name"])
    if "/" in name or name in (".", "..") or not storable(name) or len(name.encode()) > FILE_BYTES:
        raise ConfigError(
            f"name is part of a folder's name: at most {FILE_BYTES} bytes on one line, without '/', got "
            f"{as_yaml(name)}; use out= for a path"
        )
    if settings["start_from"] is not None:  # absolute: workers may stand elsewhere
        from fedsim.models.starting import weights_file

        settings = {**settings, "start_from": str(weights_file(settings["start_from"]).absolute())}
    return settings


def try_out(settings: Settings) -> dict[str, Any]:
    """Builds what costs nothing, so that a sweep finds a wrong setting before its first run.

    Returns:
        What was made, by group.

    Raises:
        ConfigError: the sentence of the part that refuses its settings.
    """
    check_trusted(settings)
    model_factory(settings)
    groups = ("partition", "latency", "compression", "uplink", "trainer", "architecture", "participants", "loop")
    return {group: instantiate(settings, group) for group in groups}


@lru_cache(maxsize=1)
def known_keys() -> frozenset[str]:
    import yaml

    tree = yaml.safe_load((config_dir() / f"{PRIMARY}.yaml").read_text(encoding="utf-8"))
    return frozenset(tree) - {"defaults"} | frozenset(NEEDED)


def _check_text(key: str, value: Any) -> None:
    if value is None:
        return
    right_type = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not right_type or not str(value).strip():
        raise ConfigError(f"{key} must be text, or null, got {as_yaml(value)}")
    if "\0" in str(value) or not _encodable(str(value)):
        raise ConfigError(f"{key} must be text that a file's name can hold, got {as_yaml(value)}")
    check_folder(key, str(value))


def _encodable(text: str) -> bool:
    try:
        return bool(os.fsencode(text))
    except UnicodeEncodeError:
        return False
