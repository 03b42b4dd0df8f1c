"""Reads and checks options that several commands have."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

MAX_COUNT = 10**6  # of what is counted: examples of a batch, clients, rounds, repetitions
# Commands that make what a file names, or look it up.
BUILDING = ("run", "resume", "reprice", "replay", "study", "flwr", "data", "devices", "list", "explain")
OWN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def parse_whole(option: str, text: str) -> int:
    """Reads a number of a list of whole numbers.

    Raises:
        ConfigError: if it is none, or out of 1..MAX_COUNT.
    """
    from devices.texts import as_yaml
    from fedsim.errors import ConfigError

    digits = text.strip()
    if not (digits.isascii() and digits.isdigit()) or not 1 <= len(digits.lstrip("0")) <= 7 or int(digits) > MAX_COUNT:
        raise ConfigError(
            f"{option} takes whole numbers of at least 1 and at most {MAX_COUNT}, separated by commas, got "
            f"{as_yaml(text)}"
        )
    return int(digits)


def check_place(option: str, path: Path, endings: Sequence[str] = ()) -> None:
    """Refuses a place for a result before the work that makes it.

    Args:
        option: as the user gave it, e.g. "--picture".
        path: the file.
        endings: that it may have; any where there are none.

    Raises:
        ConfigError: if no such file can be written.
    """
    from devices.texts import as_yaml
    from devices.writing import try_place
    from fedsim.errors import ConfigError

    what = f"{option}={as_yaml(str(path))}"
    if endings and path.suffix.lower() not in endings:
        listed = " or ".join(ending for ending in endings if ending)
        raise ConfigError(f"{option} must end in {listed}, got {as_yaml(str(path))}")
    try:
        if path.is_dir():
            raise ConfigError(f"{what} is a folder; name a file")
        if not path.name.strip(". ") or not path.parent.is_dir():
            raise ConfigError(f"{what} cannot be written: there is no folder {as_yaml(str(path.parent))}")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{what} is no file; name one")
        try_place(path)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def check_folder_place(option: str, folder: Path, names: Sequence[str] = ()) -> None:
    """Refuses a folder that cannot be made or written into, and those that are to be made in it, before the work.

    Raises:
        ConfigError: if there can be no such folder, or nothing can be written into it.
    """
    from devices.texts import as_yaml
    from devices.writing import try_place
    from fedsim.errors import ConfigError
    from fedsim.settings.folder_names import check_folder

    check_folder(option, str(folder))
    what = f"{option}={as_yaml(str(folder))}"
    try:
        for inner in (folder, *(folder / name for name in names)):
            there = next(place for place in (inner, *inner.parents) if os.path.lexists(place))
            if not there.is_dir():
                raise ConfigError(f"{what} cannot be made: {as_yaml(str(there))} is no folder")
            try_place(there / ".place")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def check_picture(path: Path, option: str = "--picture") -> None:
    """Refuses a place for a picture, as `check_place` does; one without an ending becomes a PNG."""
    from devices.figures import FORMATS

    check_place(option, path, (*FORMATS, ""))


def check_name(option: str, name: str) -> None:
    """Refuses a name for a device of one's own that could not be a file's name too.

    Raises:
        DeviceError: with what a name is made of.
    """
    from devices.errors import DeviceError
    from devices.profile import profile_names
    from devices.texts import file_name, quoted

    if not OWN_NAME.fullmatch(name) or name in profile_names() or file_name(name) != name:
        raise DeviceError(
            f"{option} must be letters, digits, '_', '-' and '.', and no shipped device, got {quoted(name)}; "
            "e.g. my_board"
        )


def check_figures(section: str, options: Mapping[str, float], keys: Mapping[str, str] | None = None) -> None:
    """Checks numbers against the bounds that they have in a device file.

    Args:
        section: of the file, e.g. "network".
        options: by their key there.
        keys: how the user knows them, e.g. {"compute_w": "--watts"}; --KEY where nothing is said.

    Raises:
        ConfigError: with the bounds and the unit.
    """
    from devices.profile_file import FIGURES
    from devices.texts import as_yaml
    from fedsim.errors import ConfigError

    for key, value in options.items():
        sentence, holds = FIGURES[section][key].rule
        if not holds(value):  # also false for what is not a number
            option = (keys or {}).get(key, "--" + key.replace("_", "-"))
            raise ConfigError(f"{option} must be {sentence}, got {as_yaml(value)}")


def without_trust(arguments: list[str]) -> list[str]:
    """Takes `--allow-target NAME` and `--config-dir DIR` out of the arguments of the commands of BUILDING."""
    from fedsim.errors import ConfigError
    from fedsim.settings.permissions import CONFIG_FLAG, FLAG, reset, search

    values: dict[str, list[str]] = {FLAG: [], CONFIG_FLAG: []}
    needed = {FLAG: "a name, as it stands behind _target_", CONFIG_FLAG: "a folder"}
    left: list[str] = []
    given = iter(arguments if arguments[:1] and arguments[0] in BUILDING else [])
    for argument in given:
        flag, _, value = argument.partition("=")
        flag = CONFIG_FLAG if flag == "-cd" else flag
        if flag in values:
            values[flag].append(value or next(given, ""))
            if not values[flag][-1] or values[flag][-1].startswith("-"):
                raise ConfigError(f"{flag} needs {needed[flag]}")
        else:
            left.append(argument)
    reset(values[FLAG])
    for folder in values[CONFIG_FLAG]:
        search(Path(folder))
    if any(argument.startswith("model=") for argument in left):
        from fedsim.settings.trust import allow_models

        allow_models(left)
    return left or arguments
