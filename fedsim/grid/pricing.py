"""What one client's work costs on its device, and whether its reply comes at all.

A pure function of the settings and the work, so that a worker which adds up a block of clients leaves out the same
clients as the edge grid does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from devices.cost import Cost, LatencyModel
from devices.fleet import Fleet
from fedsim.messages.cohort import ClientAnswer, Outcome

WENT_OFFLINE, CRASHED = "went offline during the round", "crashed during the round"


@dataclass(frozen=True)
class Priced:
    """What became of a client by itself, before the round closes.

    Attributes:
        cost: what it spent, until its end where that came early.
        work_ended: it had computed all when its part in the round ended, though perhaps not sent it: what it has for
            itself is stored. False for a client that ran out of memory or failed in its own work.
        paused_s: for which it was offline in between, and went on afterwards.
    """

    outcome: Outcome
    reason: str = ""
    cost: Cost = field(default_factory=Cost)
    work_ended: bool = False
    paused_s: float = 0.0

    def arrives(self, limit_s: float | None) -> bool:
        """Whether the reply is there `limit_s` seconds after the round began."""
        return self.outcome == "completed" and (limit_s is None or self.cost.total_s <= limit_s)


class RadioTails:
    """Until when each client's radio is awake after its last transfer, which that contact has paid for.

    A contact that begins before does not pay for those seconds again: rounds that follow each other within the tail
    keep a radio awake once, however many they are. Only clients that are awake are kept.
    """

    def __init__(self) -> None:
        self.awake_until_s: dict[int, float] = {}

    def contact(self, client: int, start_s: float, cost: Cost) -> Cost:
        """The cost of a contact, less the tail that the last one paid for and that this one cuts short."""
        if cost.tail_watts == 0 or cost.total_s == 0:
            return cost
        overlap_s = max(0.0, self.awake_until_s.get(client, start_s) - start_s)
        until_s = start_s + cost.total_s + cost.up_tail_s
        self.awake_until_s[client] = max(until_s, self.awake_until_s.get(client, until_s))
        if overlap_s == 0:
            return cost
        up_s = max(0.0, cost.up_tail_s - overlap_s)
        left_s = overlap_s - (cost.up_tail_s - up_s)
        return replace(cost, up_tail_s=up_s, compute_tail_s=max(0.0, cost.compute_tail_s - left_s))

    def forget(self, now_s: float) -> None:
        """Drops the clients whose radios sleep at `now_s`."""
        self.awake_until_s = {c: until_s for c, until_s in self.awake_until_s.items() if until_s > now_s}


@dataclass(frozen=True)
class Prices:
    """Prices the clients of one exchange.

    Args:
        round: of the exchange: jitter and crashes are drawn for it.
        start_s: simulated time at which it began.
        pauses: a client that goes offline goes on with its work when it is back, instead of losing it.
    """

    fleet: Fleet
    latency: LatencyModel
    round: int
    start_s: float
    pauses: bool = False

    def settle(self, answers: Sequence[ClientAnswer], repeats: Sequence[int] | None = None) -> list[Priced]:
        """The cost of each client's work, and its outcome where the device itself ends its round early.

        Args:
            answers: of the clients.
            repeats: how often each was sent out in this round before; None: never.
        """
        if not answers:
            return []
        clients, again = [answer.client for answer in answers], repeats or [0] * len(answers)
        jitters = [self.fleet.jitter(*self._turn(*one)) for one in zip(clients, again, strict=True)]
        costs = self.latency.costs([answer.work for answer in answers], self.fleet.units(clients), jitters).all()
        return [self._ended(one, cost, repeat) for one, cost, repeat in zip(answers, costs, again, strict=True)]

    def _turn(self, client: int, repeat: int) -> tuple[int, ...]:
        return (client, self.round, repeat) if repeat else (client, self.round)

    def arrivals(self, answers: Sequence[ClientAnswer], limit_s: float | None) -> list[bool]:
        """Whether each reply is there `limit_s` seconds after the exchange began; prices only those that may not be."""
        doubtful = [answer for answer in answers if limit_s is not None or not self._is_certain(answer)]
        priced = dict(zip(map(id, doubtful), self.settle(doubtful), strict=True))
        return [id(answer) not in priced or priced[id(answer)].arrives(limit_s) for answer in answers]

    def _is_certain(self, answer: ClientAnswer) -> bool:
        """Whether the reply comes however long it takes: nothing can end the client's round but a deadline."""
        return (
            answer.outcome == "completed"
            and type(self.latency).cost is LatencyModel.cost  # one of its own may find that the work does not fit
            and answer.work.peak_memory_bytes <= self.fleet[answer.client].memory_bytes
            and self.fleet.online_until(answer.client, self.start_s) == math.inf
            and self.fleet.crash_s(answer.client, self.round) == math.inf
        )

    def _ended(self, answer: ClientAnswer, cost: Cost, repeat: int) -> Priced:
        """What became of a client whose work costs so much if nothing comes between."""
        if answer.outcome == "out_of_memory" or not cost.fits:
            reason = answer.reason or f"needs {answer.work.peak_memory_bytes} bytes at its peak"
            return Priced("out_of_memory", reason, cost.until(cost.down_s))  # it dies when it allocates
        if answer.outcome == "failed":
            return Priced("failed", answer.reason, cost.until(cost.down_s + cost.compute_s))
        if self.pauses:
            return self._paused(answer, cost, repeat)
        leaves_s = self.fleet.online_until(answer.client, self.start_s) - self.start_s
        crashes_s = self.fleet.crash_s(*self._turn(answer.client, repeat))
        gone_s = min(leaves_s, crashes_s)
        if gone_s < cost.total_s:
            offline = leaves_s <= crashes_s
            reason = WENT_OFFLINE if offline else CRASHED
            work_ended = gone_s >= cost.down_s + cost.compute_s  # a device stores its results before it sends them
            return Priced("offline" if offline else "failed", reason, cost.until(gone_s), work_ended)
        return Priced(answer.outcome, answer.reason, cost, work_ended=True)

    def _paused(self, answer: ClientAnswer, cost: Cost, repeat: int) -> Priced:
        """What became of a client that works whenever it is online."""
        crashes_s = self.fleet.crash_s(*self._turn(answer.client, repeat))
        work_s = min(cost.total_s, crashes_s)
        paused_s = self.fleet.end_of_work(answer.client, self.start_s, work_s) - self.start_s - work_s
        if crashes_s < cost.total_s:
            done = crashes_s >= cost.down_s + cost.compute_s
            return Priced("failed", CRASHED, cost.until(crashes_s), done, max(0.0, paused_s))
        return Priced(answer.outcome, answer.reason, cost, True, max(0.0, paused_s))
