"""What ran, in a few words: method, data and fleet by what was really used.

An option whose `_target_` was replaced on the command line is called after the class that took its place.
"""

from __future__ import annotations

from pathlib import Path

from devices.texts import file_name, visible
from fedsim.settings.groups import devices_of_fleet, preset, preset_private, target_of
from fedsim.settings.run_settings import RunSettings

MAX_NAMED = 2  # devices of an own fleet; more are counted
MAX_LETTERS = 60  # of a bundle's own name


def method_name(settings: RunSettings) -> str:
    """Names the method preset and what was exchanged in it; without a preset, strategy and trainer."""
    choices = settings.choices
    usual = preset_private(choices["method"]) if choices.get("method") else []
    private = [f"private=[{','.join(settings.private)}]"] if list(settings.private) != usual else []
    names = {group: used(settings, group) for group in ("strategy", "trainer")}
    if choices.get("method"):
        own = preset(choices["method"])
        changed = [f"{group}={choices.get(group)}" for group, name in own.items() if choices.get(group) != name]
        changed += [f"{group}={name}" for group, name in names.items() if name != choices.get(group)]
        return " ".join([str(choices["method"]), *changed, *private])
    strategy, trainer = names["strategy"], names["trainer"]
    return " ".join([strategy if trainer in ("sgd", strategy) else f"{strategy}+{trainer}", *private])


def workload_name(settings: RunSettings) -> str:
    """Names the workload; a bundle as its meta.json says, or after its folder."""
    name, path = used(settings, "workload"), settings.groups["workload"].get("path")
    if name != "bundle" or not isinstance(path, str):
        return name
    from fedsim.workloads.bundle import name_of

    return visible(name_of(path) or Path(path).name or name, MAX_LETTERS)


def fleet_name(settings: RunSettings) -> str:
    """Names the fleet that was chosen, or its devices where they are not those of that option."""
    name, own = used(settings, "fleet"), settings.groups["fleet"].get("devices")
    if not isinstance(own, dict) or devices_of_fleet(str(settings.choices["fleet"])) in (None, own):
        return name
    devices = [Path(device).stem if device.endswith(".yaml") else device for device in own]
    return ", ".join(devices) if len(devices) <= MAX_NAMED else f"{len(devices)} devices of its own"


def label_of(settings: RunSettings) -> str:
    """Names a run as a part of a path: by its own name, or by what ran and its seed."""
    what = (method_name(settings), workload_name(settings), fleet_name(settings), f"seed{settings.seed}")
    return file_name(settings.name or "-".join(what))


def used(settings: RunSettings, group: str) -> str:
    """Names what a group really made: the option, or the class that took the place of its own."""
    name = str(settings.choices.get(group))
    usual, target = target_of(group, name), settings.groups[group].get("_target_")
    return name if target is None or usual in (None, target) else str(target).rpartition(".")[2]
