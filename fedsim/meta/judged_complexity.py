"""What a neural complexity measure adds to the choice of cells, on tasks of classes that it was not learned on.

Cells that a task has at random are trained there for a moment; training loss plus predicted gap then says how large the
loss on held-out images will be. Labels of these are only used to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import pearsonr, rankdata

from devices.nas.nb201 import counts
from fedsim.meta.complexity import Complexity
from fedsim.meta.judged import rank_correlation, task_images
from fedsim.meta.metad2a import MetaD2A
from fedsim.meta.snapshots import TaskSnapshots
from fedsim.meta.trained_cells import TrainedCells

# What cells are ranked by, and what each rank needs.
RANKED_BY = {
    "multiply-adds": "nothing",
    "MetaD2A's predictor": "nothing",
    "training accuracy": "training",
    "training loss": "training",
    "training loss + NC": "training, test images",
    "MetaD2A and loss": "training",
    "MetaD2A and loss + NC": "training, test images",
    "test loss": "training, test labels",
}


@dataclass(frozen=True)
class ComplexityScore:
    """How well one measure did on one task.

    Attributes:
        name: of the task.
        seed: of the measure's training.
        spearman: correlations with held-out accuracies, by what ranks (`RANKED_BY`); of losses, the smallest are best.
            "NC" is the predicted gap, "MetaD2A and" the sum of standardised ranks; those of MetaD2A may be absent.
        gap, predicted_gap: of each cell, test loss less training loss, in nats.
        usual_gap: mean gap of trained networks on the tasks that were learned from.
    """

    name: str
    seed: int
    spearman: Mapping[str, float]
    gap: tuple[float, ...]
    predicted_gap: tuple[float, ...]
    usual_gap: float

    @property
    def correlation(self) -> float:
        """Returns Pearson's correlation of predicted and true gaps; 0 where all are alike."""
        return correlation([self])

    @property
    def error(self) -> float:
        """Returns the mean absolute error of the predicted gaps."""
        return float(np.abs(np.subtract(self.predicted_gap, self.gap)).mean())

    @property
    def usual_error(self) -> float:
        """Returns the mean absolute error of the usual gap in the place of all predicted ones."""
        return float(np.abs(self.usual_gap - np.array(self.gap)).mean())


def correlation(scores: Sequence[ComplexityScore]) -> float:
    """Returns Pearson's correlation of predicted and true gaps over all cells of some tasks; 0 where all are alike."""
    predicted, true = (np.concatenate(part) for part in zip(*((s.predicted_gap, s.gap) for s in scores), strict=True))
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return 0.0
    return float(pearsonr(predicted, true).statistic)


def joined_ranks(*scores: np.ndarray) -> np.ndarray:
    """Returns the sum of standardised ranks: each score says as much, in whatever unit it is."""
    ranks = np.stack([rankdata(own) for own in scores])
    spread = ranks.std(1, keepdims=True)
    total: np.ndarray = ((ranks - ranks.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)).sum(0)
    return total


def judge_complexity(
    made: Complexity,
    trained: TrainedCells,
    held_out: Sequence[TaskSnapshots],
    seed: int,
    usual_gap: float,
    predictor: MetaD2A | None = None,
) -> Iterator[ComplexityScore]:
    """Judges a measure on tasks.

    Args:
        made: the measure.
        trained: the tasks with the accuracies.
        held_out: snapshots of all cells that a task has at random, of the trained networks alone.
        seed: of the measure's training.
        usual_gap: mean gap on the tasks that were learned from.
        predictor: what is joined.
    """
    for own in held_out:
        cells = trained.cells(own.task)
        accuracies, ops = trained.accuracies(own.task, cells), np.array(cells)
        gap, loss, predicted = own.gap.double().numpy(), own.train_loss.double().numpy(), made.predict(own)
        scores = {
            "multiply-adds": counts(ops)[1],
            "training accuracy": own.train_accuracy.numpy(),
            "training loss": -loss,
            "training loss + NC": -(loss + predicted),
            "test loss": -(loss + gap),
        }
        if predictor is not None:
            wanted = predictor.predict(task_images(trained, own.task), ops)
            scores["MetaD2A's predictor"] = wanted
            scores["MetaD2A and loss"] = joined_ranks(wanted, scores["training loss"])
            scores["MetaD2A and loss + NC"] = joined_ranks(wanted, scores["training loss + NC"])
        spearman = {name: rank_correlation(scores[name], accuracies) for name in RANKED_BY if name in scores}
        yield ComplexityScore(own.task, seed, spearman, tuple(gap.tolist()), tuple(predicted.tolist()), usual_gap)
