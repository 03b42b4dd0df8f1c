"""`fedsim new`: the files of a method, model, workload, rule or attack of one's own, which run at once."""

from __future__ import annotations

import keyword
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

DEFAULT = ("strategy", "trainer")  # the two halves of a method


def new(
    name: Annotated[str, typer.Argument(help="Name of the module and of its options, e.g. scaffold.")],
    strategy: Annotated[bool, typer.Option("--strategy", help="With the server half of a method.")] = False,
    trainer: Annotated[bool, typer.Option("--trainer", help="With the client half of a method.")] = False,
    model: Annotated[bool, typer.Option("--model", help="With a network.")] = False,
    workload: Annotated[bool, typer.Option("--workload", help="With data.")] = False,
    participants: Annotated[bool, typer.Option("--participants", help="With a rule of client selection.")] = False,
    attack: Annotated[bool, typer.Option("--attack", help="With what malicious clients do.")] = False,
) -> None:
    """Begin a method of your own: code, its options and a test in the working folder; both halves if nothing is said.

    What is written runs at once, in its limit case as federated averaging to the last bit.

    Example: fedsim new scaffold --trainer --strategy
    """
    from devices.writing import make_folders, write_new
    from fedsim.cli.templates import files_of

    asked = {"strategy": strategy, "trainer": trainer, "model": model, "workload": workload}
    asked |= {"participants": participants, "attack": attack}
    parts = [part for part, is_asked in asked.items() if is_asked] or list(DEFAULT)
    halves = any(part in DEFAULT for part in parts)
    _check_folder()
    files = {Path(path): text for path, text in files_of(name, parts).items()} if name.isidentifier() else {}
    _check_free(name, files)
    _check_name(name, [*parts, *(["method"] if halves else [])])
    for path, text in files.items():
        make_folders(path.parent)
        write_new(path, text)
        print(f"wrote {path}")
    taken = [
        f"{group}={name}"
        for group in ("method", *(part for part in asked if part not in DEFAULT))
        if Path(f"configs/{group}/{name}.yaml") in files
    ]
    print(f"run it: fedsim run {' '.join(taken)}")
    print(f"test it: python -m pytest test_{name}.py")


def _check_name(name: str, groups: list[str]) -> None:
    """Refuses a name that Python, or the options that there are, have for something else.

    Raises:
        ConfigError: says what has it.
    """
    from importlib.util import find_spec

    from devices.texts import as_yaml
    from fedsim.errors import ConfigError
    from fedsim.settings.groups import options

    what = f"NAME={as_yaml(name)}"
    if not (name.isidentifier() and name.isascii() and name == name.lower()) or keyword.iskeyword(name):
        raise ConfigError(f"{what} must be a name of a Python module: small letters, digits and '_', e.g. my_method")
    if name in sys.stdlib_module_names:
        raise ConfigError(f"{what} is a module of Python's own library; take another name, e.g. my_{name}")
    if taken := [group for group in groups if name in options(group)]:
        raise ConfigError(f"{what} is an option already ({taken[0]}={name}); take another name, e.g. my_{name}")
    found = find_spec(name)
    if found is not None and found.origin is not None:  # a mere folder has none, and gives way to a module
        raise ConfigError(f"{what} is an installed module, which Python would find first; take another, e.g. my_{name}")


def _check_free(name: str, files: dict[Path, str]) -> None:
    """Refuses to write over a file.

    Raises:
        ConfigError: for the first one that is there.
    """
    from fedsim.errors import ConfigError

    for path in files:
        if os.path.lexists(path):
            raise ConfigError(f"{path} is there already; remove it, or take another name than {name}")


def _check_folder() -> None:
    """Refuses folders in which nothing would be looked up: of a run or study, and fedsim's own.

    Raises:
        ConfigError: says to go elsewhere.
    """
    from fedsim.errors import ConfigError
    from fedsim.settings.groups import config_dir
    from fedsim.settings.origins import came_with_a_run

    here = Path.cwd()
    what = "a run or study" if came_with_a_run(here / "x") else "fedsim itself" if config_dir().parent == here else ""
    if what:
        raise ConfigError(f"{here} is the folder of {what}; change to a folder of your own")
