"""How much the engines cost above the bare PyTorch loop, side by side on this host.

Rounds of the bare loop and of each engine alternate in one process and the medians are compared: absolute times on a
shared machine are noise, their ratio is not. May import: torch, fedsim. Engines come from the caller.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from rich.progress import Progress
from rich.table import Table

from fedsim.errors import ConfigError
from fedsim.federation import Federation
from fedsim.report import RoundReport, RunFolder
from fedsim.seeding import torch_generator
from fedsim.settings import Settings, World, build_world, compose

EngineFactory = Callable[[Settings], Grid]
COHORT, CLIENTS, EXAMPLES, BATCH = 10, 100, 100, 20
WARM_UP = 2


def bench(
    make_engine: EngineFactory, model: str = "lenet5", rounds: int = 30, populations: Sequence[int] = ()
) -> dict[str, Any]:
    """Measures client updates per second of the bare loop and of each engine.

    Every update is one epoch over 100 examples of 1x28x28 in batches of 20, cohort 10 of 100. A round of the engine is
    the whole round: sampling, packing, training, averaging, clock, report files; only evaluation is left out.

    Args:
        make_engine: builds the engine that the settings name.
        model: a model config that takes 1x28x28 images.
        rounds: measured rounds of each side, after two to warm up.
        populations: numbers of clients at which a round is timed as well.

    Returns:
        {"plain_updates_per_s", "engines": {name: {...}}, "population": {clients: seconds per round}}

    Raises:
        ConfigError: for a population smaller than the cohort, or a model that takes no such images.
    """
    for clients in populations:
        if clients < COHORT:
            raise ConfigError(f"--population takes numbers of at least {COHORT} (the cohort), got {clients}")
    settings = _settings(model, CLIENTS)
    plain = PlainLoop(build_world(json.dumps(settings)))
    shown = Progress(transient=True, disable=not sys.stdout.isatty())
    with tempfile.TemporaryDirectory() as folder, shown as progress:
        task = progress.add_task("bench", total=(rounds + WARM_UP) * (1 + len(populations)))
        engine = EngineRounds(settings, make_engine, Path(folder) / "local")
        engine.federation.ask_clients(0)  # every client's data are drawn and cached, as they are in the bare loop
        plain_s: list[float] = []
        engine_s: list[float] = []
        engine_cpu_s: list[float] = []
        for number in range(1, rounds + WARM_UP + 1):
            # Taking turns at being first keeps slow drifts of the host out of the ratio.
            sides = [(plain.round, plain_s), (engine.round, engine_s)]
            for side, seconds in sides if number % 2 else reversed(sides):
                started, cpu = time.perf_counter(), time.process_time()
                side(number)
                if number > WARM_UP:
                    seconds.append(time.perf_counter() - started)
                    if side == engine.round:
                        engine_cpu_s.append(time.process_time() - cpu)
            progress.advance(task)
        engine.close()
        result: dict[str, Any] = {
            "model": model,
            "plain_updates_per_s": COHORT / statistics.median(plain_s),
            "engines": {
                "local": {
                    "updates_per_s": COHORT / statistics.median(engine_s),
                    "ratio": statistics.median(p / e for p, e in zip(plain_s, engine_s, strict=True)),
                    "start_s": engine.start_s,
                    "peak_rss_bytes": _peak_rss_bytes(),
                    "cpu_ms_per_update": 1e3 * statistics.median(engine_cpu_s) / COHORT,
                }
            },
        }
        if populations:
            result["population"] = _populations(
                make_engine, model, rounds, populations, Path(folder), lambda: progress.advance(task)
            )
    return result


def _populations(
    make_engine: EngineFactory,
    model: str,
    rounds: int,
    populations: Sequence[int],
    folder: Path,
    advance: Callable[[], None],
) -> dict[str, float]:
    """Median seconds of a round with each number of clients, taking turns."""
    engines = {n: EngineRounds(_settings(model, n), make_engine, folder / str(n)) for n in populations}
    seconds: dict[int, list[float]] = {n: [] for n in populations}
    for number in range(1, rounds + WARM_UP + 1):
        for clients, engine in engines.items():
            started = time.perf_counter()
            engine.round(number)
            if number > WARM_UP:
                seconds[clients].append(time.perf_counter() - started)
            advance()
    for engine in engines.values():
        engine.close()
    return {str(n): statistics.median(times) for n, times in seconds.items()}


class EngineRounds:
    """Whole rounds of a federation, reports included, one at a time."""

    def __init__(self, settings: Settings, make_engine: EngineFactory, folder: Path):
        started = time.perf_counter()
        self.federation = Federation(build_world(json.dumps(settings)), make_engine(settings))
        self.folder = RunFolder(folder, settings)
        self.start_s = time.perf_counter() - started

    def round(self, number: int) -> RoundReport:
        """One training round, written down."""
        started, start_s = time.perf_counter(), self.federation.grid.clock.now_s
        report, clients = self.federation.report(number, start_s, self.federation.train(number), started)
        self.folder.add(report, clients)
        return report

    def close(self) -> None:
        """Closes the run folder."""
        self.folder.close()


class PlainLoop:
    """The loop that everybody writes: copy the weights in, train, average; no messages, devices or reports."""

    def __init__(self, world: World):
        self.world, self.workload = world, world.workload
        trainer = world.settings["trainer"]
        self.lr, self.batch_size = trainer["lr"], trainer["batch_size"]
        torch.set_num_threads(world.settings["engine"]["threads"])
        self.model = self.workload.build_model()
        self.weights = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.data = [self.workload.client_data(client_id).train for client_id in range(self.workload.num_clients)]

    def round(self, number: int) -> None:
        """Trains a cohort and averages what it learnt."""
        shuffle = torch_generator(number, "plain")
        cohort = torch.randperm(self.workload.num_clients, generator=shuffle)[:COHORT].tolist()
        sums = {name: torch.zeros_like(t) for name, t in self.weights.items()}
        for client_id in cohort:
            train = self.data[client_id]
            self.model.load_state_dict(self.weights)
            optimiser = torch.optim.SGD(self.model.parameters(), self.lr)
            for rows in torch.randperm(len(train), generator=shuffle).split(self.batch_size):
                batch = train.gather(rows)
                optimiser.zero_grad()
                self.workload.loss(self.model, batch).backward()
                optimiser.step()
            for name, t in self.model.state_dict().items():
                sums[name] += t / len(cohort)
        self.weights = sums


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    shown = Table(title=f"{result['model']}, {EXAMPLES} examples a client, batch {BATCH}, cohort {COHORT} of {CLIENTS}")
    for name in ("engine", "updates/s", "of the bare loop", "CPU ms/update", "start s"):
        shown.add_column(name, justify="left" if name == "engine" else "right")
    shown.add_row("bare loop", f"{result['plain_updates_per_s']:.1f}", "1.000", "", "")
    for name, e in result["engines"].items():
        figures = (
            f"{e['updates_per_s']:.1f}",
            f"{e['ratio']:.3f}",
            f"{e['cpu_ms_per_update']:.1f}",
            f"{e['start_s']:.2f}",
        )
        shown.add_row(name, *figures)
    for clients, seconds in result.get("population", {}).items():
        shown.add_row(f"local, {int(clients):,} clients", f"{COHORT / seconds:.1f}", "", "", "")
    return shown


def _settings(model: str, clients: int) -> Settings:
    data = ["workload=blobs", "workload.input_shape=[1,28,28]", f"workload.examples_per_client={EXAMPLES}"]
    data += [
        "workload.client_test_fraction=0",
        f"num_clients={clients}",
        f"cohort={COHORT}",
        f"evaluate_clients={min(clients, CLIENTS)}",
    ]
    return compose(
        [
            *data,
            f"model={model}",
            "fleet=uniform",
            f"trainer.batch_size={BATCH}",
            "trainer.local_epochs=1",
            "engine.device=cpu",
        ]
    )


def _peak_rss_bytes() -> int:
    """Largest resident memory of this process so far; Linux counts kilobytes, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
