"""People who join when the learning is over: the owners of a data set's test part, each with a few examples."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedsim.errors import DataError
from fedsim.seeding import generator

if TYPE_CHECKING:
    from fedsim.workloads.arrays import Arrays, DataSet


def newcomers_of(data: DataSet, examples: int, seed: int) -> DataSet:
    """Returns the test part as a data set of its own: `examples` of each owner to train on, its others held out.

    Owners with less than twice as many examples are left out, and so is what nobody owns.

    Args:
        data: whose test part has owners.
        examples: of each that it trains on, drawn by the seed.
        seed: of the run.

    Raises:
        DataError: if nobody is left.
    """
    owners = data.test.owners
    if owners is None:
        raise DataError(f"workload.newcomers={examples} needs owners in the test part of {data.source}, which has none")
    names, counts = np.unique(owners, return_counts=True)
    chosen = [name for name, count in zip(names.tolist(), counts, strict=True) if name != "" and count >= 2 * examples]
    if not chosen:
        raise DataError(
            f"workload.newcomers={examples}: nobody in the test part of {data.source} has {2 * examples} examples; the "
            f"most are {counts[names != ''].max(initial=0)}"
        )
    train: list[np.ndarray] = []
    for name in chosen:
        rows = np.flatnonzero(owners == name)
        train.append(np.sort(generator(seed, "newcomer", str(name)).permutation(rows)[:examples]))
    ours = np.concatenate(train)
    held = np.setdiff1d(np.flatnonzero(np.isin(owners, chosen)), ours)
    return replace(data, train=_rows(data.test, ours), test=_rows(data.test, held))


def _rows(part: Arrays, rows: np.ndarray) -> Arrays:
    return part._replace(x=part.x[rows], y=part.y[rows], owners=None if part.owners is None else part.owners[rows])
