"""The columns of a comparison beside scores and costs: which there are, what they are called, how figures are written.

A method or an attack whose runs have a figure worth comparing has it in `COMPARED` of `workloads/metrics.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from devices.units import energy, simulated, size
from fedsim.report.plots.style import AXES
from fedsim.study.spec import Study
from fedsim.workloads.metrics import COMPARED, METRICS, Metric, shown_as

TAIL, WAITING, NEVER = "energy_j.tail", "energy_j.waiting", "clients.never"
BESIDE = {  # figures of every run that say where energy went, and whom the model has never met
    TAIL: "radio tails",
    WAITING: "waiting",
    NEVER: "never took part",
}
OF_ENERGY = "radio tails are a part of the energy; waiting is not"


def paths_of(study: Study, known: Collection[str]) -> list[str]:
    """Returns the paths of the figures that a comparison shows.

    Args:
        study: whose own columns and axes come first.
        known: the figures that any of its runs has.
    """
    own = [*study.columns, *(axis for axis in study.x if axis not in AXES)]
    named = {in_words(path) for path in own}
    more = [path for path in (*COMPARED, *BESIDE) if path in known and in_words(path) not in named]
    return list(dict.fromkeys([*own, *more]))


def headings(paths: Iterable[str], score: Metric) -> dict[str, str]:
    """Returns the headings of columns by their paths, no two alike, with the unit where the cells do not have it.

    Args:
        paths: of the figures.
        score: the column that they stand beside, which has the mean of a metric over more than the last evaluation.
    """
    found: dict[str, str] = {}
    for path in paths:
        text = in_words(path)
        taken = text in (score.label, *found.values())
        found[path] = f"{'last' if path.startswith(METRICS) else path.partition('.')[0]} {text}" if taken else text
    return found


def in_words(path: str) -> str:
    """Returns what a figure is of, with its unit where it is not written with it."""
    if metric := shown_as(path):
        return metric.label
    text = BESIDE.get(path) or path.removeprefix(METRICS).removesuffix("_bytes").replace("_", " ")
    return text.replace(".", " ")


def beside_costs(paths: Collection[str]) -> list[str]:
    """Returns a line on what the column of energy holds, where others say where it went."""
    return [OF_ENERGY] if {TAIL, WAITING} & set(paths) else []


def figure(path: str, value: float) -> str:
    """Returns a figure of a run: bytes, seconds and joules in the unit that reads best, else in its own.

    It is empty where there is none.
    """
    if math.isnan(value):
        return ""
    if metric := shown_as(path):
        return metric.number(value)
    if path.startswith("energy_j.") or path.endswith(("_joules", "energy_j")):
        return energy(value)
    if path.endswith(("_bytes", "_s")):
        return size(value) if path.endswith("_bytes") else simulated(value)
    return f"{value:.4g}"
