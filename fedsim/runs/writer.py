"""Runs a federation and writes what becomes of it: the run folder, its checkpoints, the summary, or why it failed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from devices.errors import DeviceError, one_line
from fedsim.engines.base import Engine
from fedsim.errors import ClientError, ConfigError, DataError, as_error, no_exit
from fedsim.grid.exchange import ClientReport
from fedsim.messages.updates import Instruction
from fedsim.report.folder import RunFolder
from fedsim.report.loggers import Log, check_logger
from fedsim.report.place import BY_ROUNDS, check_free
from fedsim.report.rounds import RoundReport, Totals
from fedsim.report.split import write_split
from fedsim.runs import checkpoint, forecast
from fedsim.runs.asynchrony import asynchrony
from fedsim.runs.federation import Federation
from fedsim.runs.own_code import write_code
from fedsim.runs.price_facts import price_facts
from fedsim.runs.price_models import FROM_THE_START, price_models, repriced
from fedsim.runs.prolong import goes_by_rounds
from fedsim.runs.summary import attacked, networks, nobody_completed, participation, summarise, unjudged, versions
from fedsim.settings.build import build_world, stock_rule
from fedsim.settings.groups import Settings
from fedsim.settings.run_settings import RunSettings
from fedsim.workloads.fingerprint import DATA, Fingerprint, check_same, of_run
from fedsim.workloads.metrics import ASYNCHRONY, NETWORKS

Watch = Callable[[RoundReport], None]


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
    check_logger(settings["logger"])
    federation = Federation(build_world(json.dumps(settings)), engine, observe)
    workload, saved = federation.world.workload, checkpoint.load(out) if resume else None
    data, totals = of_run(settings, workload), Totals()
    if saved is not None:
        check_same(saved.state.get(DATA), settings, workload, out)
        totals = _go_on(federation, saved, out)
    engine.start()  # one that cannot be started leaves nothing behind
    writer = RunWriter(federation, out, settings, data, totals, resume, saved)
    if announce:
        _announce(announce, federation, out, resume, saved)
    with writer:
        writer.log = Log(out, settings, writer.reports)
        for report, clients in federation.rounds(writer.reports[-1] if writer.reports else None):
            writer.add(report, clients)
            if watch:
                watch(report)
            writer.keep_if_due()
        return writer.finish()


class RunWriter:
    """Writes a run into its folder, and what it failed of when its context is left by an error.

    Args:
        federation: before its first round, or where the checkpoint was written.
        out: the run folder.
        settings: of the run, as its folder holds them.
        data: fingerprint of the data.
        totals: of the rounds behind it.
        resume: the folder holds the beginning of this run.
        saved: the checkpoint from which it goes on; None where it starts.

    Attributes:
        reports: of all rounds so far.
        log: what is told to a logger, beside the folder.
    """

    def __init__(
        self,
        federation: Federation,
        out: Path,
        settings: Settings,
        data: Fingerprint,
        totals: Totals,
        resume: bool,
        saved: checkpoint.Saved | None,
    ):
        self.federation, self.out, self.data, self.totals, self.resume = federation, out, data, totals, resume
        last, sums = (-1, None) if saved is None else (saved.round, saved.sums)
        self.priced = FROM_THE_START if saved is None else repriced(saved.priced, last + 1)
        self.folder = RunFolder(out, settings, resume, last, sums, federation.primary, federation.origin)
        write_split(federation.world.workload, out)
        write_code(out, settings)
        self.reports: list[RoundReport] = self.folder.before
        self.log: Log | None = None
        self.checkpoints = checkpoint.Checkpoints(out, federation.settings.checkpoint_s)
        if saved is not None:
            self.checkpoints.forget_after(saved)

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if raised is not None:
                self._fail(raised)
        finally:
            self.folder.close()
            if self.log is not None:
                self.log.close(raised is None)

    def add(self, report: RoundReport, clients: list[ClientReport]) -> None:
        """Writes a round that has ended."""
        self.folder.add(report, clients)
        self.totals.add(report, clients)
        self.reports.append(report)
        if self.log is not None:
            self.log.add(report)

    def keep_if_due(self) -> None:
        """Writes a checkpoint when it is time for one, or when a longer run would go on from here."""
        settings = self.federation.settings
        if self.checkpoints.due or self.reports[-1].round == goes_on_from(settings) < settings.rounds:
            self._keep(self.federation.state())

    def finish(self) -> dict[str, Any]:
        """Writes the summary and the last checkpoint; returns the summary."""
        federation, reports, world = self.federation, self.reports, self.federation.world
        needed = stock_rule("fewest_replies")(federation.strategy)
        summary = summarise(federation, reports, self.totals, time.perf_counter() - self._started)
        summary |= participation(reports, world.fleet, federation.primary, needed) | {DATA: self.data}
        summary["price_models"], warning = price_models(self.priced, summary["rounds"])
        summary["warnings"] += [
            *nobody_completed(reports, federation),
            *unjudged(federation),
            *attacked(federation),
            *([warning] if warning else []),
        ]
        summary |= world.workload.figures(reports)
        if said := goes_by_rounds(world, federation.strategy):
            summary[BY_ROUNDS] = said
        by_class = federation.by_class(summary["rounds"])
        summary |= by_class.figures() if by_class else {}
        if entries := federation.deploy():
            summary["compression"] = entries
        summary |= federation.facts()
        self.folder.flush()
        if given := networks(federation.strategy, world.fleet):
            summary[NETWORKS] = given
        if federation.loop.is_buffered:
            summary[ASYNCHRONY] = asynchrony(self.out, federation.grid)
        summary |= price_facts(self.out, world.fleet, world.latency, summary["rounds"])
        goes_on = summary["rounds"] == goes_on_from(federation.settings)
        self._keep(federation.state() if goes_on else None)
        self.folder.finish(summary, world.workload.pictures(reports), by_class)
        self.checkpoints.keep(kept_at_the_end(federation.settings))
        if self.log is not None:
            self.log.finish(summary)
        return summary

    def _keep(self, federation: dict[str, Any] | None) -> None:
        """Writes a checkpoint; without the state of the federation, one from which no round follows."""
        state: dict[str, Any] = {"totals": vars(self.totals), DATA: self.data}
        if federation is not None:
            state["federation"] = federation
        saved = checkpoint.Saved(self.reports[-1].round, self.federation.arrays, state, versions(), self.priced)
        try:
            self.checkpoints.write(saved, self.folder.checksums)
        except checkpoint.NotKeptError as error:
            self.checkpoints.every_s = None
            warnings.warn(f"this run keeps no checkpoints: {error}, which no checkpoint can hold", stacklevel=3)

    def _fail(self, raised: BaseException) -> None:
        """Notes why the run ended, or removes a folder in which nothing has happened.

        Raises:
            Exception: in place of an error that says less.
        """
        error = as_error(raised)
        # Halves that do not belong together are seen when they first meet: still a wrong setting, so nothing stays.
        if isinstance(error, ConfigError | DataError | DeviceError) and not self.resume and len(self.reports) <= 1:
            self.folder.discard()
        else:
            if isinstance(error, ClientError) and isinstance(error.instruction, Instruction):
                error.instruction = replace(error.instruction, data=self.data)
            self.folder.fail(error)
        if error is not raised:
            raise error from raised


def goes_on_from(settings: RunSettings) -> int:
    """The last round of a run after which a longer one is in the same state.

    It judges the model after the last round whatever `evaluate_every` says, which costs simulated time where clients
    judge; a longer one would not have.
    """
    return settings.rounds if settings.rounds % settings.evaluate_every == 0 else settings.rounds - 1


def kept_at_the_end(settings: RunSettings) -> int:
    """How many checkpoints a finished run keeps: the last, and the one from which a longer run would go on."""
    return 1 + settings.rounds - goes_on_from(settings)


def _announce(
    announce: Callable[[str], None], federation: Federation, out: Path, resume: bool, saved: checkpoint.Saved | None
) -> None:
    """Says that there was no checkpoint, and how long the run will roughly take."""
    if resume and saved is None:
        announce(f"{out} has no checkpoint: this run starts anew")
    ahead_s = forecast.host_seconds(federation, max(saved.round, 0) if saved else 0)
    if sentence := forecast.sentence(ahead_s, federation.settings.checkpoint_s):
        announce(sentence)


def _go_on(federation: Federation, saved: checkpoint.Saved, out: Path) -> Totals:
    """Brings a federation to where a checkpoint was written; returns the totals of the rounds so far.

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
