"""What an importer has found in somebody's files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from devices.texts import quoted, storable
from fedsim.errors import DataError
from fedsim.workloads.arrays import Kind

Track = Callable[[Sequence[Any], str], Iterable[Any]]  # of rows and what is done with them; draws a bar


@dataclass(frozen=True)
class Found:
    """Examples that will be a bundle.

    Attributes:
        x: examples, as `Arrays` wants them.
        y: labels, [n] int64.
        classes: their names.
        kind: of the examples.
        owners: who made each example, [n]; None where the files do not say.
        in_test: examples that the files put into a test part, [n] bool; None where they do not say.
        stretches: number of the recording that each example is a window of, [n], in order of time; None for others.
        overlap: later windows that share rows with one.
        meta: more for meta.json.
        notes: sentences on what was done or left out.
    """

    x: np.ndarray
    y: np.ndarray
    classes: list[str]
    kind: Kind
    owners: np.ndarray | None = None
    in_test: np.ndarray | None = None
    stretches: np.ndarray | None = None
    overlap: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def untracked(rows: Sequence[Any], what: str) -> Iterable[Any]:
    """Draws no bar."""
    return rows


def number_labels(labels: Sequence[str], where: str, extra: Sequence[str] = ()) -> tuple[np.ndarray, list[str]]:
    """Numbers the names of classes in their order: whole numbers by size, everything else by letters.

    Args:
        labels: of every example.
        where: what the sentence calls the file or folder.
        extra: classes that may have no example.

    Raises:
        DataError: if no file can hold a name.
    """
    classes = sorted({*labels, *extra})
    check_names("class", classes, where)
    if all(whole(name) for name in classes):
        classes.sort(key=int)
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[label] for label in labels], np.int64), classes


def ids(owners: Sequence[str], where: str) -> np.ndarray:
    """Returns owners as an array: int64 where all are whole numbers, else text.

    Raises:
        DataError: if no file can hold an id.
    """
    check_names("client", set(owners), where)
    return np.array([int(o) for o in owners], np.int64) if all(whole(o) for o in owners) else np.array(owners, str)


def whole(text: str) -> bool:
    """Returns whether the text is how an int64 is written."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= 18 and str(int(text)) == text


def check_names(what: str, names: Iterable[str], where: str) -> None:
    """Refuses names that files and tables cannot hold.

    Raises:
        DataError: naming the first.
    """
    for name in sorted(names):
        if not name or not storable(name):
            raise DataError(f"{where} has a {what} {quoted(name)}, which files and tables cannot hold; name it anew")
