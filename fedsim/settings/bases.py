"""Composes what options of groups give, once for each choice of options: a study's arms often differ in values only.

Hydra takes a tenth of a second for it. Every file that it read is read again for each use, so that an edit is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.settings.config_files import content, noting
from fedsim.settings.groups import PRIMARY, config_dir, config_folders
from fedsim.settings.overrides import parsed

MAX_KEPT = 256


class _Base(NamedTuple):
    """A composed config, of which every use gets a copy, and the files behind it."""

    config: Any
    files: dict[Path, bytes | None]


_KEPT: dict[tuple[str, ...], _Base] = {}


def composed(overrides: Sequence[str], search_path: Sequence[str]) -> Any:
    """Returns what Hydra composes, with its own settings below `hydra`.

    Args:
        overrides: as Hydra is to read them.
        search_path: the override that tells where else options are.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    folders = config_folders()
    read = {text: parsed(text) for text in overrides}
    chosen = [text for text in overrides if _is_hydras(read[text], folders)]
    config = _base([*chosen, *search_path])
    ConfigLoaderImpl._apply_overrides_to_config([read[text] for text in overrides if text not in chosen], config)
    return config


def _is_hydras(override: Any, folders: Sequence[Path]) -> bool:
    """Returns whether an override takes an option of a group, or is one for Hydra to refuse."""
    if override.is_sweep_override():
        return True
    is_group = any((folder / str(override.key_or_group)).is_dir() for folder in folders)
    return is_group and not isinstance(override.value(), dict)


def _base(overrides: Sequence[str]) -> Any:
    key = (str(config_dir()), *overrides)
    kept = _KEPT.get(key)
    if kept is None or any(content(file) != before for file, before in kept.files.items()):
        with noting() as files:
            config = _by_hydra(overrides)
        while len(_KEPT) >= MAX_KEPT:
            del _KEPT[next(iter(_KEPT))]
        kept = _KEPT[key] = _Base(config, dict(files))
    return deepcopy(kept.config)


def _by_hydra(overrides: Sequence[str]) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra  # leave a surrounding @hydra.main alone
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose(PRIMARY, list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer
