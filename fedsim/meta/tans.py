"""TANS, learned from a zoo: which trained network suits a data set, and how accurate it will be.

Each step takes one net of each task to learn from, and as its query held-out examples of that task, drawn anew. The
head learns what some nets of the zoo, most of them of other tasks, reach there after a short fine-tuning, by MetaD2A's
loss of a predictor: errors, and those that change the order.

Source: Jeong et al., "Task-Adaptive Neural Network Search with Meta-Contrastive Learning" (TANS), NeurIPS 2021.
Differs: tens of small tasks with a few nets each (140 data sets of 100 nets there), features of random filters and the
number of classes (of a ResNet-18 trained on ImageNet), how strongly a net answers 16 kinds of noise (its features of
one batch), topology of three families (of Once-for-All networks), all inputs scaled; the authors' head learns the
accuracy of a net on its own data set, by squared errors, and chooses among ten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor

from devices.bounds import checked
from devices.errors import one_line
from devices.nas.metad2a.predictor import predictor_loss
from devices.nas.tans.encoders import WIDTH, Retriever
from devices.nas.tans.losses import MARGIN, contrastive_loss
from devices.nas.tans.probe import FUNCTIONAL, functional_embedding
from devices.tensor_files import read_tensors, write_tensors
from fedsim.errors import ConfigError, DataError
from fedsim.meta.architectures import TOPOLOGY
from fedsim.meta.features import FEATURES, PER_CLASS, scaled_features
from fedsim.meta.fitting import Fitting, Look, fit
from fedsim.meta.tasks import Images, Part
from fedsim.meta.tuning import Tuned
from fedsim.meta.zoo import HeldOut, Net, Zoo
from fedsim.seeding import derive, generator

METHOD = "TANS"
HEADER, WEIGHTS = METHOD.lower(), "a file of TANS's weights"  # of a file's metadata, and what it is
QUERY = FEATURES + 1  # numbers of an example: of the image, and of how many classes there are
LOOKED_AT = 8  # queries of each validation task at a look
OWN, OTHERS = 2, 8  # nets that are fine-tuned on a task to learn from


@checked("tans", ConfigError)
@dataclass(frozen=True)
class TansSettings:
    """Settings of meta-training.

    Attributes:
        steps: each on one net of every task to learn from.
        width: of the points.
        margin: of the contrastive loss.
        learning_rate: of Adam.
        look_every: steps between two looks at the validation tasks.
        seed: of weights and draws.
    """

    steps: Annotated[int, Ge(1)] = 200
    width: Annotated[int, Ge(1)] = WIDTH
    margin: Annotated[float, Gt(0)] = MARGIN
    learning_rate: Annotated[float, Gt(0)] = 1e-2
    look_every: Annotated[int, Ge(1)] = 20
    seed: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True)
class Lesson:
    """A task as it is learned from.

    Attributes:
        task: its name.
        features: of examples for queries, [classes, images, 129].
        nets: places of its own nets in the zoo.
        reached: accuracies in percent of some nets after fine-tuning on it, by their places.
    """

    task: str
    features: Tensor
    nets: Sequence[int]
    reached: Mapping[int, float] = field(default_factory=dict)

    def query(self, draw: np.random.Generator) -> Tensor:
        """Returns the features of 20 images of each class, or as many as there are, drawn anew: [examples, 129]."""
        classes, count, width = self.features.shape
        rows = torch.from_numpy(np.argsort(draw.random((classes, count)), axis=1)[:, :PER_CLASS])
        return self.features[torch.arange(classes)[:, None], rows].reshape(-1, width)


@dataclass(frozen=True)
class Catalogue:
    """Nets as the encoder takes them: topologies [n, 38] and answers [n, 32]."""

    topology: Tensor
    functional: Tensor

    @classmethod
    def of(cls, nets: Sequence[Net]) -> Catalogue:
        """Returns what is known of nets."""
        topology = torch.stack([net.architecture.topology(net.num_classes, net.parameters, net.macs) for net in nets])
        functional = torch.stack([functional_embedding(net.answers) for net in nets])
        return cls(topology, functional)

    def of_places(self, places: Sequence[int]) -> Catalogue:
        """Returns some of the nets."""
        return Catalogue(self.topology[places], self.functional[places])


@dataclass(frozen=True)
class Tans:
    """The encoders, with the scales that they were learned in.

    Attributes:
        network: encoders and head.
        scales: mean and deviation of the numbers of an example, a topology and answers.
    """

    network: Retriever
    scales: Mapping[str, Tensor]

    def _scaled(self, what: str, x: Tensor) -> Tensor:
        return (x - self.scales[f"{what}_mean"]) / self.scales[f"{what}_std"]

    def query(self, examples: Tensor) -> Tensor:
        """Returns the point of a data set, [width], from its examples [examples, 129]."""
        point: Tensor = self.network.queries(self._scaled("query", examples))
        return point

    def points(self, nets: Catalogue) -> Tensor:
        """Returns the points of nets, [n, width]."""
        topology, functional = self._scaled("topology", nets.topology), self._scaled("functional", nets.functional)
        points: Tensor = self.network.nets(topology, functional)
        return points

    @torch.no_grad()
    def judge(self, examples: Tensor, nets: Catalogue) -> tuple[np.ndarray, np.ndarray]:
        """Returns how near each net is to a data set, the cosine, and its predicted accuracy in percent, [n] each."""
        query, points = self.query(examples), self.points(nets)
        predicted = self.network.head(query.expand(len(points), -1), points)
        return (points @ query).double().numpy(), 100 * predicted.double().numpy()

    def save(self, path: Path, settings: TansSettings) -> None:
        """Writes encoders and scales."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        write_tensors(path, tensors | dict(self.scales), {"settings": asdict(settings)}, HEADER)

    @classmethod
    def load(cls, path: Path) -> Tans:
        """Reads what `save` wrote.

        Raises:
            DeviceError: for a file that is no such thing.
            DataError: for one that lacks a tensor, or has one of another shape.
        """
        tensors, facts = read_tensors(path, HEADER, WEIGHTS)
        try:
            network = Retriever(QUERY, TOPOLOGY, FUNCTIONAL, TansSettings(**facts["settings"]).width)
            own = {key.removeprefix("network."): t for key, t in tensors.items() if key.startswith("network.")}
            network.load_state_dict(own)
            sizes = {"query": QUERY, "topology": TOPOLOGY, "functional": FUNCTIONAL}
            keys = [(f"{what}_{kind}", size) for what, size in sizes.items() for kind in ("mean", "std")]
            scales = {key: tensors[key].reshape(size) for key, size in keys}
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise ValueError("a number in it is NaN or infinite")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{path} cannot be read as {WEIGHTS}: {one_line(error)}") from None
        return cls(network, scales)


def example_features(x: Tensor, num_classes: int) -> Tensor:
    """Returns the numbers of examples, [n, 129], from images [n, 3, 16, 16], each colour of which is scaled first."""
    return with_classes(scaled_features(x), num_classes)


def with_classes(features: Tensor, num_classes: int) -> Tensor:
    """Returns the numbers of examples, [n, 129], from their features [n, 128]."""
    return torch.cat([features, torch.full((len(features), 1), float(np.log2(num_classes)))], dim=1)


def bundle_query(images: Images, seed: int) -> Tensor:
    """Returns the examples of a query for a bundle, [examples, 129]: 20 images of each class, drawn.

    Raises:
        DataError: if a class has no images.
    """
    x = images.some(PER_CLASS, generator(seed, "tans images", images.folder.name))
    return example_features(x.flatten(0, 1), images.num_classes)


def lessons(zoo: Zoo, part: Part) -> list[Lesson]:
    """Returns the tasks of a part with the examples that queries are drawn from.

    Raises:
        DataError: if its bundles are not here, or have changed.
    """
    places: dict[str, list[int]] = {}
    for place, net in enumerate(zoo.nets):
        places.setdefault(net.task, []).append(place)
    made = []
    for name in zoo.names(part):
        task = zoo.task(name)
        zoo.check(task)
        rows = HeldOut.of(task).query
        features = example_features(task.test_x[rows.flatten()], task.num_classes)
        made.append(Lesson(name, features.reshape(*rows.shape, QUERY), places[name]))
    return made


def with_transfers(
    learned: Sequence[Lesson], nets: Sequence[Net], tuned: Tuned, progress: Callable[[], None] | None = None
) -> list[Lesson]:
    """Fine-tunes some nets of these tasks on each: two of its own and eight of others, drawn; `progress` follows each.

    Raises:
        DataError: as `Tuned.curve`.
    """
    pool, found = [place for lesson in learned for place in lesson.nets], []
    for lesson in learned:
        draw, reached = generator(tuned.zoo.tasks.seed, "tans transfers", lesson.task), dict[int, float]()
        others = [place for place in pool if place not in lesson.nets]
        for places, count in ((lesson.nets, OWN), (others, OTHERS)):
            for place in draw.choice(places, min(count, len(places)), replace=False).tolist() if places else ():
                reached[place] = tuned.curve(lesson.task, nets[place], [tuned.tuning.steps])[0]
                if progress is not None:
                    progress()
        found.append(replace(lesson, reached=reached))
    return found


def meta_train(
    nets: Catalogue,
    learned: Sequence[Lesson],
    valid: Sequence[Lesson],
    settings: TansSettings,
    checkpoint: Path | None = None,
    progress: Callable[[Look], None] | None = None,
) -> Tans:
    """Trains encoders and head on the tasks to learn from; recall on those for validation chooses the weights.

    Args:
        nets: of the whole zoo; those of other tasks are not looked at.
        learned: tasks to learn from, with what nets reach there.
        valid: tasks for validation.
        settings: see `TansSettings`; equal settings give equal weights on equal machines with one thread.
        checkpoint: file that is written at every look and gone on from.
        progress: called at every look.

    Raises:
        DataError: for a checkpoint of another training.
    """
    places = [place for lesson in learned for place in lesson.nets]
    scales: dict[str, Tensor] = {}
    examples = torch.cat([lesson.features.flatten(0, 1) for lesson in learned])
    rows = {"query": examples, "topology": nets.topology[places], "functional": nets.functional[places]}
    for what, x in rows.items():
        scales |= {f"{what}_mean": x.double().mean(0).float(), f"{what}_std": x.double().std(0).float() + 1e-2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(settings.seed, "tans weights"))
        made = Tans(Retriever(QUERY, TOPOLOGY, FUNCTIONAL, settings.width), scales)
    facts = {"settings": asdict(settings), "tasks": _digest(nets, [*learned, *valid])}
    draw = generator(settings.seed, "tans")
    fitting = Fitting(made.network, settings.learning_rate, draw, facts, METHOD)
    known = [place for lesson in (*learned, *valid) for place in lesson.nets]
    queries = [(own, own.query(generator(settings.seed, "tans looks", n))) for own in valid for n in range(LOOKED_AT)]

    reached = [torch.tensor(list(own.reached.values())) / 100 for own in learned]

    def loss(draw: np.random.Generator) -> Tensor:
        points, asked = made.points(nets), torch.stack([made.query(lesson.query(draw)) for lesson in learned])
        matches = points[[int(draw.choice(lesson.nets)) for lesson in learned]]
        errors = []
        for lesson, query, wanted in zip(learned, asked, reached, strict=True):
            tuned = points[list(lesson.reached)]
            errors.append(predictor_loss(made.network.head(query.expand_as(tuned), tuned), wanted))
        return contrastive_loss(asked, matches, settings.margin) + torch.stack(errors).mean()

    def score() -> float:
        there = nets.of_places(known)
        found = [recall(made.judge(query, there)[0], known, own.nets, 1) for own, query in queries]
        return float(np.mean(found))

    fit(fitting, loss, score, settings.steps, settings.look_every, checkpoint, progress)
    return made


def recall(similarity: np.ndarray, places: Sequence[int], wanted: Sequence[int], count: int) -> float:
    """Returns 1 if one of the nearest nets is a wanted one, else 0.

    Args:
        similarity: of some nets, [n].
        places: of those in the zoo, [n].
        wanted: places of the task's own nets.
        count: nets that are looked at.
    """
    nearest = np.argsort(-similarity, kind="stable")[:count]
    return float(any(places[i] in wanted for i in nearest))


def _digest(nets: Catalogue, all_lessons: Sequence[Lesson]) -> str:
    reached = [value for lesson in all_lessons for pair in sorted(lesson.reached.items()) for value in pair]
    parts = [nets.topology, nets.functional, *(own.features for own in all_lessons), torch.tensor(reached)]
    return blake2b(b"".join(part.numpy().tobytes() for part in parts), digest_size=8).hexdigest()
