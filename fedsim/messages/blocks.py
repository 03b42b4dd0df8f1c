"""Sums whose shape never changes: clients in fixed blocks, float64 inside, cast once at the end.

The blocks are a function of the cohort alone, never of the number of workers, so every engine adds the same numbers in
the same order and gets the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fedsim.messages.weights import rounded_to
from fedsim.workloads.base import Tensors

MAX_BLOCKS = 64
UNEQUAL = "clients sent weights of different names or shapes; a mean needs equal ones"

T = TypeVar("T")


def blocks(clients: Sequence[T]) -> list[Sequence[T]]:
    """Cuts clients, in order, into at most 64 blocks of ceil(n / 64)."""
    size = max(1, -(-len(clients) // MAX_BLOCKS))
    return [clients[start : start + size] for start in range(0, len(clients), size)]


class BlockSum:
    """Sum of weight x tensors over the clients of one block, in the order in which they are added, where they lie.

    A block of one client stays as it came: its product is left to whoever adds up the blocks, so that nothing twice as
    large travels.
    """

    def __init__(self) -> None:
        self.weight, self.clients = 0.0, 0
        self._first: Mapping[str, Tensor] = {}
        self._total: Tensors = {}
        self._scaled: Tensors = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Adds one client's tensors, which must not change afterwards.

        Raises:
            ValueError: if names or shapes differ from those of the first client.
        """
        if self.clients == 0:
            self._first = tensors
        else:
            if self.clients == 1:
                self._total = _products(self._first, self.weight, {})
            _add_to(self._total, _products(tensors, weight, self._scaled))
        self.weight += weight
        self.clients += 1

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The float64 sum; of a single client its own tensors, not yet multiplied by its weight."""
        return self._first if self.clients == 1 else self._total


class WeightedSum:
    """Running sum over blocks, in block order. Its buffers are reused: fresh memory costs more than adding."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._total: Tensors = {}
        self._scaled: Tensors = {}

    def add(self, block: Mapping[str, Tensor], weight: float, clients: int) -> None:
        """Adds the `BlockSum.tensors` of a block of this weight and number of clients.

        Raises:
            ValueError: if names or shapes differ from those of the first block.
        """
        product = _products(block, weight, self._scaled) if clients == 1 else block
        if not self._total:
            self._total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in product.items()}
        _add_to(self._total, product)
        self.weight += weight

    @property
    def totals(self) -> Tensors:
        """The weighted sums, float64; they change as blocks are added."""
        return self._total

    def mean(self, dtypes: Mapping[str, torch.dtype]) -> Tensors:
        """The weighted mean in these dtypes, of tensors with other names in the first of them; integers are rounded.

        Raises:
            ValueError: if the weights sum to zero.
        """
        if not self.weight > 0:
            raise ValueError(f"the weights of a mean must sum to more than zero, got {self.weight}")
        first = next(iter(dtypes.values()))  # joined weights are all alike
        return {name: rounded_to(total / self.weight, dtypes.get(name, first)) for name, total in self._total.items()}


def _products(tensors: Mapping[str, Tensor], weight: float, buffers: Tensors) -> Tensors:
    """Weight x tensors in float64, written into `buffers`."""
    for name, t in tensors.items():
        if name not in buffers:
            buffers[name] = torch.empty_like(t, dtype=torch.float64)
        if buffers[name].shape != t.shape:
            raise ValueError(UNEQUAL)
        buffers[name].copy_(t).mul_(weight)  # first to float64: the product would be made in the dtype of the tensor
    if len(buffers) != len(tensors):
        raise ValueError(UNEQUAL)
    return buffers


def _add_to(total: Tensors, tensors: Mapping[str, Tensor]) -> None:
    if {name: t.shape for name, t in total.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError(UNEQUAL)
    for name, t in total.items():
        t += tensors[name]
