"""Rules of client selection: by data, loss, speed, or how often a client took part.

Sources are with each rule. All choose among clients that are connected; a cohort drawn by a strategy itself meets those
who sleep, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Interval
from flwr.app import ArrayRecord

from fedsim.errors import ConfigError
from fedsim.grid.exchange import ClientReport
from fedsim.grid.participants import Draw, Participants

OBSERVED = "clients are chosen by the seconds that they take"


class BySize(Participants):
    """Draws clients with chances in proportion to their examples, without putting back.

    A client tells the number of its examples when it is first met. Source: Li et al., "On the Convergence of FedAvg on
    Non-IID Data", ICLR 2020, scheme I, there with putting back (recalled). Weigh replies equally with it: by examples,
    as FedAvg does, large clients count twice.
    """

    exchanges: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True

    def choose(self, number: int, count: int, free: Sequence[int], weights: ArrayRecord, draw: Draw) -> list[int]:
        return self.by_size(count, free, draw)

    def by_size(self, count: int, free: Sequence[int], draw: Draw) -> list[int]:
        """Returns clients drawn by their examples, of whom those are asked who have not told them."""
        if unknown := [client for client in free if not self.roster.of(client).examples]:
            self.roster.ask(unknown)
        return drawn(free, [float(self.roster.of(client).examples) for client in free], count, draw)


class PowerOfChoice(BySize):
    """Draws candidates by size, and takes those on whose examples the present weights have the highest loss.

    Candidates download the weights and judge them on their training examples, which they pay for.

    Args:
        candidates: d, for each client that is taken: at least 1, which takes all candidates.

    Source: Cho et al., "Towards Understanding Biased Client Selection in Federated Learning", AISTATS 2022 (recalled).
    """

    def __init__(self, candidates: Annotated[float, Interval(ge=1, le=1000)] = 2.0):
        self.candidates = candidates

    def choose(self, number: int, count: int, free: Sequence[int], weights: ArrayRecord, draw: Draw) -> list[int]:
        asked = self.by_size(min(len(free), math.ceil(self.candidates * count)), free, draw)
        self.roster.ask(sorted(asked), weights)
        return sorted(asked, key=lambda client: (-self.roster.of(client).loss, client))[:count]


class Oort(Participants):
    """Takes clients that are useful and fast: by loss times examples, less for those slower than the pace.

    The utility of a client is its examples times its loss, which is Oort's |B| sqrt(mean loss^2) where losses of its
    examples are alike: clients report the mean. Utilities are cut at a quantile and scaled to [0, 1], with
    sqrt(0.1 log(round) / last round) for those not seen for long, and times (pace / seconds)^penalty for those slower
    than the pace: the quantile `pace` of all clients' seconds, which a pacer raises when utilities stand still and
    lowers when they leap. Among the best, by a cut-off, clients are drawn by utility; a falling share of the cohort is
    for clients never met, of whom the fast ones by our predictions are drawn.

    Args:
        exploration, exploration_decay, exploration_min: share of a cohort for clients never met, its factor per round,
            and the least.
        pace: quantile of seconds that is fast enough at first, in percent.
        pacer_step: rounds after which the pacer looks.
        pacer_delta: by how many percent it moves.
        penalty: alpha, exponent for slow clients.
        clip: quantile at which utilities are cut.
        cut_off: share of the last utility that is still taken.
        window: candidates among the never met for each that is taken.
        most: rounds after which a client is left out, as long as there are others; None: never.

    Source: Lai et al., "Oort: Efficient Federated Learning via Guided Participant Selection", OSDI 2021 (recalled);
    the formulas and defaults of the published code (oort/oort.py, read). There, clients never met are drawn by size;
    here a server does not know it, and they are drawn by predicted speed, as in the paper.
    """

    reads_data: ClassVar[bool] = True
    reads_devices: ClassVar[str] = OBSERVED

    def __init__(
        self,
        exploration: Annotated[float, Interval(ge=0, le=1)] = 0.9,
        exploration_decay: Annotated[float, Interval(gt=0, le=1)] = 0.98,
        exploration_min: Annotated[float, Interval(ge=0, le=1)] = 0.3,
        pace: Annotated[float, Interval(gt=0, le=100)] = 30.0,
        pacer_step: Annotated[int, Ge(1)] = 20,
        pacer_delta: Annotated[float, Interval(ge=0, le=100)] = 10.0,
        penalty: Annotated[float, Interval(ge=0, le=100)] = 2.0,
        clip: Annotated[float, Interval(gt=0, le=1)] = 0.98,
        cut_off: Annotated[float, Interval(gt=0, le=1)] = 0.95,
        window: Annotated[float, Interval(ge=1, le=1000)] = 5.0,
        most: Annotated[int, Ge(1)] | None = None,
    ):
        self.exploration, self.exploration_decay, self.exploration_min = exploration, exploration_decay, exploration_min
        self.pace, self.pacer_step, self.pacer_delta = pace, pacer_step, pacer_delta
        self.penalty, self.clip, self.cut_off, self.window, self.most = penalty, clip, cut_off, window, most
        self.history: list[float] = []  # mean utility of the exploited clients of each round
        self.exploited: list[int] = []  # who has not come back yet
        self.number = 0  # of the last round

    def choose(self, number: int, count: int, free: Sequence[int], weights: ArrayRecord, draw: Draw) -> list[int]:
        if number != self.number:
            self.exploration = max(self.exploration * self.exploration_decay, self.exploration_min)
            self.number = number
        limit_s = self.limit_s()
        met = [client for client in free if self.roster.of(client).examples]
        if self.most is not None and (fresh := [c for c in met if self.roster.of(c).asked <= self.most]):
            met = fresh
        new = [client for client in free if not self.roster.of(client).examples]
        share = int((1 - self.exploration) * count + draw.random())  # rounded by chance: one client may be all there is
        useful = self.exploit(number, min(len(met), max(share, count - len(new))), met, limit_s, draw)
        self.exploited += useful
        return [*useful, *self.explore(min(count - len(useful), len(new)), new, draw)]

    def limit_s(self) -> float:
        """Returns the seconds that are fast enough: a quantile over all that have been met; inf before that."""
        seconds = sorted(seen.seconds for seen in self.roster.seen.values() if seen.seconds)
        if not seconds or self.pace >= 100:
            return math.inf
        return seconds[min(int(len(seconds) * self.pace / 100), len(seconds) - 1)]

    def exploit(self, number: int, count: int, met: Sequence[int], limit_s: float, draw: Draw) -> list[int]:
        """Returns clients drawn by score among the best."""
        if not count:
            return []
        scores = self.scores(number, met, limit_s)
        ranked = sorted(met, key=lambda client: (-scores[client], client))
        least = self.cut_off * scores[ranked[min(count, len(ranked) - 1)]]
        best = [client for client in ranked if scores[client] >= least]
        return drawn(best, [scores[client] for client in best], count, draw)

    def scores(self, number: int, met: Sequence[int], limit_s: float) -> dict[int, float]:
        """Returns how useful and fast each client is."""
        utility = {client: self.utility(client) for client in met}
        values = sorted(utility.values())
        cut = values[min(int(len(values) * self.clip), len(values) - 1)]
        low, high = values[0] * 0.999, max(values)
        found = {}
        for client in met:
            seen = self.roster.of(client)
            span = max(high - low, 1e-4)
            score = (min(utility[client], cut) - low) / span
            score += math.sqrt(0.1 * math.log(max(number, 1)) / max(seen.round, 1))
            if seen.seconds > limit_s:
                score *= (limit_s / seen.seconds) ** self.penalty
            found[client] = score
        return found

    def utility(self, client: int) -> float:
        """Returns how useful a client's examples are."""
        seen = self.roster.of(client)
        return seen.examples * max(seen.loss, 0.0)

    def explore(self, count: int, new: Sequence[int], draw: Draw) -> list[int]:
        """Returns clients never met, drawn by predicted speed among the fastest."""
        if not count:
            return []
        speed = {client: 1 / max(self.roster.expected_s(client), 1e-9) for client in new}
        ranked = sorted(new, key=lambda client: (-speed[client], client))[: math.ceil(self.window * count)]
        return drawn(ranked, [speed[client] for client in ranked], count, draw)

    def learn(self, number: int, reports: Sequence[ClientReport]) -> None:
        """Takes what came, and lets the pacer look."""
        super().learn(number, reports)
        came = {report.client for report in reports if report.outcome == "completed"}
        useful = [self.utility(client) for client in self.exploited if client in came]
        gone = {report.client for report in reports}
        self.exploited = [client for client in self.exploited if client not in gone]
        self.history.append(sum(useful) / len(useful) if useful else 0.0)
        step = self.pacer_step
        if number >= 2 * step and number % step == 0:
            before, now = sum(self.history[-2 * step : -step]), sum(self.history[-step:])
            if abs(now - before) <= 0.1 * before:
                self.pace = min(100.0, self.pace + self.pacer_delta)
            elif abs(now - before) >= 5 * before:
                self.pace = max(self.pacer_delta, self.pace - self.pacer_delta)


class Tifl(Participants):
    """Sorts clients into tiers of equal speed, and draws a cohort from one tier at a time, so that nobody waits.

    Args:
        tiers: how many, of as many clients each.
        chances: of each tier, from the fastest to the slowest; None: equal ones.

    Source: Chai et al., "TiFL: A Tier-based Federated Learning System", HPDC 2020, its static policy (recalled). Tiers
    are by seconds seen, or predicted for who has not been met. The adaptive policy, which judges the accuracy of each
    tier on data that a server does not have, is left out.
    """

    reads_devices: ClassVar[str] = OBSERVED

    def __init__(self, tiers: Annotated[int, Ge(1)] = 5, chances: Sequence[Annotated[float, Ge(0)]] | None = None):
        if chances is not None and (len(chances) != tiers or not sum(chances) > 0):
            raise ConfigError(f"participants.chances must be {tiers} numbers that are not all 0, got {list(chances)}")
        self.tiers, self.chances = tiers, chances

    def choose(self, number: int, count: int, free: Sequence[int], weights: ArrayRecord, draw: Draw) -> list[int]:
        ranked = sorted(free, key=lambda client: (self.roster.expected_s(client), client))
        tiers = [tier.tolist() for tier in np.array_split(np.array(ranked), self.tiers) if len(tier)]
        chances = np.array(self.chances[: len(tiers)] if self.chances else [1.0] * len(tiers), float)
        if not chances.sum() > 0:
            chances[:] = 1.0
        first = int(draw.choice(len(tiers), p=chances / chances.sum()))
        # A tier with fewer clients than a cohort is filled up by the next slower, then by the next faster ones.
        order = [*tiers[first:], *reversed(tiers[:first])]
        chosen: list[int] = []
        for tier in order:
            missing = count - len(chosen)
            chosen += drawn(tier, [1.0] * len(tier), min(missing, len(tier)), draw)
        return chosen


class Fastest(Participants):
    """Draws candidates, and takes the fastest of those who are expected to answer in time.

    Args:
        limit_s: seconds in which a client must answer; None takes deadline_s of the run.
        candidates: for each client that is taken.

    Source: Nishio and Yonetani, "Client Selection for Federated Learning with Heterogeneous Resources in Mobile Edge",
    ICC 2019 (FedCS), without its model of a shared uplink (recalled).
    """

    reads_devices: ClassVar[str] = OBSERVED

    def __init__(
        self,
        limit_s: Annotated[float, Gt(0)] | None = None,
        candidates: Annotated[float, Interval(ge=1, le=1000)] = 2.0,
    ):
        self.limit_s, self.candidates = limit_s, candidates

    def choose(self, number: int, count: int, free: Sequence[int], weights: ArrayRecord, draw: Draw) -> list[int]:
        limit_s = self.limit_s if self.limit_s is not None else self.roster.deadline_s
        asked = drawn(free, [1.0] * len(free), min(len(free), math.ceil(self.candidates * count)), draw)
        expected = {client: self.roster.expected_s(client) for client in asked}
        in_time = [client for client in asked if limit_s is None or expected[client] <= limit_s]
        return sorted(in_time, key=lambda client: (expected[client], client))[:count]


class LeastOften(Participants):
    """Takes the clients that were asked least often, ties at random: everybody takes part as often as can be."""

    def choose(self, number: int, count: int, free: Sequence[int], weights: ArrayRecord, draw: Draw) -> list[int]:
        mixed = [free[place] for place in draw.permutation(len(free))]
        return sorted(mixed, key=lambda client: self.roster.of(client).asked)[:count]


def drawn(clients: Sequence[int], chances: Sequence[float], count: int, draw: Draw) -> list[int]:
    """Returns so many different clients, drawn with chances in proportion to these; those of no chance come last."""
    likely = np.array(chances, float)
    first = min(count, int((likely > 0).sum()))
    found: list[int] = []
    if first:
        places = draw.choice(len(clients), first, replace=False, p=likely / likely.sum())
        found = [int(clients[place]) for place in places]
    left = [client for client in clients if client not in set(found)]
    return [*found, *(int(left[place]) for place in draw.permutation(len(left))[: count - first])]
