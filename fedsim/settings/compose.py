"""One config tree, two doors: composes it, checks it, and builds from it what a run needs.

`fedsim run` and `flwr run` both come here. Methods, trainers and strategies are reached only as `_target_` texts.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices.errors import DeviceError, unknown
from devices.reading import read_yaml
from devices.texts import FILE_BYTES, VALUE_LETTERS, quoted, storable, visible
from fedsim.errors import ConfigError, DataError, ExitError, in_words, no_exit
from fedsim.report.place import check_folder
from fedsim.settings.parameters import check_parameters, said
from fedsim.settings.trust import check_group, plugin_folders
from fedsim.workloads.host_memory import check_fits, model_bytes

if TYPE_CHECKING:
    from torch import nn

    from devices.cost import LatencyModel
    from devices.fleet import Fleet
    from fedsim.workloads.base import ModelFactory, Workload

Settings = dict[str, Any]
GROUPS = (
    *("workload", "model", "partition", "stream", "fleet", "latency", "compression", "uplink"),
    *("strategy", "trainer", "method"),
    *("engine", "experiment"),
)
NEEDED = tuple(group for group in GROUPS if group not in ("method", "experiment"))  # presets leave no settings behind
PRIMARY = "run"
MOST_ROUNDS, MOST_CLIENTS = 10**7, 10**9
MOST_THREADS = 4096  # and clients that are trained at once
MOST_SECONDS = 1e10  # 300 years
CLIENT_BYTES = 64  # of a client in a fleet while it is drawn
TEXTS = ("name", "out")  # settings that are text whatever they look like
FREE_MAPS = ("fleet.devices",)  # whose keys are the user's own: giving the map replaces it
RESULTS_HANG_ON = ("threads", "device", "batch_clients")  # of the engine's settings, in the last bits
FORMAT, FORMATS = "memory_format", ("contiguous", "channels_last")
ENDLESS = "contains itself, or nests deeper than torch can follow; keep what is around a layer outside of it"
WORLDS = 4  # kept per process: `fedsim bench` has a few runs open at a time, everything else one


def config_dir() -> Path:
    """The folder of the installed `configs` package, wherever the process was started."""
    spec = importlib.util.find_spec("configs")
    if spec is None or spec.origin is None:
        raise ConfigError("the package 'configs' is not installed beside fedsim; install fedsim again")
    return Path(spec.origin).parent


def config_folders() -> list[Path]:
    """Where options of groups are looked up: fedsim's own folder, then those of plug-ins."""
    return [config_dir(), *plugin_folders()]


def options(group: str) -> list[str]:
    """The names that a group accepts, sorted."""
    paths = (path for folder in config_folders() for path in (folder / group).glob("*.yaml"))
    return sorted({path.stem for path in paths if path.is_file()})


def _option(group: str, name: str) -> Path:
    """The file of an option."""
    files = [folder / group / f"{name}.yaml" for folder in config_folders()]
    return next((file for file in files if file.is_file()), files[0])


def model_settings(name: str) -> Settings:
    """The settings of a model config by itself."""
    tree: Settings = read_yaml(_option("model", name))
    return tree


def preset(method: str) -> dict[str, str]:
    """The options that a method preset takes, by group."""
    tree = read_yaml(_option("method", method))
    chosen = {str(key): str(value) for entry in tree["defaults"] for key, value in entry.items()}
    return {key.removeprefix("override /"): value for key, value in chosen.items()}


def preset_private(method: str) -> list[str]:
    """What a method preset keeps on the devices."""
    tree = read_yaml(_option("method", method))
    return [str(name) for name in tree.get("private", [])]


def devices_of_fleet(name: str) -> dict[str, float] | None:
    """The devices of a fleet's own file with their shares; None where it has none, or is in another config tree."""
    import yaml

    file = _option("fleet", name)
    tree = yaml.safe_load(file.read_text()) if file.is_file() else None
    return tree.get("devices") if isinstance(tree, dict) else None


# --- composing ---------------------------------------------------------------------------------------------------


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
        return resolve(composed, composed.hydra.runtime.choices)


def _composed(overrides: Sequence[str]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra  # leave a surrounding @hydra.main alone
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return hydra_compose(PRIMARY, [*overrides, *search_path()], return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer


def search_path() -> list[str]:
    """What tells Hydra where the configs of plug-ins are."""
    found = ",".join(f"'file://{folder}'" for folder in plugin_folders())
    return [f"hydra.searchpath=[{found}]"] if found else []


def check_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides, with the ones of `FREE_MAPS` written so that they replace the map instead of adding to it.

    Raises:
        ConfigError: for an override that cannot be read, or a group that is given something else than a name.
    """
    checked: list[str] = []
    for text in overrides:
        override = _parsed(text)
        key, value = override.key_or_group, override.value()
        plain = not text.startswith(("+", "~"))
        if any(len(part) > FILE_BYTES for part in re.split("[./@]", key)):
            raise ConfigError(unknown("setting", key, _known_keys()))  # Hydra would look for a file of that name
        if plain and key in GROUPS and not (isinstance(value, str | dict) or override.is_sweep_override()):
            raise ConfigError(unknown(key, "null" if value is None else value, options(key)))
        if plain and key in GROUPS and isinstance(value, str) and (len(value) > FILE_BYTES or not storable(value)):
            raise ConfigError(unknown(key, value, options(key)))  # no name of a file, which it would be taken for
        if plain and key in TEXTS and isinstance(value, int | float) and not isinstance(value, bool):
            text = f'{key}="{text.partition("=")[2].strip()}"'  # name=1e-3 is a name, not 0.001
        if plain and key in FREE_MAPS and (isinstance(value, dict) or override.is_sweep_override()):
            checked += [f"~{key}", f"+{text}"]
        else:
            checked.append(text)
    return checked


def is_of_hydra(text: str) -> bool:
    """Whether an override is of Hydra's own settings, or puts something there."""
    override = _parsed(text)
    return any(re.match(r"hydra\b", place or "") for place in (override.key_or_group, override.package))


def sweep_overrides(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every run of a sweep, in order; empty where only Hydra can tell (globs, its plug-ins)."""
    choices: dict[str, list[str]] = {}  # as Hydra does it: a key given twice keeps its first place and its last value
    for text in overrides:
        override = _parsed(text)
        if is_of_hydra(text) or (override.is_sweep_override() and not override.is_discrete_sweep()):
            return []
        try:
            values = [str(v) for v in override.sweep_string_iterator()] if override.is_sweep_override() else None
        except Exception:  # a glob asks the config folder
            return []
        key = override.get_key_element()
        choices[key] = [text] if values is None else [f"{key}={value}" for value in values]
    return [list(run) for run in itertools.product(*choices.values())]


def _parsed(text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError) as error:
        reason = _flat(error).partition(" See https://")[0].replace(f"Error parsing override {text!r} ", "")
        reason = visible(reason, VALUE_LETTERS)
        raise ConfigError(
            f"cannot read the setting {quoted(text)} ({reason}); write KEY=VALUE, and special characters in quotes "
            f"that the shell leaves alone: {_quoted_for_a_shell(text)}"
        ) from error
    if not override.key_or_group:
        raise ConfigError(f"cannot read the setting {quoted(text)}; write KEY=VALUE, e.g. rounds=20")
    return override


def _quoted_for_a_shell(text: str) -> str:
    """The setting as one types it in a shell, with its value in quotes that reach Hydra."""
    key, _, value = visible(text, VALUE_LETTERS).partition("=")
    return shlex.quote(f'{key}="{value}"') if value else "KEY='\"VALUE\"'"


def from_run_config(run_config: dict[str, Any]) -> Settings:
    """Settings of a run that Flower started: `--run-config 'overrides="strategy=fedadam rounds=5"'`."""
    if run_config.get("config-json"):
        settings: Settings = json.loads(str(run_config["config-json"]))
        return check(settings)
    return compose(shlex.split(str(run_config.get("overrides", ""))))


def settings_of_run(folder: Path) -> Settings:
    """The settings of an earlier run; what its version did not know yet is as it was then.

    Raises:
        ConfigError: if the folder holds no run or its settings are wrong.
    """
    from devices.errors import FileError
    from fedsim.report.files import read_config

    try:
        settings = check(completed(read_config(folder)))
    except FileError as error:
        raise ConfigError(str(error)) from error
    _check_choices(settings["choices"], f"{folder / 'config.yaml'}: ")
    return settings


def _check_choices(choices: Any, where: str = "") -> None:
    """Checks which options an earlier run took: texts, by which it is named, and a method of `configs/method`."""
    from devices.errors import FileError
    from fedsim.report.files import CHOSEN, NAME
    from fedsim.settings.forms import check_tree

    try:
        check_tree(choices, {**dict.fromkeys(choices if isinstance(choices, dict) else (), NAME), **CHOSEN}, "choices")
    except FileError as error:
        raise ConfigError(f"{where}{error}; fedsim fills choices in by itself") from error
    method = choices.get("method")
    if method is not None and method not in options("method"):
        raise ConfigError(f"{where}{unknown('method in choices', method, options('method'))}")


def completed(settings: Settings) -> Settings:
    """Settings of an earlier version with what came later: a new setting's default is what was done before it."""
    choices = settings.get("choices")
    if not isinstance(choices, dict) or not choices or all(key in settings for key in _known_keys()):
        return settings
    usual = compose([])
    groups = {group: usual["choices"][group] for group in GROUPS if group not in choices}
    return {**usual, **settings, "choices": {**choices, **groups}}


def on_engine(settings: Settings, overrides: Sequence[str]) -> Settings:
    """The same run elsewhere: with other settings of the engine, as far as they cannot change a result.

    Raises:
        ConfigError: for any other setting.
    """
    engine, name = dict(settings["engine"]), settings["choices"]["engine"]
    for text in overrides:
        key = _parsed(text).key_or_group
        if key != "engine" and not key.startswith("engine."):
            raise ConfigError(f"{text} cannot be given: only the engine of a run may change, e.g. engine=ray")
        if key.removeprefix("engine.") in RESULTS_HANG_ON:
            raise ConfigError(f"{key} cannot change: the last bits of results depend on it")
    if overrides:
        chosen = compose([f"engine={name}", *overrides])
        given = {_parsed(text).key_or_group for text in overrides}
        if "engine" in given:
            fixed = {key: engine[key] for key in RESULTS_HANG_ON}
            engine, name = {**chosen["engine"], **fixed}, chosen["choices"]["engine"]
        else:
            engine |= {key: value for key, value in chosen["engine"].items() if f"engine.{key}" in given}
    return check({**settings, "engine": engine, "choices": {**settings["choices"], "engine": name}})


def resolve(config: Any, choices: Any) -> Settings:
    """Plain checked settings from a composed config; `choices` says which option each group took.

    A config that already carries its choices (the `config.yaml` of an earlier run) keeps them.
    """
    from omegaconf import OmegaConf, open_dict

    config = config.copy()
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
    if not earlier:
        return check(settings)  # type: ignore[arg-type]
    settings = check(completed(settings))  # type: ignore[arg-type]
    _check_choices(settings["choices"])
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

    check_before_hydra()
    try:
        yield
    except (ConfigError, DataError, DeviceError):
        raise
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if group and error.options is not None:
            raise ConfigError(unknown(group, name, error.options)) from error
        raise ConfigError(_flat(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    except COMPOSING as error:
        hint = "; do the defaults of a file name itself?" if isinstance(error, RecursionError) else ""
        raise ConfigError(f"these settings cannot be put together: {in_words(error)}{hint}") from error


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = _flat(error) or f"these settings cannot be put together: {type(error).__name__}"
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
            if not path and (below := _below_groups(key, node)):
                return below
            return unknown("setting", prefix + part, set(names))
        node, path = node[part], [*path, part]
    return ""


def _below_groups(key: str, settings: Settings) -> str:
    """Says that a setting is unknown but for its group, which was left out; empty where no group has it."""
    found = []
    for group in GROUPS:
        node = settings.get(group)
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                break
            node = node[part]
        else:
            found.append(repr(f"{group}.{key}"))
    return f"unknown setting {key!r}; did you mean {' or '.join(found)}?" if found else ""


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


# --- checking ----------------------------------------------------------------------------------------------------


def check(settings: Settings) -> Settings:
    """Checks the settings that every run has.

    Raises:
        ConfigError: names the key, what came and what is allowed.
    """
    known = _known_keys()
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
    _number(settings, "target_accuracy", above=0.0, most=1.0, optional=True)
    for key in ("threads", "batch_clients"):
        _number(settings["engine"], key, whole=True, least=1, most=MOST_THREADS, prefix="engine.")
    _number(settings, "checkpoint_s", least=0.0, most=MOST_SECONDS, optional=True)
    _choice(settings, "on_client_error", ("stop", "drop"))
    private = settings["private"]
    if not isinstance(private, list) or not all(isinstance(name, str) and name for name in private):
        raise ConfigError(f"private must be a list of roles or patterns, e.g. [head], got {said(private)}")
    memory_format(settings)
    _choice(settings["engine"], "device", ("auto", "cpu", "cuda"), prefix="engine.")
    for key in ("out", "name"):
        _text(settings, key)
    name = str(settings["name"])
    if "/" in name or name in (".", "..") or not storable(name) or len(name.encode()) > FILE_BYTES:
        raise ConfigError(
            f"name is part of a folder's name: at most {FILE_BYTES} bytes on one line, without '/', got {said(name)}; "
            "use out= for a path"
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


def check_trusted(settings: Settings) -> None:
    """Checks what the configuration would call, before any of it is called; see `fedsim.settings.trust`.

    Raises:
        ConfigError: for the first `_target_` that a configuration may not name.
    """
    for group in NEEDED:
        check_group(group, settings[group])


def check_address(settings: Settings, overrides: Sequence[str], source: str) -> None:
    """Refuses to join a Ray cluster that only a file names: what its workers answer is unpickled here.

    Args:
        settings: of a run.
        overrides: the user's own.
        source: where the others come from.
    """
    address = settings["engine"].get("address")
    if address is not None and not any(_parsed(text).key_or_group == "engine.address" for text in overrides):
        raise ConfigError(
            f"engine.address={address!r} comes from {source}, and whoever runs that cluster could run code here; if it "
            f"is yours, say it again on the command line: engine.address={address}, or else engine.address=null"
        )


@lru_cache(maxsize=1)
def _known_keys() -> frozenset[str]:
    import yaml

    tree = yaml.safe_load((config_dir() / f"{PRIMARY}.yaml").read_text(encoding="utf-8"))
    return frozenset(tree) - {"defaults"} | frozenset(NEEDED)


def _text(settings: Settings, key: str) -> None:
    value = settings[key]
    if value is None:
        return
    right_type = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not right_type or not str(value).strip():
        raise ConfigError(f"{key} must be text, or null, got {said(value)}")
    if "\0" in str(value) or not _encodable(str(value)):
        raise ConfigError(f"{key} must be text that a file's name can hold, got {said(value)}")
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
        raise ConfigError(f"{prefix}{key} must be {kind} {' and '.join(bounds)}{null}, got {said(value)}")


def _choice(settings: Settings, key: str, allowed: Sequence[str], prefix: str = "") -> None:
    if (value := _given(settings, key, prefix)) not in allowed:
        raise ConfigError(unknown(f"value for {prefix}{key}", value, allowed))


def _given(settings: Settings, key: str, prefix: str) -> Any:
    if key not in settings:
        raise ConfigError(f"the setting {prefix}{key} is missing; a whole configuration has it")
    return settings[key]


# --- building ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What driver and workers build alike from the settings: pure functions of them, never changed by a run."""

    settings: Settings
    workload: Workload
    fleet: Fleet
    latency: LatencyModel


@lru_cache(maxsize=WORLDS)
def build_world(config_json: str) -> World:
    """Builds data, fleet and latency model; once per process and run, also when driver and worker share the process.

    Raises:
        ConfigError: for settings that do not fit together, such as a cohort larger than the population.
    """
    settings: Settings = json.loads(config_json)
    check_trusted(settings)
    workload, seed = build_workload(settings), settings["seed"]
    _check_memory(settings, model_factory(settings), workload)
    fleet = instantiate(settings, "fleet", num_clients=workload.num_clients, seed=seed)
    for key in ("cohort", "evaluate_clients"):
        if settings[key] > workload.num_clients:
            raise ConfigError(
                f"{key} must be at most the {workload.num_clients} clients there are, got {settings[key]}"
            )
    for group in ("trainer", "compression", "uplink"):
        instantiate(settings, group)  # workers make their own; a wrong setting is to be refused before a run begins
    return World(settings, workload, fleet, instantiate(settings, "latency"))


def build_workload(settings: Settings) -> Workload:
    """Builds the data alone, as the stream brings them.

    Raises:
        ConfigError, DataError: if they are not there or do not fit the settings.
    """
    parts = {"model": model_factory(settings), "partition": instantiate(settings, "partition")}
    seed = settings["seed"]
    workload = instantiate(settings, "workload", **parts, num_clients=settings["num_clients"], seed=seed)
    if not len(workload.test):
        raise DataError(f"workload {workload.name} has no test examples, so no model can be judged on it")
    stream = instantiate(settings, "stream")  # a partial: Hydra would copy the data
    streamed: Workload = stream(
        workload=workload, rounds=settings["rounds"], evaluate_every=settings["evaluate_every"], seed=seed
    )
    return streamed


def _check_memory(settings: Settings, make: ModelFactory, workload: Workload) -> None:
    """Refuses a population or a model that this host cannot hold, before it is made.

    Raises:
        ConfigError: naming the largest number among the settings of the model.
    """
    import torch

    from fedsim.workloads.base import JUDGED_AT_ONCE

    check_fits(f"num_clients={workload.num_clients}", CLIENT_BYTES * workload.num_clients)
    batch = min(JUDGED_AT_ONCE, max(1, len(workload.test)))
    dtype = workload.test.gather(torch.arange(min(1, len(workload.test))))["x"].dtype
    needed = model_bytes(make, workload.input_shape, workload.num_classes, batch, dtype)
    if not needed:  # it could not be made without numbers
        try:
            with torch.random.fork_rng(devices=[]):
                make(input_shape=workload.input_shape, num_classes=workload.num_classes)
        except (ConfigError, DataError, DeviceError):
            raise
        except Exception as error:
            raise ConfigError(_no_factory(settings, error)) from error
    sizes = {key: value for key, value in settings["model"].items() if _largest(value) > 1}
    key = max(sizes, key=lambda name: _largest(sizes[name]), default="")
    check_fits(f"model.{key}={said(sizes[key])}" if key else f"model={settings['choices']['model']}", needed)


def _largest(value: Any) -> float:
    """The largest number in a setting."""
    if isinstance(value, list):
        return max(map(_largest, value), default=0.0)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def instantiate(settings: Settings, group: str, **extra: Any) -> Any:
    """Makes the object that a group's `_target_` names.

    Raises:
        ConfigError: when a configuration may not name it (see `fedsim.settings.trust`), or its constructor refuses the
            settings; the sentence is the constructor's own.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    check_group(group, settings[group])
    check_parameters(group, settings[group], extra)
    try:
        with no_exit():
            return hydra_instantiate(settings[group], **extra)
    except ExitError as error:
        raise ConfigError(f"{group}: {error}") from error
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError | DataError | DeviceError):
            raise type(cause)(str(cause)) from error
        raise ConfigError(f"{group}: {_flat(cause or error)}") from error


def model_factory(settings: Settings) -> ModelFactory:
    """What makes the model, in the memory format of `memory_format`.

    Raises:
        ConfigError: when its constructor refuses the settings, or the format is unknown.
    """
    own = {key: value for key, value in settings["model"].items() if key != FORMAT}
    make, format = instantiate({"model": own}, "model"), memory_format(settings)
    try:
        inspect.signature(make).bind(input_shape=(1,), num_classes=1)
    except TypeError as error:
        raise ConfigError(_no_factory(settings, error)) from error
    except ValueError:  # it does not say what it takes
        pass

    def model(**shapes: Any) -> nn.Module:
        from fedsim.workloads.base import MEMORY_FORMATS

        with no_exit():
            network: nn.Module = make(**shapes)
        target = f"model._target_={settings['model']['_target_']!r}"
        try:
            _refuse_lazy(network)
            if not any(p.requires_grad for p in network.parameters()):
                raise ConfigError(f"{target} makes a network without weights to train")
            return network.to(memory_format=MEMORY_FORMATS[format])  # type: ignore[call-overload]
        except RecursionError as error:
            raise ConfigError(f"{target} makes a network that {ENDLESS}") from error

    return model


def _refuse_lazy(network: nn.Module) -> None:
    """Weights are counted, sent and averaged before the network sees a first input.

    Raises:
        ConfigError: naming the first tensor that has no shape until then.
    """
    from torch.nn.parameter import is_lazy

    for name, tensor in itertools.chain(network.named_parameters(), network.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(
                f"{name} of model {type(network).__name__} has no shape before a first input (a lazy layer); give the "
                "layer its sizes"
            )


def _no_factory(settings: Settings, error: Exception) -> str:
    """Says that the model's `_target_` makes no network when it is given the shapes of the data."""
    return (
        f"model._target_={settings['model']['_target_']!r} makes no network for the input_shape and num_classes of a "
        f"workload ({in_words(error)}); name a function that takes both and returns the network, "
        "in a file of your own, e.g. model._target_=mine.network"
    )


def memory_format(settings: Settings) -> str:
    """How images and convolution weights lie in memory: a setting of the model, because it changes the last bits.

    Channels-last, a training step of a small convolutional network on a CPU takes 0.6 to 0.85 of its time; networks
    whose config says nothing stay contiguous.
    """
    name = settings["model"].get(FORMAT, FORMATS[0])
    if name not in FORMATS:
        raise ConfigError(unknown(f"value for model.{FORMAT}", name, FORMATS))
    return str(name)


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
