"""Measures what the engines cost above the bare PyTorch loop, side by side on this host.

Every side runs in its own process and they take turns, round by round; medians are compared, because absolute times on
a shared machine are noise and their ratios are not. Engines come from the caller.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from fedsim.cli.bench_sides import CapturedLoop, EngineFactory, EngineRounds, FastLoop, PlainLoop, SideProcess
from fedsim.errors import ConfigError
from fedsim.report.terminal import console, table, work_bar
from fedsim.settings.compose import compose
from fedsim.settings.groups import Settings

COHORT, CLIENTS, EXAMPLES, BATCH = 10, 100, 100, 20
ON_A_CARD = (128, 256)  # cohort and clients there
WARM_UP = 2
PLAIN, FAST, CAPTURED = "plain", "plain, channels last", "plain, captured"
SHAPES = {"resnet8": (3, 32, 32)}  # of examples; others take 1x28x28


@dataclass(frozen=True)
class Bench:
    """What a bench trains.

    Attributes:
        model: a model config that takes images.
        device: where all sides train.
        skew: alpha of the Dirichlet distribution of the clients' sizes; None: all have 100 examples.
        tf32: whether a card multiplies in 19 bits, on all sides.
        others: further overrides of the engines' runs, such as a method.
    """

    model: str = "lenet5"
    device: str = "cpu"
    skew: float | None = None
    tf32: bool = False
    others: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[int, int]:
        """Returns cohort and clients."""
        return ON_A_CARD if self.device == "cuda" else (COHORT, CLIENTS)

    def settings(self, engine: str, workers: int | None, clients: int, cohort: int) -> Settings:
        """Returns the settings of a run on an engine."""
        overrides = [
            "workload=blobs",
            f"workload.input_shape={list(SHAPES.get(self.model, (1, 28, 28)))}",
            f"workload.examples_per_client={EXAMPLES}",
            f"workload.size_alpha={'null' if self.skew is None else self.skew}",
            "workload.client_test_fraction=0",
            f"num_clients={clients}",
            f"cohort={cohort}",
            f"evaluate_clients={min(clients, max(CLIENTS, cohort))}",
            f"model={self.model}",
            "fleet=uniform",
            f"trainer.batch_size={BATCH}",
            "trainer.local_epochs=1",
            f"engine={engine}",
            f"engine.device={self.device}",
            f"engine.tf32={str(self.tf32).lower()}",
            *self.others,
        ]
        return compose([*overrides, f"engine.workers={workers}"] if workers and engine == "ray" else overrides)


def measure(
    make_engine: EngineFactory,
    bench: Bench,
    rounds: int = 30,
    engines: Sequence[str] = ("local",),
    workers: int | None = None,
    populations: Sequence[int] = (),
    cohorts: Sequence[int] = (),
) -> dict[str, Any]:
    """Measures client updates per second of bare loops and of each engine.

    Every update is one epoch over 100 examples of 1x28x28 in batches of 20, cohort 10 of 100; on a card 128 of 256. A
    round of an engine is the whole round: sampling, packing, training, averaging, clock, report files; only evaluation
    is left out.

    Args:
        make_engine: builds the engine that the settings name; a function of a module.
        bench: what is trained, and where.
        rounds: measured rounds of each side, after two to warm up.
        engines: options of the group `engine`, but for Flower's runtime.
        workers: of engines that have them; none for their own default.
        populations: numbers of clients at which rounds of each engine are timed as well,
        cohorts: with each of these cohorts.

    Returns:
        {"model", "device", "skew", "tf32", "cohort", "clients", "plain_updates_per_s", "plain_cpu_ms_per_update",
        "plain_channels_last_updates_per_s" (on a card "plain_captured_updates_per_s"), "engines": {name: {
        "updates_per_s", "examples_per_s", "ratio", "ratio_channels_last" (on a card "ratio_captured"), "start_s",
        "peak_rss_bytes", "cpu_ms_per_update", "cpu_ratio"}}, "sweep": [{"engine", "clients", "cohort", "round_s",
        "updates_per_s", "start_s", "idle_rss_bytes", "peak_rss_bytes"}]};
        ratios are medians over rounds, against the bare loop in the same turn; memory is that of the driver's process.

    Raises:
        ConfigError: for a population smaller than the cohort, or a model that takes no such images.
    """
    own_cohort, own_clients = bench.sizes
    sizes = [
        (n, c)
        for n in populations or ([max(own_clients, *cohorts)] if cohorts else ())
        for c in cohorts or (own_cohort,)
    ]
    for clients, cohort in sizes:
        if clients < cohort:
            raise ConfigError(f"--population takes numbers of at least {cohort} (the cohort), got {clients}")
    settings = {name: bench.settings(name, workers, own_clients, own_cohort) for name in engines}
    plain = replace(bench, others=()).settings("local", None, own_clients, own_cohort)
    with tempfile.TemporaryDirectory() as folder, work_bar(console()) as progress:
        task = progress.add_task("bench", total=(rounds + WARM_UP) * (1 + len(sizes)))
        makers: dict[str, Callable[[], SideProcess]] = {PLAIN: partial(SideProcess, PlainLoop, plain)}
        makers |= {name: partial(SideProcess, loop, plain) for name, loop in _beside(bench).items()}
        for name in engines:
            makers[name] = partial(SideProcess, EngineRounds, settings[name], make_engine, Path(folder) / name)
        measured = _take_turns(makers, rounds, lambda: progress.advance(task))
        result = _result(bench, engines, measured)
        makers = {}
        for clients, cohort in sizes:
            for name in engines:
                given = bench.settings(name, workers, clients, cohort)
                where = Path(folder) / f"{name}-{clients}-{cohort}"
                makers[f"{name} {clients} {cohort}"] = partial(SideProcess, EngineRounds, given, make_engine, where)
        if makers:
            measured = _take_turns(makers, rounds, lambda: progress.advance(task, len(sizes)))
            result["sweep"] = [_sweep_row(key, measured[key]) for key in makers]
    return result


def _result(bench: Bench, engines: Sequence[str], measured: Mapping[str, _Measured]) -> dict[str, Any]:
    """Returns what `measure` does, from the sides of its first part."""
    base, beside, (cohort, clients) = measured[PLAIN], _beside(bench), bench.sizes
    return {
        "model": bench.model,
        "device": bench.device,
        "skew": bench.skew,
        "tf32": bench.tf32,
        "cohort": cohort,
        "clients": clients,
        "plain_updates_per_s": cohort / base.round_s,
        **{f"{_key(name)}_updates_per_s": cohort / measured[name].round_s for name in beside},
        "plain_cpu_ms_per_update": base.cpu_ms(cohort),
        "engines": {
            name: {
                "updates_per_s": cohort / measured[name].round_s,
                "examples_per_s": measured[name].examples_per_s,
                "ratio": base.over(measured[name]),
                **{f"ratio_{_key(o).removeprefix('plain_')}": measured[o].over(measured[name]) for o in beside},
                "start_s": measured[name].start_s,
                "peak_rss_bytes": measured[name].peak_bytes,
                "cpu_ms_per_update": measured[name].cpu_ms(cohort),
                "cpu_ratio": measured[name].cpu_ms(cohort) / base.cpu_ms(cohort),
            }
            for name in engines
        },
    }


def _beside(bench: Bench) -> dict[str, type[PlainLoop]]:
    """Returns the loops beside the plain one: on a card the captured one, for equal clients."""
    if bench.device == "cpu":
        return {FAST: FastLoop}
    return {CAPTURED: CapturedLoop} if bench.skew is None else {}


def _key(side: str) -> str:
    return side.replace(", ", "_").replace(" ", "_")


class _Measured:
    """Holds the seconds that one side took, round by round."""

    def __init__(self, side: SideProcess):
        self.start_s, self.idle_bytes, self.peak_bytes = side.start_s, int(side.idle_bytes), 0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.examples: list[float] = []

    @property
    def round_s(self) -> float:
        """Returns the median of a round's host seconds."""
        return statistics.median(self.seconds)

    @property
    def examples_per_s(self) -> float:
        """Returns examples a second over all rounds."""
        return sum(self.examples) / sum(self.seconds)

    def cpu_ms(self, cohort: int) -> float:
        """Returns CPU milliseconds per update, the mean over rounds."""
        return 1e3 * statistics.mean(self.cpu_seconds) / cohort  # the clock of processes ticks in hundredths

    def over(self, other: _Measured) -> float:
        """Returns how many times as fast the other side is."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def _take_turns(
    makers: dict[str, Callable[[], SideProcess]], rounds: int, advance: Callable[[], None]
) -> dict[str, _Measured]:
    sides: dict[str, SideProcess] = {}
    try:
        for name, make in makers.items():
            sides[name] = make()
        measured = {name: _Measured(side) for name, side in sides.items()}
        for number in range(-WARM_UP, rounds):
            # Taking turns at being first keeps slow drifts of the host out of the ratio.
            for name in sides if number % 2 else reversed(sides):
                seconds, cpu_s, examples = sides[name].round(number + WARM_UP)
                if number >= 0:
                    measured[name].seconds.append(seconds)
                    measured[name].cpu_seconds.append(cpu_s)
                    measured[name].examples.append(examples)
            advance()
        for name, side in sides.items():
            measured[name].peak_bytes = side.close()
        sides = {}
        return measured
    finally:
        for side in sides.values():
            side.kill()


def _sweep_row(key: str, measured: _Measured) -> dict[str, Any]:
    name, clients, cohort = key.split()
    return {
        "engine": name,
        "clients": int(clients),
        "cohort": int(cohort),
        "round_s": measured.round_s,
        "updates_per_s": int(cohort) / measured.round_s,
        "start_s": measured.start_s,
        "idle_rss_bytes": measured.idle_bytes,
        "peak_rss_bytes": measured.peak_bytes,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Returns the result as tables for people."""
    where = "" if result["device"] == "cpu" else f", on {result['device']}{' in 19 bits' if result['tf32'] else ''}"
    size = EXAMPLES if result["skew"] is None else f"about {EXAMPLES}"
    of = f"cohort {result['cohort']} of {result['clients']}"
    title = f"{result['model']}, {size} examples a client, batch {BATCH}, {of}{where}"
    columns = ("side", "updates/s", "of the bare loop", "CPU ms/update", "start s", "peak MB")
    shown = table(*columns, left=("side",), title=title)
    base = result["plain_updates_per_s"]
    shown.add_row("bare loop", f"{base:.1f}", "1.000", f"{result['plain_cpu_ms_per_update']:.1f}", "", "")
    for side in (FAST, CAPTURED):
        if found := result.get(f"{_key(side)}_updates_per_s"):
            shown.add_row(side.replace("plain", "bare loop"), f"{found:.1f}", f"{found / base:.3f}", "", "", "")
    for name, e in result["engines"].items():
        shown.add_row(
            name,
            f"{e['updates_per_s']:.1f}",
            f"{e['ratio']:.3f}",
            f"{e['cpu_ms_per_update']:.1f}",
            f"{e['start_s']:.2f}",
            f"{e['peak_rss_bytes'] / 1e6:.0f}",
        )
    return [shown, _sweep_table(result["sweep"])] if "sweep" in result else [shown]


def _sweep_table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("engine", "clients", "cohort", "round ms", "updates/s", "start s", "idle MB", "peak MB")
    shown = table(*columns, left=("engine",), title="more clients")
    for row in rows:
        shown.add_row(
            row["engine"],
            f"{row['clients']:,}",
            f"{row['cohort']:,}",
            f"{1e3 * row['round_s']:.0f}",
            f"{row['updates_per_s']:.1f}",
            f"{row['start_s']:.2f}",
            f"{row['idle_rss_bytes'] / 1e6:.0f}",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
        )
    return shown
