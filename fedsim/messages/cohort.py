"""What the server's side asks of many clients at once, and what they answer: plain typed objects, no records.

An engine in this process hands them on as they are; one that crosses a process border packs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from devices.cost import Work
from fedsim.messages.updates import Broadcast
from fedsim.messages.weights import SentWeights
from fedsim.workloads.base import Tensors

Outcome = Literal["completed", "late", "offline", "out_of_memory", "failed"]
PLAN = "plan"  # phase in which a worker tells what work clients would do in training
OUTCOMES: tuple[Outcome, ...] = ("completed", "late", "offline", "out_of_memory", "failed")


@dataclass(frozen=True, slots=True)
class ClientTask:
    """What one client is to do.

    Attributes:
        client: its id.
        broadcast: what it is sent; one object where several clients get the same, and never changed.
        state: what it keeps from earlier rounds, by name; never changed.
        block: number of its block: clients of a block are added up together, see `messages.blocks`.
        group: clients of one group may be trained at once; named by the first of them.
        down_bytes: what it downloads.
        expected_flops: of its training, by what was seen so far; for sharing out work, never for results.
        repeat: how often it was sent out in the broadcast's round before: its draws differ.
    """

    client: int
    broadcast: Broadcast
    state: Tensors = field(default_factory=dict)
    block: int = 0
    group: int | None = None
    down_bytes: int = 0
    expected_flops: float = 1.0
    repeat: int = 0


@dataclass(frozen=True, slots=True)
class Close:
    """When an exchange begins and ends, and how its updates are added up.

    Attributes:
        start_s: simulated time at which it begins.
        limit_s: seconds after which replies are late; None waits for all.
        alike: clients count the same, instead of by their examples.
    """

    start_s: float
    limit_s: float | None
    alike: bool = False


@dataclass(frozen=True, slots=True)
class CohortTask:
    """What the clients of an exchange are to do.

    Attributes:
        round: of the exchange.
        phase: "train", "evaluate", "query.<question>", or PLAN, which is answered without doing the work.
        clients: in the order of their ids.
        settings: the run's, as JSON: a worker builds its world from them.
        close: given, workers add up each block over its clients that are in time, and send no single updates.
    """

    round: int
    phase: str
    clients: tuple[ClientTask, ...]
    settings: str
    close: Close | None = None

    @property
    def expected_flops(self) -> float:
        """Of all its clients."""
        return sum(task.expected_flops for task in self.clients)

    def of(self, clients: Iterable[ClientTask]) -> CohortTask:
        """The same for some of the clients."""
        return replace(self, clients=tuple(clients))

    def units(self) -> list[list[ClientTask]]:
        """The clients, in order, in lists that stay in one place: blocks that are added up there, and groups."""
        found: list[list[ClientTask]] = [[task] for task in self.clients[:1]]
        for before, task in pairwise(self.clients):
            together = self.close is not None and task.block == before.block
            if together or (task.group is not None and task.group == before.group):
                found[-1].append(task)
            else:
                found.append([task])
        return found

    def one_by_one(self) -> list[CohortTask]:
        """A task for each client, which answers with its own update: a part of a block cannot be added up alone."""
        return [replace(self, clients=(replace(task, group=None),), close=None) for task in self.clients]


@dataclass(frozen=True, slots=True)
class ClientAnswer:
    """What one client did, and what it sends back.

    Attributes:
        outcome: "completed", "out_of_memory" or "failed"; the last two send nothing.
        reason, traceback: of a client that did not complete.
        work: what it did, with the bytes that it sends.
        num_examples: that its metrics and weights count for.
        weights: after training; None where they are in the sum of its block, and in other phases.
        extras: what a method sends beside them, by name.
        state: what it has for later rounds.
    """

    client: int
    outcome: Outcome = "completed"
    reason: str = ""
    traceback: str = ""
    work: Work = field(default_factory=Work)
    num_examples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    weights: SentWeights | None = None
    extras: dict[str, Tensors] = field(default_factory=dict)
    state: Tensors = field(default_factory=dict)

    def without_weights(self) -> ClientAnswer:
        """The same, where the weights have gone into a sum."""
        # Written out: `dataclasses.replace` looks through the fields again for every client.
        return ClientAnswer(
            self.client,
            self.outcome,
            self.reason,
            self.traceback,
            self.work,
            self.num_examples,
            self.metrics,
            None,
            self.extras,
            self.state,
        )


@dataclass(frozen=True, slots=True)
class BlockAnswer:
    """The sum over the clients of a block that are in time.

    Attributes:
        clients: whose updates are in it.
        weight: what they count for together, their examples or, alike, their number.
        total: the sum of what each counts for times its weights, float64; of a single client its weights, not yet
            multiplied; None where no client was in time.
    """

    block: int
    clients: tuple[int, ...] = ()
    weight: float = 0.0
    total: SentWeights | None = None


@dataclass(frozen=True, slots=True)
class CohortAnswer:
    """What some clients of a `CohortTask` answer; with the sums of their blocks, if those were asked for."""

    clients: tuple[ClientAnswer, ...]
    sums: tuple[BlockAnswer, ...] = ()

    @classmethod
    def joined(cls, answers: Sequence[CohortAnswer]) -> CohortAnswer:
        """Several answers as one."""
        return cls(tuple(c for a in answers for c in a.clients), tuple(s for a in answers for s in a.sums))
