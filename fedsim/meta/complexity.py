"""A neural complexity measure, learned from snapshots of networks in training on small data sets.

Source: Lee et al., "Neural Complexity Measures", NeurIPS 2020. Differs: its learners are cells of NAS-Bench-201 in
trainings that nothing regularises, taken down beforehand (there, learners are trained anew by turns with the measure,
and regularised by it after a while); inputs are features of random filters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor

from devices.bounds import checked
from devices.errors import one_line
from devices.nas.neural_complexity import Behaviour, NeuralComplexity, complexity_loss
from devices.tensor_files import read_tensors, write_tensors
from fedsim.errors import ConfigError, DataError
from fedsim.meta.features import FEATURES
from fedsim.meta.fitting import Fitting, Look, fit
from fedsim.meta.snapshots import TaskSnapshots
from fedsim.seeding import derive, generator

METHOD = "neural complexity"  # also of the files' metadata
WEIGHTS = "a file of a neural complexity measure"

LEAST_SPREAD = 1e-6  # variance of gaps; where all are alike, nothing is to be told apart
LEAST_LOG_P = -10.0  # a network that is surer of its mistakes looks the same

Bank = deque[tuple[TaskSnapshots, int]]  # snapshots, by the trainings of their task and the place there


@checked("complexity", ConfigError)
@dataclass(frozen=True)
class ComplexitySettings:
    """Settings of learning a measure.

    Attributes:
        steps: each on `tasks` tasks.
        tasks: of a step.
        snapshots: of each of these tasks.
        points: images that a step looks at, of those trained on and of those held out; drawn anew for each task.
        bank: snapshots that are kept, the last ones.
        learning_rate: of Adam.
        look_every: steps between two looks at the validation tasks.
        seed: of weights and draws.
    """

    steps: Annotated[int, Ge(1)] = 300
    tasks: Annotated[int, Ge(1)] = 4
    snapshots: Annotated[int, Ge(1)] = 10
    points: Annotated[int, Ge(1)] = 48
    bank: Annotated[int, Ge(1)] = 10_000
    learning_rate: Annotated[float, Gt(0)] = 5e-4
    look_every: Annotated[int, Ge(1)] = 20
    seed: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True)
class Complexity:
    """A measure, with the scales that it was learned in.

    Attributes:
        network: predicts gaps in units of their spread.
        feature_mean, feature_std: of the images' features, [128].
        log_p_mean, log_p_std: of the log probabilities in the snapshots that were learned from.
        gap_mean, gap_std: of the gaps there.
    """

    network: NeuralComplexity
    feature_mean: Tensor
    feature_std: Tensor
    log_p_mean: float
    log_p_std: float
    gap_mean: float
    gap_std: float

    def behaviour(self, own: TaskSnapshots, rows: Tensor, points: Tensor, points_test: Tensor) -> Behaviour:
        """Returns what some of a task's networks say at some of its images, as the network takes it."""
        x, x_test = ((x - self.feature_mean) / self.feature_std for x in (own.x[points], own.x_test[points_test]))
        parts = own.log_p[rows][:, points], own.log_p_test[rows][:, points_test]
        h, h_test = ((part.clamp(min=LEAST_LOG_P) - self.log_p_mean) / self.log_p_std for part in parts)
        return Behaviour(x[None], own.y[points][None], h, x_test[None], h_test)

    @torch.no_grad()
    def predict(self, own: TaskSnapshots) -> np.ndarray:
        """Predicts the gaps of all snapshots of a task, [snapshots], from all images that they know."""
        everything = [torch.arange(count) for count in (len(own.log_p), len(own.x), len(own.x_test))]
        found = self.network(self.behaviour(own, *everything))
        gaps: np.ndarray = self.gap_mean + self.gap_std * found.double().numpy()
        return gaps

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Writes the network and its scales."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        scales = {"feature_mean": self.feature_mean, "feature_std": self.feature_std}
        numbers = {"log_p_mean": self.log_p_mean, "log_p_std": self.log_p_std}
        numbers |= {"gap_mean": self.gap_mean, "gap_std": self.gap_std}
        write_tensors(path, tensors | scales, {**facts, **numbers}, METHOD)

    @classmethod
    def load(cls, path: Path) -> Complexity:
        """Reads what `save` wrote.

        Raises:
            DeviceError: for a file that is no such thing.
            DataError: for one that lacks a tensor, or has one of another shape.
        """
        tensors, facts = read_tensors(path, METHOD, WEIGHTS)
        network = NeuralComplexity(FEATURES)
        try:
            own = {key.removeprefix("network."): t for key, t in tensors.items() if key.startswith("network.")}
            network.load_state_dict(own)
            mean, std = (tensors[key].reshape(FEATURES) for key in ("feature_mean", "feature_std"))
            numbers = [float(facts[key]) for key in ("log_p_mean", "log_p_std", "gap_mean", "gap_std")]
            if not all(bool(part.isfinite().all()) for part in (*tensors.values(), torch.tensor(numbers))):
                raise ValueError("a number in it is NaN or infinite")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{path} cannot be read as {WEIGHTS}: {one_line(error)}") from None
        return cls(network, mean, std, *numbers)


def fill(bank: Bank, learned: Sequence[TaskSnapshots]) -> None:
    """Puts all snapshots into a bank, tasks by turns; one that is full loses its oldest."""
    for row in range(max(len(own.log_p) for own in learned)):
        bank.extend((own, row) for own in learned if row < len(own.log_p))


def learn_complexity(
    learned: Sequence[TaskSnapshots],
    valid: Sequence[TaskSnapshots],
    settings: ComplexitySettings,
    checkpoint: Path | None = None,
    progress: Callable[[Look], None] | None = None,
) -> Complexity:
    """Learns a measure from snapshots; those of the tasks for validation choose the weights.

    Args:
        learned: of each task to learn from.
        valid: of each task that chooses.
        settings: see `ComplexitySettings`; equal settings give equal weights on equal machines with one thread.
        checkpoint: a file that is written at every look, and gone on from.
        progress: called at every look.

    Raises:
        DataError: for a checkpoint of another training.
    """
    bank: Bank = deque(maxlen=settings.bank)
    fill(bank, learned)
    rows = torch.cat([own.x for own in learned]).double()
    gaps = torch.stack([own.gap[row] for own, row in bank])
    said = torch.cat([own.log_p_test[row].clamp(min=LEAST_LOG_P).flatten() for own, row in bank]).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(settings.seed, "complexity weights"))
        network = NeuralComplexity(FEATURES)
    mean, std = rows.mean(0).float(), (rows.std(0) + 1e-6).float()
    scales = [float(scale) for part in (said, gaps) for scale in (part.mean(), part.std(correction=0) + 1e-6)]
    made = Complexity(network, mean, std, *scales)
    facts = {"settings": asdict(settings), "snapshots": _digest([*learned, *valid])}
    fitting = Fitting(network, settings.learning_rate, generator(settings.seed, "complexity"), facts, METHOD)
    step, score = _parts(made, bank, valid, settings)
    fit(fitting, step, score, settings.steps, settings.look_every, checkpoint, progress)
    return made


def _parts(
    made: Complexity, bank: Bank, valid: Sequence[TaskSnapshots], settings: ComplexitySettings
) -> tuple[Callable[[np.random.Generator], Tensor], Callable[[], float]]:
    """Returns the loss of a step, and minus the share of final gaps' variance that is left on the validation tasks."""
    tasks = {own.task: own for own, _ in bank}
    rows = {name: [row for own, row in bank if own.task == name] for name in tasks}
    targets = {name: (own.gap - made.gap_mean) / made.gap_std for name, own in tasks.items()}

    def some(draw: np.random.Generator, count: int, most: int) -> Tensor:
        return torch.from_numpy(draw.permutation(count)[:most])

    def loss(draw: np.random.Generator) -> Tensor:
        losses = []
        for name in draw.choice(sorted(tasks), min(settings.tasks, len(tasks)), replace=False).tolist():
            own = tasks[name]
            chosen = torch.tensor(rows[name])[some(draw, len(rows[name]), settings.snapshots)]
            points = [some(draw, len(x), settings.points) for x in (own.x, own.x_test)]
            losses.append(complexity_loss(made.network, made.behaviour(own, chosen, *points), targets[name][chosen]))
        return torch.stack(losses).mean()

    def score() -> float:
        found = []
        for own in (taken.ends() for taken in valid):
            points = [torch.arange(min(settings.points, len(x))) for x in (own.x, own.x_test)]
            predicted = made.network(made.behaviour(own, torch.arange(len(own.log_p)), *points))
            error = made.gap_std * predicted - own.gap
            found.append(error.var(correction=0) / own.gap.var(correction=0).clamp(min=LEAST_SPREAD))
        return -float(torch.stack(found).mean())

    return loss, score


def _digest(snapshots: Sequence[TaskSnapshots]) -> str:
    parts = [part for own in snapshots for part in (own.x, own.x_test, own.y, own.y_test, own.log_p, own.log_p_test)]
    return blake2b(b"".join(part.numpy().tobytes() for part in parts), digest_size=8).hexdigest()
