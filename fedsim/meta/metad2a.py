"""MetaD2A, learned from small data sets: what cells a data set needs, and how accurate they will be.

A generator learns, from each task, the cells that did best there; a predictor learns the accuracies of all. Both are
judged on tasks of classes that neither saw (`fedsim.meta.judged`).

Source: Lee et al., "Rapid Neural Architecture Search by Learning to Generate Graphs from Datasets" (MetaD2A), ICLR
2021. Differs: twelve small tasks and short trainings of small networks (1,310 subsets of ImageNet and networks trained
in full there, which cannot be had without ImageNet), features of random filters (of a ResNet-18 trained on ImageNet),
a constant learning rate, hundreds of steps (400 epochs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from devices.bounds import checked
from devices.errors import one_line
from devices.nas.metad2a.cell_graph import cell_arrows, cell_types
from devices.nas.metad2a.generator import CellGenerator, Generated, generate, generator_loss
from devices.nas.metad2a.predictor import AccuracyPredictor, predictor_loss
from devices.tensor_files import read_tensors, write_tensors
from fedsim.errors import ConfigError, DataError
from fedsim.meta.features import FEATURES, PER_CLASS, task_features
from fedsim.meta.fitting import Fitting, Look, fit
from fedsim.meta.tasks import Part
from fedsim.meta.trained_cells import TrainedCells
from fedsim.seeding import derive, generator

DRAWN = 500  # graphs for a new data set
HEADER = "metad2a"  # of the files' metadata
WEIGHTS = "a file of MetaD2A's weights"


@checked("metad2a", ConfigError)
@dataclass(frozen=True)
class MetaSettings:
    """Settings of meta-training.

    Attributes:
        predictor_steps: each on `tasks` tasks and all of their cells.
        generator_steps: each on `tasks` tasks and their best cells.
        tasks: of a step.
        good_share: of a task's cells, the best ones, which the generator learns.
        kl_weight: of the divergence of z from N(0, 1); beta of the paper.
        learning_rate: of Adam.
        look_every: steps between two looks at the validation tasks.
        seed: of weights and draws.
    """

    predictor_steps: Annotated[int, Ge(1)] = 400
    generator_steps: Annotated[int, Ge(1)] = 400
    tasks: Annotated[int, Ge(1)] = 4
    good_share: Annotated[float, Interval(gt=0, le=1)] = 0.2
    kl_weight: Annotated[float, Ge(0)] = 0.005
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    look_every: Annotated[int, Ge(1)] = 20
    seed: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True)
class Lesson:
    """A task as it is learned from: features [classes, images, 128], cells [n, 6], accuracies in percent [n]."""

    features: Tensor
    ops: Tensor
    accuracy: Tensor

    def images(self, draw: np.random.Generator) -> Tensor:
        """Returns the features of 20 images of each class, drawn anew: [classes, 20, 128]."""
        classes, count, _ = self.features.shape
        rows = np.argsort(draw.random((classes, count)), axis=1)[:, :PER_CLASS]
        return self.features[torch.arange(classes)[:, None], torch.from_numpy(rows)]

    def best(self, share: float) -> Tensor:
        """Returns the cells of the best accuracies, at least one, [n, 6]."""
        count = max(1, round(share * len(self.ops)))
        return self.ops[self.accuracy.argsort(descending=True, stable=True)[:count]]


@dataclass(frozen=True)
class MetaD2A:
    """Generator and predictor, with the scales that they were learned in.

    Attributes:
        generator, predictor: the networks.
        feature_mean, feature_std: of the images' features, [128].
        accuracy_mean, accuracy_std: of the trained cells, in percent.
    """

    generator: CellGenerator
    predictor: AccuracyPredictor
    feature_mean: Tensor
    feature_std: Tensor
    accuracy_mean: float
    accuracy_std: float

    def scaled(self, features: Tensor) -> Tensor:
        """Returns features as the networks take them."""
        return (features - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def predict(self, features: Tensor, ops: np.ndarray) -> np.ndarray:
        """Predicts accuracies in percent, [n], from features [classes, images, 128] and cells [n, 6]."""
        found = self.predictor(self.scaled(features), torch.from_numpy(ops))
        accuracies: np.ndarray = self.accuracy_mean + self.accuracy_std * found.double().numpy()
        return accuracies

    def propose(self, features: Tensor, draw: np.random.Generator, drawn: int = DRAWN) -> tuple[Generated, np.ndarray]:
        """Draws graphs for a data set; returns its distinct cells, as they came, and their predicted accuracies."""
        found = generate(self.generator, self.scaled(features), drawn, draw, drawn)
        return found, self.predict(features, found.cells) if len(found.cells) else np.zeros(0)

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Writes both networks and their scales."""
        tensors = {f"generator.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        tensors |= {f"predictor.{name}": tensor for name, tensor in self.predictor.state_dict().items()}
        scales = {"feature_mean": self.feature_mean, "feature_std": self.feature_std}
        accuracy = {"accuracy_mean": self.accuracy_mean, "accuracy_std": self.accuracy_std}
        write_tensors(path, tensors | scales, {**facts, **accuracy}, HEADER)

    @classmethod
    def load(cls, path: Path) -> MetaD2A:
        """Reads what `save` wrote.

        Raises:
            DeviceError: for a file that is no such thing.
            DataError: for one that lacks a tensor, or has one of another shape.
        """
        tensors, facts = read_tensors(path, HEADER, WEIGHTS)
        networks: list[nn.Module] = [CellGenerator(FEATURES), AccuracyPredictor(FEATURES)]
        try:
            for name, network in zip(("generator.", "predictor."), networks, strict=True):
                own = {key.removeprefix(name): t for key, t in tensors.items() if key.startswith(name)}
                network.load_state_dict(own)
            scales = [tensors[key].reshape(FEATURES) for key in ("feature_mean", "feature_std")]
            accuracy = [float(facts[key]) for key in ("accuracy_mean", "accuracy_std")]
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise ValueError("a number in it is NaN or infinite")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{path} cannot be read as {WEIGHTS}: {one_line(error)}") from None
        return cls(*networks, *scales, *accuracy)  # type: ignore[arg-type]


def lessons(trained: TrainedCells, part: Part) -> list[Lesson]:
    """Returns the tasks of a part with the cells that were trained for all; features are not scaled."""
    made = []
    for name in trained.names(part):
        cells = trained.cells(name)
        accuracies = torch.tensor(trained.accuracies(name, cells))
        made.append(Lesson(task_features(trained.task(name)), torch.tensor(cells), accuracies))
    return made


def meta_train(
    trained: TrainedCells,
    settings: MetaSettings,
    checkpoint: Path | None = None,
    progress: Callable[[str, Look], None] | None = None,
) -> MetaD2A:
    """Trains predictor and generator on the tasks to learn from; those for validation choose the weights.

    Args:
        trained: tasks and accuracies; cells that are missing are trained first.
        settings: see `MetaSettings`; equal settings give equal weights on equal machines with one thread.
        checkpoint: what its two files' names begin with; they are written at every look and gone on from.
        progress: called with "predictor" or "generator" at every look.

    Raises:
        DataError: for a checkpoint of another training.
    """
    learned, valid = lessons(trained, "train"), lessons(trained, "valid")
    rows = torch.cat([lesson.features.flatten(0, 1) for lesson in learned]).double()
    accuracies = torch.cat([lesson.accuracy for lesson in learned])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(settings.seed, "metad2a weights"))
        networks = CellGenerator(FEATURES), AccuracyPredictor(FEATURES)
    std = (rows.std(0) + 1e-6).float()
    made = MetaD2A(*networks, rows.mean(0).float(), std, float(accuracies.mean()), float(accuracies.std() + 1e-6))
    facts = {"settings": asdict(settings), "tasks": _digest([*learned, *valid])}
    learned, valid = ([_scaled(made, lesson) for lesson in part] for part in (learned, valid))
    for kind, model, steps, parts_of in (
        ("predictor", made.predictor, settings.predictor_steps, _predictor),
        ("generator", made.generator, settings.generator_steps, _generator),
    ):
        draw = generator(settings.seed, "metad2a", kind)
        fitting = Fitting(model, settings.learning_rate, draw, {**facts, "network": kind})
        step, score = parts_of(made, learned, valid, settings)
        file = checkpoint and checkpoint.with_name(f"{checkpoint.name}.{kind}")
        watch = partial(progress, kind) if progress is not None else None
        fit(fitting, step, score, steps, settings.look_every, file, watch)
    return made


def _predictor(
    made: MetaD2A, learned: list[Lesson], valid: list[Lesson], settings: MetaSettings
) -> tuple[Callable[[np.random.Generator], Tensor], Callable[[], float]]:
    """Returns the loss of a step, and the mean correlation with the accuracies on the validation tasks."""

    def loss(draw: np.random.Generator) -> Tensor:
        chosen = draw.choice(len(learned), min(settings.tasks, len(learned)), replace=False)
        parts = [learned[i] for i in chosen]
        losses = [predictor_loss(made.predictor(own.images(draw), own.ops), own.accuracy) for own in parts]
        return torch.stack(losses).mean()

    def score() -> float:
        found = [(made.predictor(own.features[:, :PER_CLASS], own.ops), own.accuracy) for own in valid]
        both = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in found]
        return float(torch.stack(both).nan_to_num(-1.0).mean())

    return loss, score


def _generator(
    made: MetaD2A, learned: list[Lesson], valid: list[Lesson], settings: MetaSettings
) -> tuple[Callable[[np.random.Generator], Tensor], Callable[[], float]]:
    """Returns the loss of a step, and the mean log-likelihood of the best cells of the validation tasks."""
    model = made.generator

    def loss(draw: np.random.Generator) -> Tensor:
        chosen = draw.choice(len(learned), min(settings.tasks, len(learned)), replace=False)
        sets = [(own.images(draw), own.best(settings.good_share)) for own in (learned[i] for i in chosen)]
        noise = torch.from_numpy(draw.standard_normal((sum(len(ops) for _, ops in sets), model.width))).float()
        return generator_loss(model, sets, noise, settings.kl_weight)

    def score() -> float:
        found = []
        for own in valid:
            ops = own.best(settings.good_share)
            z = model.posterior(own.features[:, :PER_CLASS])[0].expand(len(ops), -1)
            found.append(model.log_likelihood(z, cell_types(ops), cell_arrows().expand(len(ops), -1, -1)).mean())
        return float(torch.stack(found).mean())

    return loss, score


def _scaled(made: MetaD2A, lesson: Lesson) -> Lesson:
    accuracy = (lesson.accuracy - made.accuracy_mean) / made.accuracy_std
    return Lesson(made.scaled(lesson.features), lesson.ops, accuracy)


def _digest(all_lessons: list[Lesson]) -> str:
    parts = [part for own in all_lessons for part in (own.features, own.ops, own.accuracy)]
    return blake2b(b"".join(part.numpy().tobytes() for part in parts), digest_size=8).hexdigest()
