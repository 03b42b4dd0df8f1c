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


def confusion_of(labels: Tensor, predicted: Tensor, classes: int) -> Any:
    """Returns how often each class was taken for each, as a sparse array [classes, classes] int64, true ones down."""
    from scipy.sparse import coo_array

    ones = np.ones(len(labels), np.int64)
    return coo_array((ones, (labels.numpy(), predicted.numpy())), shape=(classes, classes)).tocsr()


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
        confusion: how often each class was taken for each, sparse [classes, classes] int64, true ones down.
        by_bin: of `counts`.
    """

    names: Sequence[str]
    confusion: Any
    by_bin: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], totals: Mapping[str, Any]) -> ByClass:
        """Returns that of the summed counts of an evaluation."""
        return cls(names, totals[CONFUSION], totals[CALIBRATION])

    def figures(self) -> dict[str, Any]:
        """Returns what a summary says of it; of too many classes less."""
        confusion, few = self.confusion, len(self.names)
        by_class = np.stack([confusion.sum(1), confusion.sum(0), confusion.diagonal()])
        with np.errstate(invalid="ignore"):
            shares = by_class[2] / by_class[0]
        rows = zip(self.names, by_class[0], shares, f1_of(by_class), strict=True)
        predictions, right, confidence = self.by_bin
        bins = [
            {"predictions": int(n), "accuracy": float(r / n), "confidence": float(c / n)} if n else {"predictions": 0}
            for n, r, c in zip(predictions, right, confidence, strict=True)
        ]
        listed = [{"name": n, "examples": int(e), "accuracy": float(a), "f1": float(f)} for n, e, a, f in rows]
        return {
            **({CLASSES: listed} if few <= MAX_LISTED else {}),
            **({CONFUSION: confusion.toarray().tolist()} if few <= MAX_SHOWN else {}),
            CALIBRATION: bins,
        }

    def table(self) -> Any:
        """Returns the confusion matrix as a pyarrow Table: label, predicted and count, of the cells that hold any."""
        import pyarrow as pa

        cells = self.confusion.tocoo()
        rows, columns = ([self.names[place] for place in places] for places in cells.coords)
        return pa.table({"label": rows, "predicted": columns, "count": pa.array(cells.data.tolist(), pa.int64())})
