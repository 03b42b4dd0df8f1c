"""Prices of a runtime on a device: what a pass costs, and how far that is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from devices.latency.columns import MAC_ROWS, TABLE_KINDS, as_matrix

BASES = ("rows", "few rows", "one row", "threads", "datasheet", "carried", "assumed", "scaled")
CELL_UNITS_MS = np.array([1e-9, 1e-9, 1e-9, 1e-3])  # of the prices in a profile: ps, ps, ps, us
MEASURED_BASES = BASES[:4]  # of prices for which the device itself was timed
MAX_TIMES_LARGER = 3.0  # than the largest reference; predictions for larger networks are extrapolations
CALLS_COLUMN = 3
MIN_SHARE = 0.02  # a kind that takes less of a pass is not worth a remark


@dataclass(frozen=True)
class Prices:
    """What one phase of one runtime costs on a device, and where the figures come from.

    Attributes:
        cells: milliseconds for each multiply-add, activation, weight and call of each kind, [10, 4].
        runtime: its name, e.g. "ncnn"; two runtimes never share a set.
        threads, precision: of the runs.
        basis: "rows" (fitted to at least ten networks of this device), "few rows", "one row" (a scale), "threads" (from
            rows with another number of threads), "datasheet" (no measurement), "carried" (from other devices by peak
            and bandwidth), "assumed" (a stated ratio).
        error: relative error to expect on a network that was not measured; None where nobody knows it.
        rows, networks: how many were measured.
        batches: the smallest and the largest that were measured.
        largest_macs: multiply-adds of one example of the largest measured network.
        kinds: layer kinds of the measured networks.
        overlap: how launches hide behind work: 1 is a sum (`devices.latency.fitting`).
        constant_ms: added to each pass; only in profiles of fedsim 0.1.
        extra_calls: added to each pass at the price of elementwise ones: the loss and the update of a step on a GPU.
        most: prices of a pass that was measured and that holds this one, so that it never takes longer; None for none.
    """

    cells: tuple[tuple[float, float, float, float], ...]
    runtime: str = ""
    threads: int = 1
    precision: str = "fp32"
    basis: str = "rows"
    error: float | None = None
    rows: int = 0
    networks: int = 0
    batches: tuple[int, int] = (1, 1)
    largest_macs: float = math.inf
    kinds: tuple[str, ...] = TABLE_KINDS
    overlap: float = 1.0
    constant_ms: float = 0.0
    extra_calls: float = 0.0
    most: Prices | None = None

    @classmethod
    def of_columns(cls, prices: np.ndarray, fused: bool, **facts: Any) -> Prices:
        """Takes prices of the cost columns [17] in milliseconds."""
        return cls.of_cells(as_matrix(prices, fused), **facts)

    @classmethod
    def of_cells(cls, cells: np.ndarray, **facts: Any) -> Prices:
        """Takes prices of each cell of a layer table, [10, 4] in milliseconds."""
        return cls(tuple(tuple(map(float, row)) for row in np.asarray(cells)), **facts)  # type: ignore[misc]

    @cached_property
    def matrix(self) -> np.ndarray:
        """The cells as an array, [10, 4]."""
        return np.array(self.cells)

    def scaled(self, factor: float | Sequence[float]) -> Prices:
        """Returns prices of a device that is `factor` times slower, in all or in each column of the cells."""
        factors = np.broadcast_to(np.asarray(factor, float), 4)
        cells = tuple(tuple(map(float, row)) for row in self.matrix * factors)
        most = None if self.most is None else self.most.scaled(factor)
        constant_ms = self.constant_ms * float(factors[CALLS_COLUMN])
        return replace(self, cells=cells, constant_ms=constant_ms, most=most)  # type: ignore[arg-type]

    def parts_ms(self, layers: tuple[tuple[float, ...], ...], batch: int) -> tuple[float, float]:
        """Returns the milliseconds of calls and of all else in one pass, before launches hide behind work."""
        table = _scaled_table(layers, batch)
        spent = table * self.matrix
        calls = float(spent[:, CALLS_COLUMN].sum())
        if not table[:, CALLS_COLUMN].any():  # a product inside of another pass: nothing of its own is started
            return calls, float(spent[:, :CALLS_COLUMN].sum())
        calls += self.constant_ms
        if self.extra_calls:
            calls += self.extra_calls * self.cells[TABLE_KINDS.index("elementwise")][CALLS_COLUMN]
        return calls, float(spent[:, :CALLS_COLUMN].sum())

    def ms(self, layers: tuple[tuple[float, ...], ...], batch: int) -> float:
        """Returns the milliseconds of one pass of `batch` examples through a layer table [10, 4]."""
        own = self._own_ms(layers, batch)
        return own if self.most is None else min(own, self.most.ms(layers, batch))

    def _own_ms(self, layers: tuple[tuple[float, ...], ...], batch: int) -> float:
        calls, work = self.parts_ms(layers, batch)
        if self.overlap == 1.0:
            return calls + work
        larger = max(calls, work)
        if larger == 0.0:
            return 0.0
        return float(
            larger * ((calls / larger) ** self.overlap + (work / larger) ** self.overlap) ** (1 / self.overlap)
        )

    def calls_share(self, layers: tuple[tuple[float, ...], ...], batch: int) -> float:
        """Returns the share of a pass that is overhead: calls against all, in [0, 1]."""
        calls, _ = self.parts_ms(layers, batch)
        whole = self.ms(layers, batch)
        return min(1.0, calls / whole) if whole else 0.0

    def remarks(self, layers: tuple[tuple[float, ...], ...], batch: int) -> list[str]:
        """Says why a prediction for this network and batch is an extrapolation; empty where references surround it."""
        found = ["measured with another number of threads"] if self.basis == "threads" else []
        table = _scaled_table(layers, batch)
        if self.basis in BASES[len(MEASURED_BASES) :]:
            how = {
                "datasheet": "from the datasheet alone",
                "carried": "carried from other devices by peak and bandwidth",
                "assumed": "a stated ratio to the forward pass",
                "scaled": "another device's, scaled",
            }[self.basis]
            return [how]
        spent = (table * self.matrix).sum(axis=1)
        shares = spent / max(float(spent.sum()), 1e-300)
        missing = [k for i, k in enumerate(TABLE_KINDS) if shares[i] > MIN_SHARE and k not in self.kinds]
        if missing:
            found.append(f"no reference has {' or '.join(missing)} layers")
        low, high = self.batches
        if not low <= batch <= high:
            found.append(f"batch {batch} is outside of the references' {low} to {high}")
        macs = float(np.array(layers)[MAC_ROWS, 0].sum())
        if macs > MAX_TIMES_LARGER * self.largest_macs:
            found.append(
                f"{macs / 1e6:.0f} million MACs against {self.largest_macs / 1e6:.0f} of the largest reference"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns what a profile holds: picoseconds and, for calls, microseconds, by kind."""
        facts: dict[str, Any] = {"runtime": self.runtime, "threads": self.threads, "precision": self.precision}
        facts |= {"basis": self.basis, "rows": self.rows, "networks": self.networks}
        if self.error is not None:
            facts["error"] = float(f"{self.error:.3g}")
        facts |= {"batches": list(self.batches)}
        if math.isfinite(self.largest_macs):
            facts["largest_mmacs"] = float(f"{self.largest_macs / 1e6:.4g}")
        if self.kinds != TABLE_KINDS:
            facts["kinds"] = list(self.kinds)
        if self.overlap != 1.0:
            facts["overlap"] = self.overlap
        if self.extra_calls:
            facts["extra_calls"] = self.extra_calls
        if self.constant_ms:
            facts["constant_ms"] = self.constant_ms
        cells = np.array(self.cells) / CELL_UNITS_MS
        facts["prices"] = {k: [float(f"{x:.4g}") for x in row] for k, row in zip(TABLE_KINDS, cells, strict=True)}
        return facts

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Prices:
        """Reads what `to_dict` wrote; the form is checked by `devices.profile`."""
        facts = {k: v for k, v in tree.items() if k not in ("prices", "largest_mmacs", "provenance", "source")}
        for key in ("batches", "kinds"):
            if key in facts:
                facts[key] = tuple(facts[key])
        if "largest_mmacs" in tree:
            facts["largest_macs"] = 1e6 * float(tree["largest_mmacs"])
        cells = np.array([tree["prices"].get(kind, [0.0] * 4) for kind in TABLE_KINDS], float) * CELL_UNITS_MS
        return cls.of_cells(cells, **facts)


@lru_cache(maxsize=1024)
def _scaled_table(layers: tuple[tuple[float, ...], ...], batch: int) -> np.ndarray:
    return np.array(layers) * [batch, batch, 1.0, 1.0]
