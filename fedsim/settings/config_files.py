"""Checks config files that do not come with fedsim, of somebody else's tree or plug-in, before Hydra reads them.

Hydra's own reader takes any size and depth, writes aliases out, and ends in a traceback for what is no YAML. What comes
with fedsim is not read twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import date
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource as HydrasFiles
from hydra._internal.core_plugins.importlib_resources_config_source import (
    ImportlibResourcesConfigSource as HydrasPackages,
)
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from devices.errors import FileError, one_line
from devices.reading import read_yaml
from devices.texts import as_yaml
from fedsim.settings.groups import check_preset
from fedsim.settings.own_networks import SCHEME, network_settings

MAX_SETTINGS = 10_000  # of a file, its aliases written out: OmegaConf takes a millisecond for each
SHIPPED = Path(__file__).resolve().parents[2] / "configs"
PACKAGES = ("configs", "hydra")  # whose files are known
PLAIN = (str, int, float, bool, date)
_READ: dict[tuple[str, Path], tuple[bytes | None, ConfigResult | None]] = {}  # what config files held, and came to
NOTES: list[dict[Path, bytes | None]] = []  # see `noting`
COMPOSING = (yaml.YAMLError, ValueError, OverflowError, RecursionError)  # what Hydra and OmegaConf let through


@cache
def check_before_hydra() -> None:
    """Has `check` look at every file that Hydra reads in this process from now on."""
    Plugins.instance()  # registers Hydra's own
    ours = {"file": FileConfigSource, "pkg": ImportlibResourcesConfigSource, SCHEME: NetworkSource}
    SourcesRegistry.instance().types |= ours


@contextmanager
def noting() -> Iterator[dict[Path, bytes | None]]:
    """Notes what Hydra looks at meanwhile: the content of every file that it reads, None for one that is not there."""
    NOTES.append({})
    try:
        yield NOTES[-1]
    finally:
        NOTES.pop()


def content(file: Path) -> bytes | None:
    """Returns what is in a file; None where there is none."""
    return file.read_bytes() if file.is_file() else None


def _note(file: Path) -> None:
    for notes in NOTES[-1:]:
        notes[file] = content(file)


def check(file: Path) -> None:
    """Checks a config file.

    Raises:
        FileError: if it is no regular file, no YAML, too large or too deep, or holds something else than a map of plain
            settings.
    """
    tree = read_yaml(file, max_nodes=MAX_SETTINGS)
    if tree is not None and not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else "a text or number"  # not which: a link leads to any file
        raise FileError(f"{file} must be a map of settings, and holds {kind}")
    left: list[Any] = [tree]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, PLAIN):
                    raise FileError(f"{file} must have words for keys, got {as_yaml(key)}")
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif value is not None and not isinstance(value, PLAIN):
            raise FileError(f"{file} must hold texts, numbers, lists and maps, got {as_yaml(value)}")


# Called as Hydra's own are: its registry goes by these names.
class FileConfigSource(HydrasFiles):
    """Hydra's source of `file://`, which looks before it reads, and reads nothing outside of its folder."""

    def is_config(self, config_path: str) -> bool:
        """Returns whether there is such a file in the folder."""
        found = not _climbs(config_path) and super().is_config(config_path)
        if not found:
            _note(Path(self.path) / self._normalize_file_name(config_path))
        return found

    def load_config(self, config_path: str) -> ConfigResult:
        """Reads a file that `check` has taken."""
        file = Path(self.path) / self._normalize_file_name(config_path)
        _note(file)
        if Path(self.path) == SHIPPED or not self.is_config(config_path):
            return self._read(config_path, file)
        check(file)
        check_preset(config_path.partition("/")[0], file)
        try:
            return self._read(config_path, file)
        except (*COMPOSING, OmegaConfBaseException) as error:
            raise _unusable(file, error) from error

    def _read(self, config_path: str, file: Path) -> ConfigResult:
        """Reads a file as Hydra does; one that has not changed since, as it was read then."""
        now = content(file)
        before, read = _READ.get((self.provider, file), (None, None))
        if read is None or now is None or now != before:
            result = super().load_config(config_path)
            _READ[self.provider, file] = (now, deepcopy(result))  # Hydra takes the result apart
            return result
        return deepcopy(read)


class ImportlibResourcesConfigSource(HydrasPackages):
    """Hydra's source of `pkg://`, which looks before it reads, and reads nothing outside of its package."""

    def is_config(self, config_path: str) -> bool:
        """Returns whether there is such a file in the package."""
        return not _climbs(config_path) and super().is_config(config_path)

    def load_config(self, config_path: str) -> ConfigResult:
        """Reads a file that `check` has taken."""
        if self.path.partition(".")[0] in PACKAGES or not self.is_config(config_path):
            return super().load_config(config_path)
        with resources.as_file(resources.files(self.path) / self._normalize_file_name(config_path)) as file:
            check(file)
        try:
            return super().load_config(config_path)
        except (*COMPOSING, OmegaConfBaseException) as error:
            raise _unusable(file, error) from error


def _climbs(config_path: str) -> bool:
    """Returns whether the name of an option leads out of the folder of options: such a file could set `hydra`."""
    return ".." in config_path.split("/")


def _unusable(file: Path, error: Exception) -> FileError:
    return FileError(f"{file} cannot be used: {one_line(error) or type(error).__name__}")


class NetworkSource(ConfigSource):
    """Hydra's source of options of the group `model` that are named as code."""

    @staticmethod
    def scheme() -> str:
        """Returns what its search path begins with."""
        return SCHEME

    def available(self) -> bool:
        """Returns that it is there."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Returns that it has no group of its own."""
        return False

    def is_config(self, config_path: str) -> bool:
        """Returns whether a path is of the group `model`, and its name one of code."""
        group, _, name = config_path.partition("/")
        return group == "model" and network_settings(name) is not None

    def load_config(self, config_path: str) -> ConfigResult:
        """Returns the settings of a network as an option's."""
        settings = OmegaConf.create(network_settings(config_path.partition("/")[2]) or {})
        return ConfigResult(self.provider, f"{SCHEME}://", settings, {"package": "model"})

    def list(self, config_path: str, results_filter: Any) -> list[str]:
        """Returns nothing: there is no list of all code."""
        return []
