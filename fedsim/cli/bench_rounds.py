"""Measures what the engines cost above the bare PyTorch loop, side by side on this host.

Every side runs in its own process and they take turns, round by round; medians are compared, because absolute times on
a shared machine are noise and their ratios are not. Engines come from the caller.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from fedsim.cli.bench_sides import EngineFactory, EngineRounds, FastLoop, PlainLoop, SideProcess
from fedsim.errors import ConfigError
from fedsim.report.terminal import console, table, work_bar
from fedsim.settings.compose import compose
from fedsim.settings.groups import Settings

COHORT, CLIENTS, EXAMPLES, BATCH = 10, 100, 100, 20
WARM_UP = 2
PLAIN, FAST = "plain", "plain, channels last"


def measure(
    make_engine: EngineFactory,
    model: str = "lenet5",
    rounds: int = 30,
    engines: Sequence[str] = ("local",),
    workers: int | None = None,
    populations: Sequence[int] = (),
    cohorts: Sequence[int] = (),
) -> dict[str, Any]:
    """Measures client updates per second of two bare loops and of each engine.

    Every update is one epoch over 100 examples of 1x28x28 in batches of 20, cohort 10 of 100. A round of an engine is
    the whole round: sampling, packing, training, averaging, clock, report files; only evaluation is left out.

    Args:
        make_engine: builds the engine that the settings name; a function of a module.
        model: a model config that takes 1x28x28 images.
        rounds: measured rounds of each side, after two to warm up.
        engines: options of the group `engine`, but for Flower's runtime.
        workers: of engines that have them; none for their own default.
        populations: numbers of clients at which rounds of each engine are timed as well,
        cohorts: with each of these cohorts.

    Returns:
        {"model", "plain_updates_per_s", "plain_channels_last_updates_per_s", "engines": {name: {"updates_per_s",
        "ratio", "start_s", "peak_rss_bytes", "cpu_ms_per_update", "cpu_ratio", "ratio_channels_last"}}, "sweep": [{
        "engine", "clients", "cohort", "round_s", "updates_per_s", "start_s", "idle_rss_bytes", "peak_rss_bytes"}]};
        ratios are medians over rounds, against the bare loop in the same turn; memory is that of the driver's process.

    Raises:
        ConfigError: for a population smaller than the cohort, or a model that takes no such images.
    """
    sizes = [(n, c) for n in populations or ([max(CLIENTS, *cohorts)] if cohorts else ()) for c in cohorts or (COHORT,)]
    for clients, cohort in sizes:
        if clients < cohort:
            raise ConfigError(f"--population takes numbers of at least {cohort} (the cohort), got {clients}")
    settings = {name: _settings(name, workers, model, CLIENTS, COHORT) for name in engines}
    plain = _settings("local", None, model, CLIENTS, COHORT)
    with tempfile.TemporaryDirectory() as folder, work_bar(console()) as progress:
        task = progress.add_task("bench", total=(rounds + WARM_UP) * (1 + len(sizes)))
        makers: dict[str, Callable[[], SideProcess]] = {
            PLAIN: partial(SideProcess, PlainLoop, plain),
            FAST: partial(SideProcess, FastLoop, plain),
        }
        for name in engines:
            makers[name] = partial(SideProcess, EngineRounds, settings[name], make_engine, Path(folder) / name)
        measured = _take_turns(makers, rounds, lambda: progress.advance(task))
        base = measured[PLAIN]
        result = {
            "model": model,
            "plain_updates_per_s": COHORT / base.round_s,
            "plain_channels_last_updates_per_s": COHORT / measured[FAST].round_s,
            "plain_cpu_ms_per_update": base.cpu_ms(COHORT),
            "engines": {
                name: {
                    "updates_per_s": COHORT / measured[name].round_s,
                    "ratio": base.over(measured[name]),
                    "ratio_channels_last": measured[FAST].over(measured[name]),
                    "start_s": measured[name].start_s,
                    "peak_rss_bytes": measured[name].peak_bytes,
                    "cpu_ms_per_update": measured[name].cpu_ms(COHORT),
                    "cpu_ratio": measured[name].cpu_ms(COHORT) / base.cpu_ms(COHORT),
                }
                for name in engines
            },
        }
        makers = {}
        for clients, cohort in sizes:
            for name in engines:
                given = _settings(name, workers, model, clients, cohort)
                where = Path(folder) / f"{name}-{clients}-{cohort}"
                makers[f"{name} {clients} {cohort}"] = partial(SideProcess, EngineRounds, given, make_engine, where)
        if makers:
            measured = _take_turns(makers, rounds, lambda: progress.advance(task, len(sizes)))
            result["sweep"] = [_sweep_row(key, measured[key]) for key in makers]
    return result


class _Measured:
    """Holds the seconds that one side took, round by round."""

    def __init__(self, side: SideProcess):
        self.start_s, self.idle_bytes, self.peak_bytes = side.start_s, int(side.idle_bytes), 0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    @property
    def round_s(self) -> float:
        """Returns the median of a round's host seconds."""
        return statistics.median(self.seconds)

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
                seconds, cpu_s = sides[name].round(number + WARM_UP)
                if number >= 0:
                    measured[name].seconds.append(seconds)
                    measured[name].cpu_seconds.append(cpu_s)
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
    title = f"{result['model']}, {EXAMPLES} examples a client, batch {BATCH}, cohort {COHORT} of {CLIENTS}"
    columns = ("side", "updates/s", "of the bare loop", "CPU ms/update", "start s", "peak MB")
    shown = table(*columns, left=("side",), title=title)
    base = result["plain_updates_per_s"]
    fast = result["plain_channels_last_updates_per_s"]
    shown.add_row("bare loop", f"{base:.1f}", "1.000", f"{result['plain_cpu_ms_per_update']:.1f}", "", "")
    shown.add_row("bare loop, channels last", f"{fast:.1f}", f"{fast / base:.3f}", "", "", "")
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


def _settings(engine: str, workers: int | None, model: str, clients: int, cohort: int) -> Settings:
    overrides = [
        "workload=blobs",
        "workload.input_shape=[1,28,28]",
        f"workload.examples_per_client={EXAMPLES}",
        "workload.client_test_fraction=0",
        f"num_clients={clients}",
        f"cohort={cohort}",
        f"evaluate_clients={min(clients, max(CLIENTS, cohort))}",
        f"model={model}",
        "fleet=uniform",
        f"trainer.batch_size={BATCH}",
        "trainer.local_epochs=1",
        f"engine={engine}",
        "engine.device=cpu",
    ]
    return compose([*overrides, f"engine.workers={workers}"] if workers and engine != "local" else overrides)
