"""How well TANS retrieves for tasks that it never saw: recall, regret under a device's limit, and learning curves.

Regret is of nets that were trained on other tasks, as for a new data set: the best accuracy that one within the limit
reaches after the same short fine-tuning, less that of the retrieved one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from devices.nas.search import Limit
from devices.nas.tans.retrieval import retrieve
from fedsim.meta.net_prices import NetPrices
from fedsim.meta.tans import Catalogue, Lesson, Tans, recall
from fedsim.meta.tuning import Tuned
from fedsim.meta.zoo import Net
from fedsim.seeding import generator

WAYS = ("retrieved, fine-tuned", "the same from scratch", "largest from scratch")


@dataclass(frozen=True)
class Score:
    """What one TANS did on one held-out task; accuracies in percent, after fine-tuning.

    Attributes:
        name: of the task.
        seed: of the meta-training.
        recall_1, recall_10: whether a net of the task is among the nearest of the whole zoo.
        chance_1, chance_10: the same of nets in a random order.
        feasible: nets of other tasks within the limit.
        best: of these.
        retrieved: net that was retrieved.
        nearest: the most similar net within the limit, whatever is predicted of it.
        largest: net with most multiply-adds within the limit.
        random: mean over all within the limit.
        own_best, own_retrieved, own_random: where the nets of the task itself may be taken too.
        ms: predicted for the retrieved net.
        cpu_s: from features to retrieved net, on this host.
    """

    name: str
    seed: int
    recall_1: float
    recall_10: float
    chance_1: float
    chance_10: float
    feasible: int
    best: float
    retrieved: float
    nearest: float
    largest: float
    random: float
    own_best: float
    own_retrieved: float
    own_random: float
    ms: float
    cpu_s: float

    @property
    def regret(self) -> float:
        """Returns what the retrieved net lacks to the best, in points."""
        return self.best - self.retrieved

    @property
    def random_regret(self) -> float:
        """Returns what a random net within the limit lacks to the best, in points."""
        return self.best - self.random


@dataclass(frozen=True)
class Curve:
    """Accuracies of one way to train on a task, in percent, after some steps, and what a step costs."""

    task: str
    way: str
    net: str
    steps: Sequence[int]
    accuracies: Sequence[float]
    step_joules: float

    @property
    def joules(self) -> list[float]:
        """Returns what was spent at each look."""
        return [self.step_joules * step for step in self.steps]

    def at_joules(self, joules: float) -> float:
        """Returns the accuracy after so many joules, between those that were looked at; NaN before the first."""
        return float(np.interp(joules, self.joules, self.accuracies, left=math.nan))


@dataclass(frozen=True, eq=False)
class Judge:
    """A zoo with its prices on a device, to judge what is retrieved there.

    Attributes:
        nets: of the zoo.
        catalogue: the same, as the encoder takes them.
        prices: of the same.
        limit: on the device.
        tuned: what nets reach on tasks.
    """

    nets: Sequence[Net]
    catalogue: Catalogue
    prices: NetPrices
    limit: Limit
    tuned: Tuned

    def within(self, lesson: Lesson, own: bool) -> list[int]:
        """Returns places of nets within the limit: of other tasks, and with `own` those of the task too."""
        return [int(p) for p in np.flatnonzero(self.limit.allows()) if own or p not in lesson.nets]

    def retrieved(self, made: Tans, lesson: Lesson, seed: int, own: bool = False) -> list[int]:
        """Returns places of the nets that are retrieved for a task, best first.

        Raises:
            NothingFitsError: if no net is within the limit.
        """
        similarity, predicted = made.judge(lesson.query(generator(seed, "tans judged", lesson.task)), self.catalogue)
        places = [place for place in range(len(self.nets)) if own or place not in lesson.nets]
        limit = replace(self.limit, predicted=self.limit.predicted[places])
        return [places[i] for i in retrieve(similarity[places], predicted[places], limit)]

    def score(self, made: Tans, lesson: Lesson, seed: int, progress: Callable[[], None]) -> Score:
        """Judges what is retrieved for a task; `progress` is called for each net that may be tuned."""
        began = time.process_time()
        place = self.retrieved(made, lesson, seed)[0]
        took = time.process_time() - began
        similarity, _ = made.judge(lesson.query(generator(seed, "tans judged", lesson.task)), self.catalogue)
        everywhere, total = range(len(self.nets)), len(self.nets)
        reached = {}
        for net in self.within(lesson, own=True):
            reached[net] = self.tuned.curve(lesson.task, self.nets[net], [self.tuned.tuning.steps])[0]
            progress()
        others = self.within(lesson, own=False)
        own_place = self.retrieved(made, lesson, seed, own=True)[0]
        mean = {own: float(np.mean([reached[p] for p in self.within(lesson, own)])) for own in (True, False)}
        return Score(
            name=lesson.task,
            seed=seed,
            recall_1=recall(similarity, everywhere, lesson.nets, 1),
            recall_10=recall(similarity, everywhere, lesson.nets, 10),
            chance_1=chance(total, len(lesson.nets), 1),
            chance_10=chance(total, len(lesson.nets), 10),
            feasible=len(others),
            best=max(reached[p] for p in others),
            retrieved=reached[place],
            nearest=reached[max(others, key=lambda p: similarity[p])],
            largest=reached[max(others, key=lambda p: self.prices.macs[p])],
            random=mean[False],
            own_best=max(reached.values()),
            own_retrieved=reached[own_place],
            own_random=mean[True],
            ms=float(self.prices.ms[place]),
            cpu_s=took,
        )

    def curves(self, made: Tans, lesson: Lesson, seed: int, looks: Sequence[int]) -> list[Curve]:
        """Returns curves of the retrieved net, of the same from scratch, and of the largest within the limit."""
        place = self.retrieved(made, lesson, seed)[0]
        largest = max(self.within(lesson, own=False), key=lambda p: self.prices.macs[p])
        found = []
        for way, own, anew in zip(WAYS, (place, place, largest), (False, True, True), strict=True):
            net, joules = self.nets[own], float(self.prices.step_joules[own])
            reached = self.tuned.curve(lesson.task, net, looks, anew)
            found.append(Curve(lesson.task, way, str(net.architecture), looks, reached, joules))
        return found


def chance(total: int, wanted: int, count: int) -> float:
    """Returns the chance that one of so many nets is a wanted one, when they are drawn at random."""
    count = min(count, total)
    return 1 - math.comb(total - wanted, count) / math.comb(total, count)
