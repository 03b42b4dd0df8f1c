"""What an exchange with clients brought, and what became of each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message

from devices.cost import Cost, Work
from fedsim.messages.cohort import Outcome


@dataclass(frozen=True, slots=True)
class ClientReport:
    """What became of one client in one exchange; one row of `clients/*.parquet`.

    Attributes:
        work: what it did until its end, with the bytes that went before it stopped.
        whole_work: the same as if nothing had stopped it: what it is priced by, here and on any other device.
    """

    round: int
    phase: str
    client: int
    device: str
    outcome: Outcome
    reason: str
    start_s: float
    cost: Cost
    wait_s: float
    wait_joules: float
    work: Work
    whole_work: Work
    num_examples: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def joules(self) -> float:
        """Energy spent on down, compute and up; waiting for the round to close is reported apart."""
        return self.cost.joules


@dataclass(frozen=True, slots=True)
class Origin:
    """What a client started from whose reply may be stale.

    Attributes:
        weights: that it was sent.
        staleness: how many times the global weights have changed since.
        weight: what its reply counts for because of that, 1 where it is fresh.
    """

    weights: ArrayRecord
    staleness: int
    weight: float


@dataclass(frozen=True, slots=True)
class Exchange:
    """What an exchange brought.

    Attributes:
        replies: accepted ones in client order, or one that holds their weighted mean.
        accepted: clients whose replies those are, also where one mean stands for all.
        reports: of all clients that were sent a message, in their order.
        origins: of each reply; empty where all started from the present weights.
        weights: the present ones, shared tensors only, of which the replies are to make new ones.
    """

    replies: list[Message]
    accepted: tuple[int, ...] = ()
    reports: tuple[ClientReport, ...] = ()
    origins: tuple[Origin, ...] = ()
    weights: ArrayRecord = field(default_factory=ArrayRecord)
