"""A zoo of networks that were trained on small tasks: what TANS retrieves from.

A folder holds it: `zoo.json` says what the tasks are and how nets are trained, `nets/NAME.safetensors` the weights of a
net, `nets/NAME.json` what is known of it, written last. A net's training depends on its task, its number and the seed
alone, so that the files are the same in whatever order, and by however many calls, they came to be.

A task's held-out images are in two parts: queries are drawn from the first quarter of each class, and nets are judged
by the others, so that no query holds an image that a net was trained on or is judged by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from devices.bounds import checked
from devices.enrol.picture import traced_cost
from devices.errors import UserError, one_line
from devices.nas.tans.probe import PROBES, probe_answers
from devices.reading import read_bytes, read_json
from devices.tensor_files import read_tensors, write_tensors
from devices.writing import write_atomic
from fedsim.errors import ConfigError, DataError
from fedsim.meta.architectures import FAMILIES, Architecture, draw_architecture
from fedsim.meta.short_training import LAYOUT, accuracy, batches, normalised, train_steps
from fedsim.meta.tasks import CORRUPTIONS, SIDE, Images, Part, Recipe, Task, TaskSettings, make_task, recipes
from fedsim.seeding import derive, generator

FACTS, NETS = "zoo.json", "nets"
HEADER, KIND = "zoo", "weights of a zoo"
MADE_BY = "fedsim devices make-zoo --out"
SHAPE = (3, SIDE, SIDE)
QUERY_PART = 4  # one in so many held-out images of a class is for queries
DECIMALS = 5  # of answers to the probe
LARGEST_FILE = 2**28  # bytes


@checked("zoo", ConfigError)
@dataclass(frozen=True)
class ZooTraining:
    """How many nets each task has, and how these are trained: Adam, one cycle, group norm.

    Attributes:
        nets: for each task; families take turns.
        steps: of training.
        batch: examples of a step.
        learning_rate: at the top of the cycle.
    """

    nets: Annotated[int, Interval(ge=3, le=100)] = 4
    steps: Annotated[int, Ge(1)] = 100
    batch: Annotated[int, Ge(2)] = 32
    learning_rate: Annotated[float, Gt(0)] = 0.01


@dataclass(frozen=True)
class Net:
    """A trained network.

    Attributes:
        name: of its files.
        task: that it was trained on.
        architecture: family and settings.
        num_classes: of the task.
        parameters, macs: numbers to train, and multiply-adds for an image of 16x16.
        accuracy: on held-out images of the task, in percent.
        answers: outputs for the probe, [128, classes].
    """

    name: str
    task: str
    architecture: Architecture
    num_classes: int
    parameters: int
    macs: int
    accuracy: float
    answers: Tensor


@dataclass(frozen=True)
class HeldOut:
    """Places of a task's held-out images: for queries [classes, images], and for judging [n]."""

    query: Tensor
    judged: Tensor

    @classmethod
    def of(cls, task: Task) -> HeldOut:
        """Splits them: of each class the first quarter is for queries, one image at least."""
        rows = [torch.nonzero(task.test_y == label).squeeze(1) for label in range(task.num_classes)]
        count = max(1, min(len(own) for own in rows) // QUERY_PART)
        return cls(torch.stack([own[:count] for own in rows]), torch.cat([own[count:] for own in rows]))


class Zoo:
    """Tasks and the nets that were trained on them, in a folder."""

    def __init__(self, folder: Path, tasks: TaskSettings, training: ZooTraining, own: Sequence[Recipe]):
        self.folder, self.tasks, self.training = folder, tasks, training
        self.recipes = {recipe.name: recipe for recipe in own}
        self._images: dict[str, Images] = {}

    @classmethod
    def begin(cls, folder: Path, tasks: TaskSettings, training: ZooTraining) -> Zoo:
        """Begins the folder, or goes on with it.

        Raises:
            DataError: for a bundle that tasks cannot be made of, or a folder that holds another zoo.
        """
        images = {name: Images(name) for name in tasks.bundles}
        zoo = cls(folder, tasks, training, recipes(tasks, images))
        zoo._images = images
        own = [asdict(recipe) for recipe in zoo.recipes.values()]
        facts = {"tasks": asdict(tasks), "training": asdict(training), "recipes": own}
        text = json.dumps(facts, indent=1, allow_nan=False)
        if not (folder / FACTS).exists():
            (folder / NETS).mkdir(parents=True, exist_ok=True)
            write_atomic(folder / FACTS, text)
        elif read_json(folder / FACTS) != json.loads(text):
            raise DataError(
                f"{folder} holds another zoo, of other tasks or nets trained otherwise; name another folder"
            )
        return zoo

    @classmethod
    def open(cls, folder: Path) -> Zoo:
        """Opens a folder that is there; its bundles need not be.

        Raises:
            DataError: if it is none.
        """
        if not (folder / FACTS).is_file():
            raise DataError(f"{folder} holds no {FACTS}; make it with: {MADE_BY} {folder}")
        facts = read_json(folder / FACTS)
        try:
            own = [_recipe_of(recipe) for recipe in facts["recipes"]]
            return cls(folder, TaskSettings(**facts["tasks"]), ZooTraining(**facts["training"]), own)
        except (KeyError, TypeError, ValueError) as error:
            why = one_line(error)[:200]
            raise DataError(f"{folder / FACTS} cannot be read as a zoo of this version: {why}") from None

    @property
    def total(self) -> int:
        """Returns how many nets there are, trained or not."""
        return self.training.nets * len(self.recipes)

    def names(self, part: Part) -> list[str]:
        """Returns the names of the tasks of a part."""
        return [name for name, recipe in self.recipes.items() if recipe.part == part]

    def task(self, name: str) -> Task:
        """Makes a task."""
        recipe = self.recipes[name]
        if recipe.bundle not in self._images:
            self._images[recipe.bundle] = Images(recipe.bundle)
        return make_task(recipe, self._images[recipe.bundle], self.tasks.seed)

    def make(self, progress: Callable[[str], None]) -> None:
        """Trains the nets that were not trained yet; `progress` is called after each net, also a known one."""
        for place, name in enumerate(self.recipes):
            task: Task | None = None
            for number in range(self.training.nets):
                family = list(FAMILIES)[(place + number) % len(FAMILIES)]
                if not self._path(f"{name}.{number}", "json").exists():
                    task = task or self.task(name)
                    self._train(task, number, family)
                progress(name)

    @cached_property
    def nets(self) -> list[Net]:
        """Returns all nets.

        Raises:
            DataError: if one is not trained yet, or its facts cannot be read.
        """
        return [self._net(f"{name}.{number}", name) for name in self.recipes for number in range(self.training.nets)]

    def weights(self, net: Net) -> dict[str, Tensor]:
        """Returns the weights of a net.

        Raises:
            DataError: if the file is not the one that was written with the net's facts, or is of another network.
        """
        path, facts = self._path(net.name, "safetensors"), read_json(self._path(net.name, "json"))
        if not path.is_file() or sha256(read_bytes(path, LARGEST_FILE)).hexdigest() != facts.get("sha256"):
            raise DataError(f"{path} is damaged or missing; remove {net.name}.json beside it, and run: {self._again()}")
        weights = read_tensors(path, HEADER, KIND)[0]
        own = net.architecture.build(SHAPE, net.num_classes).state_dict()
        if {name: t.shape for name, t in weights.items()} != {name: t.shape for name, t in own.items()}:
            raise DataError(f"{path} does not hold the weights of {net.architecture} with {net.num_classes} classes")
        return weights

    def check(self, task: Task) -> None:
        """Refuses a task whose images are not those that its nets were trained on.

        Raises:
            DataError: if its bundle has changed.
        """
        path = self._path(f"{task.name}.0", "json")
        if read_json(path).get("images") != task.fingerprint:
            raise DataError(f"{path}: this net was trained on other images than its bundle has now")

    def _train(self, task: Task, number: int, family: str) -> None:
        seed, training = self.tasks.seed, self.training
        architecture = draw_architecture(family, generator(seed, "zoo architectures", task.name, number))
        model = architecture.build(SHAPE, task.num_classes, derive(seed, "zoo weights", task.name, number))
        cost = traced_cost(family, model, torch.zeros(1, *SHAPE))
        model.to(memory_format=LAYOUT)  # type: ignore[call-overload]  # torch's stubs leave it out
        x, held_out = (part.contiguous(memory_format=LAYOUT) for part in normalised(task))
        rows = batches(len(x), training.batch, generator(seed, "zoo batches", task.name, number))
        for _ in train_steps(model.train(), x, task.train_y, rows, training.steps, training.learning_rate):
            pass
        judged = HeldOut.of(task).judged
        found = accuracy(model.eval(), held_out[judged], task.test_y[judged])
        name = f"{task.name}.{number}"
        path = self._path(name, "safetensors")
        write_tensors(path, model.state_dict(), {}, HEADER)
        facts = {
            "family": family,
            "settings": architecture.settings,
            "num_classes": task.num_classes,
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": round(cost.forward_flops / 2),
            "accuracy": found,
            "answers": [[round(v, DECIMALS) for v in row] for row in probe_answers(model, SHAPE).tolist()],
            "images": task.fingerprint,
            "sha256": sha256(path.read_bytes()).hexdigest(),
        }
        write_atomic(self._path(name, "json"), json.dumps(facts, allow_nan=False))

    def _net(self, name: str, task: str) -> Net:
        path = self._path(name, "json")
        if not path.exists():
            raise DataError(f"{self.folder} lacks net {name}; go on with: {self._again()}")
        facts = read_json(path)
        try:
            return _net_of(name, task, facts)
        except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
            raise DataError(f"{path} cannot be read as facts of a net: {one_line(error)}") from None

    def _again(self) -> str:
        return f"{MADE_BY} {self.folder}"

    def _path(self, name: str, ending: str) -> Path:
        return self.folder / NETS / f"{name}.{ending}"


def _recipe_of(facts: Mapping[str, Any]) -> Recipe:
    made = Recipe(**{**facts, "classes": tuple(int(label) for label in facts["classes"])})
    if made.part not in get_args(Part) or made.corruption not in CORRUPTIONS or Path(made.name).name != made.name:
        raise ValueError(f"there is no task {made.name!r} of part {made.part!r}, {made.corruption!r}")
    return made


def _net_of(name: str, task: str, facts: Mapping[str, Any]) -> Net:
    answers = torch.tensor(facts["answers"], dtype=torch.float32).reshape(PROBES, int(facts["num_classes"]))
    made = Net(
        name,
        task,
        Architecture(facts["family"], facts["settings"]),
        num_classes=int(facts["num_classes"]),
        parameters=int(facts["parameters"]),
        macs=int(facts["macs"]),
        accuracy=float(facts["accuracy"]),
        answers=answers,
    )
    if min(made.parameters, made.macs) < 1 or not 0 <= made.accuracy <= 100 or not answers.isfinite().all():
        raise DataError("a number in it is out of its bounds")
    return made
