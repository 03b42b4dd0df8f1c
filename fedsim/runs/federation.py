"""One run from top to bottom: build, the round loop, report.

The loop is ours and calls the hooks of a Flower `Strategy`, so any stock strategy runs as an edge workload; Flower's
own `start` has no clock, budget, early stop or evaluation cadence. Never a method.
"""

from __future__ import annotations

import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.exception import AppExitException
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from devices.errors import DeviceError, one_line
from devices.fleet import Fleet
from fedsim import __version__
from fedsim.engines.base import Engine
from fedsim.errors import ClientError, ConfigError, NotFiniteError, RunError, as_error, no_exit
from fedsim.grid.edge import ONE_METHOD, EdgeGrid
from fedsim.grid.exchange import ClientReport
from fedsim.grid.server_half import ServerContext, ServerModel
from fedsim.messages.cohort import OUTCOMES
from fedsim.messages.records import (
    ARRAYS,
    Instruction,
    all_finite,
    array_record,
    like,
    record_of,
    tensors_of,
)
from fedsim.models.roles import TensorRoles
from fedsim.report import strict_json
from fedsim.report.folder import RunFolder
from fedsim.report.place import check_free, new_run_folder
from fedsim.report.rounds import RoundReport, Totals, weights_sha256
from fedsim.report.split import keep_split
from fedsim.runs import checkpoint, forecast
from fedsim.runs.checkpoint import restore_strategy, strategy_state
from fedsim.runs.deployment import check_plan, deployments
from fedsim.runs.price_facts import price_facts
from fedsim.runs.price_models import FROM_THE_START, price_models, repriced
from fedsim.runs.server import ServerSide
from fedsim.seeding import seeded_globals
from fedsim.settings.build import World, build_world, instantiate, pick_device
from fedsim.settings.compose import from_run_config
from fedsim.settings.groups import Settings, devices_of_fleet, preset, preset_private
from fedsim.settings.run_settings import RunSettings
from fedsim.workloads import metrics as figures
from fedsim.workloads.fingerprint import DATA, check_same, of_run
from fedsim.workloads.metrics import Metric

Watch = Callable[[RoundReport], None]
CLIENTS_SETTINGS = "lower trainer.lr or set trainer.clip_norm"


class Federation:
    """A federation that can be stepped round by round: the global weights, the strategy and the edge grid.

    `arrays` holds the whole model; of private tensors it keeps the initial values.

    Args:
        world: data, fleet and latency model.
        engine: where clients run.
        observe: called with each client's id as its reply comes in (progress).
    """

    def __init__(self, world: World, engine: Engine, observe: Callable[[int], None] | None = None):
        settings = world.settings
        self.world, self.settings, self.seed = world, settings, settings.seed
        self.strategy = build_strategy(settings, world.workload.num_clients)
        self.model = world.workload.build_model().to(pick_device(settings.engine.device))
        self.roles = TensorRoles.of(self.model, settings.private)
        self.arrays = record_of(self.model.state_dict())
        self.primary = world.workload.primary
        self.target = target_of(settings, self.primary)
        self.has_ended = False  # it was restored from its end
        self.lowest = (math.inf, 0)  # test loss so far, and the round that had it
        self.server = ServerSide(self.strategy, self.roles)
        check_plan(
            instantiate(settings.groups, "compression"),
            self.model,
            world.workload.inputs(world.workload.sample(2))[0],
            world.fleet,
        )
        self.grid = EdgeGrid(
            engine,
            world.fleet,
            world.latency,
            world.config_json,
            seed=self.seed,
            deadline_s=settings.deadline_s,
            keep=settings.cohort if settings.num_asked > settings.cohort else None,
            averages=self.server.averages,
            on_client_error=settings.on_client_error,
            batch_clients=settings.engine.batch_clients,
            observe=observe,
        )
        self.server.begin(
            ServerContext(
                ServerModel.of(world.workload),
                world.latency,
                num_clients=len(world.fleet),
                seed=self.seed,
                rounds=settings.rounds,
                trained=self.roles.trained,
            )
        )

    def rounds(self, after: RoundReport | None = None) -> Iterator[tuple[RoundReport, list[ClientReport]]]:
        """Round 0 (the untrained model), then training rounds until one of the limits is reached.

        Args:
            after: the last round that is behind us (see `restore`); None begins with round 0.
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
            if self.is_over or number % settings.evaluate_every == 0 or number == settings.rounds:
                self.complete(number)
                metrics |= self.judge(number) | self.ask_clients(number)
            last, clients = self.report(number, start_s, metrics, started)
            yield last, clients

    def is_last(self, report: RoundReport) -> bool:
        """Whether one of the limits was reached in this round."""
        settings = self.settings
        score, target = report.metrics.get(self.primary.name), self.target
        good = score is not None and target is not None and self.primary.reaches(score, target)
        over = self.is_over or good or self.is_stale(report)
        return self.has_ended or report.round >= settings.rounds or (report.round > 0 and over)

    def is_stale(self, report: RoundReport) -> bool:
        """Whether the round was judged and the lowest test loss is `patience_rounds` old (nan is no loss).

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
        """Whether the simulated time is used up before another round can begin."""
        limit_s, clock = self.settings.max_simulated_s, self.grid.clock
        return limit_s is not None and clock.next_round_s(self.settings.round_every_s) >= limit_s

    def state(self) -> dict[str, Any]:
        """Between two rounds, what the rounds to come depend on, beside the settings and `arrays`."""
        loss, number = self.lowest
        lowest = {"loss": None if math.isinf(loss) else loss, "round": number}
        return {"grid": self.grid.state(), "strategy": strategy_state(self.strategy), "lowest": lowest}

    def restore(self, arrays: ArrayRecord, state: dict[str, Any] | None) -> None:
        """Goes on where another federation with the same settings was; without a state, where no round follows."""
        self.arrays, self.has_ended = arrays, state is None
        if state is None:
            return
        if lowest := state.get("lowest"):
            self.lowest = (math.inf if lowest["loss"] is None else lowest["loss"], lowest["round"])
        self.grid.restore(state["grid"])
        restore_strategy(self.strategy, state["strategy"])

    def train(self, number: int) -> dict[str, float]:
        """One training exchange and the new global weights; without replies the weights stay."""
        exchange = self.grid.exchange(self.instructions(number))
        self.server.closed(number, exchange)
        if not (replies := exchange.replies):
            return {}
        if self.server.mean_is_all:
            self.take(number, replies[0].content.array_records[ARRAYS])
            return self.means("train")
        try:
            arrays, metrics = self.server.aggregate(number, replies, self.shared)
        except AppExitException as error:
            reason = f"cannot use what the clients sent: {str(error).removesuffix('. Skipping aggregation.')}"
            beside = sorted({name for reply in replies for name in reply.content.array_records if name != ARRAYS})
            pair = f"; beside their weights they sent {beside}, {ONE_METHOD}" if beside else ""
            raise RunError(f"{self.server.name} {reason}{pair}") from error
        if arrays is not None:
            self.take(number, arrays)
        return self.with_means("train", metrics)

    def means(self, phase: str) -> dict[str, float]:
        """The mean of each metric over the clients of this round whose replies were accepted: see `metrics`."""
        return figures.means(c for c in self.grid.reports if c.phase == phase and c.outcome == "completed")

    def with_means(self, phase: str, metrics: MetricRecord | None) -> dict[str, float]:
        """The means of what clients report, and what a strategy adds of its own.

        A strategy with a function of its own for them has the last word; Flower's weighs all of them by examples.
        """
        own, means = _plain(metrics), self.means(phase)
        return own | means if self.server.metrics_function(phase) is aggregate_metricrecords else means | own

    def take(self, number: int, shared: ArrayRecord) -> None:
        """Makes these the global weights; what is private stays as it was.

        Raises:
            RunError: if they are not finite: clients whose own updates are not have failed before; if they do not fit.
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
        """The weights that are sent and averaged; all of them unless some are private."""
        if not self.roles.private:
            return self.arrays
        return array_record({name: array for name, array in self.arrays.items() if name not in self.roles.private})

    def instructions(self, number: int) -> list[Message]:
        """What the strategy sends to the clients of a round, addressed by client id."""
        self.grid.round = number
        shared = self.shared
        handed = self.server.handed(shared)
        with seeded_globals(self.seed, "cohort", number):
            messages = self.server.ask("configure_train", number, handed, ConfigRecord(), self.grid)
            return self.server.sent(messages, handed, shared)

    def complete(self, number: int) -> None:
        """Lets the strategy finish the weights before they are judged."""
        shared = self.shared
        handed = self.server.handed(shared)
        if (completed := self.server.ask("complete", number, handed, self.grid)) is not handed:
            self.take(number, self.server.whole(completed, shared))

    def judge(self, number: int) -> dict[str, float]:
        """Returns the metrics of the global model on held-out examples, on the server, at no simulated cost.

        Where tensors are private, the server has their initial values only: what clients learn shows in `ask_clients`.

        Returns:
            The mark of `metrics.NOT_FINITE` alone where the model's output is not finite, and the run shall go on.

        Raises:
            RunError: where it shall not.
            ConfigError: where the model has not been trained yet.
        """
        self.model.load_state_dict(tensors_of(self.arrays))
        try:
            return self.world.workload.judge(self.model, number)
        except NotFiniteError:
            said = "the global model's output on the test examples is NaN or infinite"
            if number == 0:
                raise ConfigError(f"{said} before any training; look at model and workload.input_range") from None
            if self.settings.on_client_error == "drop":
                return {figures.NOT_FINITE: 1.0}
            raise RunError(f"{said} after round {number}; {self._advice()}") from None

    def _advice(self) -> str:
        """What to change where clients' updates are finite, and what is made of them is not."""
        strategy = [] if self.server.mean_is_all else numbers_of(self.settings.groups["strategy"], "strategy")
        of_server = f"change the strategy's settings ({', '.join(strategy)}), or " if strategy else ""
        return f"{of_server}{CLIENTS_SETTINGS}"

    def deploy(self) -> list[dict[str, Any]]:
        """What each kind of device runs of the global model, where they run less than all of it."""
        self.model.load_state_dict(tensors_of(self.arrays))
        return deployments(self.world, self.model)

    def ask_clients(self, number: int) -> dict[str, float]:
        """Mean metrics of the clients' models on their own held-out parts; the devices pay for it.

        Clients that failed, as those do of whose model the output is not finite, are counted in `client_failed`.
        A client's model is the global one, with its own values of what is private.
        """
        if not self.settings.evaluate_clients:
            return {}
        shared = self.shared
        handed = self.server.handed(shared)
        with seeded_globals(self.seed, "evaluate", number):
            asked_for = self.server.ask("configure_evaluate", number, handed, ConfigRecord(), self.grid)
            messages = self.server.sent(asked_for, handed, shared)
        replies = self.grid.send_and_receive(messages)
        failed = sum(r.phase == "evaluate" and r.outcome == "failed" for r in self.grid.reports)
        metrics = self.server.ask("aggregate_evaluate", number, replies) if replies else None
        counted = {"failed": float(failed)} if failed else {}
        return {f"client_{key}": value for key, value in (self.with_means("evaluate", metrics) | counted).items()}

    def report(
        self, number: int, start_s: float, metrics: dict[str, float], started: float
    ) -> tuple[RoundReport, list[ClientReport]]:
        """What happened since the last report."""
        clients, now_s = self.grid.take_reports(), self.grid.clock.now_s
        return RoundReport.of(number, now_s, now_s - start_s, clients, metrics, time.perf_counter() - started), clients


@no_exit()
def run(
    settings: Settings,
    engine: Engine,
    out: Path,
    watch: Watch | None = None,
    observe: Callable[[int], None] | None = None,
    resume: bool = False,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Runs one experiment into the folder `out` and returns its summary.

    Args:
        settings: of the run.
        engine: where clients run.
        out: the run folder.
        watch: called with each round that has ended.
        observe: called with each client's id as its reply comes in.
        resume: `out` holds the beginning of this run: go on from its checkpoint, or from the start where it has none.
        announce: told in a sentence that there was no checkpoint, and how long a run of minutes will roughly be.

    Raises:
        ConfigError, DataError: before anything is written; to go on with other data than those of the beginning, too.
        ClientError: when a client fails; what was written so far stays, with `failure.json`.
    """
    if not resume:
        check_free(out)
    federation = Federation(build_world(json.dumps(settings)), engine, observe)
    saved = checkpoint.load(out) if resume else None
    totals, priced, last, sums = Totals(), FROM_THE_START, -1, None
    data = of_run(settings, federation.world.workload)
    if saved is not None:
        check_same(saved.state.get(DATA), settings, federation.world.workload, out)
        totals, last, sums = _go_on(federation, saved, out), saved.round, saved.sums
        priced = repriced(saved.priced, last + 1)
    engine.start()  # one that cannot be started leaves nothing behind
    folder = RunFolder(out, settings, resume, last, sums)
    keep_split(federation.world.workload, out)
    if announce and resume and saved is None:
        announce(f"{out} has no checkpoint: this run starts anew")
    ahead_s = forecast.host_seconds(federation, max(last, 0)) if announce else 0.0
    if announce and (said := forecast.sentence(ahead_s, federation.settings.checkpoint_s)):
        announce(said)
    reports, started = folder.before, time.perf_counter()
    keeper = checkpoint.Checkpoints(out, federation.settings.checkpoint_s)
    if saved is not None:
        keeper.forget_after(saved)

    def keep(ended: bool = False) -> None:
        state: dict[str, Any] = {"totals": vars(totals), DATA: data}
        if not ended:
            state["federation"] = federation.state()
        try:
            saved = checkpoint.Saved(reports[-1].round, federation.arrays, state, versions(), priced)
            keeper.write(saved, folder.checksums)
        except checkpoint.NotKeptError as error:
            keeper.every_s = None
            warnings.warn(f"this run keeps no checkpoints: {error}, which no checkpoint can hold", stacklevel=2)

    try:
        for report, clients in federation.rounds(reports[-1] if reports else None):
            folder.add(report, clients)
            totals.add(report, clients)
            reports.append(report)
            if watch:
                watch(report)
            if keeper.due:
                keep()
        summary = summarise(federation, reports, totals, time.perf_counter() - started)
        workload, fleet = federation.world.workload, federation.world.fleet
        summary |= participation(reports, fleet, federation.primary, _stock("fewest_replies")(federation.strategy)) | {
            DATA: data
        }
        summary["price_models"], warning = price_models(priced, summary["rounds"])
        summary["warnings"] += [warning] if warning else []
        summary |= workload.figures(reports)
        if entries := federation.deploy():
            summary["compression"] = entries
        folder.flush()
        summary |= price_facts(out, fleet, federation.world.latency, summary["rounds"])
        keep(ended=True)
        folder.finish(summary, workload.pictures(reports))
        keeper.keep(1)
    except BaseException as raised:
        error = as_error(raised)
        # Halves that do not belong together are seen when they first meet: still a wrong setting, so nothing stays.
        if isinstance(error, ConfigError | DeviceError) and not resume and len(reports) <= 1:
            folder.discard()
        else:
            if isinstance(error, ClientError) and isinstance(error.instruction, Instruction):
                error.instruction = replace(error.instruction, data=data)
            folder.fail(error)
        if error is raised:
            raise
        raise error from raised
    finally:
        folder.close()
    return summary


def build_strategy(settings: RunSettings, num_clients: int) -> Strategy:
    """The strategy, told how many clients to sample; every Flower strategy takes these arguments of FedAvg."""
    train, judge = min(settings.num_asked, num_clients), settings.evaluate_clients
    strategy: Strategy = instantiate(
        settings.groups,
        "strategy",
        fraction_train=train / num_clients,
        min_train_nodes=train,
        fraction_evaluate=judge / num_clients,
        min_evaluate_nodes=judge,
        min_available_nodes=train,
    )
    _stock("check_cohort")(strategy, min(settings.cohort, num_clients))
    return strategy


def _stock(name: str) -> Callable[..., Any]:
    """What strategies.stock knows of Flower's own strategies."""
    from hydra.utils import get_method

    found: Callable[..., Any] = get_method(f"strategies.stock.{name}")
    return found


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


def summarise(federation: Federation, reports: list[RoundReport], totals: Totals, host_s: float) -> dict[str, Any]:
    """Returns the figures of a finished run; equal runs differ only in `host_s` (and `versions` between machines)."""
    settings, primary = federation.settings, federation.primary
    choices = settings.choices
    max_client = max(totals.client_joules.values(), default=0.0)
    return {
        "method": method_name(settings),
        "workload": choices["workload"],
        "fleet": fleet_name(settings),
        "seed": settings.seed,
        "rounds": reports[-1].round,
        **primary.as_entry(),
        "final": figures.final(reports, primary),
        "best": figures.best(reports, primary),
        "simulated_s": reports[-1].now_s,
        "energy_j": {"total": totals.joules, "max_client": max_client, "waiting": totals.wait_joules},
        "down_bytes": totals.down_bytes,
        "up_bytes": totals.up_bytes,
        "peak_memory_bytes": totals.peak_memory_bytes,
        "storage_bytes": totals.storage_bytes,
        "outcomes": {outcome: totals.outcomes[outcome] for outcome in OUTCOMES},
        "not_finite_rounds": len(figures.not_finite(reports)),
        "to_target": figures.to_target(reports, federation.target, primary),
        "host_s": host_s,
        "weights_sha256": weights_sha256(federation.arrays),
        "versions": versions(),
    }


def participation(reports: list[RoundReport], fleet: Fleet, primary: Metric, needed: int = 1) -> dict[str, Any]:
    """How many clients took part in the training, and warnings that some of them could not, or too few at a time."""
    count, seconds, rhythm_s = len(figures.took_part(reports)), reports[-1].now_s, fleet.availability.rhythm_s
    warned = []
    if lost := figures.not_finite(reports):
        many = f"{len(lost)} rounds, the first {lost[0]}" if len(lost) > 1 else f"round {lost[0]}"
        warned.append(f"the global model's output was NaN or infinite after {many}: it has no {primary.title} there")
    if rhythm_s is not None and seconds < rhythm_s:
        short = f"clients of this fleet are online at hours of their own, and the run took {seconds:.4g} simulated s"
        warned.append(f"{short}: who slept then never took part; round_every_s=600 starts six rounds an hour")
    replies = [len(report.outcomes.get("completed", ())) for report in reports if report.cohort]
    if few := sum(0 < count < needed for count in replies):
        warned.append(
            f"in {few} of {len(replies)} rounds fewer than {needed} clients completed, and the strategy's guarantee "
            "needs so many"
        )
    return {
        "clients": {"population": len(fleet), "took_part": count, "never": len(fleet) - count},
        "warnings": warned,
    }


def numbers_of(tree: Mapping[str, Any], prefix: str) -> list[str]:
    """The numbers among a group's settings as a user writes them, e.g. "strategy.eta=0.1"."""
    found: list[str] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += numbers_of(value, f"{prefix}.{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(f"{prefix}.{key}={value}")
    return found


def method_name(settings: RunSettings) -> str:
    """The method preset, with what was exchanged of it; strategy and trainer where no preset was taken."""
    choices = settings.choices
    usual = preset_private(choices["method"]) if choices.get("method") else []
    private = [f"private=[{','.join(settings.private)}]"] if list(settings.private) != usual else []
    if choices.get("method"):
        own = preset(choices["method"])
        changed = [f"{group}={choices.get(group)}" for group, name in own.items() if choices.get(group) != name]
        return " ".join([str(choices["method"]), *changed, *private])
    strategy, trainer = choices["strategy"], choices["trainer"]
    return " ".join([str(strategy) if trainer in ("sgd", strategy) else f"{strategy}+{trainer}", *private])


def fleet_name(settings: RunSettings) -> str:
    """The fleet that was chosen, and whether its devices are others than that option's."""
    name = str(settings.choices["fleet"])
    usual = devices_of_fleet(name)
    return name if usual in (None, settings.groups["fleet"].get("devices")) else f"{name}, own devices"


def versions() -> dict[str, str]:
    """What the figures may depend on."""
    libraries = {name: version(name) for name in ("torch", "flwr", "numpy")}
    return {"python": platform.python_version(), "fedsim": __version__, **libraries}


def _go_on(federation: Federation, saved: checkpoint.Saved, out: Path) -> Totals:
    """Brings a federation to where a checkpoint was written; the sums over the rounds so far.

    Raises:
        ConfigError: if the checkpoint is not of a run with these settings.
    """
    for reason in saved.damaged:
        warnings.warn(f"{reason}; this run goes on from round {saved.round}, of the checkpoint before", stacklevel=3)
    _compare_versions(saved.versions)
    if saved.sums is None:
        warnings.warn(
            "fedsim 0.1 wrote no checksums: nobody can tell whether what this run goes on from is undamaged",
            stacklevel=3,
        )
    try:
        federation.restore(saved.weights, saved.state.get("federation"))
        return Totals(**saved.state["totals"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = one_line(error)
        point = f"the checkpoint of round {saved.round} in {out}"
        raise ConfigError(f"{point} is not of a run with these settings: {type(error).__name__}: {reason}") from error


def _compare_versions(before: dict[str, str]) -> None:
    """Warns of libraries that are not those that the run began with."""
    now = versions()
    if changed := [
        f"{name} {before[name]}, now {now[name]}" for name in now if before.get(name, now[name]) != now[name]
    ]:
        others = "; ".join(changed)
        warnings.warn(f"this run began with {others}: its last bits may differ from an unbroken one's", stacklevel=3)


def _plain(metrics: MetricRecord | None) -> dict[str, float]:
    return {key: float(value) for key, value in (metrics or {}).items() if isinstance(value, int | float)}


# --- under Flower's own runtime ------------------------------------------------------------------------------------

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """`flwr run`: the same run on Flower's own engine. A failure leaves `failure.json` in the run folder."""
    from fedsim.engines.flower.engine import FlowerEngine
    from fedsim.engines.session_folder import usual_files

    usual_files()  # the run folder is the user's, and no part of the session
    settings = from_run_config(dict(context.run_config))
    with new_run_folder(settings) as out:
        print(f"run folder: {out.resolve()}", flush=True)
        torch.set_num_threads(settings["engine"]["threads"])
        summary = run(settings, FlowerEngine(grid), out, watch=lambda report: print(report.to_json(), flush=True))
    print(strict_json.dumps(summary), flush=True)
