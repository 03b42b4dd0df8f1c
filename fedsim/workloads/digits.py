"""Handwritten digits that ship inside scikit-learn: 1797 real images of 8x8, for tests and first steps; no download.

The file is read without importing scikit-learn, which takes seconds.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Interval

from fedsim.errors import DataError
from fedsim.seeding import generator
from fedsim.workloads.arrays import Arrays, ArrayWorkload, DataSet

SIDE = 8  # pixels of a digit
BOX = "box"  # of an example: where its object is


class Digits(ArrayWorkload):
    """Ten digits, [1, 8, 8] in [0, 1]; a fixed fifth of each class is the test split, whatever the seed of the run.

    Args:
        name, default_clients, arrays: arguments of ArrayWorkload.
    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998 (its test part).
    """

    def __init__(self, name: str = "digits", default_clients: Annotated[int, Ge(1)] = 20, **arrays: Any):
        super().__init__(name=name, default_clients=default_clients, **arrays)

    def read(self) -> DataSet:
        x, y = _read()
        tested = _fifth_of_each_class(y)
        train, test = (Arrays(x[rows], y[rows]) for rows in (~tested, tested))
        return DataSet(train, test, [str(digit) for digit in range(10)], "image", self.name)

    @staticmethod
    def locate(settings: Mapping[str, Any]) -> tuple[str, bool, str]:
        """Returns the kind, whether the data are here, and where or how to get them."""
        return "image", True, "ships with scikit-learn"


class PlacedDigits(Digits):
    """The digits, each at a drawn place of a larger square among pieces of others: what a map of a network can miss.

    Examples come with `box` beside x and y: top, left, bottom, right of the digit in pixels, the last two outside.
    Places and pieces are the same whatever the seed of the run.

    Args:
        canvas: height and width, [1, canvas, canvas].
        pieces: of 4 x 4 pixels of other digits, below the digit where they meet.
        digits: arguments of Digits.
    """

    def __init__(
        self,
        canvas: Annotated[int, Interval(ge=SIDE, le=256)] = 24,
        pieces: Annotated[int, Interval(ge=0, le=1000)] = 6,
        name: str = "placed_digits",
        **digits: Any,
    ):
        self.canvas, self.pieces = canvas, pieces
        self.boxes: list[np.ndarray] = []
        super().__init__(name=name, **digits)
        self.train_tensors[BOX], self.test.tensors[BOX] = (torch.from_numpy(boxes) for boxes in self.boxes)

    def read(self) -> DataSet:
        data = super().read()
        placed = []
        for part, split in ((data.train, "train"), (data.test, "test")):
            x, boxes = _placed(part.x, self.canvas, self.pieces, generator(0, "digits", "canvas", split))
            placed.append(part._replace(x=x))
            self.boxes.append(boxes)
        return replace(data, train=placed[0], test=placed[1])


def _placed(x: np.ndarray, canvas: int, pieces: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns images [n, canvas, canvas, 1] and the boxes of their digits [n, 4] int64."""
    count, piece = len(x), SIDE // 2
    images = np.zeros((count, canvas, canvas, 1), x.dtype)
    for image in images:
        for _ in range(pieces):
            other, (top, left) = rng.integers(count), rng.integers(canvas - piece + 1, size=2)
            row, column = rng.integers(SIDE - piece + 1, size=2)
            image[top : top + piece, left : left + piece] = x[other, row : row + piece, column : column + piece]
    corners = rng.integers(canvas - SIDE + 1, size=(count, 2))
    for image, digit, (top, left) in zip(images, x, corners, strict=True):
        image[top : top + SIDE, left : left + SIDE] = digit
    return images, np.concatenate([corners, corners + SIDE], axis=1)


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images [1797, 8, 8, 1] float32 in [0, 1] and labels [1797] int64."""
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("workload digits reads the images that ship with scikit-learn: pip install scikit-learn")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.int64)  # 64 grey values in 0..16, then the digit
        x, y = table[:, :64], table[:, 64]
    else:  # a release that stores the file elsewhere
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
    return (x.reshape(-1, SIDE, SIDE, 1) / 16).astype(np.float32), y.astype(np.int64)


def _fifth_of_each_class(y: np.ndarray) -> np.ndarray:
    """Returns which examples are the test split, [n] bool."""
    rng, tested = generator(0, "digits", "test"), np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        tested[rows[: round(len(rows) / 5)]] = True
    return tested
