"""Which code a configuration may name: decides by name and file before anything of a stranger's is imported.

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
import json
import os
import re
import site
import sys
import sysconfig
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint, distributions, entry_points
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from devices.errors import one_line
from devices.texts import as_yaml
from fedsim.errors import ConfigError, no_exit
from fedsim.settings.parameters import SPECIAL

OWN = ("fedsim", "clients", "strategies", "devices")
LIBRARIES = ("flwr.serverapp.strategy", "torch.nn", "torchvision.models")
PLUGINS = "fedsim.plugins"  # group of entry points, each naming a package
FLAG = "--allow-target"
LOOKS = 5  # into a folder that changes meanwhile
# What fedsim tells the processes that it starts.
ALLOWED, FOLDER, KEPT_OUT = "FEDSIM_ALLOW_TARGET", "FEDSIM_WORKING_FOLDER", "FEDSIM_KEEP_OUT"
MAY = (
    "fedsim's own packages, Flower's strategies, torch.nn, torchvision.models, plug-ins and modules of the working "
    "folder"
)
# What each group makes, as MODULE:CLASS, so that nothing is imported to say it.
KINDS = {
    "workload": "fedsim.workloads.base:Workload",
    "model": "torch.nn:Module",
    "partition": "fedsim.workloads.partition:Partition",
    "stream": "fedsim.workloads.base:Workload",
    "fleet": "devices.fleet:Fleet",
    "latency": "devices.cost:LatencyModel",
    "compression": "devices.compression.plan:CompressionPlan",
    "uplink": "devices.compression.updates:UpdateCompressor",
    "strategy": "flwr.serverapp.strategy:Strategy",
    "trainer": "clients.trainers.base:LocalTrainer",
    "engine": "flwr.serverapp:Grid",
}
FACTORIES = ("model", "stream")  # groups that are called later, with more arguments
CONVERSIONS = ("none", "partial", "object", "all")
NESTED = ("devices.availability:Availability",)  # made inside others, beside the groups
Kinds = tuple[Any, ...] | None  # classes, of which an object must be one; None where the place does not say

_allowed: set[str] = set()
_given: list[Path] = []
_everything = False


# --- what a command was told ------------------------------------------------------------------------------------------


def begin(allowed: Iterable[str] = ()) -> None:
    """Forgets what an earlier command of this process was told, and allows the names behind `--allow-target`."""
    global _everything
    _allowed.clear()
    _allowed.update(allowed)
    _given.clear()
    _everything = False


def keep_out(folder: Path) -> None:
    """Notes a folder that a command was given: modules below it, or beside it in a deeper place, are not the user's.

    Args:
        folder: as it was given; a link counts as where it stands and as where it leads.
    """
    resolved, here = _real(folder), working_folder()
    _given.append(resolved)
    as_written = Path(os.path.abspath(folder))
    for place in (resolved, *map(_real, (as_written, *as_written.parents))):
        if place != here and place.is_relative_to(here):
            _given.append(here / place.relative_to(here).parts[0])


def keep_out_beside(file: Path) -> None:
    """Likewise for a file that a command was given, unless it lies in the working folder itself or above it."""
    for folder in (Path(os.path.abspath(file)).parent, _real(file).parent):
        if not working_folder().is_relative_to(_real(folder)):
            keep_out(folder)


def leave_to_the_driver() -> None:
    """Checks nothing in this process: a worker, whose settings its driver has checked."""
    global _everything
    _everything = True


def flags() -> list[str]:
    """The arguments that allow another `fedsim` what this one was allowed."""
    return [f"{FLAG}={name}" for name in sorted(allowed())]


def environment() -> dict[str, str]:
    """The variables that allow the processes of a study or of Flower what this one was allowed, and no more."""
    kept_out = sorted({str(folder) for folder in _kept_out()})
    return {ALLOWED: ",".join(sorted(allowed())), FOLDER: str(working_folder()), KEPT_OUT: json.dumps(kept_out)}


def allowed() -> set[str]:
    """The names behind `--allow-target`."""
    return _allowed | {name for name in os.environ.get(ALLOWED, "").split(",") if name}


def _kept_out() -> list[Path]:
    """Folders whose modules are not the user's own: this command's, and those of the one that started it."""
    return [*_given, *map(Path, json.loads(os.environ.get(KEPT_OUT) or "[]"))]


def working_folder() -> Path:
    """The user's own."""
    return _real(Path(os.environ.get(FOLDER) or Path.cwd()))


# --- trees ------------------------------------------------------------------------------------------------------------


def check_group(group: str, tree: Mapping[str, Any]) -> None:
    """As `check_tree`, for the whole of a group of settings.

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
            target = locate(f"{key}._target_", tree["_target_"], kinds, _is_partial(tree))
            _no_downloads(key, target, tree)
            hints = _hints(target)
        for name, value in tree.items():
            if name != "_target_":
                hint = Any if hints is None else hints.get(str(name), Any)
                inner = kinds if hints is None else kinds_of(hint, _is_partial(value))
                check_tree(f"{key}.{name}", value, inner, factory if hints is None else _takes_factory(hint))
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


def group_kinds(group: str) -> Kinds:
    """What a group of settings makes."""
    return (_class(KINDS[group]),)


def kinds_of(hint: Any, partial: bool) -> Kinds:
    """What may stand where an annotation is `hint`; `Callable` stands for any object that can be called."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, str | typing.TypeVar):
        return None
    if origin in (typing.Union, types.UnionType):
        found = [kinds_of(part, partial) for part in arguments if part is not type(None)]
        return None if None in found else tuple(kind for kinds in found for kind in kinds or ())
    if Callable in (origin, hint):
        return kinds_of(arguments[-1] if arguments else Any, False) if partial else (Callable,)
    if inspect.isclass(origin) and issubclass(origin, Mapping | Sequence):
        return kinds_of([part for part in arguments if part is not ...][-1], partial)
    return (hint,) if inspect.isclass(hint) else ()


def _takes_factory(hint: Any) -> bool:
    """Whether what is called later may stand where an annotation is `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(map(_takes_factory, arguments))
    if inspect.isclass(origin) and issubclass(origin, Mapping | Sequence):
        return any(map(_takes_factory, arguments))
    return Callable in (origin, hint) or not inspect.isclass(origin or hint)


def _is_partial(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("_partial_") is True


def _hints(target: Any) -> dict[str, Any]:
    """Annotations by parameter: of a function, or of the constructors of a class and those above it."""
    makers = [vars(c)["__init__"] for c in target.__mro__[:-1] if "__init__" in vars(c)] if _isclass(target) else []
    found: dict[str, Any] = {}
    for make in makers or [target]:
        try:
            hints = typing.get_type_hints(make)
        except Exception:  # names that exist for type checkers only
            hints = {}
        for name, hint in hints.items():
            found.setdefault(name, hint)
    return found


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
    """The class or function of that name, if a configuration may name it; imports nothing else.

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
    if _everything or name in allowed():
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
    if not (_isclass(found) or inspect.isfunction(found)) or not isinstance(home, str):
        raise _refused(key, name, "it is no class or function of Python")
    if not _may(home, getattr(sys.modules.get(home), "__file__", None)) or _at(home, found.__qualname__) is not found:
        raise _refused(key, name, f"it is defined as {home}.{found.__qualname__}")
    _check_kind(key, name, found, kinds, partial)
    return found


def _found(key: str, name: Any) -> Any:
    from hydra.utils import get_object

    _reach_working_folder(str(name).partition(".")[0])
    try:
        with no_exit():
            return get_object(str(name))
    except Exception as error:
        raise ConfigError(f"{key}={name!r} cannot be used: {one_line(error)}") from error


def _refused(key: str, name: Any, why: str) -> ConfigError:
    return ConfigError(
        f"{key}={name!r} cannot be used: {why}, and a configuration may name {MAY} only; if you trust it, add "
        f"{FLAG} {name}"
    )


def _check_kind(key: str, name: str, found: Any, kinds: Kinds, partial: bool) -> None:
    wanted = tuple(map(_class, (*KINDS.values(), *NESTED))) if kinds is None else kinds
    makes: Any = found
    if not _isclass(found):
        try:
            makes = typing.get_type_hints(found).get("return")
        except Exception:  # names that exist for type checkers only
            makes = None
    for kind in wanted:
        if kind is Callable:
            if _isclass(found) and not partial and any("__call__" in vars(c) for c in found.__mro__[:-1]):
                return
        elif _isclass(makes) and issubclass(makes, kind):
            return
    said = " or ".join("a callable object" if kind is Callable else kind.__name__ for kind in kinds or ())
    said = said or ("plain values" if kinds == () else "what fedsim is made of: a Workload, a Module, a Strategy ...")
    makers = "CLASS" if kinds is None else " | ".join(kind.__name__ for kind in kinds if kind is not Callable)
    hint = f" (a function says what it makes in its annotation, -> {makers})" if makers and not _isclass(found) else ""
    what = f"{key}={name!r} cannot be used: this place takes {said}, which it is not{hint}"
    raise ConfigError(f"{what}; if you trust it, add {FLAG} {name}")


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
    file = _real(file)
    if _came_with_a_run(file) if by_user else not _is_the_users(file):
        where = "a run or study folder" if by_user else "a file that is not in the working folder"
        raise ConfigError(f"model {name} would run code of {where}; if you trust it, add {FLAG} {name}")


# --- where things are defined -----------------------------------------------------------------------------------------


def _module(key: str, name: str) -> types.ModuleType:
    """The longest module that the path begins with, imported only after all of it has been judged by its specs."""
    files = dict(_files(name))
    if not files:
        raise ConfigError(f"{key}={name!r} cannot be used: there is no module {name.partition('.')[0]!r} here")
    for module, file in files.items():
        if not _may(module, file) and not _leads_to_library(module):
            raise _refused(key, name, f"{module} is {_where(file)}")
    _reach_working_folder(name.partition(".")[0])
    last = list(files)[-1]
    try:
        with no_exit():
            return importlib.import_module(last)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{key}={name!r} cannot be used: {last} cannot be imported ({reason})") from error


def _files(name: str) -> Iterator[tuple[str, str | None]]:
    """The modules along a dotted path with their files, found without importing any.

    Packages without code of their own are left out.
    """
    parts = name.split(".")
    spec = _root(parts[0])
    for number in range(1, len(parts) + 1):
        if spec is None:
            return
        if spec.origin is not None or number == len(parts):
            yield ".".join(parts[:number]), spec.origin
        places = spec.submodule_search_locations
        if places is None or number == len(parts):
            return
        spec = PathFinder.find_spec(parts[number], list(places))  # by its whole name, it would import what is above


def _root(name: str) -> ModuleSpec | None:
    try:
        spec = find_spec(name)
    except ValueError:  # a main script has none
        file = getattr(sys.modules.get(name), "__file__", None)
        spec = spec_from_file_location(name, file) if file else None
    return spec or PathFinder.find_spec(name, [str(working_folder())])


def _reach_working_folder(root: str) -> None:
    """Lets modules of the working folder be imported, behind everything that is installed."""
    folder = str(working_folder())
    if root not in sys.modules and folder not in sys.path and find_spec(root) is None:
        sys.path.append(folder)
        importlib.invalidate_caches()


def _may(module: str, file: str | None) -> bool:
    """Whether a configuration may name what a module defines."""
    root = module.partition(".")[0]
    if root in OWN:
        return file is not None and _is_below(Path(file), Path(__file__).resolve().parents[2] / root)
    if any(module == library or module.startswith(f"{library}.") for library in LIBRARIES) or root in plugins():
        return True
    return file is not None and os.path.isabs(file) and _is_the_users(_real(Path(file)))  # not "frozen"


def _leads_to_library(module: str) -> bool:
    return any(library.startswith(f"{module}.") for library in LIBRARIES)


def _is_the_users(file: Path) -> bool:
    """Whether a file is in the working folder, not installed there, and in no folder that came from elsewhere."""
    if not _is_below(file, working_folder()) or any(
        _is_below(file, folder) for folder in (*_kept_out(), *_installed())
    ):
        return False
    return not any(part in ("site-packages", "dist-packages") for part in file.parts) and not _came_with_a_run(file)


def _came_with_a_run(file: Path) -> bool:
    return any(is_run_folder(folder) or is_study_folder(folder) for folder in file.parents)


def is_run_folder(folder: Path) -> bool:
    """Whether a run was written here."""
    config = folder / "config.yaml"
    if not config.is_file():
        return False
    if any((folder / name).exists() for name in ("rounds.jsonl", "summary.json", "failure.json", "checkpoint")):
        return True
    text = config.read_text(errors="replace")
    return re.search(r"""(^|[{,])\s*["']?choices["']?\s*:""", text, re.MULTILINE) is not None


def is_study_folder(folder: Path) -> bool:
    """Whether the runs of a study were written here."""
    return (folder / "study.json").exists() or (folder / "study.csv").exists() or _has_arms(folder)


def _has_arms(folder: Path) -> bool:
    """Whether arms lie below, for as long as they do: what others remove meanwhile is looked for again."""
    for _ in range(LOOKS):
        with suppress(OSError):
            return any(folder.glob("*/seed-*/*.yaml"))
    return True  # never still: what lies here is not called


@cache
def _installed() -> tuple[Path, ...]:
    """Where packages and Python itself are installed."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = {sysconfig.get_paths()[name] for name in names} | {site.getusersitepackages(), *site.getsitepackages()}
    return tuple(_real(Path(path)) for path in found)


def _is_below(path: Path, folder: Path) -> bool:
    return _real(path).is_relative_to(folder)


def _real(path: Path) -> Path:
    """Where a path leads; `Path.resolve` fails for links that lead to each other, before Python 3.13."""
    return Path(os.path.realpath(path))


def _where(origin: str | None) -> str:
    if origin is None or not os.path.isabs(origin):  # "built-in", "frozen"
        return "a part of Python"
    file = _real(Path(origin))
    if any(_is_below(file, folder) for folder in _installed()):
        return "another package"
    if any(_is_below(file, folder) for folder in _kept_out()) or _is_below(file, working_folder()):
        return "in a folder that came with the configuration"
    return f"in {file.parent}, which is not below the working folder"


def _at(module: str, qualname: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _isclass(value: Any) -> typing.TypeGuard[type]:
    return inspect.isclass(value) and typing.get_origin(value) is None


def _class(text: str) -> Any:
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)


# --- plug-ins ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def plugins() -> frozenset[str]:
    """Top packages of the installed plug-ins; warns of entry points that name none, which stay unused."""
    found = set()
    for entry in _entries():
        root = re.split(r"[.:\s\[]", entry.value)[0]  # entry.module fails for a value that has none
        try:
            there = root.isidentifier() and root != "__main__" and find_spec(root) is not None
        except (ImportError, ValueError):
            there = False
        if there:
            found.add(root)
        else:
            what = f"plug-in {as_yaml(entry.name)} is not used: its entry point {as_yaml(entry.value)} names no package"
            warnings.warn(f"{what} that can be imported; install what brings it again", stacklevel=2)
    return frozenset(found)


def _entries() -> Iterable[EntryPoint]:
    """Entry points of plug-ins, also where those of some other package cannot be read."""
    try:
        yield from entry_points(group=PLUGINS)
    except (OSError, TypeError, ValueError, AttributeError):
        for package in distributions():
            try:
                yield from package.entry_points.select(group=PLUGINS)
            except (OSError, TypeError, ValueError, AttributeError) as error:
                what = f"the entry points of a package in {package.locate_file('')} cannot be read"
                warnings.warn(f"{what} ({one_line(error)})", stacklevel=3)


def plugin_folders() -> list[Path]:
    """The `configs` folders of the installed plug-ins, below the packages that their entry points name."""
    found = []
    for root in sorted(plugins()):
        spec = find_spec(root)
        found += [Path(place) / "configs" for place in (spec and spec.submodule_search_locations) or ()]
    return [folder for folder in found if folder.is_dir()]
