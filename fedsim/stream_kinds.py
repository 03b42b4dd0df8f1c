"""How a data set becomes a sequence of tasks: its classes in groups, or all of it rotated, permuted or drawn apart.

May import: torch, numpy, torchvision (lazily), fedsim.streams, seeding, errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from devices.errors import unknown
from fedsim.errors import ConfigError
from fedsim.seeding import generator
from fedsim.streams import TASK, Stream
from fedsim.workload import Tensors


class SplitClasses(Stream):
    """Each task has its own classes, as many as the others.

    Domain-incremental, the classes of each task are numbered from 0, so that tasks share the outputs.

    Args:
        class_order: "natural": the first classes come first; "shuffled": a draw of the run's seed; or a list.
        stream: arguments of Stream.
    """

    def __init__(self, class_order: str | Sequence[int] = "natural", **stream: Any):
        self.class_order = class_order
        super().__init__(**stream)

    def set_up(self) -> None:
        classes = self.inner.num_classes
        if classes % self.tasks:
            raise ConfigError(f"stream.tasks must divide the {classes} classes of {self.name}, got {self.tasks}")
        order = list(range(classes))
        if self.class_order == "shuffled":
            order = generator(self.seed, "stream", "classes").permutation(classes).tolist()
        elif isinstance(self.class_order, str):
            if self.class_order != "natural":
                raise ConfigError(unknown("value for stream.class_order", self.class_order, ("natural", "shuffled")))
        elif sorted(self.class_order) != order:
            raise ConfigError(f"stream.class_order must hold each of 0..{classes - 1} once, got {self.class_order}")
        else:
            order = list(self.class_order)
        size = classes // self.tasks
        if size < 2 and self.incremental != "class":
            raise ConfigError(f"stream.tasks must leave two classes to each task, got {self.tasks} for {classes}")
        self.groups = [order[task * size : (task + 1) * size] for task in range(self.tasks)]
        self.task_of_class, self.new_label = torch.empty(2, classes, dtype=torch.int64)
        for place, c in enumerate(order):
            self.task_of_class[c] = place // size
            self.new_label[c] = place % size if self.incremental == "domain" else c
        if self.incremental == "domain":
            self.num_classes = size

    def belongs(self, task: int, labels: Tensor) -> Tensor:
        return self.task_of_class[labels] == task

    def change(self, batch: Tensors) -> Tensors:
        return {**batch, "y": self.relabel(batch["y"])}

    def relabel(self, labels: Tensor) -> Tensor:
        return self.new_label[labels]

    def classes_of(self, task: int) -> list[int]:
        return list(range(self.num_classes)) if self.incremental == "domain" else list(self.groups[task])


class Reused(Stream):
    """Each task is the whole data set, changed.

    Args:
        disjoint: divide a client's examples among its tasks; otherwise each task has all of them, as is published.
        stream: arguments of Stream.
    """

    def __init__(self, disjoint: bool = False, **stream: Any):
        self.disjoint = disjoint
        super().__init__(**stream)
        if self.incremental != "domain":
            raise ConfigError(f"stream.incremental must be domain where tasks share classes, got {self.incremental!r}")

    def belongs(self, task: int, labels: Tensor) -> Tensor:
        return torch.ones(len(labels), dtype=torch.bool)

    def _rows(self, client_id: int, task: int) -> Tensor:
        rows = super()._rows(client_id, task)
        if not self.disjoint:
            return rows
        place = generator(self.seed, "stream", "disjoint", client_id).permutation(len(self._own(client_id).train))
        return rows[torch.from_numpy(place % self.tasks)[rows] == task]


class Rotated(Reused):
    """Images turned by a further angle in each task; corners are filled with zeros.

    Args:
        degrees: per task, against the clock.
        interpolation: "nearest" or "bilinear".
        reused: arguments of Reused.
    """

    def __init__(self, degrees: float = 9.0, interpolation: Literal["nearest", "bilinear"] = "nearest", **reused: Any):
        if interpolation not in ("nearest", "bilinear"):
            raise ConfigError(unknown("value for stream.interpolation", interpolation, ("nearest", "bilinear")))
        self.degrees, self.interpolation = degrees, interpolation
        super().__init__(**reused)

    def set_up(self) -> None:
        if len(self.input_shape) != 3:
            shape = " x ".join(map(str, self.input_shape))
            raise ConfigError(f"stream=rotated turns images, and an example of {self.name} is {shape}")

    def change(self, batch: Tensors) -> Tensors:
        from torchvision.transforms.functional import InterpolationMode, rotate

        mode = InterpolationMode(self.interpolation)
        x, tasks = batch["x"], batch[TASK]
        own = tasks.unique().tolist()
        if own == [0] or not self.degrees:
            return batch
        if len(own) == 1:
            return {**batch, "x": rotate(x, self.degrees * own[0], mode)}
        x = x.clone()
        for task in own:
            x[tasks == task] = rotate(x[tasks == task], self.degrees * task, mode)
        return {**batch, "x": x}


class Permuted(Reused):
    """The numbers of every example in another fixed order in each task; the first task is as it was."""

    def set_up(self) -> None:
        size = int(torch.tensor(self.input_shape).prod())
        orders = [generator(self.seed, "stream", "pixels", task).permutation(size) for task in range(1, self.tasks)]
        self.places = torch.stack([torch.arange(size), *map(torch.from_numpy, orders)])  # [tasks, size]

    def change(self, batch: Tensors) -> Tensors:
        if not batch["x"].is_floating_point():
            raise ConfigError(f"stream=permuted mixes numbers, and {self.name} feeds tokens")
        flat = batch["x"].flatten(1)
        return {**batch, "x": flat.gather(1, self.places[batch[TASK]]).view_as(batch["x"])}
