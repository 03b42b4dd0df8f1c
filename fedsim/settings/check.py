"""Checks composed settings as a whole, before anything is built of them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from devices.errors import unknown
from devices.texts import FILE_BYTES, as_yaml, storable
from fedsim.errors import ConfigError
from fedsim.settings.build import check_trusted, instantiate, memory_format, model_factory
from fedsim.settings.folder_names import check_folder
from fedsim.settings.groups import (
    MOST_CLIENTS,
    MOST_ROUNDS,
    NEEDED,
    PRIMARY,
    Settings,
    _below_groups,
    config_dir,
    options,
)

MOST_THREADS = 4096  # and clients that are trained at once
MOST_SECONDS = 1e10  # 300 years
MOST_TARGET = 1e12  # of whatever a workload is judged by
TEXTS = ("name", "out")  # settings that are text whatever they look like


def check_choices(choices: Any, where: str = "") -> None:
    """Checks which options an earlier run took: texts, by which it is named, and a method of `configs/method`."""
    from devices.errors import FileError
    from fedsim.settings.forms import CHOSEN, NAME, check_tree

    try:
        check_tree(choices, {**dict.fromkeys(choices if isinstance(choices, dict) else (), NAME), **CHOSEN}, "choices")
    except FileError as error:
        raise ConfigError(f"{where}{error}; fedsim fills choices in by itself") from error
    method = choices.get("method")
    if method is not None and method not in options("method"):
        raise ConfigError(f"{where}{unknown('method in choices', method, options('method'))}")


def check(settings: Settings) -> Settings:
    """Checks the settings that every run has.

    Raises:
        ConfigError: names the key, what came and what is allowed.
    """
    known = known_keys()
    for key in settings:
        if key not in known:
            raise ConfigError(_below_groups(str(key), settings) or unknown("setting", key, known))
    for key in known:
        if key not in settings:
            raise ConfigError(f"{key} is missing from the settings; it is in configs/{PRIMARY}.yaml")
    for key in NEEDED:
        if not isinstance(settings[key], dict) or "_target_" not in settings[key]:
            raise ConfigError(unknown(key, settings[key], options(key)))
    _number(settings, "rounds", whole=True, least=1, most=MOST_ROUNDS)
    _number(settings, "seed", whole=True, least=0, most=2**63 - 1)
    _number(settings, "cohort", whole=True, least=1, most=MOST_CLIENTS)
    _number(settings, "num_clients", whole=True, least=1, most=MOST_CLIENTS, optional=True)
    _number(settings, "over_selection", least=1.0, most=1000.0)
    _number(settings, "evaluate_every", whole=True, least=1, most=MOST_ROUNDS)
    _number(settings, "evaluate_clients", whole=True, least=0, most=MOST_CLIENTS)
    for key in ("deadline_s", "round_every_s", "max_simulated_s"):
        _number(settings, key, above=0.0, most=MOST_SECONDS, optional=True)
    _number(settings, "patience_rounds", whole=True, least=1, most=MOST_ROUNDS, optional=True)
    _number(settings, "target", least=-MOST_TARGET, most=MOST_TARGET, optional=True)
    _number(settings, "target_accuracy", above=0.0, most=1.0, optional=True)
    for key in ("threads", "batch_clients"):
        _number(settings["engine"], key, whole=True, least=1, most=MOST_THREADS, prefix="engine.")
    _number(settings, "checkpoint_s", least=0.0, most=MOST_SECONDS, optional=True)
    _choice(settings, "on_client_error", ("stop", "drop"))
    private = settings["private"]
    if not isinstance(private, list) or not all(isinstance(name, str) and name for name in private):
        raise ConfigError(f"private must be a list of roles or patterns, e.g. [head], got {as_yaml(private)}")
    memory_format(settings)
    _choice(settings["engine"], "device", ("auto", "cpu", "cuda"), prefix="engine.")
    for key in ("out", "name"):
        _text(settings, key)
    name = str(settings["name"])
    if "/" in name or name in (".", "..") or not storable(name) or len(name.encode()) > FILE_BYTES:
        raise ConfigError(
            f"name is part of a folder's name: at most {FILE_BYTES} bytes on one line, without '/', got "
            f"{as_yaml(name)}; use out= for a path"
        )
    return settings


def try_out(settings: Settings) -> None:
    """Builds what costs nothing, so that a sweep finds a wrong setting before its first run.

    Raises:
        ConfigError: the sentence of the part that refuses its settings.
    """
    check_trusted(settings)
    model_factory(settings)
    for group in ("partition", "latency", "compression", "uplink", "trainer"):
        instantiate(settings, group)


@lru_cache(maxsize=1)
def known_keys() -> frozenset[str]:
    import yaml

    tree = yaml.safe_load((config_dir() / f"{PRIMARY}.yaml").read_text(encoding="utf-8"))
    return frozenset(tree) - {"defaults"} | frozenset(NEEDED)


def _text(settings: Settings, key: str) -> None:
    value = settings[key]
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


def _number(
    settings: Settings,
    key: str,
    *,
    whole: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    optional: bool = False,
    prefix: str = "",
) -> None:
    value = _given(settings, key, prefix)
    if value is None and optional:
        return
    bounds = [f"{'of ' if whole else ''}at least {least:g}"] if least is not None else []
    bounds += [f"greater than {above:g}"] if above is not None else []
    kind = "a whole number" if whole else "a number"
    right_type = isinstance(value, int) if whole else isinstance(value, int | float)
    in_bounds = right_type and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))
    in_bounds = in_bounds and (least is None or value >= least) and (above is None or value > above)
    too_much = in_bounds and most is not None and value > most
    if too_much or (most is not None and most <= 1):
        bounds.append(f"at most {most:g}" if isinstance(most, float) else f"at most {most}")
    if not in_bounds or too_much:
        null = ", or null" if optional else ""
        raise ConfigError(f"{prefix}{key} must be {kind} {' and '.join(bounds)}{null}, got {as_yaml(value)}")


def _choice(settings: Settings, key: str, allowed: Sequence[str], prefix: str = "") -> None:
    if (value := _given(settings, key, prefix)) not in allowed:
        raise ConfigError(unknown(f"value for {prefix}{key}", value, allowed))


def _given(settings: Settings, key: str, prefix: str) -> Any:
    if key not in settings:
        raise ConfigError(f"the setting {prefix}{key} is missing; a whole configuration has it")
    return settings[key]
