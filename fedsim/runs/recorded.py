"""The settings of a run as its folder holds them."""

from __future__ import annotations

from pathlib import Path

from devices.errors import FileError
from fedsim.errors import ConfigError
from fedsim.report.files import read_config
from fedsim.settings.check import check, check_choices
from fedsim.settings.compose import completed
from fedsim.settings.groups import Settings


def settings_of_run(folder: Path) -> Settings:
    """The settings of an earlier run; what its version did not know yet is as it was then.

    Raises:
        ConfigError: if the folder holds no run or its settings are wrong.
    """
    try:
        settings = check(completed(read_config(folder)))
    except FileError as error:
        raise ConfigError(str(error)) from error
    check_choices(settings["choices"], f"{folder / 'config.yaml'}: ")
    return settings
