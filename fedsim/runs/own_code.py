"""The files of the user's that a run is made of, noted with it, and compared when it is taken up again."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from devices.reading import read_bytes
from devices.writing import write_atomic
from fedsim.errors import ConfigError
from fedsim.report.checksums import check_inside, read_signed_json, signed_json
from fedsim.report.place import CODE
from fedsim.settings.build import check_trusted
from fedsim.settings.forms import TEXT, check_tree, maps_of
from fedsim.settings.groups import NEEDED, Settings
from fedsim.settings.origins import OWN, is_the_users, module_files
from fedsim.settings.own_networks import IN_FILE
from fedsim.settings.permissions import real_path, working_folder
from fedsim.settings.trust import source_file

LIBRARIES = (*OWN, "flwr", "torch", "torchvision", "numpy")  # whose imports are none of the user's
FILES = "files"
FLAG = "--changed-code"


class ChangedCodeError(ConfigError):
    """Own code of a run is not what the run was begun with."""


def own_code(settings: Settings) -> dict[str, str]:
    """Returns the sha256 of every file of the user's that settings lead to, by its path in the working folder.

    Those are the files of each `_target_` and `source`, and what they import of the working folder, or from beside a
    file that was named; nothing is imported to say it.
    """
    left = [place for group in NEEDED for place in _named(settings[group])]
    found: dict[Path, str] = {}
    while left:
        file, module = left.pop()
        if file in found:
            continue
        text = read_bytes(file)
        found[file] = sha256(text).hexdigest()
        left += _imported(text, file, module)
    here = working_folder()
    names = {str(file.relative_to(here)) if file.is_relative_to(here) else str(file): file for file in found}
    return {name: found[names[name]] for name in sorted(names)}


def write_code(folder: Path, settings: Settings) -> None:
    """Notes the user's own files in a run folder; writes nothing where a run needs none."""
    if files := own_code(settings):
        write_atomic(folder / CODE, signed_json({FILES: files}))


def check_code(folder: Path, settings: Settings) -> None:
    """Refuses to take up a run whose own code is not what it was begun with; of an earlier version nothing is known.

    Raises:
        ChangedCodeError: naming the files that differ.
        ConfigError: if the settings name what they may not: nothing of that is read.
        FileError: if the note cannot be read, or is not what the run wrote.
    """
    path = folder / CODE
    if not path.exists() and not path.is_symlink():
        return
    check_trusted(settings)
    tree = read_signed_json(check_inside(folder, path))
    check_tree(tree, {FILES: maps_of(TEXT)}, str(path))
    before, now = tree[FILES], own_code(settings)
    changed = [name for name in sorted({**before, **now}) if before.get(name) != now.get(name)]
    if changed:
        raise ChangedCodeError(
            f"{folder} was begun with other code than that here: {', '.join(changed)} changed; bring back what it was "
            f"begun with, start a new run, or go on all the same with {FLAG}"
        )


def _named(tree: Any) -> Iterator[tuple[Path, str]]:
    """Yields the user's files that settings name with their modules; a file that is run has none."""
    if isinstance(tree, Mapping):
        target, source = tree.get("_target_"), tree.get("source")
        if target == IN_FILE and isinstance(source, str):
            yield real_path(source_file(source)), ""
        elif isinstance(target, str):
            yield from _modules(target)
    values = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    for value in values:
        yield from _named(value)


def _modules(name: str) -> Iterator[tuple[Path, str]]:
    """Yields the user's modules along a dotted path, with their files."""
    if name.partition(".")[0] in LIBRARIES:
        return
    for module, file in module_files(name):
        if file is not None and file.endswith(".py") and is_the_users(real_path(Path(file))):
            yield real_path(Path(file)), module


def _imported(text: bytes, file: Path, module: str) -> Iterator[tuple[Path, str]]:
    """Yields what a file of the user's imports of theirs."""
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module if file.name == "__init__.py" else module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            above = ".".join(filter(None, (package if node.level else "", node.module)))
            names = [above, *(f"{above}.{alias.name}" for alias in node.names)]
        for name in names:
            beside = [] if module else list(_beside(file.parent, name))
            yield from beside or _modules(name)


def _beside(folder: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Yields the files of a module that lies beside a file that is run, which come before all others."""
    parts = name.split(".")
    for number in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:number])
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                yield real_path(path), ""
