"""A finished run on other devices, without training: its recorded work, priced anew, moves the clock.

Everything that the grid decides is decided again: who is reached, who is late, who runs out of memory. What clients
learn is not known for work that nobody did, so a re-priced run ends before the first round in which another client
would have taken part, or another reply would have been accepted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict

from devices.availability import Always
from devices.cost import ModelCost, Work
from devices.fleet import Fleet
from fedsim.engines.base import Engine
from fedsim.errors import ConfigError
from fedsim.grid.edge import NOT_THERE
from fedsim.grid.exchange import ClientReport
from fedsim.grid.pricing import CRASHED
from fedsim.messages.cohort import ClientAnswer, ClientTask, CohortAnswer, CohortTask
from fedsim.report.files import read_rows, row_files
from fedsim.report.rounds import RoundReport, read_rounds
from fedsim.runs.federation import Federation
from fedsim.settings.build import World
from fedsim.workloads import metrics as figures

TRAIN, EVALUATE = "train", "evaluate"
MS, FLOPS = "latency_ms", "flops"  # of an inference, among the metrics of a client that judges
COLUMNS = ["round", "phase", "client", "outcome", "reason", "start_s", "up_s", "down_bytes", "num_examples"]
COLUMNS += ["metrics", "work"]


class UnknownError(Exception):
    """What a client would do was not recorded; the message says which."""


@dataclass(frozen=True)
class Recorded:
    """One client in one exchange, as the run recorded it.

    Attributes:
        work: all of it, also where the client stopped before its end; None where it never began.
        has_worked: it had done all its work when its part ended, though perhaps not sent it.
    """

    client: int
    outcome: str
    reason: str
    num_examples: int
    metrics: dict[str, float]
    work: Work | None
    has_worked: bool


@dataclass(frozen=True)
class RecordedExchange:
    """One exchange of a run: its clients in their order."""

    phase: str
    clients: dict[int, Recorded]

    @property
    def accepted(self) -> set[int]:
        """Whose replies the strategy got."""
        return {client for client, one in self.clients.items() if one.outcome == "completed"}


def recorded_exchanges(folder: Path) -> dict[int, list[RecordedExchange]]:
    """The exchanges of each round of a run, in order.

    Raises:
        FileError: if the client rows cannot be read.
    """
    works: dict[str, Work] = {}
    found: dict[int, list[RecordedExchange]] = {}
    for path in row_files(folder):
        rows = read_rows(path, COLUMNS).to_pylist()
        for (round_number, phase, _), group in groupby(rows, key=lambda row: (row["round"], row["phase"], row["start_s"])):
            clients = {row["client"]: _recorded(row, works) for row in group}
            found.setdefault(round_number, []).append(RecordedExchange(phase, clients))
    return found


def _recorded(row: Mapping[str, Any], works: dict[str, Work]) -> Recorded:
    text, outcome, reason = row["work"], row["outcome"], row["reason"]
    if text not in works:
        works[text] = Work.from_dict(json.loads(text))
    began = not (outcome == "offline" and reason == NOT_THERE)
    return Recorded(
        row["client"],
        outcome,
        reason,
        row["num_examples"],
        json.loads(row["metrics"]),
        works[text] if began else None,
        outcome in ("completed", "late") or row["up_s"] > 0,
    )


class RecordedEngine(Engine):
    """Answers with what clients did in the run, for a fleet on which it may cost something else.

    Attributes:
        exchange: whose answers are asked for next.
    """

    def __init__(self, before: World, now: World):
        self.before, self.now = before, now
        self.exchange = RecordedExchange("", {})

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        """Answers with the recorded work of each client.

        Raises:
            UnknownError: for a client whose work here is not that of the run.
        """
        for one in task.clients:
            yield CohortAnswer((self._answer(one, task),))

    def _answer(self, task: ClientTask, cohort: CohortTask) -> ClientAnswer:
        client, fleet = task.client, self.now.fleet
        recorded = self.exchange.clients[client]
        who = f"client {client} ({fleet.device_name(client)})"
        if recorded.work is None:
            raise UnknownError(f"{who} was offline then and would take part")
        memory_bytes, ended = fleet[client].memory_bytes, recorded.outcome == "out_of_memory"
        fits = recorded.work.peak_memory_bytes <= memory_bytes
        if fits and ended:
            raise UnknownError(f"{who} ran out of memory then and would not")
        if not fits and memory_bytes != self.before.fleet[client].memory_bytes:
            raise UnknownError(f"{who} would run out of memory, where it did not, or elsewhere")
        if recorded.outcome == "failed" and recorded.reason != CRASHED:
            return ClientAnswer(client, "failed", recorded.reason, work=recorded.work)
        metrics = recorded.metrics
        if cohort.phase == EVALUATE:
            metrics = self._predicted(metrics, recorded.work, client)
        outcome = "out_of_memory" if ended else "completed"
        return ClientAnswer(client, outcome, recorded.reason if ended else "", "", recorded.work, recorded.num_examples, metrics)

    def _predicted(self, metrics: Mapping[str, float], work: Work, client: int) -> dict[str, float]:
        """Metrics of a judged model with the milliseconds of one inference as they are predicted here.

        Raises:
            UnknownError: if the network that they are of cannot be told from the work.
        """
        latency, fleet = self.now.latency, self.now.fleet
        kinds = fleet.profiles if len(fleet.profiles) > 1 else ()
        ends = [name.removeprefix(FLOPS) for name in metrics if name == FLOPS or name.startswith(f"{FLOPS}_")]
        before = {f"{MS}_on_{p.name}{end}" for p in self.before.fleet.profiles for end in ends}
        found: dict[str, float] = {}
        for name, value in metrics.items():
            if name in before:
                continue
            network = _network(work, metrics[FLOPS + name.removeprefix(MS)]) if name.startswith(MS) else None
            found[name] = value if network is None else latency.inference_ms(network, fleet[client])
            if name.removeprefix(FLOPS) in ends and name.startswith(FLOPS):
                network = _network(work, value)
                found |= {f"{MS}_on_{p.name}{name.removeprefix(FLOPS)}": latency.inference_ms(network, p) for p in kinds}
        return found


def _network(work: Work, flops: float) -> ModelCost:
    """The one network in some work that takes so many FLOPs.

    Raises:
        UnknownError: if there is none, or another one takes as many.
    """
    fit = {id(p.network): p.network for p in work.passes if p.network.forward_flops == flops}
    if len({repr(network) for network in fit.values()}) != 1:
        raise UnknownError("the record does not tell which network was judged")
    return next(iter(fit.values()))


class RepricedFederation(Federation):
    """The rounds of a run again, with what clients did and learned then, on the fleet of another world.

    Args:
        world: of the run, but for its fleet, latency model and limits of time.
        before: of the run itself.
        folder: where that was written.

    Attributes:
        ended: why it ends before the run did; empty where it does not.
    """

    def __init__(self, world: World, before: World, folder: Path):
        self.recorder = RecordedEngine(before, world)
        super().__init__(world, self.recorder)
        self.grid.averages = False  # nobody sends weights
        self.before = {report.round: report for report in read_rounds(folder)}
        self.exchanges = recorded_exchanges(folder)
        self.ended = ""

    def rounds(self, after: RoundReport | None = None) -> Iterator[tuple[RoundReport, list[ClientReport]]]:
        """Yields the rounds as far as they are known."""
        try:
            yield from super().rounds(after)
        except UnknownError as error:
            self.ended = f"before round {self.grid.round}: {error}"

    def train(self, number: int) -> dict[str, float]:
        """Repeats the exchanges up to the training; returns the metrics of the recorded round."""
        self.grid.round = number
        if number not in self.before:
            raise UnknownError(f"the run has {max(self.before)} rounds")
        self._ahead = list(self.exchanges.get(number, ()))
        while self._ahead and self._ahead[0].phase != EVALUATE:
            is_training = self._ahead[0].phase == TRAIN
            self._repeat(self._ahead.pop(0))
            if is_training:
                break
        settings, before = self.settings, self.before[number].metrics
        evaluated = self.primary.name in before or figures.NOT_FINITE in before
        if evaluated != (self.is_over or number % settings.evaluate_every == 0 or number == settings.rounds):
            raise UnknownError("the model was " + ("judged then" if evaluated else "not judged then"))
        return {name: value for name, value in before.items() if not name.startswith(figures.CLIENTS)}

    def complete(self, number: int) -> None:
        """Repeats the exchanges between training and evaluation."""
        while self._ahead and self._ahead[0].phase != EVALUATE:
            self._repeat(self._ahead.pop(0))

    def judge(self, number: int) -> dict[str, float]:
        """Returns nothing: what was judged is among the metrics of the round; of round 0, all."""
        return {} if number else dict(self.before[0].metrics)

    def _messages(self, hook: str, draw: str, number: int) -> list[Message]:
        """Returns empty messages to the clients that were asked to evaluate."""
        self.recorder.exchange = self._ahead.pop(0) if self._ahead else RecordedExchange(EVALUATE, {})
        return self._to(self.recorder.exchange)

    def _to(self, exchange: RecordedExchange) -> list[Message]:
        return [Message(RecordDict(), client, exchange.phase) for client in exchange.clients]

    def _repeat(self, exchange: RecordedExchange) -> None:
        """Lets an exchange take place again.

        Raises:
            UnknownError: if other replies would have been accepted, or clients would keep something else.
        """
        self.recorder.exchange = exchange
        now = self.grid.exchange(self._to(exchange))
        if other := sorted(exchange.accepted ^ set(now.accepted)):
            client = other[0]
            how = ("was", "would not be") if client in exchange.accepted else ("was not", "would be")
            raise UnknownError(f"the reply of client {client} {how[0]} accepted then and {how[1]}")
        for report in now.reports:
            recorded = exchange.clients[report.client]
            if recorded.work is not None and recorded.work.storage_bytes and recorded.has_worked != _has_worked(report):
                raise UnknownError(f"client {report.client} would not keep between rounds what it kept then")


def _has_worked(report: ClientReport) -> bool:
    """Whether a client had done all its work when its part ended."""
    return report.outcome in ("completed", "late") or report.cost.up_s > 0
