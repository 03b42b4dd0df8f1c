"""What a classifier does for each class, and how far its confidence can be believed: counts that add up over batches.

Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2: the expected calibration error
over 15 bins of equal width, each with its upper edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

BINS = 15
MACRO_F1, ECE = "macro_f1", "ece"
CLASSES, CALIBRATION, CONFUSION = "classes", "calibration", "confusion"
MAX_LISTED, MAX_SHOWN = 100, 20  # classes that a summary lists, and of which it holds the whole matrix


def counts(labels: Tensor, predicted: Tensor, confidence: Tensor, classes: int) -> dict[str, np.ndarray]:
    """Returns what some predictions add to the counts of an evaluation.

    Args:
        labels: true classes, [n] int64.
        predicted: the most likely class of each, [n] int64.
        confidence: its probability, [n].
        classes: how many there are.

    Returns:
        By class, [3, classes] int64: examples, predictions and right ones. By bin, [3, 15] float64: predictions, right
        ones and summed confidence, which is exact whatever the order of float32 numbers.
    """
    y, p = labels.numpy(), predicted.numpy()
    sure = confidence.double().nan_to_num().numpy()  # an evaluation that is not finite is refused as a whole
    right = y == p
    bins = np.clip(np.ceil(sure * BINS), 1, BINS).astype(np.int64) - 1
    by_class = [np.bincount(each, minlength=classes) for each in (y, p, y[right])]
    by_bin = [np.bincount(each, weights, BINS) for each, weights in ((bins, None), (bins[right], None), (bins, sure))]
    return {CLASSES: np.stack(by_class), CALIBRATION: np.stack(by_bin)}


@dataclass(frozen=True)
class Confusion:
    """How often each class was taken for each: the cells that hold any, since classes can be many.

    Attributes:
        classes: how many there are.
        cells: label times classes plus predicted, rising, [n] int64.
        counts: of each cell, [n] int64.
    """

    classes: int
    cells: np.ndarray
    counts: np.ndarray

    def __add__(self, other: Confusion | int) -> Confusion:
        if not isinstance(other, Confusion):  # the 0 that a sum begins with
            return self
        cells, places = np.unique(np.concatenate([self.cells, other.cells]), return_inverse=True)
        counts = np.zeros(len(cells), np.int64)
        np.add.at(counts, places, np.concatenate([self.counts, other.counts]))
        return Confusion(self.classes, cells, counts)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns label and predicted class of each cell."""
        return np.divmod(self.cells, self.classes)

    def by_class(self) -> np.ndarray:
        """Returns examples, predictions and right ones of each class, [3, classes] int64."""
        labels, predicted = self.places()
        found = np.zeros((3, self.classes), np.int64)
        for row, chosen in zip(found, (labels, predicted, np.where(labels == predicted, labels, -1)), strict=True):
            np.add.at(row, chosen[chosen >= 0], self.counts[chosen >= 0])
        return found

    def dense(self) -> np.ndarray:
        """Returns the whole matrix, true classes down, [classes, classes] int64."""
        matrix = np.zeros((self.classes, self.classes), np.int64)
        matrix[self.places()] = self.counts
        return matrix


def confusion_of(labels: Tensor, predicted: Tensor, classes: int) -> Confusion:
    """Returns how often each class was taken for each."""
    return Confusion(classes, *np.unique(labels.numpy() * classes + predicted.numpy(), return_counts=True))


def f1_of(by_class: np.ndarray) -> np.ndarray:
    """Returns the F1 of each class, [classes]; nan where no example is of it and none was taken for it."""
    examples, predictions, right = by_class
    with np.errstate(invalid="ignore"):
        return np.asarray(2.0 * right / (examples + predictions))


def macro_f1(by_class: np.ndarray) -> float:
    """Returns the mean F1 of the classes that an example is of or was taken for."""
    return float(np.nanmean(f1_of(by_class)))


def calibration_error(by_bin: np.ndarray) -> float:
    """Returns the mean distance of confidence and accuracy of the bins, weighted by their predictions."""
    predictions, right, confidence = by_bin
    return float(np.abs(right - confidence).sum() / predictions.sum())


@dataclass(frozen=True)
class ByClass:
    """An evaluation by class.

    Attributes:
        names: of the classes.
        confusion: how often each class was taken for each.
        by_bin: of `counts`.
    """

    names: Sequence[str]
    confusion: Confusion
    by_bin: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], totals: Mapping[str, Any]) -> ByClass:
        """Returns that of the summed counts of an evaluation."""
        return cls(names, totals[CONFUSION], totals[CALIBRATION])

    def figures(self) -> dict[str, Any]:
        """Returns what a summary says of it; of too many classes less."""
        by_class, few = self.confusion.by_class(), len(self.names)
        with np.errstate(invalid="ignore"):
            shares = by_class[2] / by_class[0]
        rows = zip(self.names, by_class[0], shares, f1_of(by_class), strict=True)
        predictions, right, confidence = self.by_bin
        bins = [
            {"predictions": int(n), "accuracy": float(r / n), "confidence": float(c / n)} if n else {"predictions": 0}
            for n, r, c in zip(predictions, right, confidence, strict=True)
        ]
        listed = [{"name": n, "examples": int(e), "accuracy": or_none(a), "f1": or_none(f)} for n, e, a, f in rows]
        return {
            **({CLASSES: listed} if few <= MAX_LISTED else {}),
            **({CONFUSION: self.confusion.dense().tolist()} if few <= MAX_SHOWN else {}),
            CALIBRATION: bins,
        }

    def cells(self) -> tuple[list[str], list[str], list[int]]:
        """Returns label, predicted class and count of the cells of the confusion matrix that hold any."""
        rows, columns = ([self.names[place] for place in places] for places in self.confusion.places())
        return rows, columns, self.confusion.counts.tolist()


def or_none(value: float) -> float | None:
    """Returns None for nan: what nothing is known of, as JSON holds it."""
    return None if np.isnan(value) else float(value)
