"""The groups of settings, their options, and the folders that hold them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from devices.errors import FileError
from devices.reading import read_text, read_yaml
from fedsim.errors import ConfigError
from fedsim.settings.origins import came_with_a_run, own_configs
from fedsim.settings.permissions import real_path, searched, working_folder
from fedsim.settings.plugins import plugin_folders

Settings = dict[str, Any]
GROUPS = (
    *("workload", "model", "partition", "stream", "fleet", "latency", "compression", "uplink"),
    *("strategy", "trainer", "architecture", "participants", "loop", "attack", "method"),
    *("engine", "experiment"),
)
PRESETS, PACKAGE = ("method", "experiment"), re.compile(r"^\s*#\s*@package\s+_global_\s*$", re.MULTILINE)
NEEDED = tuple(group for group in GROUPS if group not in PRESETS)  # presets leave no settings behind
PRIMARY = "run"
FREE_MAPS = ("fleet.devices",)  # whose keys are the user's own: giving the map replaces it
AFFECTS_RESULTS = ("threads", "device", "batch_clients", "tf32")  # of the engine's settings, in the last bits
FORMAT, FORMATS = "memory_format", ("contiguous", "channels_last")


def config_dir() -> Path:
    """Returns the folder of the installed `configs` package, wherever the process was started."""
    spec = importlib.util.find_spec("configs")
    if spec is None or spec.origin is None:
        raise ConfigError("the package 'configs' is not installed beside fedsim; install fedsim again")
    return Path(spec.origin).parent


def config_folders() -> list[Path]:
    """Returns the folders in which options are looked up.

    They are fedsim's, those of `--config-dir`, `configs` of the working folder, and those of plug-ins.

    Raises:
        ConfigError: for an option in one of the user's that another one has, too, or that is not the user's, and for
            what would take the place of Hydra's own settings.
    """
    others, own = [config_dir(), *plugin_folders()], own_folders()
    for folder in (*own, *others[1:]):
        refuse_of_hydra(folder)
    for number, folder in enumerate(own):
        _check_options(folder, [*others, *own[:number]])
    return [others[0], *own, *others[1:]]


def own_folders() -> list[Path]:
    """Returns the folders of options that the user brings: those of `--config-dir`, and `configs` beside them.

    The working folder's is left out where that is a checkout of fedsim.
    """
    beside = working_folder() / "configs"
    if real_path(beside) == config_dir() or all((beside / name).is_file() for name in ("__init__.py", "run.yaml")):
        return searched()
    here = own_configs()
    return searched() if here is None else [*searched(), here]


def refuse_of_hydra(folder: Path) -> None:
    """Refuses a folder of options with a folder `hydra`: its files would take the place of Hydra's own.

    Raises:
        ConfigError: naming the first file in it.
    """
    if (place := folder / "hydra").is_dir():
        file = min(place.rglob("*.yaml"), default=place)
        key = ".".join(file.relative_to(folder).parent.parts if file.is_file() else ("hydra",))
        raise sets_hydra(key, file)


def sets_hydra(key: str, where: Path | str) -> ConfigError:
    """Returns the error for what sets something of Hydra's own."""
    return ConfigError(
        f"{where} sets {key}: Hydra would act on that by itself, so a config tree may not set it; give it on the "
        "command line"
    )


def _check_options(folder: Path, others: Sequence[Path]) -> None:
    """Refuses options of a folder whose names others have, and those that a link brings from a run or study folder.

    Raises:
        ConfigError: naming both files, or the link.
    """
    for group in ("", *GROUPS, "study"):
        files = sorted((folder / group).glob("*.yaml"))
        for file in files:
            name = file.relative_to(folder)
            if other := next((other / name for other in others if (other / name).is_file()), None):
                raise ConfigError(f"{file} has the name of {other}, and only one of them can be meant; rename it")
        places = {real_path(file).parent: file for file in files}
        if sent := next((file for place, file in places.items() if came_with_a_run(place / "x")), None):
            raise ConfigError(f"{sent} lies in the folder of a run or study, from which no option is taken")


def options(group: str) -> list[str]:
    """Returns the names that a group accepts, sorted."""
    paths = (path for folder in config_folders() for path in (folder / group).glob("*.yaml"))
    return sorted({path.stem for path in paths if path.is_file()})


def option_file(group: str, name: str) -> Path:
    """Returns the file of an option; where fedsim would have it, if there is none."""
    shipped = config_dir() / group / f"{name}.yaml"
    if shipped.is_file():  # the folders of others may have none of that name, and are not looked through for it
        return shipped
    files = [folder / group / f"{name}.yaml" for folder in config_folders()[1:]]
    return next((file for file in files if file.is_file()), shipped)


def check_preset(group: str, file: Path) -> None:
    """Refuses a file of a group of presets that does not set settings of all groups: Hydra would take it for a setting.

    Raises:
        FileError: if it is empty, or lacks the line that says so.
    """
    if group in PRESETS and not PACKAGE.search(text := read_text(file)):
        what = "lacks the line" if text.strip() else "is empty; it begins with the line"
        raise FileError(f"{file} {what} # @package _global_")


def following(group: str, name: str | None, key: str) -> list[tuple[str, ...]]:
    """Returns the paths of the settings of an option that are those of another key, as `${rounds}` is of rounds.

    Those of the options that it builds on are among them.
    """
    return list(dict.fromkeys(_following(group, str(name), key, ())))


def _following(group: str, name: str, key: str, seen: tuple[Path, ...]) -> Iterator[tuple[str, ...]]:
    file = option_file(group, name)
    tree = read_yaml(file) if file.is_file() and file not in seen else None
    if not isinstance(tree, dict):
        return
    yield from (path for path, value in _leaves(tree) if value == f"${{{key}}}")
    for base, below in _bases(group, tree.get("defaults") or ()):
        yield from ((*below, *path) for path in _following(group, base, key, (*seen, file)))


def _bases(group: str, defaults: Sequence[Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the options of its own group that an option builds on, and where in it their settings stand."""
    for entry in defaults:
        where, base = next(iter(entry.items())) if isinstance(entry, dict) and entry else ("", entry)
        place, _, package = (str(where) or str(base)).partition("@")
        name = f"{place}/{base}" if where else place
        below = "" if package == "_here_" else package or (place.replace("/", ".") if where else "")
        if not (name := name.removeprefix(f"/{group}/")).startswith(("/", "override ")):
            yield name, tuple(below.split(".")) if below else ()


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

    file = option_file(group, name)
    tree = read_yaml(file) if file.is_file() else None
    if not isinstance(tree, dict):
        return None
    if isinstance(target := updated(tree).get("_target_"), str):
        return target
    bases = [entry for entry in tree.get("defaults", ()) if isinstance(entry, str) and entry != "_self_"]
    return next((target for base in bases if (target := target_of(group, base)) is not None), None)


def model_settings(name: str) -> Settings:
    """Returns the settings of a model config by itself."""
    tree: Settings = read_yaml(option_file("model", name))
    return tree


def preset(method: str) -> dict[str, str]:
    """Returns the options that a method preset takes, by group."""
    tree, chosen = _preset_file("method", method), dict[str, str]()
    for entry in tree.get("defaults", ()):
        if isinstance(entry, dict):
            chosen |= {str(key).removeprefix("override /"): str(value) for key, value in entry.items()}
        elif entry not in ("_self_", method):
            chosen |= preset(str(entry))
    return chosen


def preset_private(method: str) -> list[str]:
    """Returns the roles and patterns of tensors that a method preset keeps on the devices."""
    return [str(name) for name in _preset_file("method", method).get("private", [])]


def set_by_presets(group: str, choices: Mapping[str, Any]) -> set[str]:
    """Returns the settings of a group that the presets among these choices set."""
    files = [(preset_group, str(choices[preset_group])) for preset_group in PRESETS if choices.get(preset_group)]
    found, seen = set[str](), set[tuple[str, str]]()
    while files:
        if (one := files.pop()) in seen:
            continue
        seen.add(one)
        tree = _preset_file(*one)
        own = tree.get(group)
        found |= {str(key) for key in own} if isinstance(own, dict) else set()
        files += [(one[0], entry) for entry in tree.get("defaults", ()) if isinstance(entry, str) and entry != "_self_"]
    return found


def _preset_file(group: str, name: str) -> Settings:
    """Returns what a preset says; nothing where its file is not here, as that of somebody's own."""
    file = option_file(group, name)
    tree = read_yaml(file) if file.is_file() else None
    return tree if isinstance(tree, dict) else {}


def devices_of_fleet(name: str) -> dict[str, float] | None:
    """Returns the devices in a fleet's own file with their shares; None where it has none, or lies in another tree."""
    file = option_file("fleet", name)
    tree = read_yaml(file) if file.is_file() else None
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
