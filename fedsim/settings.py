"""One config tree, two doors: composes it, checks it, and builds from it what a run needs.

`fedsim run` and `flwr run` both come here. May import: hydra, omegaconf, devices, fedsim. Methods, trainers and
strategies are reached only as `_target_` texts.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices.errors import unknown
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from devices.cost import LatencyModel
    from devices.fleet import Fleet
    from fedsim.workload import Workload

Settings = dict[str, Any]
GROUPS = ("workload", "model", "partition", "fleet", "latency", "strategy", "trainer", "method", "engine", "experiment")
PRIMARY = "run"


def config_dir() -> Path:
    """The folder of the installed `configs` package, wherever the process was started."""
    spec = importlib.util.find_spec("configs")
    if spec is None or spec.origin is None:
        raise ConfigError("the package 'configs' is not installed beside fedsim; install fedsim again")
    return Path(spec.origin).parent


def options(group: str) -> list[str]:
    """The names that a group accepts, sorted."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


# --- composing ---------------------------------------------------------------------------------------------------


def compose(overrides: Sequence[str]) -> Settings:
    """Composes the tree with Hydra's override syntax and checks it.

    Raises:
        ConfigError: one sentence about the first wrong key, value or name.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra  # leave a surrounding @hydra.main alone
    GlobalHydra.instance().clear()
    try:
        with one_sentence(), initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = hydra_compose(PRIMARY, list(overrides), return_hydra_config=True)
            return resolve(composed, composed.hydra.runtime.choices)
    finally:
        GlobalHydra.instance().hydra = outer


def from_run_config(run_config: dict[str, Any]) -> Settings:
    """Settings of a run that Flower started: `--run-config 'overrides="strategy=fedadam rounds=5"'`."""
    if run_config.get("config-json"):
        settings: Settings = json.loads(str(run_config["config-json"]))
        return check(settings)
    return compose(shlex.split(str(run_config.get("overrides", ""))))


def resolve(config: Any, choices: Any) -> Settings:
    """Plain checked settings from a composed config; `choices` says which option each group took.

    A config that already carries its choices (the `config.yaml` of an earlier run) keeps them.
    """
    from omegaconf import OmegaConf, open_dict

    config = config.copy()
    with open_dict(config):
        config.pop("hydra", None)
        if not config.get("choices"):
            config.choices = {group: choices.get(group) for group in GROUPS}
    settings = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    return check(settings)  # type: ignore[arg-type]


@contextmanager
def one_sentence() -> Any:
    """Turns what Hydra and OmegaConf say about a wrong setting into one ConfigError with the nearest right name."""
    from hydra.core.override_parser.types import Override  # noqa: F401  (fails early when hydra is broken)
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if group and error.options is not None:
            raise ConfigError(unknown(group, name, error.options)) from error
        raise ConfigError(_flat(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: Exception) -> str:
    text = _flat(error)
    key = re.search(r"Could not override '([^']+)'|full_key: (\S+)", text)
    if key and "not in struct" in text:
        return _unknown_key(key[1] or key[2])
    group = re.search(r"Could not override '([^'/]+)'.*No match in the defaults list", text)
    if group:
        return _unknown_key(group[1])
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing[1]} must be given, e.g. {missing[1]}=..."
    return text


def _unknown_key(key: str) -> str:
    """Names the nearest key at the level where `key` stops being known."""
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf

    known = OmegaConf.to_container(hydra_compose(PRIMARY), resolve=False)
    node: Any = known
    path: list[str] = []
    for part in key.split("."):
        if not isinstance(node, dict):
            return f"unknown setting {key!r}: {'.'.join(path)} has no settings below it"
        if part not in node:
            prefix = "".join(f"{p}." for p in path)
            names = [prefix + str(name) for name in node if not str(name).startswith("_")]
            names += list(GROUPS) if not path else []
            return unknown("setting", prefix + part, set(names))
        node, path = node[part], [*path, part]
    return f"unknown setting {key!r}"


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


# --- checking ----------------------------------------------------------------------------------------------------


def check(settings: Settings) -> Settings:
    """Checks the settings that every run has.

    Raises:
        ConfigError: names the key, what came and what is allowed.
    """
    _number(settings, "rounds", whole=True, least=1)
    _number(settings, "seed", whole=True, least=0)
    _number(settings, "cohort", whole=True, least=1)
    _number(settings, "num_clients", whole=True, least=1, optional=True)
    _number(settings, "over_selection", least=1.0)
    _number(settings, "evaluate_every", whole=True, least=1)
    _number(settings, "evaluate_clients", whole=True, least=0)
    _number(settings, "deadline_s", above=0.0, optional=True)
    _number(settings, "max_simulated_s", above=0.0, optional=True)
    _number(settings, "target_accuracy", above=0.0, most=1.0, optional=True)
    _number(settings["engine"], "threads", whole=True, least=1, prefix="engine.")
    _choice(settings, "on_client_error", ("stop", "drop"))
    _choice(settings["engine"], "device", ("auto", "cpu", "cuda"), prefix="engine.")
    return settings


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
    value = settings[key]
    if value is None and optional:
        return
    bounds = [f"at least {least:g}"] if least is not None else []
    bounds += [f"greater than {above:g}"] if above is not None else []
    bounds += [f"at most {most:g}"] if most is not None else []
    kind = "a whole number" if whole else "a number"
    right_type = isinstance(value, int) if whole else isinstance(value, int | float)
    in_bounds = right_type and not isinstance(value, bool) and math.isfinite(value)
    in_bounds = in_bounds and (least is None or value >= least) and (above is None or value > above)
    if not in_bounds or (most is not None and value > most):
        null = ", or null" if optional else ""
        raise ConfigError(f"{prefix}{key} must be {kind} {' and '.join(bounds)}{null}, got {value!r}")


def _choice(settings: Settings, key: str, allowed: Sequence[str], prefix: str = "") -> None:
    if settings[key] not in allowed:
        raise ConfigError(unknown(f"value for {prefix}{key}", settings[key], allowed))


# --- building ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What driver and workers build alike from the settings: pure functions of them, never changed by a run."""

    settings: Settings
    workload: Workload
    fleet: Fleet
    latency: LatencyModel


@lru_cache(maxsize=1)
def build_world(config_json: str) -> World:
    """Builds data, fleet and latency model; once per process and run, also when driver and worker share the process.

    Raises:
        ConfigError: for settings that do not fit together, such as a cohort larger than the population.
    """
    settings: Settings = json.loads(config_json)
    parts = {"model": instantiate(settings, "model"), "partition": instantiate(settings, "partition")}
    seed = settings["seed"]
    workload = instantiate(settings, "workload", **parts, num_clients=settings["num_clients"], seed=seed)
    fleet = instantiate(settings, "fleet", num_clients=workload.num_clients, seed=seed)
    for key in ("cohort", "evaluate_clients"):
        if settings[key] > workload.num_clients:
            raise ConfigError(
                f"{key} must be at most the {workload.num_clients} clients there are, got {settings[key]}"
            )
    return World(settings, workload, fleet, instantiate(settings, "latency"))


def instantiate(settings: Settings, group: str, **extra: Any) -> Any:
    """Makes the object that a group's `_target_` names.

    Raises:
        ConfigError: when its constructor refuses the settings; the sentence is the constructor's own.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    try:
        return hydra_instantiate(settings[group], **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError | KeyError | OSError):
            raise ConfigError(str(cause.args[0]) if isinstance(cause, KeyError) else str(cause)) from error
        raise ConfigError(f"{group}: {_flat(cause or error)}") from error


def asked(settings: Settings) -> int:
    """How many clients a round asks, so that `cohort` replies are likely to come: ceil(over_selection x cohort)."""
    return math.ceil(settings["over_selection"] * settings["cohort"] - 1e-9)


def pick_device(name: str) -> Any:
    """The torch device of `engine.device`: "auto" takes a GPU when there is one."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device=cuda needs a GPU, and torch finds none here; use engine.device=auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
