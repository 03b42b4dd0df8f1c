"""The cost columns of the structured model, their physical units and their bounds.

A network's layer table becomes 17 counts, and a device's costs are 17 non-negative prices for them. The unit of a price
follows from the datasheet (a multiply-add at the peak, four bytes at the memory's bandwidth, a microsecond a call), its
bounds from physics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from devices.errors import DeviceError
from devices.texts import quoted

TABLE_KINDS = (
    *("conv3x3", "conv", "pointwise", "grouped", "depthwise", "pool", "elementwise", "foldable", "fc", "recurrent"),
)
FOLDABLE = TABLE_KINDS.index("foldable")
MAC_KINDS = tuple(k for k in TABLE_KINDS if k not in ("pool", "elementwise", "foldable"))  # others count operations
MAC_ROWS = [TABLE_KINDS.index(kind) for kind in MAC_KINDS]  # of a layer table
TABLE_KINDS_0_1 = ("conv", "pointwise", "depthwise", "pool", "elementwise", "fc", "recurrent")
MACS = ("conv3x3", "conv", "pointwise", "grouped", "depthwise", "fc")
ACTIVATIONS = ("dense", "pointwise", "depthwise", "fc", "pool", "elementwise")
WEIGHTS = ("layers", "recurrent")
CALLS = ("layers", "rest", "recurrent")
SECTIONS = {"ps_per_mac": MACS, "ps_per_activation": ACTIVATIONS, "ps_per_weight": WEIGHTS, "us_per_call": CALLS}
COLUMNS = tuple(f"{section}.{name}" for section, names in SECTIONS.items() for name in names)
NUM_COLUMNS = len(COLUMNS)
IS_CALL = np.array([column.startswith("us_per_call") for column in COLUMNS])
IS_MAC = np.array([column.startswith("ps_per_mac") for column in COLUMNS])

Phase = Literal["forward", "train_step"]

# The cost column that pays for each cell of a layer table [10 kinds, 4 columns]; -1 for the element operations of pools
# and elementwise layers, whose time is that of the elements they read and write.
_CELLS = np.array(
    [
        # macs, activations, weights, calls
        [COLUMNS.index(f"ps_per_mac.{mac}") if mac else -1, COLUMNS.index(f"ps_per_activation.{act}"),
         COLUMNS.index(f"ps_per_weight.{weight}"), COLUMNS.index(f"us_per_call.{call}")]
        for mac, act, weight, call in (
            ("conv3x3", "dense", "layers", "layers"),
            ("conv", "dense", "layers", "layers"),
            ("pointwise", "pointwise", "layers", "layers"),
            ("grouped", "depthwise", "layers", "layers"),
            ("depthwise", "depthwise", "layers", "layers"),
            ("", "pool", "layers", "rest"),
            ("", "elementwise", "layers", "rest"),
            ("", "elementwise", "layers", "rest"),  # foldable
            ("fc", "fc", "layers", "layers"),
            ("fc", "fc", "recurrent", "recurrent"),
        )
    ]
)  # fmt: skip

SLOWEST_BYTES_PER_S = 0.25e9  # no memory that a network runs from is slower: the bound of every streaming price
CACHE_OVER_MEMORY = 20.0  # elements that stay in a cache are read at most this much faster than from memory
LONGEST_CALL_MS = 0.3
SHORTEST_CALL_MS = {"arm": 0.01, "x86": 0.002, "gpu": 0.001, "mcu": 1e-4, "none": 1e-5}  # of a training step
SHORTEST_INFERENCE_CALL_MS = 1e-5
WINOGRAD_GAIN = 4.0  # multiply-adds that F(4x4, 3x3) saves, at most
BYTES_PER_CYCLE = 2.0  # of one core: copies of 2.6 GB/s at 1.8 GHz (Pi 4) and 6 GB/s at 2.4 GHz (Pi 5) were measured
SLOWEST_MAC = 2000.0  # times a multiply-add at the peak; the slowest kernel of the tables takes 500
MOST_EXAMPLES = 2**31 - 1  # of a batch
STEP_MACS = 3.0  # multiply-adds of a training step over those of a forward pass: two products more
SLOWEST_WEIGHTS = 8.0  # times a step's bytes of weights at the memory's bandwidth: a third of it, and fresh pages
STEP_WEIGHTS = 6.0  # reads and writes of a weight in a step: forward, backward, its gradient, and an SGD update's three


def counts(table: np.ndarray | Sequence[Sequence[float]], batch: int, fused: bool = False) -> np.ndarray:
    """Counts what one pass of `batch` examples through a layer table [10, 4] needs of each column, [17] float64.

    Args:
        table: of the network.
        batch: examples per pass.
        fused: whether the runtime folds norms and rectifiers into the layers before them, so that they cost nothing.

    Raises:
        DeviceError: if the batch is below 1, or no number that can be counted with.
    """
    if batch < 1:
        raise DeviceError(f"batch must be 1 or more, got {batch}")
    if batch > MOST_EXAMPLES:
        raise DeviceError(f"batch must be at most {MOST_EXAMPLES}, got {quoted(batch)}")
    scaled = np.asarray(table, float) * [batch, batch, 1.0, 1.0]
    if fused:
        scaled[FOLDABLE] = 0.0
    found = np.zeros(NUM_COLUMNS)
    priced = _CELLS >= 0
    np.add.at(found, _CELLS[priced], scaled[priced])
    return found


def as_matrix(prices: np.ndarray, fused: bool = False) -> np.ndarray:
    """Lays prices [17] out as one for each cell of a layer table, [10, 4]."""
    matrix = np.where(_CELLS >= 0, np.asarray(prices, float)[_CELLS], 0.0)
    if fused:
        matrix[FOLDABLE] = 0.0
    return matrix


def from_0_1(rows: Sequence[Sequence[float]], as_prices: bool = False) -> tuple[tuple[float, ...], ...]:
    """Converts rows of fedsim 0.1 from its seven kinds to ten: its `conv` and `depthwise` were not told apart.

    Args:
        rows: a layer table, or prices of its cells, [7, 4].
        as_prices: whether rows are prices, which hold for every kind that came out of the old one; a count goes to one.
    """
    old = dict(zip(TABLE_KINDS_0_1, (tuple(map(float, row)) for row in rows), strict=True))
    if as_prices:
        old |= {"conv3x3": old["conv"], "grouped": old["depthwise"], "foldable": old["elementwise"]}
    return tuple(old.get(kind, (0.0,) * 4) for kind in TABLE_KINDS)


@dataclass(frozen=True)
class Physics:
    """What a datasheet says of a device that runs networks in one way.

    Attributes:
        macs_per_s: peak multiply-adds per second of the threads and the precision that are used.
        bytes_per_s: theoretical bandwidth of the memory.
        isa: arm, x86, gpu, mcu, or none where it is not known.
        threads: in use; each streams at most `BYTES_PER_CYCLE`.
        clock_ghz: of a core; what a framework spends on a call goes with it.
        element_bytes: of a weight.
        winograd: whether the runtime has Winograd convolutions.
        weights_told: whether rows tell the price of weights in a step; they do not where all have one batch, since
            weights then take the same share of each network. The memory bounds that price instead.
    """

    macs_per_s: float
    bytes_per_s: float
    isa: str
    threads: int = 1
    clock_ghz: float = 2.0
    element_bytes: int = 4
    winograd: bool = True
    weights_told: bool = True

    def units(self, phase: Phase) -> np.ndarray:
        """Returns milliseconds of each column at the peak and at what threads stream, [17]; a call is 1 us at 2 GHz."""
        streams = self.bytes_per_s
        if self.isa != "gpu":
            streams = min(streams, self.threads * BYTES_PER_CYCLE * 1e9 * self.clock_ghz)
        return self._at(streams, phase)

    def _at(self, bytes_per_s: float, phase: Phase) -> np.ndarray:
        step = phase == "train_step"
        mac = 1e3 / self.macs_per_s * (STEP_MACS if step else 1.0)
        element = 4e3 / bytes_per_s  # activations are computed in single precision
        weight = self.element_bytes * 1e3 / bytes_per_s * (STEP_WEIGHTS if step else 1.0)
        call = 1e-3 * (STEP_MACS if step else 1.0) * (1.0 if self.isa == "gpu" else 2.0 / self.clock_ghz)
        activation = element * (STEP_MACS if step else 1.0)
        return np.array([mac] * len(MACS) + [activation] * len(ACTIVATIONS) + [weight, weight / 4] + [call] * 3)

    def least_ms(self, found: np.ndarray, phase: Phase) -> np.ndarray:
        """Returns the milliseconds below which no pass can be: multiply-adds at the peak, or bytes at the bandwidth.

        Args:
            found: counts of the cost columns, [..., 17].
            phase: of the pass.
        """
        spent = found * self.bounds(phase)[0]
        least: np.ndarray = np.maximum(spent[..., IS_MAC].sum(-1), spent[..., ~IS_MAC & ~IS_CALL].sum(-1))
        return least

    def bounds(self, phase: Phase) -> tuple[np.ndarray, np.ndarray]:
        """Returns the least and the largest price of each column in milliseconds, [17] each."""
        step, units = phase == "train_step", self._at(self.bytes_per_s, phase)
        low, high = units.copy(), units.copy()
        high[IS_MAC] *= SLOWEST_MAC
        if self.winograd and not step:
            low[0] /= WINOGRAD_GAIN
        streams = slice(len(MACS), len(MACS) + len(ACTIVATIONS))
        low[streams] /= CACHE_OVER_MEMORY * (2.0 if step else 1.0)
        slowest = 1e3 / SLOWEST_BYTES_PER_S * (STEP_MACS if step else 1.0)
        high[streams] = 4 * slowest
        first = len(MACS) + len(ACTIVATIONS)
        low[first + 1] = units[first] / (STEP_WEIGHTS if step else 1.0) / CACHE_OVER_MEMORY  # cached between steps
        high[first : first + 2] = self.element_bytes * slowest * 2
        if step and not self.weights_told:
            high[first : first + 2] = np.minimum(high[first : first + 2], SLOWEST_WEIGHTS * units[first])
        low[IS_CALL] = SHORTEST_CALL_MS[self.isa] if step else SHORTEST_INFERENCE_CALL_MS
        high[IS_CALL] = LONGEST_CALL_MS
        return low, np.maximum(high, 1.5 * low)
