"""How an asynchronous run used its clients: how stale their replies were, and how long devices and server were idle.

Read from the run folder, so that a resumed run says the same as one that never stopped.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from fedsim.grid.edge import EdgeGrid
from fedsim.report.files import read_rows, row_files
from fedsim.workloads.metrics import MEAN_STALENESS, STALENESS

COLUMNS = ["phase", "client", "device", "outcome", "start_s", "total_s", "metrics"]
Spell = tuple[float, float]  # from when to when a client was at work


def asynchrony(folder: Path, grid: EdgeGrid) -> dict[str, Any]:
    """Returns the summary's `asynchrony`.

    Args:
        folder: of the run, with its client rows written.
        grid: at the end of the run; who is in flight then has been at work, too.

    Returns:
        staleness: how many replies were used, by how often the weights had changed since.
        mean_staleness: of the used replies; left out where none was.
        device_staleness: the same of each device that a used reply came from.
        unused: replies that came too late or were too stale.
        busy: share of the time in which a client of each device worked, and of all of them.
        at_work: clients at work on average.
        server_idle_s: seconds in which no client was at work.
        in_flight: clients at work at the end, whose energy and bytes are in no round.
    """
    end_s, ages, unused = grid.clock.now_s, defaultdict[str, list[int]](list), 0
    spells: dict[str, list[Spell]] = defaultdict(list)
    for path in row_files(folder):
        for row in read_rows(path, COLUMNS).to_pylist():
            if row["phase"] != "train":
                continue
            metrics = json.loads(row["metrics"])
            if row["outcome"] == "completed":
                ages[row["device"]].append(int(metrics[STALENESS]))
            unused += row["outcome"] == "late"
            ended_s = row["start_s"] + row["total_s"] + metrics.get("paused_s", 0.0)
            spells[row["device"]].append((row["start_s"], min(ended_s, end_s)))
    for _, contact in grid.in_flight:
        spells[grid.fleet.device_name(contact.client)].append((contact.start_s, min(contact.end_s, end_s)))
    every = [spell for some in spells.values() for spell in some]
    owners = {name: count for name, count, _ in grid.fleet.summary()}
    busy = {name: _share(some, owners[name], end_s) for name, some in sorted(spells.items())}
    staleness = Counter(age for some in ages.values() for age in some)
    return {
        STALENESS: {str(age): count for age, count in sorted(staleness.items())},
        **({MEAN_STALENESS: mean([*staleness.elements()])} if staleness else {}),
        "device_staleness": {name: mean(some) for name, some in sorted(ages.items())},
        "unused": unused,
        "busy": {"all": _share(every, len(grid.fleet), end_s), **busy},
        "at_work": sum(until - since for since, until in every) / end_s if end_s else 0.0,
        "server_idle_s": end_s - _covered(every),
        "in_flight": len(grid.in_flight),
    }


def _share(spells: Sequence[Spell], clients: int, end_s: float) -> float:
    return sum(until - since for since, until in spells) / (clients * end_s) if clients and end_s else 0.0


def _covered(spells: Sequence[Spell]) -> float:
    """Returns the seconds that lie in one spell at least."""
    covered, reached = 0.0, 0.0
    for since, until in sorted(spells):
        covered += max(0.0, until - max(since, reached))
        reached = max(reached, until)
    return covered
