"""Lists the workloads that the config folders offer, and whether their data are here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

import yaml

from fedsim.settings.plugins import plugin_folders
from fedsim.settings.trust import locate as locate_class


class WorkloadRow(NamedTuple):
    """A workload that can be chosen: its config's name, kind of data, whether they are here, where or how to get."""

    name: str
    kind: str
    found: bool
    where: str


def list_workloads() -> list[WorkloadRow]:
    """Returns every workload of the config folders, by name, and whether its data are on this machine."""
    folders: list[Traversable] = [files("configs"), *plugin_folders()]
    found = {
        file.name.removesuffix(".yaml"): file
        for folder in reversed(folders)
        if folder.joinpath("workload").is_dir()
        for file in folder.joinpath("workload").iterdir()
        if file.name.endswith(".yaml")
    }
    rows = []
    for name in sorted(found):
        settings = _settings(found, name)
        make = locate_class("workload._target_", settings["_target_"])
        here = getattr(make, "locate", None)  # workloads from elsewhere need not have it
        rows.append(WorkloadRow(name, *(here(settings) if here else ("?", False, "not known"))))
    return rows


def _settings(found: Mapping[str, Traversable], name: str) -> dict[str, Any]:
    """Returns the keys of one workload file and, below them, of the files of the same group that it builds on."""
    own = yaml.safe_load(found[name].read_text(encoding="utf-8"))
    bases = [base for base in own.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    merged: dict[str, Any] = {}
    for layer in (*(_settings(found, base) for base in bases), own):
        merged.update(layer)
    return merged
