"""Checks a config tree that `fedsim run --config-path` names, and folders that are searched: they may be others'.

Hydra itself calls what stands below `hydra` (its launcher, sweeper, callbacks, logging), sets environment variables and
imports packages for its search path. So a tree from elsewhere may set nothing there; the command line may.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from devices.reading import read_yaml
from fedsim.errors import ConfigError
from fedsim.settings.build import check_trusted
from fedsim.settings.compose import check_address, one_sentence, resolve, search_path
from fedsim.settings.groups import PRIMARY, config_dir, own_folders, refuse_of_hydra, sets_hydra
from fedsim.settings.overrides import is_of_hydra, sweep_overrides
from fedsim.settings.permissions import FLAG, allowed, keep_out
from fedsim.settings.plugins import plugins

PACKAGE = "pkg://"
OF_HYDRA = ("hydra._internal.core_plugins.", "hydra_plugins.")  # what the command line may name there
# Of Hydra's own settings, what differs from run to run.
VARYING = {"runtime": None, "overrides": None, "job": ("name", "override_dirname", "id", "num", "config_name")}


def is_foreign(flags: Sequence[str]) -> bool:
    """Returns whether one of Hydra's flags names another config tree."""
    known = _known(flags)
    return bool(known.config_path or known.config_name)


def check_foreign(flags: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Checks what Hydra would call by itself, before it reads anything; the flags, with an absolute `--config-path`.

    Raises:
        ConfigError: for a tree that sets something below `hydra`, a package that is no plug-in, a folder that is none.
    """
    _check_command_line(overrides)
    known = _known(flags)
    own = own_folders()
    if not is_foreign(flags) and not own:
        return list(flags)
    name, tree = known.config_name or PRIMARY, config_dir()
    if known.config_path and known.config_path.startswith(PACKAGE):
        root = known.config_path.removeprefix(PACKAGE).replace("/", ".").partition(".")[0]
        if root not in (config_dir().name, *plugins(), *allowed()):
            what = f"--config-path={known.config_path}: {root} is no plug-in"
            raise ConfigError(f"{what}; if you trust it, add {FLAG} {root}")
        return list(flags)
    if known.config_path:
        tree = _folder("--config-path", known.config_path)
        own = own_folders()
    for folder in (tree, *own):
        if folder != config_dir():
            refuse_of_hydra(folder)
        _check_primary(folder / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"))
    where = " or ".join(map(str, [tree] if known.config_path else own or [tree]))
    for run in [list(overrides)] if not _sweeps(flags, overrides) else _runs(overrides):
        _check_run(tree, where, name, run, shown=bool(known.cfg or known.info))
    path = ["--config-path", str(tree)] if known.config_path else []
    return [*_without(flags, "--config-path", "-cp"), *path]


def _known(flags: Sequence[str]) -> argparse.Namespace:
    from hydra._internal.utils import get_args_parser

    return get_args_parser().parse_known_args(list(flags))[0]


def _without(flags: Sequence[str], *names: str) -> list[str]:
    """Returns Hydra's flags without one of them, in either form."""
    left, skip = [], False
    for flag in flags:
        if skip or flag.partition("=")[0] in names:
            skip = not skip and "=" not in flag
        else:
            left.append(flag)
    return left


def _folder(flag: str, given: str) -> Path:
    folder = Path(given)
    if not folder.is_dir():
        raise ConfigError(f"{flag}={given} must be a folder")
    keep_out(folder)
    return folder.resolve()


def _sweeps(flags: Sequence[str], overrides: Sequence[str]) -> bool:
    return _known(flags).multirun or "hydra.mode=MULTIRUN" in overrides


def _runs(overrides: Sequence[str]) -> list[list[str]]:
    """Returns the overrides of each run of a sweep."""
    of_hydra = [text for text in overrides if is_of_hydra(text)]
    runs = sweep_overrides([text for text in overrides if text not in of_hydra])
    if not runs:
        raise ConfigError("a sweep over another config tree can list values only, e.g. -m seed=1,2")
    return [[*run, *of_hydra] for run in runs]


def _check_command_line(overrides: Sequence[str]) -> None:
    """Refuses what the command line names for Hydra to call, but its own launchers and plug-ins."""
    for text in overrides:
        key, _, value = text.partition("=")
        if is_of_hydra(text) and "_target_" in text and not value.startswith(OF_HYDRA) and value not in allowed():
            raise ConfigError(f"{text} would have Hydra call {value}; if you trust it, add {FLAG} {value or key}")


def _check_primary(file: Path) -> None:
    """Refuses a file that sets something of Hydra's, before its own reader imports what `hydra.searchpath` names."""
    if not file.exists():
        return
    tree = read_yaml(file)
    if isinstance(tree, dict) and "hydra" in tree:
        raise sets_hydra("hydra", file)


def _check_run(tree: Path, where: str, name: str, overrides: Sequence[str], shown: bool) -> None:
    """Composes as Hydra would, and compares what would be Hydra's own settings with those of fedsim's own tree.

    Then checks what the run would call, unless it is only to be shown.
    """
    with one_sentence(overrides):
        composed = _composed(tree, name, overrides)
        usual = _composed(config_dir(), PRIMARY, [text for text in overrides if is_of_hydra(text)])
        if key := _difference(_of_hydra(composed), _of_hydra(usual), "hydra"):
            raise sets_hydra(key, where)
        if not shown:
            settings = resolve(composed, composed.hydra.runtime.choices, overrides)
            check_trusted(settings)
            check_address(settings, overrides, where)


def _composed(tree: Path, name: str, overrides: Sequence[str]) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(tree), version_base="1.3"):
            left = [text for text in overrides if not text.startswith("hydra.searchpath=")]
            return compose(name, [*left, *search_path(overrides)], return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer


def _of_hydra(composed: Any) -> Any:
    """Returns Hydra's own settings, without what differs from run to run."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(composed.hydra, resolve=False)
    assert isinstance(plain, dict)
    plain.pop("searchpath")
    for key, names in VARYING.items():
        if names is None:
            plain.pop(key)
        for part in names or ():
            plain[key].pop(part)
    return plain


def _difference(there: Any, usual: Any, key: str) -> str:
    """Returns the first key in which two trees differ; empty where they are equal."""
    if not isinstance(there, dict) or not isinstance(usual, dict):
        return "" if there == usual else key
    missing = object()
    found = (
        _difference(there.get(name, missing), usual.get(name, missing), f"{key}.{name}") for name in {**usual, **there}
    )
    return next((one for one in found if one), "")
