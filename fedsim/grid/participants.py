"""Which clients take part: a rule sees what a server could know of them, and what it asks of them is paid.

A server knows the data sheet of a device, who is connected, what came back in earlier rounds and how long that took. It
knows neither data nor who will go offline.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from statistics import median
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from devices.bounds import Checked, is_replaced
from devices.cost import Cost, LatencyModel, ModelCost, Passes, Work
from fedsim.errors import ConfigError
from fedsim.grid.edge import NOT_NEEDED, TOO_LATE, EdgeGrid
from fedsim.grid.exchange import ClientReport
from fedsim.grid.memory import memory_of
from fedsim.messages.records import ARRAYS, CONFIG, payload_bytes, tensors_of
from fedsim.seeding import generator

QUESTION, TOLD = "participants", "told"  # what clients are asked, and the record that they answer with
EXAMPLES, LOSS = "examples", "loss"  # in it; the latter where weights came with the question
TRAIN_LOSS = "train_loss"  # metric of updates
OF_DATA = frozenset({"metrics", "num_examples", "work", "whole_work"})  # fields of a report that tell of data
OPEN = tuple(field.name for field in fields(ClientReport) if field.name not in OF_DATA)
USUAL_BATCH = 10  # examples of the step by which devices are compared


@dataclass(slots=True)
class Seen:
    """What a server has seen of a client.

    Attributes:
        asked: how often it was asked to train.
        examples: that it has told; 0: it has not.
        loss: mean training loss that it last reported.
        seconds: that it last took until its reply was there; 0: none has come yet.
        round: in which that was.
    """

    asked: int = 0
    examples: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    round: int = 0

    def facts(self) -> dict[str, Any]:
        """Returns all of it, for a checkpoint."""
        return {"asked": self.asked, "seconds": self.seconds, "round": self.round, **self.told()}

    def told(self) -> dict[str, Any]:
        """Returns what the client has told of its data."""
        return {"examples": self.examples, "loss": self.loss}


class Veiled(Seen):
    """What a server has seen of a client whose data noise is to hide: a look at what it tells of them is refused.

    Args:
        refusal: the sentence.
        facts: what has been seen.
    """

    __slots__ = ("refusal",)

    def __init__(self, refusal: str, facts: Mapping[str, Any]):
        self.refusal, self.asked = refusal, facts.get("asked", 0)
        self.seconds, self.round = facts.get("seconds", 0.0), facts.get("round", 0)

    def told(self) -> dict[str, Any]:
        """Returns nothing."""
        return {}

    @property
    def examples(self) -> int:  # type: ignore[override]
        """Refuses to tell."""
        raise ConfigError(self.refusal)

    @property
    def loss(self) -> float:  # type: ignore[override]
        """Refuses to tell."""
        raise ConfigError(self.refusal)


class VeiledReport(ClientReport):
    """What became of a client, without what it tells of its data.

    Args:
        report: the whole one.
        refusal: the sentence with which a look at the rest is refused.
    """

    __slots__ = ("refusal",)
    refusal: str

    def __init__(self, report: ClientReport, refusal: str):
        object.__setattr__(self, "refusal", refusal)
        for name in OPEN:
            object.__setattr__(self, name, getattr(report, name))

    def _refused(self) -> Any:
        raise ConfigError(self.refusal)

    metrics = num_examples = work = whole_work = property(_refused)


class Roster:
    """What a server knows of its clients.

    Args:
        grid: to them.
        latency: predicts seconds on a device.
        step: what one example of a training step costs.
        payload: the weights, of whose size a download and an upload are.
        seed: of the run.
        deadline_s: of the run.
        no_data: why the rule may not look at what clients tell of their data, a sentence; empty: it may.
        no_questions: why it may not ask them; empty: it may.
    """

    def __init__(
        self,
        grid: EdgeGrid,
        latency: LatencyModel,
        step: ModelCost,
        payload: ArrayRecord,
        seed: int,
        deadline_s: float | None,
        no_data: str = "",
        no_questions: str = "",
    ):
        self._no_data, self._no_questions = no_data, no_data or no_questions
        self._grid, self._latency, self.seed, self.deadline_s = grid, latency, seed, deadline_s
        size = payload_bytes(RecordDict({ARRAYS: payload}))
        self._work = Work((Passes(step, USUAL_BATCH, 1, 1),), down_bytes=size, up_bytes=size)
        self.seen: dict[int, Seen] = {}
        self._costs: dict[int, Cost] = {}

    def __len__(self) -> int:
        return len(self._grid.fleet)

    def of(self, client: int) -> Seen:
        """Returns what has been seen of a client."""
        return self.seen.get(client) or self._made({})

    def _made(self, facts: Mapping[str, Any]) -> Seen:
        return Veiled(self._no_data, facts) if self._no_data else Seen(**facts)

    def shown(self, reports: Sequence[ClientReport]) -> Sequence[ClientReport]:
        """Returns reports of a training exchange as the rule may see them."""
        return [VeiledReport(report, self._no_data) for report in reports] if self._no_data else reports

    def facts(self) -> dict[int, dict[str, Any]]:
        """Returns what has been seen of all clients, for a checkpoint."""
        return {client: seen.facts() for client, seen in self.seen.items()}

    def restore(self, facts: Mapping[int, Mapping[str, Any]]) -> None:
        """Takes the place of another roster."""
        self.seen = {client: self._made(seen) for client, seen in facts.items()}

    def note(self, number: int, reports: Iterable[ClientReport]) -> None:
        """Takes notice of a training exchange.

        Of a client on whose reply nobody waited, only that it takes longer is known.
        """
        trained = [report for report in reports if report.phase == "train"]
        last_s = max((report.cost.total_s for report in trained if report.outcome == "completed"), default=0.0)
        for report in trained:
            seen = self.seen.setdefault(report.client, self._made({}))
            seen.asked += 1
            if report.outcome == "completed" and not self._no_data:
                seen.examples, seen.loss = report.num_examples, float(report.metrics.get(TRAIN_LOSS, 0.0))
            if report.outcome in ("completed", "late"):
                seen.seconds, seen.round = self._until(report, last_s), number

    def _until(self, report: ClientReport, last_s: float) -> float:
        """Returns the seconds until the server had a client's reply, or gave it up."""
        if report.reason == TOO_LATE and self.deadline_s is not None:
            return math.nextafter(self.deadline_s, math.inf)  # more than a client may take
        return min(report.cost.total_s, last_s) if report.reason == NOT_NEEDED else report.cost.total_s

    def expected_s(self, client: int) -> float:
        """Returns how long a client will take: as the last time, or else what its device is predicted to take.

        What is predicted is one download, one upload, and as many training steps as those took who have come back.
        """
        if seconds := self.of(client).seconds:
            return seconds
        cost = self._cost(client)
        return cost.down_s + cost.up_s + self.usual_steps * cost.compute_s

    @property
    def usual_steps(self) -> float:
        """Returns the median number of training steps of those who have come back; 1 before any has."""
        steps = []
        for client, seen in self.seen.items():
            cost = self._cost(client)
            if seen.seconds and cost.compute_s > 0:
                steps.append(max(0.0, seen.seconds - cost.down_s - cost.up_s) / cost.compute_s)
        return median(steps) if steps else 1.0

    def _cost(self, client: int) -> Cost:
        if client not in self._costs:
            self._costs[client] = self._latency.cost(self._work, self._grid.client(client).profile)
        return self._costs[client]

    def ask(self, clients: Sequence[int], weights: ArrayRecord | None = None) -> None:
        """Asks clients for the number of their examples and, with weights, for the loss of these on them.

        They download the weights and judge them on all of their training examples, which costs what it costs.

        Args:
            clients: whom to ask.
            weights: the present ones; None: only for the number.

        Raises:
            ConfigError: where noise is to hide what they would tell, or nobody waits for answers.
        """
        if self._no_questions:
            raise ConfigError(self._no_questions)
        config = ConfigRecord({"server-round": self._grid.round})
        content = RecordDict({CONFIG: config} if weights is None else {ARRAYS: weights, CONFIG: config})
        for reply in self._grid.send_and_receive([Message(content, c, f"query.{QUESTION}") for c in clients]):
            told = tensors_of(reply.content.array_records[TOLD])
            seen = self.seen.setdefault(reply.metadata.src_node_id, Seen())
            seen.examples = int(told[EXAMPLES])
            if LOSS in told:
                seen.loss = float(told[LOSS])


class Participants(Checked, ABC, group="participants", error=ConfigError):
    """A rule by which clients are chosen among those who are connected and idle.

    Attributes:
        exchanges: it holds exchanges of its own, for which the round waits.
        reads_data: it goes by what clients say of their data, such as losses and numbers of examples. These two say it
            before the run; without them, what does not fit is refused when the rule does it.
        reads_devices: what it decides by the seconds of devices, in words; empty where nothing.
        derived: names of attributes that a checkpoint leaves out: they are made anew. All others hold numbers, texts
            and tensors, and lists, tuples, sets and maps of them.
    """

    derived: ClassVar[frozenset[str]] = frozenset({"roster"})
    exchanges: ClassVar[bool] = False
    reads_data: ClassVar[bool] = False
    reads_devices: ClassVar[str] = ""

    roster: Roster

    @property
    def chooses(self) -> bool:
        """Whether it offers a strategy the clients that it is to take; else the strategy draws them by itself."""
        return True

    def begin(self, roster: Roster) -> None:
        """Takes what there is to know, once."""
        self.roster = roster

    @abstractmethod
    def choose(self, number: int, count: int, free: Sequence[int], weights: ArrayRecord, draw: Draw) -> list[int]:
        """Returns the clients that are to take part.

        Args:
            number: of the round.
            count: how many at most.
            free: who is connected and idle, more than `count`.
            weights: the present ones.
            draw: random numbers of this choice.
        """

    def learn(self, number: int, reports: Sequence[ClientReport]) -> None:
        """Takes what a training exchange brought."""
        self.roster.note(number, reports)

    def chosen(self, number: int, count: int, free: Sequence[int], weights: ArrayRecord, repeat: int = 0) -> list[int]:
        """Returns the clients that take part, in order; all of the free ones where there are no more than needed.

        Raises:
            ConfigError: where the rule names a client twice, one that is not free, or what is no client.
        """
        if len(free) <= count:
            return sorted(free)
        again = (repeat,) if repeat else ()
        draw = generator(self.roster.seed, "participants", number, *again)
        returned = self.choose(number, count, free, weights, draw)
        try:
            found = sorted(map(operator.index, returned))
            fits = len(found) == len(set(found) & set(free)) <= count
        except TypeError:
            fits = False
        if not fits:
            got = list(islice(returned, 20)) if isinstance(returned, Iterable) else returned
            raise ConfigError(
                f"{type(self).__name__}.choose must return at most {count} of the clients that are free, each once, "
                f"got {got!r}"
            )
        return found

    def state(self) -> dict[str, Any]:
        """Returns what later choices depend on."""
        return {"seen": self.roster.facts(), "own": memory_of(self)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where another one was."""
        self.roster.restore(state["seen"])
        vars(self).update(state["own"])


Draw = np.random.Generator


class Uniform(Participants):
    """The strategy draws its clients, each with the same chance, asleep or not."""

    @property
    def chooses(self) -> bool:
        """Whether a class below chooses in another way."""
        return any(
            is_replaced(hook, default)
            for hook, default in (
                (self.choose, Uniform.choose),
                (self.chosen, Participants.chosen),
                (self.learn, Participants.learn),
                (self.begin, Participants.begin),
            )
        )

    def choose(self, number: int, count: int, free: Sequence[int], weights: ArrayRecord, draw: Draw) -> list[int]:
        return [free[place] for place in draw.choice(len(free), count, replace=False)]
