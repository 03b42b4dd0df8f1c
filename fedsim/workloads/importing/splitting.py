"""Holds out the test part of files that come without one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedsim.errors import ConfigError, DataError
from fedsim.seeding import generator
from fedsim.workloads.importing.found import Found


class Parts(NamedTuple):
    """Rows of both parts, in order, and a sentence on how they were chosen."""

    train: np.ndarray
    test: np.ndarray
    how: str


def split(found: Found, fraction: float, seed: int) -> Parts:
    """Divides examples into a part to train on and one to test on.

    The files' own test part counts where there is one. Otherwise whole owners are held out, so that nobody is in both
    parts; without owners, the end of every recording; of what is neither, the same share of every class. Every class
    that has an example is in the training part.

    Args:
        found: what is divided.
        fraction: share of the examples to test on.
        seed: of the draw.

    Raises:
        ConfigError: if the fraction is not inside (0, 1).
        DataError: if nothing is left for one of the parts.
    """
    check_fraction(fraction)
    if found.in_test is not None:
        return _parts(found.in_test, "test part: as the files have it")
    rng = generator(seed, "import-split")
    if found.owners is not None and (test := _whole_owners(found.owners, found.y, fraction, rng)).any():
        held = len(np.unique(found.owners[test]))
        share = f"{held} of {len(np.unique(found.owners))} clients, whole"
        return _parts(test, f"test part: {share} ({test.mean():.0%} of the examples, seed {seed})")
    alone = "" if found.owners is None else "; no client could be held out whole, so clients are in both parts"
    if found.stretches is not None:
        return _ends(found.stretches, fraction, found.overlap, alone)
    test = _same_share(found.y, fraction, rng)
    return _parts(test, f"test part: {test.mean():.0%} of the examples, of every class alike (seed {seed}){alone}")


def check_fraction(fraction: float) -> None:
    """Refuses a share that leaves one part empty.

    Raises:
        ConfigError: if it is not inside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"--test-fraction must be above 0 and below 1, got {fraction:g}")


def _parts(test: np.ndarray, how: str) -> Parts:
    if test.all() or not test.any():
        empty = "training" if test.all() else "test"
        raise DataError(f"{len(test)} examples are too few: none is left for the {empty} part; bring more")
    return Parts(np.flatnonzero(~test), np.flatnonzero(test), how)


def _whole_owners(owners: np.ndarray, y: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Returns the rows of owners that together come near to the share of every class, [n] bool."""
    names, number = np.unique(owners, return_inverse=True)
    counts = np.zeros((len(names), int(y.max()) + 1))
    np.add.at(counts, (number, y), 1)
    total = counts.sum(0)
    wanted, taken, chosen = fraction * total, np.zeros_like(total), np.zeros(len(names), bool)
    scale = np.maximum(total, 1)
    for owner in rng.permutation(len(names)):
        more = taken + counts[owner]
        leaves_all = bool(((total - more > 0) | (total == 0)).all())
        if leaves_all and (((more - wanted) / scale) ** 2).sum() < (((taken - wanted) / scale) ** 2).sum():
            taken, chosen[owner] = more, True
    return chosen[number]


def _ends(stretches: np.ndarray, fraction: float, overlap: int, alone: str) -> Parts:
    """Cuts every recording in two by time, and leaves out what would share rows with the test part."""
    train: list[np.ndarray] = []
    test: list[np.ndarray] = []
    for rows in np.split(np.arange(len(stretches)), np.flatnonzero(np.diff(stretches)) + 1):
        last = int(len(rows) * fraction + 0.5)
        if len(rows) - last - overlap < 1:
            last = 0
        test.append(rows[len(rows) - last :])
        train.append(rows[: len(rows) - last - (overlap if last else 0)])
    parts = np.concatenate(train), np.concatenate(test)
    if not len(parts[1]):
        raise DataError("no recording is long enough to hold its end out as the test part; lower --window")
    left = len(stretches) - len(parts[0]) - len(parts[1])
    dropped = f"; {left} windows that overlap it are left out" if left else ""
    return Parts(*parts, f"test part: the end of every recording{dropped}{alone}")


def _same_share(y: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Draws the rounded share of every class, at least one of two and never all, [n] bool."""
    test = np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        test[rows[: min(max(int(len(rows) * fraction + 0.5), 1), len(rows) - 1)]] = True
    return test
