"""Simulated time: who is on time and how long a round takes. Host time never enters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedsim.grid.events import Event, EventQueue


@dataclass(frozen=True)
class RoundTiming:
    """How one exchange ended: client ids in client order, and its length in simulated seconds."""

    on_time: tuple[int, ...]
    late: tuple[int, ...]
    round_s: float


class SimClock:
    """The clock of a run. Rounds move it by `begin_round`, `close_round` and `advance`; arrivals set it.

    Attributes:
        round_began_s: when the last round began; None before the first.
    """

    def __init__(self, now_s: float = 0.0, round_began_s: float | None = None):
        self.now_s, self.round_began_s = now_s, round_began_s

    def next_round_s(self, every_s: float | None) -> float:
        """When the next round can begin: now, but at the earliest `every_s` after the beginning of the one before."""
        if every_s is None or self.round_began_s is None:
            return self.now_s
        return max(self.now_s, self.round_began_s + every_s)

    def begin_round(self, every_s: float | None = None) -> None:
        """Lets time pass until the next round can begin. Nobody takes part in the time between two rounds."""
        self.now_s = self.round_began_s = self.next_round_s(every_s)

    def close_round(
        self, arrival_s: Mapping[int, float], deadline_s: float | None = None, keep: int | None = None
    ) -> RoundTiming:
        """Decides who is on time and advances the clock to the end of the round.

        The round ends with the last accepted reply, or at the deadline when a reply is still on its way then. Clients
        that dropped out are not waited for: a broken connection is noticed at once.

        Args:
            arrival_s: seconds after the round's start at which each client's reply arrives, by client id.
            deadline_s: replies after it are late; None waits for all.
            keep: only the first `keep` replies are accepted and the last of them ends the round (over-selection); the
                rest are late. Equal arrivals are ordered by client id.
        """
        coming = EventQueue[None]()
        for client, time_s in arrival_s.items():
            coming.put(Event(time_s, client), None)
        accepted, round_s = list[int](), 0.0
        while coming and (keep is None or len(accepted) < keep):
            if deadline_s is not None and coming.next_s > deadline_s:
                round_s = deadline_s
                break
            (round_s, client, _), _ = coming.pop()
            accepted.append(client)
        self.now_s += round_s
        late = sorted(event.client for event, _ in coming)
        return RoundTiming(tuple(sorted(accepted)), tuple(late), round_s)

    def advance(self, seconds: float) -> None:
        """Lets time pass without an exchange."""
        self.now_s += seconds
