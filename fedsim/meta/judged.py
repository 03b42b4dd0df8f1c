"""How well MetaD2A does on data sets that it was not trained on: tasks of other classes, and two known tables.

On a task, what it proposes is trained like the cells that the task has at random. On CIFAR-10 and CIFAR-100 accuracies
are NAS-Bench-201's own, of 200 epochs of networks of full size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from devices.nas.nb201 import counts
from devices.reading import read_npz
from fedsim.errors import DataError
from fedsim.meta.features import FEATURES, PER_CLASS, image_features, task_features
from fedsim.meta.metad2a import MetaD2A
from fedsim.meta.tasks import Images
from fedsim.meta.trained_cells import Ops, TrainedCells
from fedsim.seeding import generator

ACCURACIES, CELLS = "nb201_accuracy.npz", "help_nb201.npz"  # files of the known tables, and the latter's cells
KNOWN = ", NAS-Bench-201"  # how the names of data sets end whose accuracies are the benchmark's


@dataclass(frozen=True)
class Score:
    """What one MetaD2A did on one data set; accuracies in percent.

    Attributes:
        name: of the data set.
        seed: of the meta-training.
        spearman: of predicted and true accuracies, over the cells that the data set has at random (or all).
        spearman_macs: of multiply-adds and true accuracies.
        valid: share of the drawn graphs that are cells.
        distinct: share of these that are distinct.
        generated: mean accuracy of the first cells that the generator drew, chosen by nothing else.
        chosen: mean accuracy of as many of its cells with the best predictions.
        random: mean accuracy of as many cells that were drawn at random.
        first: accuracy of the cell with the best prediction.
        random_all: mean accuracy over all cells that the data set has at random.
        best: accuracy of the best cell that was trained there (or of the whole space).
        cpu_s: from images to predicted cells, on this host.
    """

    name: str
    seed: int
    spearman: float
    spearman_macs: float
    valid: float
    distinct: float
    generated: float
    chosen: float
    random: float
    first: float
    random_all: float
    best: float
    cpu_s: float

    @property
    def is_known(self) -> bool:
        """Returns whether its accuracies are the benchmark's."""
        return self.name.endswith(KNOWN)


Truth = Callable[[Sequence[Ops]], list[float]]


def judge(
    made: MetaD2A, name: str, seed: int, images: Callable[[], Tensor], random: Sequence[Ops], truth: Truth, count: int
) -> Score:
    """Judges MetaD2A on a data set.

    Args:
        made: what is judged.
        name: of the data set.
        seed: of its meta-training, and of what is drawn here.
        images: computes the data set's features.
        random: cells that were drawn at random, to compare with.
        truth: returns accuracies in percent of some cells.
        count: cells that are trained, of each kind.
    """
    began = time.process_time()
    features = images()
    found, predicted = made.propose(features, generator(seed, "metad2a judged", name))
    took = time.process_time() - began
    cells = [tuple(ops) for ops in found.cells.tolist()]
    ranked = [cells[i] for i in np.argsort(-predicted, kind="stable")]
    accuracies = truth(random)
    # An untrained generator may have found no cell at all; it then has no figure.
    drawn, chosen = truth(cells[:count]) or [np.nan], truth(ranked[:count]) or [np.nan]
    ops = np.array(random)
    return Score(
        name=name,
        seed=seed,
        spearman=rank_correlation(made.predict(features, ops), accuracies),
        spearman_macs=rank_correlation(counts(ops)[1], accuracies),
        valid=found.valid / found.drawn,
        distinct=found.found / max(found.valid, 1),
        generated=float(np.mean(drawn)),
        chosen=float(np.mean(chosen)),
        random=float(np.mean(accuracies[:count])),
        first=chosen[0],
        random_all=float(np.mean(accuracies)),
        best=float(np.nanmax([*accuracies, *drawn, *chosen])),
        cpu_s=took,
    )


def judge_tasks(made: MetaD2A, trained: TrainedCells, seed: int, count: int) -> list[Score]:
    """Judges on the tasks that are held out; trains what is proposed there, unless it was before."""
    scores = []
    for name in trained.names("held_out"):
        images, truth = partial(task_images, trained, name), partial(trained.accuracies, name)
        scores.append(judge(made, name, seed, images, trained.cells(name), truth, count))
    return scores


def task_images(trained: TrainedCells, name: str) -> Tensor:
    """Returns a task's features as MetaD2A is judged by them, [classes, 20, 128]."""
    return task_features(trained.task(name))[:, :PER_CLASS]


def judge_tables(made: MetaD2A, folder: Path, bundles: Sequence[str], seed: int, count: int) -> list[Score]:
    """Judges on CIFAR-10 and CIFAR-100 with NAS-Bench-201's accuracies, over the whole space.

    Args:
        made: what is judged.
        folder: of nb201_accuracy.npz and help_nb201.npz.
        bundles: of them, cifar10 and cifar100, those that are here.
        seed: of its meta-training.
        count: cells of each kind.

    Raises:
        DataError: for files that do not fit each other.
    """
    ops = read_npz(folder / CELLS, ("arch_ops",))["arch_ops"].astype(np.int64)
    columns = {f"{name}_test": name for name in bundles}
    tables = read_npz(folder / ACCURACIES, tuple(columns))
    scores = []
    for column, name in columns.items():
        if tables[column].shape != (len(ops),):
            raise DataError(
                f"{folder / ACCURACIES}: {column} has {tables[column].shape}, not a row for each of {len(ops)}"
            )
        known = dict(zip(map(tuple, ops.tolist()), tables[column].tolist(), strict=True))
        order = generator(0, "metad2a table", name).permutation(len(ops))  # the first ones are random ones
        random = [tuple(row) for row in ops[order].tolist()]
        images, truth = partial(bundle_features, name, seed), partial(_look_up, known)
        scores.append(judge(made, f"{name}{KNOWN}", seed, images, random, truth, count))
    return scores


def _look_up(known: Mapping[Ops, float], cells: Sequence[Ops]) -> list[float]:
    return [known[ops] for ops in cells]


def bundle_features(name: str, seed: int) -> Tensor:
    """Returns the features of 20 images of each class, or as many as the smallest has, [classes, images, 128].

    Raises:
        DataError: if it is not there, or holds no images, or a class without any.
    """
    x = Images(name).some(PER_CLASS, generator(seed, "metad2a images", name))
    return image_features(x.flatten(0, 1)).reshape(*x.shape[:2], FEATURES)


def rank_correlation(predicted: np.ndarray, accuracies: Sequence[float]) -> float:
    """Returns Spearman's correlation; 0 where all are alike, as of a predictor that tells nothing apart."""
    if not np.ptp(predicted) or not np.ptp(accuracies):
        return 0.0
    return float(spearmanr(predicted, accuracies).statistic)
