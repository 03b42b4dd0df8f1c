"""What networks of cells say in the course of their trainings: outputs on some images, and how far the losses part.

Files are beside those of `fedsim.meta.trained_cells`, `snapshots/TASK.safetensors`. Cells are trained as they were
there, to the same weights, and what is taken down follows from task, cell and seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from devices.nas.nb201 import NB201Network, from_string, to_string
from devices.tensor_files import read_tensors, write_tensors
from fedsim.errors import DataError
from fedsim.meta.features import image_features
from fedsim.meta.short_training import normalised
from fedsim.meta.tasks import Task
from fedsim.meta.trained_cells import NORM_IMAGES, Ops, TrainedCells, settle_norms, train_cell
from fedsim.seeding import generator

FOLDER, HEADER, KIND = "snapshots", "snapshots", "snapshots of trained cells"
MOMENTS = 4  # of a training, in equal distances; the last is its end
POINTS = 256  # images that outputs are taken of, of those trained on and of those held out, where there are so many


@dataclass(frozen=True)
class TaskSnapshots:
    """Snapshots of the trainings on one task; a training's stand together, the last is of the network as judged.

    Attributes:
        task: its name.
        x, x_test: features of images to train on and of held-out ones, [n, 128] and [m, 128].
        y, y_test: their classes, one-hot, [n, classes] and [m, classes].
        log_p, log_p_test: log probabilities, [snapshots, n, classes] and [snapshots, m, classes].
        moments: snapshots of each training.
    """

    task: str
    x: Tensor
    x_test: Tensor
    y: Tensor
    y_test: Tensor
    log_p: Tensor
    log_p_test: Tensor
    moments: int

    @cached_property
    def train_loss(self) -> Tensor:
        """Returns the mean cross-entropies on images that were trained on, [snapshots]."""
        return -(self.log_p * self.y).sum(2).mean(1)

    @cached_property
    def gap(self) -> Tensor:
        """Returns how much larger the mean cross-entropies on held-out images are, [snapshots]."""
        return -(self.log_p_test * self.y_test).sum(2).mean(1) - self.train_loss

    @cached_property
    def train_accuracy(self) -> Tensor:
        """Returns the shares of images that were trained on whose class is the likeliest, [snapshots]."""
        return (self.log_p.argmax(2) == self.y.argmax(1)).float().mean(1)

    def ends(self) -> TaskSnapshots:
        """Returns the snapshots of networks as they are judged, one of each training."""
        last = slice(self.moments - 1, None, self.moments)
        own = (self.x, self.x_test, self.y, self.y_test, self.log_p[last], self.log_p_test[last])
        return TaskSnapshots(self.task, *own, moments=1)


class Snapshots:
    """Snapshots of cells' trainings in the folder of the trained cells, which grows as more are asked for."""

    def __init__(self, trained: TrainedCells):
        self.trained = trained
        steps = trained.training.steps
        self.steps = sorted({max(1, steps * (number + 1) // MOMENTS) for number in range(MOMENTS)})

    def of(self, name: str, cells: Sequence[Ops], progress: Callable[[str], None] | None = None) -> TaskSnapshots:
        """Returns the snapshots of cells on a task; trains again those of which none were taken.

        Args:
            name: of the task.
            cells: operation ids.
            progress: called with the task's name after each cell.

        Raises:
            DataError: for a file of other images, or one that cannot be used.
        """
        task = self.trained.task(name)
        rows = [_some(task, part, len(y), POINTS) for part, y in (("train", task.train_y), ("test", task.test_y))]
        known, found = self._read(task, [len(own) for own in rows]), []
        for ops in cells:
            if ops not in known:
                known[ops] = self._take(task, ops, rows)
                self._write(task, known)
            found.append(known[ops])
            if progress is not None:
                progress(name)
        images = ((task.train_x, task.train_y, rows[0]), (task.test_x, task.test_y, rows[1]))
        x, x_test = (image_features(x[own]) for x, _, own in images)
        y, y_test = (F.one_hot(y[own], task.num_classes).float() for _, y, own in images)
        log_p, log_p_test = (torch.cat([pair[part] for pair in found]) for part in (0, 1))
        return TaskSnapshots(name, x, x_test, y, y_test, log_p, log_p_test, len(self.steps))

    def _take(self, task: Task, ops: Ops, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Trains a cell and returns what its network said at each of the steps, of both kinds of images."""
        inputs = normalised(task)
        for_norms = inputs[0][_some(task, "norms", len(inputs[0]), NORM_IMAGES)]
        taken: list[list[Tensor]] = [[], []]

        def watch(step: int, model: NB201Network) -> None:
            if step not in self.steps:
                return
            if model.training:
                model = deepcopy(model)
                settle_norms(model, for_norms)
            with torch.no_grad():
                for x, own, kept in zip(inputs, rows, taken, strict=True):
                    kept.append(model(x[own]).log_softmax(1))

        train_cell(task, ops, self.trained.training, self.trained.tasks.seed, watch)
        return torch.stack(taken[0]), torch.stack(taken[1])

    def _read(self, task: Task, points: list[int]) -> dict[Ops, tuple[Tensor, Tensor]]:
        path = self.trained.folder / FOLDER / f"{task.name}.safetensors"
        if not path.exists():
            return {}
        tensors, facts = read_tensors(path, HEADER, KIND)
        if facts.get("images") != task.fingerprint or facts.get("steps") != self.steps:
            raise DataError(f"{path}: these snapshots are of other images, or of other steps; remove the file")
        try:
            cells = [from_string(text) for text in facts["cells"]]
            shape = (len(cells), len(self.steps), -1, task.num_classes)
            parts = [tensors[part].reshape(shape) for part in ("train", "test")]
            if [part.shape[2] for part in parts] != points or not all(bool(p.isfinite().all()) for p in parts):
                raise ValueError("other numbers of images, or one that is NaN or infinite")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{path} cannot be read as {KIND}: {error}") from None
        return {ops: (train, test) for ops, train, test in zip(cells, *parts, strict=True)}

    def _write(self, task: Task, known: dict[Ops, tuple[Tensor, Tensor]]) -> None:
        cells = sorted(known)
        train, test = (torch.stack([known[ops][part] for ops in cells]) for part in (0, 1))
        facts = {"images": task.fingerprint, "steps": self.steps, "cells": [to_string(ops) for ops in cells]}
        path = self.trained.folder / FOLDER / f"{task.name}.safetensors"
        write_tensors(path, {"train": train, "test": test}, facts, HEADER)


def _some(task: Task, part: str, count: int, most: int) -> Tensor:
    """Draws which images of a part are looked at."""
    return torch.from_numpy(generator(0, "snapshot images", task.name, part).permutation(count)[:most])
