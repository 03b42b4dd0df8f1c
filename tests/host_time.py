"""Where the host's time goes beside training, per client: `python tests/host_time.py [KEY=VALUE ...]`.

Whole rounds of `engine=local` and a bare loop of the same steps take turns in one process. Each part below is timed
without the parts inside it; what no part covers is `rest`. No test: a tool to look before and after a change.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsim.cli.bench_sides import EngineRounds, FastLoop
from fedsim.runs.experiment import build_engine
from fedsim.settings.compose import compose

SETTINGS = ["workload=blobs", "workload.examples_per_client=16", "workload.test_examples=64", "model=mlp"]
SETTINGS += ["num_clients=1000", "cohort=1000", "trainer.batch_size=8", "trainer.local_epochs=1", "fleet=mixed"]
SETTINGS += ["engine.device=cpu", "checkpoint_s=0"]
ROUNDS = 9
PARTS = {  # where each part begins
    "data": "clients.data_cache:DataCache.of",
    "context": "clients.worker:Worker.context",
    "weights in": "clients.live_model:LiveModel.load",
    "weights out": "clients.live_model:LiveModel.sent",
    "random numbers": "fedsim.seeding:derive",
    "training": "clients.trainers.sgd:SGDRun.train",
    "start of a trainer": "clients.trainers.sgd:SGDTrainer.start",
    "update": "clients.trainers.sgd:SGDRun.fit",
    "worker": "clients.worker:Worker.serve_one",
    "block sums": "fedsim.messages.blocks:BlockSum.add",
    "pricing": "devices.latency.models:StructuredLatency.seconds",
    "pricing, one by one": "devices.cost:LatencyModel.cost",
    "jitter": "devices.fleet:Fleet.jitter",
    "round report": "fedsim.runs.federation:Federation.report",
    "events and rows": "fedsim.report.folder:RunFolder.add",
    "parquet": "fedsim.report.folder:RunFolder.flush",
}


class Watch:
    """Adds up seconds by part; the seconds of a part inside another count for the inner one."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside: list[float] = []  # of each part that is going on: seconds of the parts in it

    def over(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.seconds[part] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return timed

    def put_on(self, name: str, part: str) -> None:
        """Times a function `module:path`, wherever modules of ours took it in."""
        module_name, _, path = name.partition(":")
        owner: Any = import_module(module_name)
        *outer, last = path.split(".")
        for each in outer:
            owner = vars(owner)[each]
        found = vars(owner)[last]
        timed = self.over(part, found)
        setattr(owner, last, timed)
        for module in [m for n, m in sys.modules.items() if n.split(".")[0] in ("fedsim", "clients", "devices")]:
            for key in [key for key, value in vars(module).items() if value is found]:
                setattr(module, key, timed)


def main(overrides: list[str]) -> None:
    """Prints a line per part."""
    settings = compose([*SETTINGS, *overrides])
    watch, clients = Watch(), settings["cohort"]
    for part, name in PARTS.items():
        watch.put_on(name, part)
    with tempfile.TemporaryDirectory() as folder:
        bare, rounds = FastLoop(settings), EngineRounds(settings, build_engine, Path(folder) / "run")
        rounds.round(0)
        took: list[tuple[float, float, Counter[str]]] = []
        for number in range(1, ROUNDS + 1):
            watch.seconds.clear()
            began = time.perf_counter()
            rounds.round(number)
            rounds.folder.flush()
            between = time.perf_counter()
            seconds = watch.seconds.copy()
            bare.round(number)
            took.append((between - began, time.perf_counter() - between, seconds))
        rounds.close()
    warm = took[2:]
    ours, bares = (1e3 / clients * statistics.median(t[i] for t in warm) for i in (0, 1))
    host = 1e3 / clients * statistics.median(t[0] - t[2]["training"] for t in warm)
    print(f"ms per client, median of {len(warm)} rounds of {clients} clients:")
    print(f"{'round':>20} {ours:.3f}\n{'bare loop':>20} {bares:.3f}\n{'outside training':>20} {host:.3f}, of which")
    for part in PARTS:
        if part != "training":
            print(f"{part:>20} {1e3 / clients * statistics.median(t[2][part] for t in warm):.3f}")
    rest = statistics.median(t[0] - sum(t[2].values()) for t in warm)
    print(f"{'rest':>20} {1e3 / clients * rest:.3f}\n{'training':>20} {ours - host:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
