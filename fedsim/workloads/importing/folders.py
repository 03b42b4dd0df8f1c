"""Lists the files of a folder that has one folder per class."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedsim.errors import ConfigError, DataError
from fedsim.workloads.importing.found import ids, number_labels

DEEPEST = 20  # folders below a class; a link may lead back to where it stands
PARENT = "parent"
SYSTEM_FILES = ("desktop.ini", "thumbs.db", "__macosx")  # which desktops leave in folders
OTHER_PARTS = ("val", "valid", "validation", "dev")


class Tree(NamedTuple):
    """The files below class folders.

    Attributes:
        paths: of every example, sorted by part, class and name.
        y: labels, [n] int64.
        classes: their names.
        owners: [n]; None where no rule was given.
        in_test: [n] bool; None where there is no test folder.
        notes: sentences on what was left out.
    """

    paths: list[Path]
    y: np.ndarray
    classes: list[str]
    owners: np.ndarray | None
    in_test: np.ndarray | None
    notes: list[str]


def read_tree(folder: Path, owner: str | None, option: str) -> Tree:
    """Lists the files of every class, of train/ and test/ where the class folders stand in these.

    Args:
        folder: holds a folder per class, or train/ and perhaps test/ that do.
        owner: who made an example: "parent", the folder that its file is in, or a regular expression that is searched
            in its path below the folder, and whose first group counts; None: the files do not say.
        option: what sentences call `owner`, e.g. "--owner".

    Raises:
        ConfigError: if the regular expression is none.
        DataError: if there are no class folders, one is empty, or a file has no owner.
    """
    owner_of = owner_rule(owner, option) if owner else None
    parts, notes = _parts(folder)
    paths: list[Path] = []
    labels: list[str] = []
    tested: list[bool] = []
    owners: list[str] = []
    for root, test in parts:
        for class_folder in _folders(root):
            files = list(_files(class_folder))
            if not files:
                raise DataError(f"class folder {class_folder} has no files; remove it or fill it")
            paths += files
            labels += [class_folder.name] * len(files)
            tested += [test] * len(files)
            if owner_of:
                owners += [owner_of(file, root, class_folder) for file in files]
    y, classes = number_labels(labels, str(folder))
    trained = {label for label, test in zip(labels, tested, strict=True) if not test}
    if only := sorted(set(labels) - trained):
        raise DataError(f"{folder} has class {only[0]!r} in test/ but not in train/; name the class folders alike")
    in_test = np.array(tested) if len(parts) > 1 else None
    return Tree(paths, y, classes, ids(owners, str(folder)) if owner else None, in_test, notes)


def owner_rule(rule: str, option: str) -> Callable[[Path, Path, Path], str]:
    """Returns what tells the owner from a file, the folder of its part and the folder of its class.

    Raises:
        ConfigError: if the rule is no regular expression.
    """
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise ConfigError(f"{option} must be 'parent' or a regular expression, got {rule!r}: {error}") from None

    def owner_of(file: Path, root: Path, class_folder: Path) -> str:
        if rule == PARENT:
            if file.parent == class_folder:
                raise DataError(
                    f"{file} lies in its class folder, and {option} parent takes the folder between the two; "
                    f"give {option} a regular expression that finds the name in the path"
                )
            return file.parent.name
        found = pattern.search(file.relative_to(root).as_posix())
        named = (found.group(1) if pattern.groups else found.group()) if found else None
        if not named:
            raise DataError(f"{file} has no name that {option} {rule!r} finds; change the expression or the file")
        return named

    return owner_of


def _parts(folder: Path) -> tuple[list[tuple[Path, bool]], list[str]]:
    """Returns the folders that hold class folders, each with whether it is the test part, and what was left out."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name the one that holds a folder per class")
    inner = _folders(folder)
    train, test = folder / "train", folder / "test"
    if not (train in inner and _folders(train)):
        return [(folder, False)], _left_out(folder, inner)
    parts = [(train, False)] + ([(test, True)] if test in inner and _folders(test) else [])
    others = [path.name for path in inner if path not in [root for root, _ in parts]]
    if len(parts) == 1 and (odd := [name for name in others if name not in OTHER_PARTS]):
        raise DataError(
            f"{folder} has folders in train/ and one {odd[0]}/ beside it, and may hold classes or parts; "
            "move one of them away"
        )
    notes = [f"left out, beside train/ and test/: {', '.join(others)}"] if others else []
    return parts, notes + [note for root, _ in parts for note in _left_out(root, _folders(root))]


def _left_out(folder: Path, inner: list[Path]) -> list[str]:
    """Says how many files stand beside class folders.

    Raises:
        DataError: if there are no class folders.
    """
    loose = sum(not entry.is_dir() for entry in _entries(folder))
    if not inner:
        raise DataError(f"{folder} has no folders, and needs one per class (it holds {loose} files)")
    return [f"left out, beside the class folders of {folder}: {loose} files"] if loose else []


def _folders(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in _entries(folder) if entry.is_dir()]


def _files(folder: Path, depth: int = 0) -> Iterator[Path]:
    if depth > DEEPEST:
        raise DataError(f"{folder} lies more than {DEEPEST} folders below its class; a link in it may lead back")
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files(folder / entry.name, depth + 1)
        else:
            yield folder / entry.name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Returns what a folder holds, in the order of names, without hidden files."""
    try:
        with os.scandir(folder) as entries:
            found = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in SYSTEM_FILES]
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}") from None
    return sorted(found, key=lambda entry: entry.name)
