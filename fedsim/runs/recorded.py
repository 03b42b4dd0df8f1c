"""Reads the settings of a run from its folder, and the fingerprint of its data."""

from __future__ import annotations

import shlex
from pathlib import Path

from devices.errors import FileError
from devices.reading import read_json
from devices.texts import visible
from fedsim.errors import ConfigError
from fedsim.report.checksums import check_inside
from fedsim.report.files import read_config, read_summary
from fedsim.report.place import REPRICED, SUMMARY
from fedsim.runs import checkpoint
from fedsim.settings.check import check, check_choices
from fedsim.settings.compose import completed
from fedsim.settings.groups import Settings
from fedsim.workloads.fingerprint import DATA, Fingerprint


def settings_of_run(folder: Path) -> Settings:
    """Returns the settings of an earlier run; what its version did not know yet is as it was then.

    Raises:
        ConfigError: if the folder holds no run or its settings are wrong.
    """
    try:
        settings = check(completed(read_config(folder)))
    except FileError as error:
        raise ConfigError(str(error)) from error
    check_choices(settings["choices"], f"{folder / 'config.yaml'}: ")
    return settings


def refuse_repriced(folder: Path) -> None:
    """Refuses a folder whose run was being re-priced: no round of it was trained, so none can follow.

    Raises:
        ConfigError: saying how it is re-priced.
    """
    if not (folder / REPRICED).exists() or (folder / SUMMARY).exists():
        return
    try:
        made = read_json(check_inside(folder, folder / REPRICED))
        run = made["run"] if isinstance(made["run"], str) else "RUN"
    except (FileError, LookupError, TypeError):
        run = "RUN"
    raise ConfigError(
        f"{folder} was being re-priced when it ended, and cannot be trained further; remove it and write it anew: "
        f"fedsim reprice {shlex.quote(visible(run))} with the fleet=, latency= and limits that it was given"
    )


def data_of_run(folder: Path) -> Fingerprint | None:
    """Returns the fingerprint of the data, from the summary or else the checkpoint; None where neither tells it."""
    if found := data_of_summary(folder):
        return found
    try:
        saved = checkpoint.load(folder)
    except (ConfigError, FileError):  # damaged: whoever needs it says so
        return None
    return saved.state.get(DATA) if saved is not None else None


def data_of_summary(folder: Path) -> Fingerprint | None:
    """Returns the fingerprint in `summary.json`; None where it has none, as in version 0.1, or cannot be read."""
    try:
        found = read_summary(folder).get(DATA)
    except (ConfigError, FileError):
        return None
    return found if isinstance(found, dict) else None
