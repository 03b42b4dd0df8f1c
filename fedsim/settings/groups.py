"""The groups of settings, their options, and the folders that hold them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from devices.reading import read_yaml
from fedsim.errors import ConfigError
from fedsim.settings.plugins import plugin_folders

Settings = dict[str, Any]
GROUPS = (
    *("workload", "model", "partition", "stream", "fleet", "latency", "compression", "uplink"),
    *("strategy", "trainer", "method"),
    *("engine", "experiment"),
)
NEEDED = tuple(group for group in GROUPS if group not in ("method", "experiment"))  # presets leave no settings behind
PRIMARY = "run"
FREE_MAPS = ("fleet.devices",)  # whose keys are the user's own: giving the map replaces it
AFFECTS_RESULTS = ("threads", "device", "batch_clients")  # of the engine's settings, in the last bits
FORMAT, FORMATS = "memory_format", ("contiguous", "channels_last")


def config_dir() -> Path:
    """Returns the folder of the installed `configs` package, wherever the process was started."""
    spec = importlib.util.find_spec("configs")
    if spec is None or spec.origin is None:
        raise ConfigError("the package 'configs' is not installed beside fedsim; install fedsim again")
    return Path(spec.origin).parent


def config_folders() -> list[Path]:
    """Returns the folders in which options are looked up: fedsim's own folder, then those of plug-ins."""
    return [config_dir(), *plugin_folders()]


def options(group: str) -> list[str]:
    """Returns the names that a group accepts, sorted."""
    paths = (path for folder in config_folders() for path in (folder / group).glob("*.yaml"))
    return sorted({path.stem for path in paths if path.is_file()})


def _option(group: str, name: str) -> Path:
    """Returns the file of an option."""
    files = [folder / group / f"{name}.yaml" for folder in config_folders()]
    return next((file for file in files if file.is_file()), files[0])


def following(group: str, name: str | None, key: str) -> list[tuple[str, ...]]:
    """Returns the paths of the settings of an option that are those of another key, as `${rounds}` is of rounds."""
    file = _option(group, str(name))
    tree = read_yaml(file) if file.is_file() else None
    return [path for path, value in _leaves(tree) if value == f"${{{key}}}"]


def _leaves(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the values of a tree of maps with their paths."""
    if not isinstance(tree, dict):
        yield above, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*above, str(key)))


def target_of(group: str, name: str) -> str | None:
    """Returns the class that an option makes, as its file or one that it builds on says; None where neither does."""
    from fedsim.settings.moved import updated

    file = _option(group, name)
    tree = read_yaml(file) if file.is_file() else None
    if not isinstance(tree, dict):
        return None
    if isinstance(target := updated(tree).get("_target_"), str):
        return target
    bases = [entry for entry in tree.get("defaults", ()) if isinstance(entry, str) and entry != "_self_"]
    return next((target for base in bases if (target := target_of(group, base)) is not None), None)


def model_settings(name: str) -> Settings:
    """Returns the settings of a model config by itself."""
    tree: Settings = read_yaml(_option("model", name))
    return tree


def preset(method: str) -> dict[str, str]:
    """Returns the options that a method preset takes, by group."""
    tree = read_yaml(_option("method", method))
    chosen = {str(key): str(value) for entry in tree["defaults"] for key, value in entry.items()}
    return {key.removeprefix("override /"): value for key, value in chosen.items()}


def preset_private(method: str) -> list[str]:
    """Returns the roles and patterns of tensors that a method preset keeps on the devices."""
    tree = read_yaml(_option("method", method))
    return [str(name) for name in tree.get("private", [])]


def devices_of_fleet(name: str) -> dict[str, float] | None:
    """Returns the devices in a fleet's own file with their shares; None where it has none, or lies in another tree."""
    import yaml

    file = _option("fleet", name)
    tree = yaml.safe_load(file.read_text()) if file.is_file() else None
    return tree.get("devices") if isinstance(tree, dict) else None


def left_out_group(key: str, settings: Settings) -> str:
    """Says which group a setting belongs to, where only that was left out; empty where no group has it."""
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
