"""A finished run on other devices, without training: its recorded work, priced anew, moves the clock.

Everything that the grid decides is decided again: who is reached, who is late, who runs out of memory. What clients
learn is not known for work that nobody did, so a re-priced run ends before the first round in which another client
would have taken part, or another reply would have been accepted.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from devices.availability import Always
from devices.compression.plan import CompressionPlan
from devices.cost import ModelCost, Work
from devices.latency.models import deployed_ms
from devices.profile import BY_LATENCY, BY_MEMORY, BY_NAME
from fedsim.engines.base import Engine, assume_task_identity
from fedsim.errors import ConfigError
from fedsim.grid.exchange import ClientReport
from fedsim.grid.pricing import CRASHED
from fedsim.grid.server_half import server_half
from fedsim.grid.serving import NOT_THERE
from fedsim.messages.cohort import ClientAnswer, ClientTask, CohortAnswer, CohortTask
from fedsim.report.files import read_rows, read_summary, row_files
from fedsim.report.repeat import command_of
from fedsim.report.rounds import RoundReport, Totals, read_rounds
from fedsim.runs import checkpoint
from fedsim.runs.federation import Federation
from fedsim.runs.recorded import data_of_run, settings_of_run
from fedsim.runs.writer import RunWriter
from fedsim.settings.build import World, build_world, instantiate
from fedsim.settings.groups import Settings
from fedsim.workloads import metrics as figures
from fedsim.workloads.by_class import ByClass
from fedsim.workloads.fingerprint import check_same, of_run

TRAIN, EVALUATE = "train", "evaluate"
MS, FLOPS = "latency_ms", "flops"  # of an inference, among the metrics of a client that judges
COLUMNS = ["round", "phase", "client", "outcome", "reason", "start_s", "up_s", "num_examples", "metrics"]
COLUMNS += ["work"]


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
        for (number, phase, _), group in groupby(rows, lambda row: (row["round"], row["phase"], row["start_s"])):
            clients = {row["client"]: _recorded(row, works) for row in group}
            found.setdefault(number, []).append(RecordedExchange(phase, clients))
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
        _has_worked(outcome, row["up_s"]),
    )


class RecordedEngine(Engine):
    """Answers with what clients did in the run, for a fleet on which it may cost something else.

    Attributes:
        exchange: whose answers are asked for next.
    """

    def __init__(self, before: World, now: World):
        assume_task_identity()
        self.before, self.now = before, now
        self.plan: CompressionPlan = instantiate(now.settings.groups, "compression")
        self.trainer = instantiate(now.settings.groups, "trainer")
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
            metrics = self._predicted(metrics, recorded.work, client, task.broadcast.round)
        if ended:
            return ClientAnswer(client, "out_of_memory", recorded.reason, work=recorded.work)
        return ClientAnswer(client, work=recorded.work, num_examples=recorded.num_examples, metrics=metrics)

    def _predicted(self, metrics: Mapping[str, float], work: Work, client: int, number: int) -> dict[str, float]:
        """Metrics of a judged model with the milliseconds of one inference as they are predicted here.

        Raises:
            UnknownError: if the network that they are of cannot be told from the work.
        """
        latency, fleet = self.now.latency, self.now.fleet
        own = fleet[client]
        bits = self.plan.recipe(own).bits if self.plan.active else self.trainer.integer_bits(number, own)
        kinds = fleet.profiles if len(fleet.profiles) > 1 else ()
        ends = [name.removeprefix(FLOPS) for name in metrics if name == FLOPS or name.startswith(f"{FLOPS}_")]
        before = {f"{MS}_on_{p.name}{end}" for p in self.before.fleet.profiles for end in ends}
        found: dict[str, float] = {}
        for name, value in metrics.items():
            if name in before:
                continue
            network = _network(work, metrics[FLOPS + name.removeprefix(MS)]) if name.startswith(MS) else None
            found[name] = value if network is None else deployed_ms(latency, network, fleet[client], bits)
            end = name.removeprefix(FLOPS)
            if name != end and end in ends:
                judged = _network(work, value)
                found |= {f"{MS}_on_{p.name}{end}": deployed_ms(latency, judged, p, bits) for p in kinds}
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
        there: the command that trains it there.

    Attributes:
        ended: why it ends before the run did; empty where it does not.
        weights: the run's last ones; None where they were not kept.
    """

    weights: ArrayRecord | None = None

    def __init__(self, world: World, before: World, folder: Path, there: str):
        self.recorder = RecordedEngine(before, world)
        super().__init__(world, self.recorder)
        self.grid.averages = False  # nobody sends weights
        self.folder, self.there = folder, there
        self.before = {report.round: report for report in read_rounds(folder)}
        if (saved := checkpoint.load(folder)) is not None:
            if saved.damaged:
                raise ConfigError(saved.damaged[0])
            if saved.round == max(self.before):
                self.weights, self.arrays = saved.weights, saved.weights
        self.exchanges = recorded_exchanges(folder)
        self.ended = ""
        self._ahead: list[RecordedExchange] = []  # of the round that goes on

    def check(self) -> None:
        """Refuses devices on which the method itself would have gone another way.

        Raises:
            ConfigError: saying what it decides by them.
        """
        if self.loop.is_buffered:
            raise ConfigError(
                f"{self.folder} cannot be re-priced: with loop=buffer the weights that a client starts from depend on "
                f"when others arrive; run it there: {self.there}"
            )
        before, now = self.recorder.before, self.world
        groups = ("fleet", "latency")
        if all(before.settings.groups[group] == now.settings.groups[group] for group in groups):
            return
        half, clients = server_half(self.strategy), range(len(now.fleet))
        trainer = instantiate(now.settings.groups, "trainer")
        compression = instantiate(now.settings.groups, "compression")
        changed: dict[str, Callable[[], bool]] = {
            BY_NAME: lambda: any(before.fleet.device_name(c) != now.fleet.device_name(c) for c in clients),
            BY_MEMORY: lambda: any(before.fleet[c].memory_bytes != now.fleet[c].memory_bytes for c in clients),
            BY_LATENCY: lambda: True,
        }
        rule = self.participants
        if rule.reads_devices:
            raise ConfigError(
                f"{self.folder} cannot be re-priced on these devices: {rule.reads_devices}, so that others would have "
                f"taken part; run it there: {self.there}"
            )
        for part in (half, trainer, compression, before.workload):
            for figure, what in part.device_reads.items():
                if changed[figure]():
                    raise ConfigError(
                        f"{self.folder} cannot be re-priced on these devices: {what}, so that its clients would have "
                        f"learned something else; run it there: {self.there}"
                    )
        always = all(isinstance(world.fleet.availability, Always) for world in (before, now))
        if (half.asks_reachable or rule.chooses) and not always:
            name = type(rule if rule.chooses else self.strategy).__name__
            raise ConfigError(
                f"{self.folder} cannot be re-priced where clients sleep: {name} asks those "
                f"whom it can reach, and others would have answered; run it there: {self.there}"
            )

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
            exchange = self._ahead.pop(0)
            self._repeat(exchange)
            if exchange.phase == TRAIN:
                break
        before = self.before[number]
        judged = bool(figures.judged([before], self.primary))
        if judged != self.is_judged(number):
            raise UnknownError("the model was " + ("judged then" if judged else "not judged then"))
        return {name: value for name, value in before.metrics.items() if not name.startswith(figures.CLIENTS)}

    def complete(self, number: int) -> None:
        """Repeats the exchanges between training and evaluation."""
        while self._ahead and self._ahead[0].phase != EVALUATE:
            self._repeat(self._ahead.pop(0))

    def judge(self, number: int) -> dict[str, float]:
        """Returns nothing: what was judged is among the metrics of the round; of round 0, all."""
        return {} if number else dict(self.before[0].metrics)

    def deploy(self) -> list[dict[str, Any]]:
        """Returns what each kind of device runs of the model; empty where the weights are not known."""
        return super().deploy() if self.is_whole else []

    def by_class(self, number: int) -> ByClass | None:
        """Returns how the model does for each class; None where the weights are not known."""
        return super().by_class(number) if self.is_whole else None

    @property
    def origin(self) -> dict[str, Any]:
        """Returns where the rounds are from."""
        return {"run": str(self.folder), "rounds": max(self.before)}

    def facts(self) -> dict[str, Any]:
        """Returns where the rounds are from, and the weights of the last one where they are known."""
        facts = {**super().facts(), "repriced": {**self.origin, "ended": self.ended}}
        return facts if self.is_whole else {**facts, "weights_sha256": None}

    @property
    def is_whole(self) -> bool:
        """Whether it goes as far as the run, whose last weights are here."""
        return not self.ended and self.grid.round == max(self.before) and self.weights is not None

    def _messages(self, hook: str, number: int, *draw: str | int) -> list[Message]:
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
            if (
                recorded.work is not None
                and recorded.work.storage_bytes
                and recorded.has_worked != _has_worked(report.outcome, report.cost.up_s)
            ):
                raise UnknownError(f"client {report.client} would not keep between rounds what it kept then")


def _has_worked(outcome: str, up_s: float) -> bool:
    """Whether a client had done all its work when its part ended."""
    return outcome in ("completed", "late") or up_s > 0


def reprice(
    folder: Path, settings: Settings, out: Path, watch: Callable[[RoundReport], None] | None = None
) -> dict[str, Any]:
    """Writes a finished run anew as it would have been on other devices; returns its summary.

    Args:
        folder: of the run.
        settings: of the run, on the other devices.
        out: the new run folder.
        watch: called with each round.

    Raises:
        ConfigError, DataError: before anything is written: if the run is not finished, is damaged, has other data than
            those here, or would have gone another way there.
    """
    if not read_summary(folder):
        raise ConfigError(f"{folder} is not finished; end it first: fedsim resume {shlex.quote(str(folder))}")
    settings_before = settings_of_run(folder)
    before, world = build_world(json.dumps(settings_before)), build_world(json.dumps(settings))
    check_same(data_of_run(folder), settings_before, before.workload, folder)
    there = command_of(settings) or "fedsim run"
    federation = RepricedFederation(world, before, folder, there)
    federation.check()
    writer = RunWriter(federation, out, settings, of_run(settings, world.workload), Totals(), False, None)
    with writer:
        for report, clients in federation.rounds():
            writer.add(report, clients)
            if watch:
                watch(report)
        if federation.ended and not report.round:
            raise ConfigError(f"{folder} cannot be re-priced so: {federation.ended}; run it there: {there}")
        if not federation.is_whole:
            writer.checkpoints.every_s = None
        return writer.finish()
