"""Makes a sequence of tasks of a data set: its classes in groups, all of it rotated or permuted, or several sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.seeding import generator
from fedsim.workloads.base import ClientData, Examples, Tensors, Workload
from fedsim.workloads.bundle import Bundle
from fedsim.workloads.classification import ClassificationWorkload, classification
from fedsim.workloads.fingerprint import Fingerprint
from fedsim.workloads.partition import Iid
from fedsim.workloads.streams.base import TASK, Stream


class SplitClasses(Stream):
    """Each task has its own classes, as many as the others.

    Domain-incremental, the classes of each task are numbered from 0, so that tasks share the outputs.

    Args:
        class_order: "natural": the first classes come first; "shuffled": a draw of the run's seed; or a list.
        stream: arguments of Stream.

    Attributes:
        task_of_class: [classes] int64.
        new_label: by class, the label that its examples get, [classes] int64.
    """

    task_of_class: Tensor
    new_label: Tensor

    def __init__(self, class_order: Literal["natural", "shuffled"] | Sequence[int] = "natural", **stream: Any):
        self.class_order = class_order
        super().__init__(**stream)

    def set_up(self) -> None:
        classes = self.inner.num_classes
        if classes % self.tasks:
            raise ConfigError(f"stream.tasks must divide the {classes} classes of {self.name}, got {self.tasks}")
        order = list(range(classes))
        if self.class_order == "shuffled":
            order = generator(self.seed, "stream", "classes").permutation(classes).tolist()
        elif not isinstance(self.class_order, str):
            if sorted(self.class_order) != order:
                raise ConfigError(f"stream.class_order must hold each of 0..{classes - 1} once, got {self.class_order}")
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
    """Each task orders the numbers of every example in another fixed way; the first task is as it was."""

    def set_up(self) -> None:
        size = int(torch.tensor(self.input_shape).prod())
        orders = [generator(self.seed, "stream", "pixels", task).permutation(size) for task in range(1, self.tasks)]
        self.places = torch.stack([torch.arange(size), *map(torch.from_numpy, orders)])  # [tasks, size]

    def change(self, batch: Tensors) -> Tensors:
        if not batch["x"].is_floating_point():
            raise ConfigError(f"stream=permuted mixes numbers, and {self.name} feeds tokens")
        flat = batch["x"].flatten(1)
        return {**batch, "x": flat.gather(1, self.places[batch[TASK]]).view_as(batch["x"])}


class Domains(Stream):
    """Each task is a data set of its own, with its own classes: bundles of images, brought to one size.

    The first task is the workload; the others are dealt to clients evenly, at random, and of each a client holds out
    the share that it holds out of the workload. Task-incremental, every task is judged among its own classes;
    domain-incremental, classes are numbered from 0 in every task.

    Args:
        bundles: folders, or names of bundles, of the tasks after the first.
        stream: arguments of Stream; `tasks` must count the workload and the bundles.
    """

    def __init__(self, bundles: Sequence[str], **stream: Any):
        self.bundles = list(bundles)
        super().__init__(**{**stream, "workload": _Union(stream["workload"], self.bundles, stream["seed"])})

    def set_up(self) -> None:
        if self.tasks != len(self.inner.starts):  # type: ignore[attr-defined]
            own = len(self.bundles) + 1
            raise ConfigError(f"stream.tasks must be {own}, the workload and {own - 1} bundles, got {self.tasks}")
        self.starts: Tensor = self.inner.starts  # type: ignore[attr-defined]
        if self.incremental == "domain":
            ends = [*self.starts.tolist()[1:], self.inner.num_classes]
            self.num_classes = max(end - start for start, end in zip(self.starts.tolist(), ends, strict=True))

    def belongs(self, task: int, labels: Tensor) -> Tensor:
        return self._task_of(labels) == task

    def _task_of(self, labels: Tensor) -> Tensor:
        return torch.bucketize(labels, self.starts, right=True) - 1

    def change(self, batch: Tensors) -> Tensors:
        return {**batch, "y": self.relabel(batch["y"])}

    def relabel(self, labels: Tensor) -> Tensor:
        return labels - self.starts[self._task_of(labels)] if self.incremental == "domain" else labels

    def classes_of(self, task: int) -> list[int]:
        if self.incremental == "domain":
            return list(range(self.num_classes))
        ends = [*self.starts.tolist()[1:], self.num_classes]
        return list(range(int(self.starts[task]), ends[task]))


class _Union(ClassificationWorkload):
    """Several image data sets as one: classes behind each other, inputs of the size and channels of the first.

    Attributes:
        starts: the first class of each, [data sets] int64.
    """

    def __init__(self, first: Workload, bundles: Sequence[str], seed: int):
        super().__init__(first.model_factory, seed)
        first = classification(first)
        if len(first.input_shape) != 3:
            raise ConfigError(f"stream=domains joins images, and {first.name} has none")
        self.first, self.name, self.num_clients = first, first.name, first.num_clients
        self.input_shape = first.input_shape
        tests, counts, self.others = [first.test], [first.num_classes], []
        for path in bundles:
            other = Bundle(
                path,
                model=first.model_factory,
                partition=Iid(),
                num_clients=first.num_clients,
                seed=seed,
                client_test_fraction=first.client_test_fraction,
            )
            if len(other.input_shape) != 3:
                raise ConfigError(f"stream.bundles must hold images, and {path} has none")
            self.others.append(other)
            tests.append(other.test)
            counts.append(other.num_classes)
        self.starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
        self.num_classes = sum(counts)
        self.test = Joined(tests, self.starts, self.input_shape)

    def fingerprint(self) -> Fingerprint:
        """Returns those of all data sets, numbered behind the first."""
        found = dict(self.first.fingerprint())
        for number, other in enumerate(self.others, start=1):
            found |= {f"bundle {number} {key}": value for key, value in other.fingerprint().items()}
        return found

    def client_data(self, client_id: int) -> ClientData:
        own = [data_set.client_data(client_id) for data_set in (self.first, *self.others)]
        train, test = ([getattr(data, part) for data in own] for part in ("train", "test"))
        return ClientData(Joined(train, self.starts, self.input_shape), Joined(test, self.starts, self.input_shape))


class Joined(Examples):
    """Parts behind each other, as images of one shape with their labels moved.

    Args:
        parts: examples of each data set.
        starts: what is added to the labels of each, [parts].
        shape: channels, height, width: single channels are repeated, several are averaged, sizes interpolated.
    """

    def __init__(self, parts: Sequence[Examples], starts: Tensor, shape: tuple[int, ...]):
        super().__init__({})
        self.parts, self.starts, self.shape = list(parts), starts, shape
        self.edges = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)

    def __len__(self) -> int:
        return int(self.edges[-1])

    @property
    def labels(self) -> Tensor:
        return torch.cat([part.labels + start for part, start in zip(self.parts, self.starts, strict=True)])

    def gather(self, index: Tensor) -> Tensors:
        which = torch.bucketize(index, self.edges[1:], right=True)
        x = torch.empty(len(index), *self.shape)
        y = torch.empty(len(index), dtype=torch.int64)
        for number in which.unique().tolist():
            here = which == number
            batch = self.parts[number].gather(index[here] - self.edges[number])
            x[here], y[here] = self._in_shape(batch["x"]), batch["y"] + self.starts[number]
        return {"x": x, "y": y}

    def _in_shape(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.shape[0]:
            x = x.mean(1, keepdim=True).expand(-1, self.shape[0], -1, -1)
        same = tuple(x.shape[2:]) == self.shape[1:]
        return x if same else F.interpolate(x, self.shape[1:], mode="bilinear", antialias=True)
