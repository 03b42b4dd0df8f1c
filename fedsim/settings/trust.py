"""Decides which code a configuration may name, by name and file, before anything of a stranger's is imported.

A run folder, a study or a config tree may come from somebody else, and a `_target_` in it would be called. It may name
what comes with fedsim, Flower's strategies, `torch.nn`, `torchvision.models`, plug-ins (installed packages with the
entry point group `fedsim.plugins`) and modules of the user's working folder; not modules in a run or study folder, nor
below a folder that a command was given. What is given may be a part of something larger that came with it, so of a
folder or file deeper in the working folder, say pack/runs/A, all of pack is kept out. It goes by where the object is
defined, not by the path that leads to it, and the object must be of the kind that its place needs. Everything else
needs `--allow-target NAME` on the command line.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from devices.errors import one_line
from devices.texts import as_yaml
from fedsim.errors import ConfigError, no_exit
from fedsim.settings.kinds import (
    FACTORIES,
    Kinds,
    annotations_of,
    check_kind,
    group_kinds,
    is_class,
    is_partial,
    kinds_of,
    takes_factory,
)
from fedsim.settings.origins import (
    came_with_a_run,
    describe,
    is_the_users,
    leads_to_library,
    may_be_named,
    module_files,
    reach_working_folder,
)
from fedsim.settings.own_networks import IN_FILE, is_file
from fedsim.settings.parameters import SPECIAL
from fedsim.settings.permissions import FLAG, allow, allowed, everything_is_allowed, real_path, working_folder

SOURCES = (
    "fedsim's own packages, Flower's strategies, torch.nn, torchvision.models, plug-ins and modules of the working "
    "folder"
)
CONVERSIONS = ("none", "partial", "object", "all")


# --- trees ------------------------------------------------------------------------------------------------------------


def check_group(group: str, tree: Mapping[str, Any]) -> None:
    """Refuses what a whole group of settings would call and may not, as `check_tree` does below it.

    Raises:
        ConfigError: names the key, what came, and what is allowed.
    """
    check_tree(group, tree, group_kinds(group))
    if tree.get("_partial_", False) != (group in FACTORIES):
        needed, why = ("true", "it is called with the data") if group in FACTORIES else ("false", "it is made at once")
        raise ConfigError(f"{group}._partial_ must be {needed}: {why}; got {as_yaml(tree.get('_partial_', False))}")


def check_tree(key: str, tree: Any, kinds: Kinds = None, factory: bool = True) -> None:
    """Checks every `_target_` of a tree, at any depth, before any of them is called, and the keys that go with it.

    Args:
        key: where the tree is, e.g. "trainer".
        tree: plain settings.
        kinds: what an object in this place may be.
        factory: whether this place takes what is called later, by `_partial_`.

    Raises:
        ConfigError: names the key, what came, and `--allow-target` where that helps.
    """
    if isinstance(tree, str):
        if "${" in tree:  # a second reading would resolve it, and what it becomes has not been checked
            raise ConfigError(f"{key}={tree!r} is an interpolation, and a finished configuration holds values only")
    elif isinstance(tree, Mapping):
        hints = None
        if "_target_" in tree:
            target = locate(f"{key}._target_", tree["_target_"], kinds, is_partial(tree))
            _no_downloads(key, target, tree)
            _check_source(target, tree)
            hints = annotations_of(target)
        for name, value in tree.items():
            if name != "_target_":
                hint = Any if hints is None else hints.get(str(name), Any)
                inner = kinds if hints is None else kinds_of(hint, is_partial(value))
                check_tree(f"{key}.{name}", value, inner, factory if hints is None else takes_factory(hint))
        _check_special(key, tree, factory)
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            check_tree(f"{key}[{number}]", value, kinds, factory)


def _check_special(key: str, tree: Mapping[str, Any], factory: bool) -> None:
    """Checks what stands beside a `_target_`: Hydra takes it as it comes, or fails without a word about the setting."""
    for name in SPECIAL[1:]:
        if name not in tree:
            continue
        what, value = f"{key}.{name}", tree[name]
        if "_target_" not in tree:
            raise ConfigError(f"{what} goes with a _target_ only, and {key} has none")
        if name == "_args_":
            raise ConfigError(f"{what} cannot be given: name every argument by a key of its own, {key}.NAME=VALUE")
        if name == "_convert_":
            if value not in CONVERSIONS:
                raise ConfigError(f"{what} must be one of {', '.join(CONVERSIONS)}, got {as_yaml(value)}")
        elif not isinstance(value, bool):
            raise ConfigError(f"{what} must be true or false, got {as_yaml(value)}")
        elif name == "_recursive_" and not value:
            raise ConfigError(f"{what} must be true: what {key} is made of is made first, got false")
        elif name == "_partial_" and value and not factory:
            raise ConfigError(f"{what} must be false: this place takes the object itself, got true")


def _check_source(target: Any, tree: Mapping[str, Any]) -> None:
    """Checks the file that settings of `fedsim.models.own_file.network` name, before it is run."""
    source = tree.get("source")
    is_in_file = f"{target.__module__}.{target.__qualname__}" == IN_FILE
    if is_in_file and isinstance(source, str) and not everything_is_allowed():
        check_file(source, source_file(source), by_user=False)


def source_file(source: str) -> Path:
    """Returns the file of FILE.py:NAME: a path is one of the working folder."""
    return working_folder() / (source.rpartition(":")[0] if not source.endswith(".py") else source)


def allow_models(arguments: Iterable[str]) -> None:
    """Allows the files that `model=FILE.py:NAME` names on the user's own command line, wherever they lie.

    Raises:
        ConfigError: for one in a run or study folder.
    """
    for argument in arguments:
        typed = argument.removeprefix("model=").split(",") if argument.startswith("model=") else ()
        for source in (text.strip("'\"") for text in typed):
            if is_file(source) and not is_the_users(real_path(source_file(source))):
                check_file(source, source_file(source), by_user=True)
                allow(source)


def _no_downloads(key: str, target: Any, tree: Mapping[str, Any]) -> None:
    """Refuses weights for torchvision's factories: they fetch them, some without being asked."""
    if not str(target.__module__).startswith("torchvision."):
        return
    defaults = {n: None if p.default is p.empty else p.default for n, p in inspect.signature(target).parameters.items()}
    if inspect.isfunction(target) and (tree.get("_args_") or not any(name.startswith("weights") for name in defaults)):
        raise ConfigError(
            f"{key}: {target.__module__}.{target.__qualname__} could download weights; take a factory of one network, "
            "such as torchvision.models.resnet18, with named settings"
        )
    for name, value in {**defaults, **tree}.items():
        if str(name).startswith(("weights", "pretrained")) and value not in (None, False):
            raise ConfigError(f"{key}.{name} must be null: torchvision would download weights; got {value!r}")


# --- one name ---------------------------------------------------------------------------------------------------------


def locate(key: str, name: Any, kinds: Kinds = None, partial: bool = False) -> Any:
    """Returns the class or function of that name, if a configuration may name it; imports nothing else.

    Args:
        key: where the name stands, e.g. "trainer._target_".
        name: dotted path.
        kinds: what it must be or make; None for any kind of a group.
        partial: whether it is called later, with more arguments.

    Raises:
        ConfigError: if it is not there, is defined elsewhere, or is of another kind.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{key} must be the dotted path of a class or function, got {as_yaml(name)}")
    if everything_is_allowed() or name in allowed():
        return _found(key, name)
    if not all(part.isidentifier() for part in name.split(".")):
        raise _refused(key, name, "it is no dotted path of a class or function")
    module = _module(key, name)
    found = module
    if module.__name__ == name and "." in name:  # a function may have the name of its module, as torchvision's alexnet
        package, _, leaf = name.rpartition(".")
        found = getattr(sys.modules[package], leaf)
    for part in name.split(".")[module.__name__.count(".") + 1 :]:
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ConfigError(f"{key}={name!r} cannot be used: {one_line(error)}") from error
        if isinstance(found, types.ModuleType):
            raise _refused(key, name, f"it leads through {module.__name__} to the module {found.__name__}")
    home = getattr(found, "__module__", None)
    if not (is_class(found) or inspect.isfunction(found)) or not isinstance(home, str):
        raise _refused(key, name, "it is no class or function of Python")
    if (
        not may_be_named(home, getattr(sys.modules.get(home), "__file__", None))
        or _at(home, found.__qualname__) is not found
    ):
        raise _refused(key, name, f"it is defined as {home}.{found.__qualname__}")
    check_kind(key, name, found, kinds, partial)
    return found


def _found(key: str, name: Any) -> Any:
    from hydra.utils import get_object

    reach_working_folder(str(name).partition(".")[0])
    try:
        with no_exit():
            return get_object(str(name))
    except Exception as error:
        raise ConfigError(f"{key}={name!r} cannot be used: {one_line(error)}") from error


def _refused(key: str, name: Any, why: str) -> ConfigError:
    return ConfigError(
        f"{key}={name!r} cannot be used: {why}, and a configuration may name {SOURCES} only; if you trust it, add "
        f"{FLAG} {name}"
    )


def check_file(name: str, file: Path, by_user: bool) -> None:
    """Checks a file that is to be run before it is.

    Args:
        name: how it was named, e.g. "net.py:Net".
        file: which.
        by_user: on the command line; else in a file.

    Raises:
        ConfigError: for a file in a run or study folder, or one that a file names and that is not the user's own.
    """
    if name in allowed() or not file.is_file():
        return
    file = real_path(file)
    if came_with_a_run(file) if by_user else not is_the_users(file):
        where = "a run or study folder" if by_user else "a file that is not in the working folder"
        raise ConfigError(f"model {name} would run code of {where}; if you trust it, add {FLAG} {name}")


def _module(key: str, name: str) -> types.ModuleType:
    """Imports the longest module that the path begins with, after all of it has been judged by its specs."""
    files = dict(module_files(name))
    if not files:
        raise ConfigError(f"{key}={name!r} cannot be used: there is no module {name.partition('.')[0]!r} here")
    for module, file in files.items():
        if not may_be_named(module, file) and not leads_to_library(module):
            raise _refused(key, name, f"{module} is {describe(file)}")
    reach_working_folder(name.partition(".")[0])
    last = list(files)[-1]
    try:
        with no_exit():
            return importlib.import_module(last)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{key}={name!r} cannot be used: {last} cannot be imported ({reason})") from error


def _at(module: str, qualname: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found
