"""Composes the one config tree and checks it, for each of its two doors.

`fedsim run` and `flwr run` both come here.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

from devices.errors import UserError, one_line, unknown
from devices.texts import quoted
from fedsim.errors import ConfigError, in_words
from fedsim.settings.check import check, check_choices, known_keys
from fedsim.settings.described import nearest_elsewhere
from fedsim.settings.groups import (
    AFFECTS_RESULTS,
    GROUPS,
    NEEDED,
    Settings,
    config_folders,
    following,
    left_out_group,
    options,
)
from fedsim.settings.hydra_text import as_hydra
from fedsim.settings.leftovers import without_leftovers
from fedsim.settings.moved import updated
from fedsim.settings.overrides import check_overrides, is_of_hydra, parsed
from fedsim.settings.run_settings import TEXTS, RunSettings


def compose(overrides: Sequence[str]) -> Settings:
    """Composes the tree with Hydra's override syntax and checks it.

    Raises:
        ConfigError: one sentence about the first wrong key, value or name.
    """
    overrides = check_overrides(overrides)
    for text in overrides:
        if is_of_hydra(text):
            raise ConfigError(f"{text} is a setting of Hydra itself, which only fedsim run takes, on its command line")
    with one_sentence(overrides):
        composed = _composed(overrides)
        return _resolved(composed, composed.hydra.runtime.choices, overrides)


def _composed(overrides: Sequence[str]) -> Any:
    from fedsim.settings.bases import composed  # Hydra is imported where it composes

    return composed(overrides, search_path())


def search_path(given: Sequence[str] = ()) -> list[str]:
    """Returns the override that tells Hydra where the configs of the user and of plug-ins are, and networks as code.

    Args:
        given: overrides that may have one of their own, which this one takes the place of.
    """
    theirs = [parsed(text).value() for text in given if text.startswith("hydra.searchpath=")]
    found = [*(theirs[-1] if theirs and isinstance(theirs[-1], list) else ())]
    found += [f"file://{folder}" for folder in config_folders()[1:]]
    return [f"hydra.searchpath={as_hydra([*found, 'code://'])}"]


def from_run_config(run_config: dict[str, Any]) -> Settings:
    """Returns the settings of a run that Flower started: `--run-config 'overrides="strategy=fedadam rounds=5"'`."""
    if run_config.get("config-json"):
        settings: Settings = json.loads(str(run_config["config-json"]))
        return check(settings)
    return compose(shlex.split(str(run_config.get("overrides", ""))))


def completed(settings: Settings) -> Settings:
    """Adds to settings of an earlier version what came later: its default is what was done before."""
    choices = settings.get("choices")
    if not isinstance(choices, dict) or not choices or all(key in settings for key in known_keys()):
        return settings
    usual = compose([])
    groups = {group: usual["choices"][group] for group in GROUPS if group not in choices}
    return {**usual, **settings, "choices": {**choices, **groups}}


def on_engine(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Returns the settings of the same run elsewhere: of the engine, as far as no result changes, and the logger.

    Raises:
        ConfigError: for any other setting.
    """
    engine, name = dict(settings["engine"]), settings["choices"]["engine"]
    logger = [parsed(text).value() for text in overrides if parsed(text).key_or_group == "logger"]
    overrides = [text for text in overrides if parsed(text).key_or_group != "logger"]
    settings = {**settings, "logger": logger[-1]} if logger else settings
    for text in overrides:
        key = parsed(text).key_or_group
        if key != "engine" and not key.startswith("engine."):
            raise ConfigError(f"{text} cannot be given: only rounds and engine of a run may change, e.g. engine=ray")
        if key.removeprefix("engine.") in AFFECTS_RESULTS:
            raise ConfigError(f"{key} cannot change: the last bits of results depend on it")
    if overrides:
        chosen = compose([f"engine={name}", *overrides])
        given = {parsed(text).key_or_group for text in overrides}
        if "engine" in given:
            fixed = {key: engine[key] for key in AFFECTS_RESULTS if key in engine}
            engine, name = {**chosen["engine"], **fixed}, chosen["choices"]["engine"]
        else:
            engine |= {key: value for key, value in chosen["engine"].items() if f"engine.{key}" in given}
    return check({**settings, "engine": engine, "choices": {**settings["choices"], "engine": name}})


def resolve(config: Any, choices: Any, overrides: Sequence[str]) -> Settings:
    """Returns plain checked settings from a composed config.

    Args:
        config: one that has its choices already (the `config.yaml` of an earlier run) keeps them.
        choices: which option each group took.
        overrides: with which it was composed.
    """
    return _resolved(config.copy(), choices, overrides)


def _resolved(config: Any, choices: Any, overrides: Sequence[str]) -> Settings:
    """Resolves a config that nobody needs as it is."""
    from omegaconf import OmegaConf, open_dict

    with open_dict(config):
        config.pop("hydra", None)
        earlier = bool(config.get("choices"))
        if not earlier:
            config.choices = {group: choices.get(group) for group in GROUPS}
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} must be given, e.g. {missing[0]}=...")
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    settings = without_leftovers(updated(settings), overrides)
    if not earlier:
        return check(settings)
    settings = check(completed(settings))
    check_choices(settings["choices"])
    return settings


@contextmanager
def one_sentence(overrides: Sequence[str] = ()) -> Iterator[None]:
    """Turns what Hydra and OmegaConf say about a wrong setting into one ConfigError with the nearest right name.

    Args:
        overrides: what was asked for; the groups among them decide which names there are.
    """
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    from fedsim.settings.config_files import COMPOSING, check_before_hydra
    from fedsim.settings.own_networks import FORMS

    check_before_hydra()
    try:
        yield
    except UserError:
        raise
    except MissingConfigException as error:
        missing = str(error.missing_cfg_file)
        group, _, name = missing.rpartition("/")
        if missing.partition("/")[0] in GROUPS and not (re.fullmatch(r"[\w/]+", group) and options(group)):
            group, _, name = missing.partition("/")  # a name with slashes; else a group below the group
        if group and error.options is not None:
            forms = f"; {FORMS}" if group == "model" else ""
            raise ConfigError(f"{unknown(group, name, error.options)}{forms}") from error
        raise ConfigError(one_line(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    except COMPOSING as error:
        hint = "; do the defaults of a file name itself?" if isinstance(error, RecursionError) else ""
        raise ConfigError(f"these settings cannot be put together: {in_words(error)}{hint}") from error


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = one_line(error) or f"these settings cannot be put together: {type(error).__name__}"
    key = re.search(r"Could not override '([^']+)'|Could not delete from config\. '([^']+)' does not exist", text)
    if key:
        # A map may hold the wrong key one level further down: the cause knows where.
        return _unknown_key(getattr(error.__cause__, "full_key", None) or key[1] or key[2], overrides) or text
    place = re.search(r"^(.*?) full_key: (\S+)", text)
    return f"{place[2]}: {place[1]}" if place else text


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    """Names the nearest key at the level where `key` stops being known; empty if all of it is."""
    from omegaconf import OmegaConf

    groups = [text for text in overrides if text.partition("=")[0] in GROUPS]
    try:
        composed = _composed(groups)
    except Exception:  # a sweep over groups: the defaults still give most names
        composed = _composed([])
    node: Any = OmegaConf.to_container(composed, resolve=False)
    node.pop("hydra")
    path: list[str] = []
    for part in key.split("."):
        if not isinstance(node, dict):
            return f"unknown setting {quoted(key)}: {'.'.join(path)} has no settings below it"
        if part not in node:
            prefix = "".join(f"{p}." for p in path)
            names = [prefix + str(name) for name in node if not str(name).startswith("_") and name != "choices"]
            names += list(GROUPS) if not path else []
            if not path and (below := left_out_group(key, node)):
                return below
            if path or not get_close_matches(part, names):
                return nearest_elsewhere(key) or unknown("setting", prefix + part, set(names))
            return unknown("setting", prefix + part, set(names))
        node, path = node[part], [*path, part]
    return ""


def check_address(settings: Settings, overrides: Sequence[str], source: str) -> None:
    """Refuses to join a Ray cluster that only a file names: what its workers answer is unpickled here.

    Args:
        settings: of a run.
        overrides: the user's own.
        source: where the others come from.
    """
    address = RunSettings.of(settings).cluster_address
    if address is not None and not any(parsed(text).key_or_group == "engine.address" for text in overrides):
        raise ConfigError(
            f"engine.address={address!r} comes from {source}, and whoever runs that cluster could run code here; if it "
            f"is yours, say it again on the command line: engine.address={address}, or else engine.address=null"
        )


REPRICED = ("fleet", "latency")  # groups, and settings of the top, that say what work costs and when it is late
AVAILABILITY = "availability"  # of a fleet: when its clients are online
MICROPHONES = "microphones"  # of a fleet: what its clients record with
LIMITS = ("deadline_s", "round_every_s", "max_simulated_s")


def of_rounds(settings: Settings, rounds: Any) -> Settings:
    """Returns the settings of the same run with another number of rounds, also where others follow it."""
    now = deepcopy(settings)
    for group in NEEDED:
        for *above, last in following(group, settings["choices"].get(group), "rounds"):
            node = now[group]
            for name in above:
                node = node.get(name, {})
            if node.get(last) == settings["rounds"]:
                node[last] = rounds
    return check({**now, "rounds": rounds})


def on_devices(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Returns the settings of the same run on other devices: another fleet, latency model or limit of time.

    Where another fleet says nothing of who is online when, its clients are online as those of the run were. What they
    record with stays.

    Raises:
        ConfigError: for any other setting.
    """
    allowed = (*REPRICED, *LIMITS, *TEXTS)
    given = [parsed(text) for text in check_overrides(overrides)]
    for text, override in zip(overrides, map(parsed, overrides), strict=True):
        if override.key_or_group.partition(".")[0] not in allowed or override.is_sweep_override():
            names = ", ".join(f"{name}=" for name in allowed)
            raise ConfigError(f"{text} cannot be given: what clients learned stays, and only {names} may change")
        if override.key_or_group.startswith(f"fleet.{MICROPHONES}"):
            raise ConfigError(f"{text} cannot be given: what clients heard, and learned from, stays")
    groups = {override.key_or_group: override.value() for override in given if override.key_or_group in REPRICED}
    composed = compose([f"{group}={name}" for group, name in groups.items()])
    now: Settings = {**deepcopy(settings), "choices": {**settings["choices"], **groups}}
    now |= {group: composed[group] for group in groups}
    if "fleet" in groups and _is_always_online(now["fleet"]) and AVAILABILITY in settings["fleet"]:
        now["fleet"][AVAILABILITY] = deepcopy(settings["fleet"][AVAILABILITY])
    if "fleet" in groups and MICROPHONES in now["fleet"]:
        now["fleet"][MICROPHONES] = deepcopy(settings["fleet"].get(MICROPHONES))
    now = _overridden(now, [override for override in given if override.key_or_group not in REPRICED])
    return check(without_leftovers(now, overrides))


def _is_always_online(fleet: Settings) -> bool:
    found = fleet.get(AVAILABILITY)
    return isinstance(found, dict) and str(found.get("_target_")).endswith(".Always")


def _overridden(settings: Settings, overrides: list[Any]) -> Settings:
    """Returns finished settings with some overrides, as Hydra applies them where it composes."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from omegaconf import OmegaConf

    config = OmegaConf.create(settings)
    OmegaConf.set_struct(config, True)
    with one_sentence():
        ConfigLoaderImpl._apply_overrides_to_config(overrides, config)
    plain: Settings = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return plain
