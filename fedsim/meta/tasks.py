"""Small data sets to learn over: classes of a bundle of images, some of their examples, and a corruption.

A task here is a data set of its own, for what learns from many of them, and has nothing to do with the tasks of a
stream. Tasks follow from a seed and the bundles alone. Those held out have classes that no other task has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Interval, MinLen
from torch import Tensor
from torch.nn import functional as F

from devices.bounds import checked
from fedsim.errors import ConfigError, DataError
from fedsim.seeding import generator
from fedsim.workloads.bundle import find_bundle, read_bundle
from fedsim.workloads.fingerprint import content_of

Part = Literal["train", "valid", "held_out"]

SIDE = 16  # pixels
MOST_TASKS = 1000  # of a part
SEEN_SHARE = 0.6  # of a bundle's classes, those of the tasks that are learned from; the others are held out
FEWEST, MOST = 3, 8  # classes of a task
PER_CLASS = (40, 80, 240)  # images to train on; at most two thirds of what the bundle has
TEST_IMAGES = 1000  # of a task, where the bundle has so many
LEAST_IMAGES = 60  # of a class, in a bundle
PATCH = 4  # pixels a side, of what `shuffled` moves


@checked("tasks", ConfigError)
@dataclass(frozen=True)
class TaskSettings:
    """What tasks are made.

    Attributes:
        bundles: folders or names, as of `workload=bundle`; kind image.
        train: tasks to learn from.
        valid: tasks that choose the best weights, of the same classes.
        held_out: tasks to judge on, of other classes.
        seed: of classes, images and corruptions.
    """

    bundles: Annotated[Sequence[str], MinLen(1)] = ("cifar10", "cifar100", "mnist")
    train: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 12
    valid: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 2
    held_out: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 6
    seed: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True)
class Recipe:
    """How a task is made: classes of a bundle, images of each to train on, and a corruption (`CORRUPTIONS`)."""

    name: str
    part: Part
    bundle: str
    classes: tuple[int, ...]
    corruption: str
    per_class: int


@dataclass(frozen=True)
class Task:
    """A data set.

    Attributes:
        name: of its recipe.
        part: what it is for.
        num_classes: labels are below it.
        train_x, test_x: images, [n, 3, 16, 16] float32, in [0, 1] but for noise.
        train_y, test_y: labels, [n] int64.
    """

    name: str
    part: Part
    num_classes: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @cached_property
    def fingerprint(self) -> str:
        """Returns a text that changes with any image or label."""
        tensors = (self.train_x, self.train_y, self.test_x, self.test_y)
        return ", ".join(content_of(tensor.numpy()) for tensor in tensors)


class Images:
    """All images of a bundle, train and test part together, by class.

    Raises:
        DataError: if there is no such bundle, or it holds no images.
    """

    def __init__(self, name: str):
        self.folder = find_bundle(name)
        data = read_bundle(self.folder)
        if data.kind != "image":
            raise DataError(
                f"tasks are made of images, and bundle {self.folder} is of kind {data.kind}; name another one"
            )
        self.x = [data.train.x, data.test.x]
        self.y = np.concatenate([data.train.y, data.test.y]).astype(np.int64)
        self.num_classes = len(data.classes)
        self.rows = [np.flatnonzero(self.y == label) for label in range(self.num_classes)]

    def take(self, rows: np.ndarray) -> Tensor:
        """Returns images, [n, 3, 16, 16] float32 in [0, 1]; grey ones have three equal colours."""
        border = len(self.x[0])
        return torch.stack([prepared(self.x[0][r] if r < border else self.x[1][r - border]) for r in rows])

    def some(self, per_class: int, draw: np.random.Generator) -> Tensor:
        """Draws so many images of each class, or as many as the smallest has, [classes, images, 3, 16, 16].

        Raises:
            DataError: if a class has none.
        """
        if empty := [label for label, rows in enumerate(self.rows) if not len(rows)]:
            raise DataError(
                f"bundle {self.folder} has no image of class {empty[0]}; remove the class from its meta.json"
            )
        count = min(per_class, *(len(rows) for rows in self.rows))
        chosen = np.concatenate([draw.permutation(rows)[:count] for rows in self.rows])
        return self.take(chosen).reshape(self.num_classes, count, 3, SIDE, SIDE)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns colours, height and width of an image as runs are fed it."""
        height, width, *colours = self.x[0].shape[1:]
        return (colours[0] if colours else 1), height, width


def prepared(image: np.ndarray) -> Tensor:
    """Returns an image [height, width] or [height, width, colours] as [3, 16, 16] float32; uint8 is divided by 255."""
    x = torch.from_numpy(np.ascontiguousarray(image))
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    x = x.unsqueeze(2) if x.ndim == 2 else x
    return F.interpolate(x.permute(2, 0, 1)[None], size=SIDE, mode="area")[0][:3].expand(3, -1, -1)


def recipes(settings: TaskSettings, bundles: Mapping[str, Images]) -> list[Recipe]:
    """Returns how the tasks are made; bundles take turns, corruptions come in an order that is drawn.

    Raises:
        DataError: for a bundle with too few classes, or too few images of one.
    """
    for images in bundles.values():
        fewest = min(len(rows) for rows in images.rows)
        if images.num_classes < 2 * FEWEST or fewest < LEAST_IMAGES:
            raise DataError(
                f"tasks need a bundle of {2 * FEWEST} classes or more with {LEAST_IMAGES} images each, and "
                f"{images.folder} has {images.num_classes}, one with {fewest}; name another one"
            )
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in settings.bundles:
        order = generator(settings.seed, "task classes", name).permutation(bundles[name].num_classes)
        border = round(SEEN_SHARE * len(order))
        seen[name] = (order[:border], order[border:])
    made: list[Recipe] = []
    counts: list[tuple[Part, int]] = [("train", settings.train), ("valid", settings.valid)]
    for part, count in [*counts, ("held_out", settings.held_out)]:
        draw = generator(settings.seed, "task recipes", part)
        corruptions: list[str] = []
        for number in range(count):
            bundle = settings.bundles[number % len(settings.bundles)]
            corruptions = corruptions or draw.permutation(list(CORRUPTIONS)).tolist()
            pool = seen[bundle][part == "held_out"]
            size = int(draw.integers(min(FEWEST, len(pool)), min(MOST, len(pool)) + 1))
            classes = tuple(sorted(draw.choice(pool, size, replace=False).tolist()))
            most = 2 * min(len(bundles[bundle].rows[label]) for label in classes) // 3
            corruption, per_class = corruptions.pop(), min(int(draw.choice(PER_CLASS)), most)
            name = f"{part}-{number:02}-{bundle.rpartition('/')[2]}-{corruption}"
            made.append(Recipe(name, part, bundle, classes, corruption, per_class))
    return made


def make_task(recipe: Recipe, images: Images, seed: int) -> Task:
    """Makes a task: draws images of its classes, some to train on and others to judge by, and corrupts them."""
    draw = generator(seed, "task images", recipe.name)
    test_size = TEST_IMAGES // len(recipe.classes)
    rows = [draw.permutation(images.rows[label])[: recipe.per_class + test_size] for label in recipe.classes]
    labels = [np.full(len(own), place) for place, own in enumerate(rows)]
    parts: list[Tensor] = []
    for cut in (slice(None, recipe.per_class), slice(recipe.per_class, None)):
        x = images.take(np.concatenate([own[cut] for own in rows]))
        parts.append(CORRUPTIONS[recipe.corruption](x, draw))
        parts.append(torch.from_numpy(np.concatenate([own[cut] for own in labels])))
    return Task(recipe.name, recipe.part, len(recipe.classes), *parts)


# --- corruptions -----------------------------------------------------------------------------------------------------


def _with_noise(x: Tensor, draw: np.random.Generator) -> Tensor:
    return x + 0.2 * torch.from_numpy(draw.standard_normal(x.shape)).float()


def _blurred(x: Tensor, draw: np.random.Generator) -> Tensor:
    for _ in range(2):
        x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return x


def _occluded(x: Tensor, draw: np.random.Generator) -> Tensor:
    """Covers a square of half the side, anywhere in each image."""
    corner = torch.from_numpy(draw.integers(0, SIDE // 2 + 1, (len(x), 2)))
    place = torch.arange(SIDE) - corner.unsqueeze(2)  # [n, 2, side]
    inside = (place >= 0) & (place < SIDE // 2)
    return x.masked_fill((inside[:, 0, :, None] & inside[:, 1, None, :]).unsqueeze(1), 0.5)


def _turned(x: Tensor, draw: np.random.Generator) -> Tensor:
    """Turns each image by 0, 90, 180 or 270 degrees."""
    quarters = draw.integers(0, 4, len(x))
    return torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(x, quarters, strict=True)])


def _shuffled(x: Tensor, draw: np.random.Generator) -> Tensor:
    """Moves squares of 4 pixels, in all images alike: by one order, which train and test images share."""
    order = torch.from_numpy(generator(0, "task patches").permutation((SIDE // PATCH) ** 2))
    pieces = F.unfold(x, PATCH, stride=PATCH)
    return F.fold(pieces[:, :, order], SIDE, PATCH, stride=PATCH)


CORRUPTIONS: Mapping[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "clean": lambda x, _: x,
    "noise": _with_noise,
    "blurred": _blurred,
    "grey": lambda x, _: x.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous(),
    "faint": lambda x, _: 0.5 + 0.2 * (x - 0.5),
    "inverted": lambda x, _: 1 - x,
    "occluded": _occluded,
    "turned": _turned,
    "shuffled": _shuffled,
}
