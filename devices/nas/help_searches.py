"""The searches that HELP was published with: 15 limits on five devices, over candidates that MetaD2A generated.

Candidates are in the order of their predicted accuracies on CIFAR-100; their true ones say what a search was worth.

Source: Lee et al., "HELP: Hardware-Adaptive Efficient Latency Prediction for NAS via Meta-Learning", NeurIPS 2021,
table 4; the candidates and the rule of three are those of the authors' code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from devices.errors import DeviceError, FileError
from devices.latency.few_shot import Estimate, FewShot, Trial
from devices.latency.spaces import Space
from devices.nas.search import Limit, NothingFitsError, Selection, select
from devices.reading import read_npz

CANDIDATES = {"metad2a_idx": "iu", "metad2a_acc_cifar100": "f"}  # arrays of HELP's table, with kinds of dtype
RULE_OF_THREE = 3  # networks that the authors' code goes on to: it keeps the one with the best true accuracy


class Published(NamedTuple):
    """A cell of table 4: the limit on a device, and the latency and accuracy (CIFAR-100, %) that HELP reached."""

    device: str
    limit_ms: float
    ms: float
    accuracy: float


TABLE_4 = (
    Published("titan_rtx_256", 18, 17.8, 69.7),
    Published("titan_rtx_256", 21, 18.9, 71.5),
    Published("titan_rtx_256", 25, 24.2, 71.8),
    Published("gold_6226", 8, 8.0, 67.3),
    Published("gold_6226", 11, 10.7, 70.2),
    Published("gold_6226", 14, 14.3, 72.1),
    Published("pixel2", 14, 13, 69.7),
    Published("pixel2", 18, 19, 71.8),
    Published("pixel2", 22, 25, 73.2),
    Published("eyeriss", 5, 3.9, 71.5),
    Published("eyeriss", 7, 5.1, 71.8),
    Published("eyeriss", 9, 9.1, 73.5),
    Published("fpga", 4, 3.8, 70.2),
    Published("fpga", 5, 4.7, 71.8),
    Published("fpga", 6, 7.4, 73.5),
)


@dataclass(frozen=True)
class Reached:
    """A network with its true latency and accuracy; None of both where no network was selected."""

    ms: float | None = None
    accuracy: float | None = None

    def meets(self, cell: Published) -> bool:
        """Whether it is within the cell's limit and as accurate as what was published, to the published digit."""
        if self.ms is None or self.accuracy is None:
            return False
        return self.ms <= cell.limit_ms and round(self.accuracy, 1) >= cell.accuracy


@dataclass(frozen=True)
class Search:
    """One cell searched with one predictor.

    Attributes:
        cell: what was published.
        predictor, measurements, seed: how latencies were predicted.
        own_margin: whether the margin is the predictor's own error, or was given.
        margin: that predictions were given.
        reached: the network that held when it was measured.
        unverified: the one that would have been taken without measuring it; above the limit it is a violation.
        checks: networks measured until one held.
    """

    cell: Published
    predictor: str
    measurements: int
    seed: int
    own_margin: bool
    margin: float
    reached: Reached
    unverified: Reached
    checks: int

    @property
    def excess(self) -> float:
        """By how much the network that nobody measured breaks the limit, relative to it; 0 where it does not."""
        return max(0.0, (self.unverified.ms or 0.0) / self.cell.limit_ms - 1)


@dataclass(frozen=True)
class Candidates:
    """The networks to choose from, best predicted accuracy first.

    Attributes:
        networks: their indices in the space, [n].
        accuracy: their true accuracies in percent, [n]; no search looks at them before it has trained a network.
    """

    networks: np.ndarray
    accuracy: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """Falls with the place: the file has the order of the predicted accuracies and not themselves."""
        return -np.arange(len(self.networks), dtype=float)


def load_candidates(path: str | Path, space: Space) -> Candidates:
    """Reads MetaD2A's candidates from HELP's table.

    Raises:
        DeviceError: for a file without them.
    """
    try:
        arrays = read_npz(Path(path), CANDIDATES, ())
    except FileError as error:
        raise DeviceError(f"{error}; the searches need MetaD2A's candidates in {', '.join(CANDIDATES)}") from None
    networks, accuracy = arrays["metad2a_idx"], arrays["metad2a_acc_cifar100"].astype(float)
    fits = networks.ndim == 1 and len(networks) and networks.shape == accuracy.shape and networks.dtype.kind in "iu"
    if not fits or networks.min() < 0 or networks.max() >= len(space.ops) or not np.isfinite(accuracy).all():
        raise DeviceError(f"{path}: metad2a_idx and metad2a_acc_cifar100 must be networks of the table and accuracies")
    return Candidates(networks.astype(int), accuracy)


def search_cell(
    cell: Published,
    predicted: Estimate,
    true_ms: np.ndarray,
    candidates: Candidates,
    margin: float | None = None,
    trained: int = 1,
) -> tuple[Reached, Reached, int]:
    """Searches one cell, and says what it reached, what it would have without a measurement, and the measurements.

    Args:
        cell: device and limit.
        predicted: latencies of the candidates.
        true_ms: measured latencies of the candidates, looked at for those that were selected, [n].
        candidates: in their order.
        margin: on predictions; None for the estimate's own error.
        trained: the first so many that hold are trained, and the most accurate is kept; 1 looks at no accuracy.
    """
    limit = Limit("ms", predicted.ms, cell.limit_ms, predicted.error if margin is None else margin)

    def reached(selection: Selection) -> Reached:
        # Training is what tells these accuracies; the first one stays where they are equal.
        kept = max(selection.best, key=lambda network: candidates.accuracy[network])
        return Reached(float(true_ms[kept]), float(candidates.accuracy[kept]))

    try:
        blind = reached(select(candidates.scores, [limit], best=trained))
        found = select(candidates.scores, [limit], lambda network: {"ms": float(true_ms[network])}, best=trained)
    except NothingFitsError as error:
        return Reached(), blind if error.checks else Reached(), len(error.checks)
    return reached(found), blind, len(found.checks)


def best_possible(cell: Published, true_ms: np.ndarray, accuracy: np.ndarray) -> Reached:
    """Returns the most accurate network within a limit, of those that have these latencies and accuracies."""
    within = np.flatnonzero(true_ms <= cell.limit_ms)
    if not len(within):
        return Reached()
    best = within[np.argmax(accuracy[within])]
    return Reached(float(true_ms[best]), float(accuracy[best]))


def search_all(
    space: Space,
    candidates: Candidates,
    trials: Sequence[Trial],
    margins: Sequence[float | None] = (None,),
    trained: int = 1,
    progress: Callable[[], None] | None = None,
) -> list[Search]:
    """Searches the cells of table 4 with each trial, each of its seeds and each margin.

    Args:
        space: HELP's table of NAS-Bench-201.
        candidates: of `load_candidates`.
        trials: of `devices.latency.few_shot`.
        margins: each as of `search_cell`.
        trained: as of `search_cell`.
        progress: called after each device.
    """
    found = []
    for trial in trials:
        few_shot = FewShot(space, trial)
        for seed in range(trial.seeds):
            for device in dict.fromkeys(cell.device for cell in TABLE_4):
                measured = few_shot.references_of(device, seed)
                predicted = few_shot.estimate(device, measured, candidates.networks, seed)
                true_ms = space.latency(device)[candidates.networks]
                own_cells = [cell for cell in TABLE_4 if cell.device == device]
                for margin, cell in itertools.product(margins, own_cells):
                    used = predicted.error if margin is None else margin
                    reached, blind, checks = search_cell(cell, predicted, true_ms, candidates, margin, trained)
                    how = (trial.predictor, trial.measurements, seed, margin is None, used)
                    found.append(Search(cell, *how, reached, blind, checks))
                if progress:
                    progress()
    return found


def bounds(space: Space, candidates: Candidates, trained: int = 1) -> list[dict[str, Any]]:
    """Returns for each cell what nobody's predictor can change.

    Returns:
        Rows {"cell", "rule", "best"}: what the rule of the searches reaches with true latencies and no margin, and the
        most accurate candidate within the limit.
    """
    rows = []
    for cell in TABLE_4:
        true_ms = space.latency(cell.device)[candidates.networks]
        rule, _, _ = search_cell(cell, Estimate(true_ms, 0.0), true_ms, candidates, trained=trained)
        rows.append({"cell": cell, "rule": rule, "best": best_possible(cell, true_ms, candidates.accuracy)})
    return rows


def summary(searches: Sequence[Search]) -> list[Mapping[str, Any]]:
    """Returns figures of each predictor, number of measurements and kind of margin, as means over seeds.

    Returns:
        Rows {"predictor", "measurements", "own_margin", "cells_met", "cells_met_least", "violations", "beyond_margin",
        "largest_excess", "checks", "margin"}: cells that are met with verification (and in the worst seed); searches
        whose unmeasured network breaks the limit, and does so by more than the margin, per 15 cells; by how much at
        most; networks measured for verification per search; mean margin.
    """
    groups: dict[tuple[str, int, bool], list[Search]] = {}
    for one in searches:
        groups.setdefault((one.predictor, one.measurements, one.own_margin), []).append(one)
    rows: list[Mapping[str, Any]] = []
    for (predictor, measurements, own_margin), own in groups.items():
        seeds = len({one.seed for one in own})
        met = [sum(one.reached.meets(one.cell) for one in own if one.seed == seed) for seed in range(seeds)]
        rows.append(
            {
                "predictor": predictor,
                "measurements": measurements,
                "own_margin": own_margin,
                "cells_met": float(np.mean(met)),
                "cells_met_least": min(met),
                "violations": sum(one.excess > 0 for one in own) / seeds,
                "beyond_margin": sum(one.excess > one.margin for one in own) / seeds,
                "largest_excess": max(one.excess for one in own),
                "checks": float(np.mean([one.checks for one in own])),
                "margin": float(np.mean([one.margin for one in own])),
            }
        )
    return rows
