"""How accurate cells of NAS-Bench-201 become on tasks: each is built as a small network and trained for a moment.

A folder holds it: `tasks.json` says what the tasks are and how cells are trained, `cells/TASK.json` the accuracy of
each cell that was trained there. A cell's training depends on its task, its operations and the seed alone, so that the
files are the same in whatever order, and by however many calls, they came to be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from devices.bounds import checked
from devices.errors import DeviceError
from devices.nas.nb201 import EDGES, OPERATIONS, NB201Network, from_string, to_string
from devices.reading import read_json
from devices.writing import write_atomic
from fedsim.errors import ConfigError, DataError
from fedsim.meta.short_training import LAYOUT, accuracy, batches, normalised, train_steps
from fedsim.meta.tasks import Images, Part, Task, TaskSettings, make_task, recipes
from fedsim.seeding import derive, generator

Ops = tuple[int, ...]

FACTS, CELLS = "tasks.json", "cells"
NORM_IMAGES = 256  # that the norms' statistics are of
SPACE = len(OPERATIONS) ** len(EDGES)  # cells


@checked("cells", ConfigError)
@dataclass(frozen=True)
class CellTraining:
    """How a cell is trained: Adam with a learning rate that rises and falls (one cycle), batch norm.

    Attributes:
        channels: of the first stage.
        cells: per stage.
        steps: of training.
        batch: examples of a step.
        learning_rate: at the top of the cycle.
    """

    channels: Annotated[int, Ge(1)] = 8
    cells: Annotated[int, Ge(1)] = 1
    steps: Annotated[int, Ge(1)] = 50
    batch: Annotated[int, Ge(2)] = 32
    learning_rate: Annotated[float, Gt(0)] = 0.01


Watch = Callable[[int, NB201Network], None]


def train_cell(task: Task, ops: Ops, training: CellTraining, seed: int, watch: Watch | None = None) -> float:
    """Trains a cell on a task and returns its accuracy on the held-out images, in percent.

    All cells of a task see the same batches and begin with the same weights outside the cells, so that less of what
    sets them apart is chance.

    Args:
        task: images and labels.
        ops: the cell, operation ids.
        training: see `CellTraining`.
        seed: of weights and batches.
        watch: called after each step but the last with its number and the network, and in the end with the network as
            it is judged. It must change nothing.
    """
    x, x_test = (part.contiguous(memory_format=LAYOUT) for part in normalised(task))
    model = _first_network(task, ops, training, derive(seed, "cell weights", task.name))
    model.to(memory_format=LAYOUT)  # type: ignore[call-overload]  # torch's stubs leave it out
    draw = generator(seed, "cell batches", task.name)
    rows = batches(len(x), training.batch, draw)
    for step in train_steps(model, x, task.train_y, rows, training.steps, training.learning_rate):
        if watch is not None and step < training.steps:
            watch(step, model)
    settle_norms(model, x[torch.from_numpy(draw.permutation(len(x))[:NORM_IMAGES])])
    if watch is not None:
        watch(training.steps, model)
    return accuracy(model, x_test, task.test_y)


def settle_norms(model: NB201Network, x: Tensor) -> None:
    """Takes the norms' statistics anew of some images: running means lag behind in a training of so few steps."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = 1.0  # of one batch, its own
    with torch.no_grad():
        model.train()(x)
    model.eval()


def _first_network(task: Task, ops: Ops, training: CellTraining, seed: int) -> NB201Network:
    """Builds a network; what is not of its cells is as in all networks of this seed."""
    with torch.random.fork_rng(devices=[]):
        networks = []
        for own in (ops, (0,) * len(ops)):
            torch.manual_seed(seed)
            shape = task.train_x.shape[1:]
            networks.append(NB201Network(own, shape, task.num_classes, training.channels, training.cells, "batch"))
    model, bare = networks
    model.load_state_dict(bare.state_dict(), strict=False)  # cells of `none` have no weights
    return model


class TrainedCells:
    """Tasks, and what cells have reached on them, in a folder that grows as more are asked for."""

    def __init__(self, folder: Path, tasks: TaskSettings, training: CellTraining, num_cells: int):
        """Begins the folder, or goes on with it.

        Raises:
            ConfigError: for a number of cells that the space does not have.
            DataError: for a bundle that tasks cannot be made of, or a folder that holds other tasks.
        """
        if not isinstance(num_cells, int) or not 2 <= num_cells <= SPACE:
            raise ConfigError(f"cells of a task must be in 2..{SPACE}, got {num_cells!r}")
        self.folder, self.tasks, self.training, self.num_cells = folder, tasks, training, num_cells
        self.images = {name: Images(name) for name in tasks.bundles}
        self.recipes = {recipe.name: recipe for recipe in recipes(tasks, self.images)}
        self._made: dict[str, Task] = {}
        self._known: dict[str, dict[Ops, float]] = {}
        facts = {
            "tasks": asdict(tasks),
            "training": asdict(training),
            "num_cells": num_cells,
            "recipes": [asdict(recipe) for recipe in self.recipes.values()],
        }
        text = json.dumps(facts, indent=1)
        if (folder / FACTS).exists():
            if read_json(folder / FACTS) != json.loads(text):
                raise DataError(f"{folder} holds other tasks, or cells trained otherwise; name another folder")
        else:
            (folder / CELLS).mkdir(parents=True, exist_ok=True)
            write_atomic(folder / FACTS, text)

    @classmethod
    def open(cls, folder: Path) -> TrainedCells:
        """Opens a folder that is there.

        Raises:
            DataError: if it is none, or its bundles are not here.
        """
        if not (folder / FACTS).is_file():
            raise DataError(f"{folder} holds no {FACTS}; make it with: fedsim devices make-tasks --out {folder}")
        facts = read_json(folder / FACTS)
        try:
            return cls(folder, TaskSettings(**facts["tasks"]), CellTraining(**facts["training"]), facts["num_cells"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / FACTS} cannot be read as tasks of this version: {error}") from None

    @property
    def total(self) -> int:
        """Returns how many trainings there are, done or not."""
        return self.num_cells * len(self.recipes)

    def names(self, part: Part) -> list[str]:
        """Returns the names of the tasks of a part."""
        return [name for name, recipe in self.recipes.items() if recipe.part == part]

    def task(self, name: str) -> Task:
        """Returns a task; made when it is first asked for."""
        if name not in self._made:
            recipe = self.recipes[name]
            self._made[name] = make_task(recipe, self.images[recipe.bundle], self.tasks.seed)
        return self._made[name]

    def cells(self, name: str) -> list[Ops]:
        """Returns the cells that a task has for all to learn from and be judged by: distinct ones, drawn at random."""
        places = generator(self.tasks.seed, "task cells", name).choice(SPACE, self.num_cells, replace=False)
        digits = np.stack(np.unravel_index(places, (len(OPERATIONS),) * len(EDGES)), axis=1)
        return [tuple(ops) for ops in digits.tolist()]

    def train(self, progress: Callable[[str], None]) -> None:
        """Trains the cells that were not trained yet; `progress` is called after each cell, also a known one."""
        for name in self.recipes:
            self.accuracies(name, self.cells(name), progress)

    def known(self, name: str) -> dict[Ops, float]:
        """Returns the accuracies in percent of all cells that were trained on a task, by their operations.

        Raises:
            DataError: for a file that is damaged, or cells that were trained on other images.
        """
        if name not in self._known:
            path = self._path(name)
            if not path.exists():
                return self._known.setdefault(name, {})
            found = read_json(path)
            try:
                accuracies = {from_string(text): float(value) for text, value in found["accuracies"].items()}
                if found["images"] != self.task(name).fingerprint:
                    raise DataError(f"{path}: these cells were trained on other images than its bundle has now")
            except (KeyError, TypeError, AttributeError, DeviceError) as error:
                raise DataError(f"{path} cannot be read as accuracies of cells: {error}") from None
            self._known[name] = accuracies
        return self._known[name]

    def accuracies(self, name: str, cells: Iterable[Ops], progress: Callable[[str], None] | None = None) -> list[float]:
        """Returns the accuracies of cells on a task in percent; trains those that are not known, and keeps them.

        Args:
            name: of the task.
            cells: operation ids.
            progress: called with the task's name after each cell.
        """
        known, found = self.known(name), []
        for ops in cells:
            if ops not in known:
                known[ops] = train_cell(self.task(name), ops, self.training, self.tasks.seed)
                by_name = {to_string(own): accuracy for own, accuracy in sorted(known.items())}
                content = {"images": self.task(name).fingerprint, "accuracies": by_name}
                write_atomic(self._path(name), json.dumps(content, indent=1, allow_nan=False))
            found.append(known[ops])
            if progress is not None:
                progress(name)
        return found

    def _path(self, name: str) -> Path:
        return self.folder / CELLS / f"{name}.json"
