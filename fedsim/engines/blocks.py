"""Sums whose shape never changes: clients in fixed blocks, float64 inside, cast once at the end.

The blocks are a function of the cohort alone, never of the number of workers, so every engine adds the same numbers in
the same order and gets the same bytes. May import: flwr, numpy, fedsim.messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from fedsim.messages import NUM_EXAMPLES, from_array, to_array

MAX_BLOCKS = 64
PLAIN_MEANS = (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedProx)

T = TypeVar("T")


def blocks(clients: Sequence[T]) -> list[Sequence[T]]:
    """Cuts clients, in order, into at most 64 blocks of ceil(n / 64)."""
    size = max(1, -(-len(clients) // MAX_BLOCKS))
    return [clients[start : start + size] for start in range(0, len(clients), size)]


def is_plain_mean(strategy: Strategy) -> bool:
    """Whether all that the strategy takes from a round is the mean weighted by examples.

    Only Flower's own classes by exact type: a subclass may look at each reply, so it gets each reply.
    """
    return (
        type(strategy) in PLAIN_MEANS
        and isinstance(strategy, FedAvg)
        and strategy.weighted_by_key == NUM_EXAMPLES
        and strategy.train_metrics_aggr_fn is aggregate_metricrecords
    )


class WeightedSum:
    """Running sum of weight x arrays in float64, over clients in blocks.

    The clients of a block are added up by themselves and the block's sum is then added to the total. Buffers are made
    once and reused: fresh memory for every client would cost more than the additions.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._dtypes: dict[str, np.dtype] = {}
        self._total: dict[str, np.ndarray] = {}
        self._block: dict[str, np.ndarray] = {}
        self._scaled: dict[str, np.ndarray] = {}
        self._number: int | None = None

    def add(self, record: ArrayRecord, weight: float, block: int) -> None:
        """Adds one client's arrays; clients come in order, so that equal `block` numbers stand together.

        Raises:
            ValueError: if names or shapes differ from those of the first client.
        """
        arrays = {name: from_array(array) for name, array in record.items()}
        if not self._dtypes:
            self._dtypes = {name: a.dtype for name, a in arrays.items()}
            for buffers in (self._total, self._block, self._scaled):
                buffers.update({name: np.zeros(a.shape, np.float64) for name, a in arrays.items()})
        if {n: a.shape for n, a in arrays.items()} != {n: t.shape for n, t in self._total.items()}:
            raise ValueError("clients sent weights of different names or shapes; a mean needs equal ones")
        opens_block = block != self._number
        if opens_block:
            self._close_block()
            self._number = block
        for name, array in arrays.items():
            product = (self._block if opens_block else self._scaled)[name]
            np.copyto(product, array)  # first to float64: numpy would multiply in the dtype of the array
            product *= weight
            if not opens_block:
                self._block[name] += product
        self.weight += weight

    def mean(self) -> ArrayRecord:
        """The weighted mean in the clients' own dtypes; integers are rounded.

        Raises:
            ValueError: if the weights sum to zero.
        """
        if not self.weight > 0:
            raise ValueError(f"the weights of a mean must sum to more than zero, got {self.weight}")
        self._close_block()
        arrays = {}
        for name, dtype in self._dtypes.items():
            mean = self._total[name] / self.weight
            arrays[name] = to_array((np.rint(mean) if dtype.kind in "iub" else mean).astype(dtype))
        return ArrayRecord(arrays)

    def _close_block(self) -> None:
        if self._number is not None:
            for name, total in self._total.items():
                total += self._block[name]
        self._number = None
