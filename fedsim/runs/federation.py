"""A federation, round by round: who is sent what, new global weights, and how good they are.

The loop is ours and calls the hooks of a Flower `Strategy`, so any stock strategy runs as an edge workload; Flower's
own `start` has no clock, budget, early stop or evaluation cadence. Never a method.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.app.exception import AppExitException
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from fedsim.attacks.colluding import with_colluders
from fedsim.engines.base import Engine
from fedsim.errors import ConfigError, NotFiniteError, RunError
from fedsim.exchanges.slices import model_cost
from fedsim.grid.edge import ONE_METHOD, EdgeGrid
from fedsim.grid.exchange import ClientReport
from fedsim.grid.loops import Loop
from fedsim.grid.participants import Participants, Roster
from fedsim.grid.server_half import ServerContext, ServerModel
from fedsim.messages.records import (
    ARRAYS,
    all_finite,
    array_record,
    like,
    record_of,
    tensors_of,
)
from fedsim.messages.secagg import SecureAggregation
from fedsim.models.roles import TensorRoles
from fedsim.report.rounds import RoundReport
from fedsim.runs.checkpoint import restore_strategy, strategy_state
from fedsim.runs.deployment import check_plan, deployments
from fedsim.runs.pairs import check_pairs, make_strategy, no_data, no_questions
from fedsim.runs.server import ServerSide
from fedsim.seeding import seeded_globals
from fedsim.settings.build import World, instantiate, pick_device
from fedsim.settings.names import used
from fedsim.settings.run_settings import RunSettings
from fedsim.workloads import metrics as figures
from fedsim.workloads.by_class import ByClass
from fedsim.workloads.metrics import Metric

CLIENTS_SETTINGS = "lower trainer.lr or set trainer.clip_norm"


class Federation:
    """A federation that can be stepped round by round: the global weights, the strategy and the edge grid.

    Args:
        world: data, fleet and latency model.
        engine: where clients run.
        observe: called with each client's id as its reply comes in (progress).

    Attributes:
        arrays: the global model; private tensors keep their initial values in it.
        has_ended: the federation was restored from the end of its run.
        lowest: the lowest test loss so far, and the round that had it.
    """

    def __init__(self, world: World, engine: Engine, observe: Callable[[int], None] | None = None):
        settings = world.settings
        self.world, self.settings, self.seed = world, settings, settings.seed
        self.loop: Loop = instantiate(settings.groups, "loop")
        self.participants: Participants = instantiate(settings.groups, "participants")
        self.strategy = make_strategy(settings, world.workload.num_clients, self.loop, self.participants)
        self.model = world.workload.build_model().to(pick_device(settings.engine.device, settings.engine.tf32))
        self.roles = TensorRoles.of(self.model, settings.private)
        self.arrays = record_of(self.model.state_dict())
        self.primary = world.workload.primary
        self.target = target_of(settings, self.primary)
        self.has_ended = False
        self.lowest = (math.inf, 0)
        self.server = ServerSide(self.strategy, self.roles)
        self.uplink = uplink = instantiate(settings.groups, "uplink")
        check_pairs(settings, self.server, self.loop, self.participants, uplink)
        self.attack = world.attack
        self.malicious = self.attack.clients(world.workload.num_clients, self.seed)
        check_plan(
            instantiate(settings.groups, "compression"),
            self.model,
            world.workload.inputs(world.workload.sample(2))[0],
            world.fleet,
        )
        self.grid = EdgeGrid(
            with_colluders(engine, world, self.roles.trained - self.roles.private, self.loop.is_buffered),
            world.fleet,
            world.latency,
            world.config_json,
            seed=self.seed,
            deadline_s=settings.deadline_s,
            keep=settings.cohort if settings.num_asked > settings.cohort else None,
            averages=self.server.averages,
            alike=self.server.alike,
            on_client_error=settings.on_client_error,
            batch_clients=settings.engine.batch_clients,
            observe=observe,
            pauses=self.loop.pauses,
            fewest=uplink.fewest if isinstance(uplink, SecureAggregation) else None,
        )
        self.server.begin(
            ServerContext(
                ServerModel.of(world.workload),
                world.latency,
                num_clients=len(world.fleet),
                seed=self.seed,
                rounds=settings.rounds,
                trained=self.roles.trained - self.roles.private,
            )
        )
        self._meet_clients()

    def _meet_clients(self) -> None:
        """Lets the rule that chooses clients know what a server does."""
        world, settings, rule = self.world, self.settings, self.participants
        if not rule.chooses:
            return
        step = model_cost(world.workload, self.model, "dense", next(self.model.parameters()).device)
        knows = (self.grid, world.latency, step, self.shared, self.seed, settings.deadline_s)
        secrets = no_data(settings, self.server, self.uplink), no_questions(settings, self.loop)
        rule.begin(Roster(*knows, *secrets))
        self.grid.choose = self.choose

    def choose(self, number: int, count: int | None = None, repeat: int = 0) -> list[int]:
        """Returns the clients that the rule chooses.

        Args:
            number: of the round.
            count: how many at most; None: as many as a round asks.
            repeat: how often it chose in this round before.
        """
        self.grid.round = number
        count = min(self.settings.num_asked, len(self.world.fleet)) if count is None else count
        free = [client for client in range(len(self.world.fleet)) if self.grid.can_be_sent(client)]
        return self.participants.chosen(number, count, free, self.shared, repeat)

    def rounds(self, after: RoundReport | None = None) -> Iterator[tuple[RoundReport, list[ClientReport]]]:
        """Yields round 0 (the untrained model), then training rounds until one of the limits is reached.

        Args:
            after: the last round before a `restore`; None begins with round 0.
        """
        settings, clock, last = self.settings, self.grid.clock, after
        if last is None:
            started = time.perf_counter()
            last, clients = self.report(0, 0.0, self.judge(0), started)
            yield last, clients
        while not self.is_last(last):
            clock.begin_round(settings.round_every_s)
            number, started, start_s = last.round + 1, time.perf_counter(), clock.now_s
            metrics = self.train(number)
            if self.is_judged(number):
                self.complete(number)
                metrics |= self.judge(number) | self.ask_clients(number)
            last, clients = self.report(number, start_s, metrics, started)
            yield last, clients

    def is_last(self, report: RoundReport) -> bool:
        """Returns whether one of the limits was reached in this round."""
        settings = self.settings
        score, target = report.metrics.get(self.primary.name), self.target
        good = score is not None and target is not None and self.primary.reaches(score, target)
        over = self.is_over or good or self.is_stale(report)
        return self.has_ended or report.round >= settings.rounds or (report.round > 0 and over)

    def is_judged(self, number: int) -> bool:
        """Returns whether the model is judged after this round: each so-many-th, and the last one."""
        settings = self.settings
        return self.is_over or number % settings.evaluate_every == 0 or number == settings.rounds

    def is_stale(self, report: RoundReport) -> bool:
        """Returns whether the round was judged and the lowest test loss is `patience_rounds` old (nan is no loss).

        Where a workload has no test loss, the primary metric takes its place.
        """
        patience, name = self.settings.patience_rounds, self.primary.name
        if figures.LOSS in report.metrics:
            loss = report.metrics[figures.LOSS]
        elif name in report.metrics:
            loss = -self.primary.gain(report.metrics[name])
        else:
            return False
        if loss < self.lowest[0]:
            self.lowest = (loss, report.round)
        return patience is not None and report.round - self.lowest[1] >= patience

    @property
    def is_over(self) -> bool:
        """Returns whether the simulated time is used up before another round can begin."""
        limit_s, clock = self.settings.max_simulated_s, self.grid.clock
        return limit_s is not None and clock.next_round_s(self.settings.round_every_s) >= limit_s

    def state(self) -> dict[str, Any]:
        """Returns what later rounds depend on beside the settings and `arrays`; to be asked between two rounds."""
        loss, number = self.lowest
        lowest = {"loss": None if math.isinf(loss) else loss, "round": number}
        state = {"grid": self.grid.state(), "strategy": strategy_state(self.strategy), "lowest": lowest}
        if loop := self.loop.state(self.grid):
            state["loop"] = loop
        if self.participants.chooses:
            state["participants"] = self.participants.state()
        return state

    def restore(self, arrays: ArrayRecord, state: dict[str, Any] | None) -> None:
        """Takes the place of another federation with the same settings; without a state, of one whose run has ended."""
        self.arrays, self.has_ended = arrays, state is None
        if state is None:
            return
        if lowest := state.get("lowest"):
            self.lowest = (math.inf if lowest["loss"] is None else lowest["loss"], lowest["round"])
        self.grid.restore(state["grid"])
        restore_strategy(self.strategy, state["strategy"])
        if "loop" in state:
            self.loop.restore(self.grid, state["loop"])
        if "participants" in state:
            self.participants.restore(state["participants"])

    def train(self, number: int) -> dict[str, float]:
        """Trains one round, takes the new global weights and returns the metrics; without replies the weights stay."""
        self.grid.round = number
        exchange = replace(self.loop.exchange(self.grid, number, self.instructions), weights=self.shared)
        self.server.closed(number, exchange)
        if self.participants.chooses:
            self.participants.learn(number, self.participants.roster.shown(exchange.reports))
        if not (replies := exchange.replies):
            return {}
        if self.server.mean_is_all:
            self.take(number, replies[0].content.array_records[ARRAYS])
            return self.means("train")
        try:
            with seeded_globals(self.seed, "aggregate", number):  # Flower's noise is drawn there
                arrays, metrics = self.server.aggregate(number, replies, self.shared)
        except AppExitException as error:
            reason = f"cannot use what the clients sent: {str(error).removesuffix('. Skipping aggregation.')}"
            beside = sorted({name for reply in replies for name in reply.content.array_records if name != ARRAYS})
            pair = f"; beside their weights they sent {beside}, {ONE_METHOD}" if beside else ""
            raise (ConfigError if beside else RunError)(f"{self.server.name} {reason}{pair}") from error
        if arrays is not None:
            self.take(number, arrays)
        return self.with_means("train", metrics)

    def means(self, phase: str) -> dict[str, float]:
        """Returns the mean of each metric over the clients of this round whose replies were accepted: see `metrics`."""
        completed = [c for c in self.grid.reports if c.phase == phase and c.outcome == "completed"]
        return figures.means(self.marked(completed))

    def marked(self, reports: Sequence[ClientReport]) -> list[ClientReport]:
        """Returns reports with who is malicious among those that trained: the run knows, and no strategy."""
        if not self.malicious:
            return list(reports)
        return [
            replace(r, metrics={**r.metrics, figures.MALICIOUS: float(r.client in self.malicious)})
            if r.phase == "train"
            else r
            for r in reports
        ]

    def with_means(self, phase: str, metrics: MetricRecord | None) -> dict[str, float]:
        """Returns the means of the clients' metrics, and those that the strategy adds.

        Where both have one, the strategy's counts if it has a function of its own for metrics: Flower's function weighs
        all of them by examples.
        """
        own, means = _plain(metrics), self.means(phase)
        return own | means if self.server.metrics_function(phase) is aggregate_metricrecords else means | own

    def take(self, number: int, shared: ArrayRecord) -> None:
        """Makes these the global weights; private tensors stay as they were.

        Raises:
            RunError: if they do not fit, or are not finite (a client whose own update is not finite has failed before).
        """
        name = self.server.name
        try:
            new = like(shared, self.shared)
            finite = all_finite(new)
        except (LookupError, TypeError, ValueError) as error:
            raise RunError(f"{name} made weights that do not fit in round {number}: {error}") from error
        if not finite:
            raise RunError(f"{name} made NaN or infinite weights of finite updates in round {number}; {self._advice()}")
        self.arrays = array_record({name: new.get(name, array) for name, array in self.arrays.items()})

    @property
    def shared(self) -> ArrayRecord:
        """Returns the weights that are sent and averaged: all that are not private."""
        if not self.roles.private:
            return self.arrays
        return array_record({name: array for name, array in self.arrays.items() if name not in self.roles.private})

    def instructions(self, number: int, clients: Sequence[int] | None = None, repeat: int = 0) -> list[Message]:
        """Returns what the strategy sends to the clients of a round, addressed by client id.

        Args:
            number: of the round.
            clients: all of whom it is to take; None: it draws some.
            repeat: how often it was asked in this round before.
        """
        self.grid.round, self.grid.offered = number, clients
        try:
            return self._messages("configure_train", number, "cohort", number, *((repeat,) if repeat else ()))
        finally:
            self.grid.offered = None

    def _messages(self, hook: str, number: int, *draw: str | int) -> list[Message]:
        """Returns what a hook of the strategy sends.

        Args:
            hook: its name.
            number: of the round.
            draw: names its global draws.
        """
        shared = self.shared
        handed = self.server.handed(shared)
        with seeded_globals(self.seed, *draw):
            messages = self.server.ask(hook, number, handed, ConfigRecord(), self.grid)
            return self.server.sent(messages, handed, shared)

    def complete(self, number: int) -> None:
        """Lets the strategy finish the weights before they are judged."""
        shared = self.shared
        handed = self.server.handed(shared)
        if (completed := self.server.ask("complete", number, handed, self.grid)) is not handed:
            self.take(number, self.server.whole(completed, shared))

    def judge(self, number: int) -> dict[str, float]:
        """Judges the global model on the server's held-out examples, at no simulated cost.

        Of private tensors the server has the initial values only: what clients learn shows in `ask_clients`.

        Returns:
            The metrics; `metrics.NOT_FINITE` alone where the output is not finite and on_client_error=drop goes on.

        Raises:
            RunError: where the output is not finite and the run is to stop.
            ConfigError: where it is not finite before any training.
        """
        self.model.load_state_dict(tensors_of(self.server.half.judged(self.arrays)))
        try:
            workload = self.world.workload
            return workload.judge(self.model, number) | self.attack.judged(workload, self.model)
        except NotFiniteError:
            what = "the global model's output on the test examples is NaN or infinite"
            if number == 0:
                raise ConfigError(f"{what} before any training; look at model and workload.input_range") from None
            if self.settings.on_client_error == "drop":
                return {figures.NOT_FINITE: 1.0}
            raise RunError(f"{what} after round {number}; {self._advice()}") from None

    def _advice(self) -> str:
        """Says what to change where the clients' updates are finite and the weights made of them are not."""
        strategy = [] if self.server.mean_is_all else numbers_of(self.settings.groups["strategy"], "strategy")
        of_server = f"change the strategy's settings ({', '.join(strategy)}), or " if strategy else ""
        return f"{of_server}{CLIENTS_SETTINGS}"

    def deploy(self) -> list[dict[str, Any]]:
        """Returns what each kind of device runs of the global model; empty where all run the whole model."""
        self.model.load_state_dict(tensors_of(self.server.half.judged(self.arrays)))
        return deployments(self.world, self.model)

    def by_class(self, number: int) -> ByClass | None:
        """Returns how the global model does for each class after a round; None without classes or a finite output."""
        self.model.load_state_dict(tensors_of(self.server.half.judged(self.arrays)))
        try:
            return self.world.workload.by_class(self.model, number)
        except NotFiniteError:
            return None

    @property
    def origin(self) -> dict[str, Any] | None:
        """Returns the run that these rounds are from, where clients did and learned it; None where they do here."""
        return None

    def facts(self) -> dict[str, Any]:
        """Returns what else there is to say of this run in its summary: who attacks, and what masks take."""
        found: dict[str, Any] = {}
        if self.malicious or self.attack.share == 0:
            aim = self.attack.aim(self.world.workload)
            name = used(self.settings, "attack")
            found["attack"] = {"name": name, "malicious": len(self.malicious), **({"aim": aim} if aim else {})}
        if isinstance(self.uplink, SecureAggregation):
            sent = (math.prod(a.shape) for name, a in self.arrays.items() if name not in self.roles.private)
            found["masking"] = self.uplink.facts(sum(sent) + 1, self.settings.num_asked)  # and what they count for
        return found

    def ask_clients(self, number: int) -> dict[str, float]:
        """Lets clients judge their models on their own held-out parts; the devices pay for it.

        A client's model is the global one with the client's own private tensors. A client whose model's output is not
        finite fails, and is counted in `client_failed`.

        Returns:
            The means of their metrics, and the mean of the tenth of them that does worst.
        """
        if not self.settings.evaluate_clients:
            return {}
        with self.loop.beside(self.grid):
            replies = self.grid.send_and_receive(self._messages("configure_evaluate", number, "evaluate", number))
        asked = [r for r in self.grid.reports if r.phase == "evaluate"]
        failed = sum(r.outcome == "failed" for r in asked)
        worst = figures.worst_tenth((r for r in asked if r.outcome == "completed"), self.primary)
        metrics = self.server.ask("aggregate_evaluate", number, replies) if replies else None
        counted = {"failed": float(failed)} if failed else {}
        means = self.with_means("evaluate", metrics) | counted
        return {f"{figures.CLIENTS}{key}": value for key, value in means.items()} | worst

    def report(
        self, number: int, start_s: float, metrics: dict[str, float], started: float
    ) -> tuple[RoundReport, list[ClientReport]]:
        """Returns what happened since the last report: the round, and each client in it."""
        clients, now_s = self.marked(self.grid.take_reports()), self.grid.clock.now_s
        return RoundReport.of(number, now_s, now_s - start_s, clients, metrics, time.perf_counter() - started), clients


def target_of(settings: RunSettings, primary: Metric) -> float | None:
    """Returns the value of the primary metric at which the run stops; None where it goes on.

    Raises:
        ConfigError: if both settings name one, or `target_accuracy` does for a workload that has no accuracy.
    """
    target, accuracy = settings.target, settings.target_accuracy
    if accuracy is None:
        return None if target is None else float(target)
    if target is not None:
        raise ConfigError(f"target={target} and target_accuracy={accuracy} both say when to stop; set one of them")
    if primary.name != figures.ACCURACY.name:
        better = "higher" if primary.higher_is_better else "lower"
        raise ConfigError(
            f"target_accuracy={accuracy} is for workloads with an accuracy, and this one is judged by {primary.name} "
            f"({better} is better); set target={accuracy} to a value of that"
        )
    return float(accuracy)


def numbers_of(tree: Mapping[str, Any], prefix: str) -> list[str]:
    """Lists the numbers among a group's settings as a user writes them, e.g. "strategy.eta=0.1"."""
    found: list[str] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += numbers_of(value, f"{prefix}.{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(f"{prefix}.{key}={value}")
    return found


def _plain(metrics: MetricRecord | None) -> dict[str, float]:
    return {key: float(value) for key, value in (metrics or {}).items() if isinstance(value, int | float)}
