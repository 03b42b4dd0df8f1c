"""Lists the workloads that the config folders offer, and whether their data are here."""

from __future__ import annotations

from typing import Any, NamedTuple

from devices.reading import read_yaml
from fedsim.settings.groups import option_file, options
from fedsim.settings.trust import locate as locate_class


class WorkloadRow(NamedTuple):
    """A workload that can be chosen: its config's name, kind of data, whether they are here, where or how to get."""

    name: str
    kind: str
    found: bool
    where: str


def list_workloads() -> list[WorkloadRow]:
    """Returns every workload of the config folders, by name, and whether its data are on this machine."""
    rows = []
    for name in options("workload"):
        settings = _settings(name)
        make = locate_class("workload._target_", settings["_target_"])
        here = getattr(make, "locate", None)  # workloads from elsewhere need not have it
        rows.append(WorkloadRow(name, *(here(settings) if here else ("?", False, "not known"))))
    return rows


def _settings(name: str) -> dict[str, Any]:
    """Returns the keys of one workload file and, below them, of the files of the same group that it builds on."""
    own = read_yaml(option_file("workload", name))
    bases = [base for base in own.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    merged: dict[str, Any] = {}
    for layer in (*(_settings(base) for base in bases), own):
        merged.update(layer)
    return merged
