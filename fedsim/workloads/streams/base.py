"""Continual learning: any workload as a stream of tasks, which arrive at its clients by simulated round.

A stream wraps a workload and changes only what clients have in which round: strategies and trainers need not know of
it. `fedsim/workloads/streams/kinds.py` says how a data set becomes tasks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from fedsim.errors import ConfigError, DataError
from fedsim.seeding import generator
from fedsim.workloads.base import ClientData, Examples, Tensors, Workload, added
from fedsim.workloads.by_class import ByClass
from fedsim.workloads.classification import ClassificationWorkload
from fedsim.workloads.fingerprint import Fingerprint
from fedsim.workloads.streams import figures as continual

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from devices.cost import ModelCost
    from devices.fleet import Fleet
    from fedsim.report.rounds import RoundReport

Incremental = Literal["task", "domain", "class"]
Order = Literal["same", "shuffled"]
Arrival = Literal["task", "chunk"]
TASK, SEEN = "task", "seen"  # of each example: the task it belongs to; how many tasks a judge counts as seen
MASKED = -1e4  # added to logits of classes that do not stand for choice; small enough to keep gradients finite
MAX_INSPECTED = 2000  # clients whose tasks are checked before the run


@dataclass(frozen=True)
class Imbalance:
    """The share of each class's training examples that stays; the arguments of `Stream` with these names."""

    full_classes: Sequence[int] | None
    rest_share: float
    long_tail: float
    max_per_class: int | None

    def shares(self, num_classes: int, seed: int) -> list[float]:
        """Returns the share of its training examples that each class keeps.

        Raises:
            ConfigError: for a class that there is not.
        """
        classes, full = range(num_classes), self.full_classes
        if wrong := [c for c in full or () if c not in classes]:
            raise ConfigError(f"stream.full_classes must be in 0..{classes[-1]}, got {wrong[0]}")
        shares = [1.0 if full is None or c in full else self.rest_share for c in classes]
        for place, c in enumerate(generator(seed, "stream", "tail").permutation(num_classes)):
            shares[c] *= self.long_tail ** (place / max(1, num_classes - 1))
        return shares


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on training inputs: the share that it replaces, and its deviation where it falls anew."""

    share: float
    fresh: float


def unchanged(workload: Workload, rounds: int, evaluate_every: int, seed: int) -> Workload:
    """Returns the workload without a stream: every client has all its examples in every round."""
    return workload


class Arrivals(Examples):
    """Examples of a data set as (row, task) pairs, changed as their tasks say when they are gathered.

    Args:
        own: where they come from.
        rows: in it, [m] int64.
        tasks: of each, [m] int64.
        stream: changes them.
        client: whose noise falls on them; None for held-out examples, which stay clean.
        seen: how many phases a judge counts as seen; None in training.
        part: in which they arrive, for noise that falls anew; None for held-out examples.
    """

    def __init__(
        self,
        own: Examples,
        rows: Tensor,
        tasks: Tensor,
        stream: Stream,
        client: int | None = None,
        seen: int | None = None,
        part: int | None = None,
    ):
        super().__init__({}, rows)
        self.own, self.tasks, self.stream, self.client, self.seen = own, tasks, stream, client, seen
        self.part = part

    def __len__(self) -> int:
        return len(self.tasks)

    def gather(self, index: Tensor) -> Tensors:
        assert self.rows is not None
        rows, tasks = self.rows[index], self.tasks[index]
        batch = {**self.own.gather(rows), TASK: tasks}
        if self.client is not None and self.stream.noise.share:
            batch["x"] = self.stream.replace_with_noise(batch["x"], self.client, len(self.own), rows, tasks)
        batch = self.stream.change(batch)
        if self.part is not None and self.client is not None and self.stream.noise.fresh:
            batch["x"] = self.stream.with_fresh_noise(batch["x"], self.client, self.part, rows, tasks)
        if self.seen is not None:
            batch[SEEN] = torch.full_like(tasks, self.seen)
        return batch

    def materialise(self, device: torch.device | str = "cpu", memory_format: str = "contiguous") -> Examples:
        """Prepares training examples once; held-out ones of many tasks would take too much memory."""
        return self if self.client is None else super().materialise(device, memory_format)

    @property
    def labels(self) -> Tensor:
        assert self.rows is not None
        return self.stream.relabel(self.own.labels[self.rows])


class Learned(Examples):
    """All examples of a data set, with the labels that are learned.

    Args:
        own: where they come from.
        relabel: returns the labels that are learned, from those of the data set.
    """

    def __init__(self, own: Examples, relabel: Callable[[Tensor], Tensor]):
        super().__init__({}, torch.arange(len(own)))
        self.own, self.relabel = own, relabel

    def gather(self, index: Tensor) -> Tensors:
        batch = self.own.gather(index)
        return {**batch, "y": self.relabel(batch["y"])}

    @property
    def labels(self) -> Tensor:
        return self.relabel(self.own.labels)


class Stream(ClassificationWorkload, group="stream"):
    """A workload whose clients meet their examples task by task.

    The rounds of a run are divided evenly among the tasks; the rounds of one task are a phase. Examples carry their
    task in the batch. Task-incremental: each example is judged, in training and testing, among the classes of its own
    task (its other logits are lowered by 1e4). Domain-incremental: one output for all tasks. Class-incremental: no
    mask in training; tests choose among the classes of all tasks seen so far.

    Args:
        workload: what is streamed.
        rounds: of the run.
        evaluate_every: of the run; the last round of every phase must be judged.
        seed: of the run.
        tasks: how many there are.
        incremental: "task", "domain" or "class".
        order: "same" for all clients, or "shuffled": each client its own.
        arrival: "task": a client has all its examples of a task in every round of the phase (several passes); "chunk":
            they are cut into one piece per round, and who is not in the cohort misses its piece (one online pass).
        blur: share of a task's examples that arrive in the neighbouring phases, half in each, in [0, 1).
        full_classes: classes that keep all their training examples; None: all classes.
        rest_share: share that every other class keeps, in (0, 1].
        long_tail: f in (0, 1]; the c-th of C classes, in a drawn order, keeps the share f^(c / (C - 1)).
        noise_share: share of training inputs replaced by Gaussian noise (mean 0, deviation 1); labels stay.
        fresh_noise: deviation of Gaussian noise that falls on every training input as it arrives, anew in every part:
            an endless stream, whose examples cannot be recalled.
        max_per_class: training examples that a client keeps of each class and task; None keeps all.
        test_per_class: test examples of each class and task that judge the global model; None: all. T tasks are judged
            T / 2 times each: on Rotated MNIST with all of them that is half the work of a run with few images.
        forward_transfer: judge the task that comes next, too (and all of them before the first).

    Raises:
        ConfigError: if a setting is wrong.
        DataError: if a client has no examples in one of its parts, or a task none to be judged on.
    """

    def __init__(
        self,
        workload: Workload,
        rounds: int,
        evaluate_every: int,
        seed: int,
        tasks: Annotated[int, Ge(2)] = 5,
        incremental: Incremental = "domain",
        order: Order = "same",
        arrival: Arrival = "task",
        blur: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
        full_classes: Sequence[int] | None = None,
        rest_share: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        long_tail: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        noise_share: Annotated[float, Interval(ge=0, le=1)] = 0.0,
        fresh_noise: Annotated[float, Ge(0)] = 0.0,
        max_per_class: Annotated[int, Ge(1)] | None = None,
        test_per_class: Annotated[int, Ge(1)] | None = None,
        forward_transfer: bool = True,
    ):
        super().__init__(workload.model_factory, seed)
        if not isinstance(workload, ClassificationWorkload):
            raise ConfigError(f"a stream deals examples by their classes, and {workload.name} has none: stream=none")
        if workload.augments:
            raise ConfigError("workload.augment does not go with a stream: set it to null, or stream=none")
        if rounds % tasks:
            near = max(1, round(rounds / tasks)) * tasks
            raise ConfigError(f"rounds must be a multiple of stream.tasks={tasks}, got {rounds}; try rounds={near}")
        self.rounds_per_task = rounds // tasks
        if self.rounds_per_task % evaluate_every:
            raise ConfigError(
                f"evaluate_every must divide the {self.rounds_per_task} rounds of a task (rounds / stream.tasks), so "
                f"that the end of every task is judged, got {evaluate_every}"
            )
        if workload.test.labels.dim() != 1:
            raise ConfigError(f"a stream needs one label per example, and {workload.name} is a sequence: stream=none")
        self.inner, self.name, self.num_clients = workload, workload.name, workload.num_clients
        self.input_shape, self.num_classes = workload.input_shape, workload.num_classes
        self.tasks, self.incremental, self.order, self.arrival = tasks, incremental, order, arrival
        self.blur, self.test_per_class, self.forward_transfer = blur, test_per_class, forward_transfer
        self.noise = Noise(noise_share, fresh_noise)
        self.endless = self.noise.fresh > 0
        self.imbalance = Imbalance(full_classes, rest_share, long_tail, max_per_class)
        self.shares = self.imbalance.shares(workload.num_classes, seed)
        self._own = lru_cache(maxsize=8)(workload.client_data)
        self.set_up()
        for task in range(tasks):
            if not self.belongs(task, workload.test.labels).any():
                raise DataError(
                    f"workload {self.name} has no test examples of task {task} (stream.tasks={tasks}), so no model can "
                    "be judged on it; add some to the test part, or take fewer tasks"
                )
        self.test = self.held_out(0)
        self.masks, self.seen_masks = self._masks()
        for client in range(min(self.num_clients, MAX_INSPECTED)):
            for phase in range(tasks):
                self._check(client, phase, len(self._phase(client, phase)[0]))

    # --- what a kind of stream says ----------------------------------------------------------------------------

    def set_up(self) -> None:
        """Prepares what the other three need, once everything else is known."""

    @abstractmethod
    def belongs(self, task: int, labels: Tensor) -> Tensor:
        """Returns which examples, by their labels [n] int64, are in a task, [n] bool."""

    def change(self, batch: Tensors) -> Tensors:
        """Changes a prepared batch as the tasks of its examples (`batch["task"]` [b] int64) ask; here it stays."""
        return batch

    def relabel(self, labels: Tensor) -> Tensor:
        """Returns the labels that are learned, from those of the data set; here they stay."""
        return labels

    def classes_of(self, task: int) -> list[int]:
        """Returns the classes among which examples of a task are told apart, as learned; here all."""
        return list(range(self.num_classes))

    @property
    def reads_rounds(self) -> str:
        """Says that tasks share the rounds among themselves."""
        return "the tasks of the stream divide the rounds (stream.tasks)"

    # --- what arrives when -------------------------------------------------------------------------------------

    def phase(self, round: int) -> int:
        """Returns which of the phases a round is in, from 0; round 0 counts to the first."""
        return min(max(round - 1, 0) // self.rounds_per_task, self.tasks - 1)

    def part(self, round: int) -> int:
        """Returns the phase or, where a task comes in chunks, the round."""
        if self.arrival == "task":
            return self.phase(round)
        return min(max(round - 1, 0), self.tasks * self.rounds_per_task - 1)

    def phase_of_part(self, part: int) -> int:
        """Returns the phase that a part is in."""
        return part if self.arrival == "task" else part // self.rounds_per_task

    def order_of(self, client_id: int) -> list[int]:
        """Returns the tasks of a client in the order in which they come."""
        if self.order == "same":
            return list(range(self.tasks))
        return [int(t) for t in generator(self.seed, "stream", "order", client_id).permutation(self.tasks)]

    def fingerprint(self) -> Fingerprint:
        """Returns that of the wrapped workload: what becomes of its examples is a matter of settings."""
        return self.inner.fingerprint()

    def client_data(self, client_id: int) -> ClientData:
        """Returns all that a client ever has, with the labels that are learned; inputs as the wrapped workload's."""
        data = self.inner.client_data(client_id)
        return ClientData(Learned(data.train, self.relabel), Learned(data.test, self.relabel), data.version)

    def client_part(self, client_id: int, part: int) -> ClientData:
        """Returns a part of a client's training examples, and its held-out examples of all tasks up to that part.

        Raises:
            DataError: if there is nothing to train on.
        """
        own, phase = self._own(client_id), self.phase_of_part(part)
        rows, tasks = self._of_part(client_id, part)
        seen = self.order_of(client_id)[: phase + 1]
        labels = own.test.labels
        held = [torch.nonzero(self.belongs(task, labels)).flatten() for task in seen]
        test_tasks = torch.cat([torch.full_like(h, task) for h, task in zip(held, seen, strict=True)])
        test = Arrivals(own.test, torch.cat(held), test_tasks, self, seen=phase + 1)
        return ClientData(Arrivals(own.train, rows, tasks, self, client_id, part=part), test)

    def arrivals(self, client_id: int, part: int) -> Tensor:
        """Returns task * examples + row for each training example of the part."""
        rows, tasks = self._of_part(client_id, part)
        return tasks * len(self._own(client_id).train) + rows

    def recall(self, client_id: int, names: Tensor) -> Tensors:
        """Returns training examples by their names.

        Raises:
            DataError: of an endless stream, which does not make the same example twice.
        """
        if self.endless:
            raise DataError(
                f"stream.fresh_noise={self.noise.fresh} makes examples anew: they cannot be recalled by name"
            )
        own = self._own(client_id).train
        kept = Arrivals(own, names % len(own), names // len(own), self, client_id)
        return kept.gather(torch.arange(len(names)))

    def _of_part(self, client_id: int, part: int) -> tuple[Tensor, Tensor]:
        rows, tasks = self._phase(client_id, self.phase_of_part(part))
        if self.arrival == "chunk":
            edges = np.linspace(0, len(rows), self.rounds_per_task + 1).astype(int)
            piece = part % self.rounds_per_task
            rows, tasks = (t[edges[piece] : edges[piece + 1]] for t in (rows, tasks))
        self._check(client_id, self.phase_of_part(part), len(rows))
        return rows, tasks

    def _check(self, client_id: int, phase: int, examples: int) -> None:
        needed = self.rounds_per_task if self.arrival == "chunk" else 1
        if examples < (needed if examples else 1):
            task = self.order_of(client_id)[phase]
            few = f"only {examples} for {needed} rounds" if examples else "no examples"
            raise DataError(
                f"client {client_id} of workload {self.name} has {few} of task {task} (stream.tasks={self.tasks}); "
                "take partition=iid, fewer clients, fewer tasks or fewer rounds"
            )

    def _phase(self, client_id: int, phase: int) -> tuple[Tensor, Tensor]:
        """Returns rows of the client's training examples and their tasks, as they come in a phase, both [m] int64."""
        order, pieces = self.order_of(client_id), []
        for other in (phase - 1, phase, phase + 1):
            if not 0 <= other < self.tasks:
                continue
            rows = self._rows(client_id, order[other])
            moved = int(self.blur / 2 * len(rows))
            first = moved if other > 0 else 0  # arrive a phase earlier
            last = len(rows) - (moved if other < self.tasks - 1 else 0)  # from here on, a phase later
            piece = {phase - 1: rows[last:], phase: rows[first:last], phase + 1: rows[:first]}[other]
            pieces.append((piece, torch.full_like(piece, order[other])))
        rows, tasks = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return rows, tasks

    def _rows(self, client_id: int, task: int) -> Tensor:
        """Draws the order of a client's training examples in a task, without those that imbalance drops."""
        labels = self._own(client_id).train.labels
        draw = generator(self.seed, "stream", "rows", client_id, task)
        rows = torch.from_numpy(draw.permutation(torch.nonzero(self.belongs(task, labels)).flatten().numpy()))
        most = self.imbalance.max_per_class
        if most is None and min(self.shares) == 1.0:
            return rows
        keep = torch.zeros(len(rows), dtype=torch.bool)
        for c in labels[rows].unique().tolist():
            places = torch.nonzero(labels[rows] == c).flatten()
            count = len(places) if most is None else min(len(places), most)
            keep[places[: int(count * self.shares[c] + 0.5)]] = True
        return rows[keep]

    def replace_with_noise(self, x: Tensor, client: int, examples: int, rows: Tensor, tasks: Tensor) -> Tensor:
        """Replaces some inputs [b, ...] by noise: the same ones and the same noise at every call."""
        x = x.clone()
        for task in tasks.unique().tolist():
            noisy = generator(self.seed, "stream", "noisy", client, task).random(examples) < self.noise.share
            here = torch.nonzero((tasks == task) & torch.from_numpy(noisy)[rows]).flatten().tolist()
            for place in here:
                draw = generator(self.seed, "stream", "noise", client, task, int(rows[place]))
                x[place] = torch.from_numpy(draw.standard_normal(tuple(x.shape[1:]), dtype=np.float32))
        return x

    def with_fresh_noise(self, x: Tensor, client: int, part: int, rows: Tensor, tasks: Tensor) -> Tensor:
        """Returns inputs [b, ...] with the noise of the part in which they arrive."""
        noise = torch.empty(x.shape)
        for place, (row, task) in enumerate(zip(rows.tolist(), tasks.tolist(), strict=True)):
            draw = generator(self.seed, "stream", "fresh", client, part, task, row)
            noise[place] = torch.from_numpy(draw.standard_normal(tuple(x.shape[1:]), dtype=np.float32))
        return x + self.noise.fresh * noise.to(x.device)

    # --- devices ------------------------------------------------------------------------------------------------

    @property
    def front_end(self) -> ModelCost | None:
        """Returns that of the wrapped workload."""
        return self.inner.front_end

    def record_with(self, fleet: Fleet) -> None:
        if fleet.microphones is None:
            return
        raise ConfigError("fleet.microphones does not go with a stream: set it to null, or stream=none")

    # --- model, objective and judgement ---------------------------------------------------------------------------

    def build_model(self, number: int = 0) -> nn.Module:
        make = self.inner.build_model if self.num_classes == self.inner.num_classes else super().build_model
        return make(number)

    def _masks(self) -> tuple[Tensor, Tensor]:
        """Returns the masks of logits, for each task and for the first n phases, [tasks (+ 1), classes]."""
        own = torch.full((self.tasks, self.num_classes), MASKED)
        for task in range(self.tasks):
            own[task, self.classes_of(task)] = 0.0
        seen = [own[list(range(n))].amax(0) if n else own.amax(0) for n in range(self.tasks + 1)]
        return own, torch.stack(seen)

    def logits(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Returns the model's logits with the mask of each example, [batch, classes]."""
        logits = super().logits(model, batch)
        if self.incremental == "task":
            return logits + self.masks.to(logits.device)[batch[TASK]]
        if self.incremental == "class" and SEEN in batch and self.order == "same":
            return logits + self.seen_masks.to(logits.device)[batch[SEEN]]
        return logits

    @property
    def own_outputs(self) -> bool:  # type: ignore[override]
        """Returns whether each task is told apart among its own classes."""
        return self.incremental == "task"

    def masks_before(self, client_id: int, phase: int) -> list[Tensor]:
        """Returns the masks of the client's tasks before a phase; none where tasks share their outputs."""
        return [self.masks[task] for task in self.order_of(client_id)[:phase]] if self.own_outputs else []

    def held_out(self, task: int, seen: int | None = None) -> Arrivals:
        """Returns a task's test examples; with `test_per_class`, the same draw for all tasks that share examples."""
        labels = self.inner.test.labels
        rows = torch.nonzero(self.belongs(task, labels)).flatten()
        if self.test_per_class is not None:
            order = torch.from_numpy(generator(self.seed, "stream", "judged").permutation(len(labels)))
            drawn = order[torch.isin(order, rows)]
            first = [drawn[labels[drawn] == c][: self.test_per_class] for c in labels[rows].unique().tolist()]
            rows = torch.cat(first).sort().values
        return Arrivals(self.inner.test, rows, torch.full_like(rows, task), self, seen=seen)

    def judge(self, model: nn.Module, round: int) -> dict[str, float]:
        """Returns the test accuracy of each task; `accuracy` and `loss` are means over the tasks seen so far.

        Macro F1 and calibration error are of all examples of those tasks together.
        """
        judged = known = self._known(round)
        if self.forward_transfer:
            judged = self.tasks if round == 0 else min(known + 1, self.tasks)
        sums = [self.totals(model, self.held_out(s, max(known, s + 1)), self.sums) for s in range(judged)]
        results = [self.means(*each) for each in sums]
        means = {key: float(np.mean([r[key] for r in results[:known]])) for key in ("accuracy", "loss")}
        tasks = {continual.key_of(s): r["accuracy"] for s, r in enumerate(results)}
        return {**self.means(*added(sums[:known])), **means, **tasks}

    def by_class(self, model: nn.Module, round: int) -> ByClass | None:
        """Returns how the model does for each class of the tasks seen so far."""
        known = self._known(round)
        sums = [self.totals(model, self.held_out(s, known), self.sums_by_class) for s in range(known)]
        return ByClass.of(self.class_names(), added(sums)[0])

    def _known(self, round: int) -> int:
        """Returns how many tasks the model is judged on as seen."""
        return self.tasks if self.order == "shuffled" else self.phase(round) + 1

    def figures(self, reports: Sequence[RoundReport]) -> dict[str, Any]:
        """Returns the accuracy matrix and its figures: of the global model, and as means over clients' own orders."""
        first, matrix = continual.accuracy_matrix(reports, self.tasks, self.rounds_per_task)
        figures = continual.summary(first, matrix)
        if self.order == "shuffled":
            orders = [self.order_of(client) for client in range(min(self.num_clients, MAX_INSPECTED))]
            figures["clients"] = continual.mean_over_orders(first, matrix, orders)
        return {"continual": figures}

    def pictures(self, reports: Sequence[RoundReport]) -> dict[str, Figure]:
        """Draws the accuracy matrix as a heat map, and the accuracy of each task over the rounds."""
        from fedsim.workloads.streams.picture import heat_map, task_curves

        _, matrix = continual.accuracy_matrix(reports, self.tasks, self.rounds_per_task)
        return {
            "accuracy-matrix": heat_map(matrix, self.name),
            "accuracy-per-task": task_curves(reports, self.tasks, self.rounds_per_task, self.order == "same"),
        }
