"""The mean of single weights, each over the clients that hold it; for clients that train different parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from devices.compression.channels import grid
from fedsim.workloads.base import Tensors

Index = EllipsisType | tuple[Tensor, ...]  # of entries in a tensor


@dataclass(frozen=True)
class Mask:
    """Which entries of a whole tensor count: those where `kept`, of its shape, is True."""

    kept: Tensor

    def share(self, weight: float, whole: Tensor) -> tuple[Index, float | Tensor]:
        """Returns where a client of this weight counts, and how much."""
        return ..., self.kept.double() * weight


@dataclass(frozen=True)
class Entries:
    """Where a smaller tensor lies in the whole one: by dimension, the entries that it has; of all others it has all."""

    by_dim: Mapping[int, Tensor] = field(default_factory=dict)

    def share(self, weight: float, whole: Tensor) -> tuple[Index, float | Tensor]:
        """Returns where a client of this weight counts, and how much."""
        has_all = all(len(entries) == whole.shape[dim] for dim, entries in self.by_dim.items())
        return (... if has_all else grid(self.by_dim, whole.shape, whole.device)), weight


@dataclass(frozen=True)
class Part:
    """What one client adds to a mean.

    Attributes:
        weight: how much it counts, e.g. its examples.
        tensors: its values; those of which it holds nothing are not among them.
        places: by name, where they belong; a tensor that is not named is whole.
    """

    weight: float
    tensors: Tensors
    places: Mapping[str, Mask | Entries]


def mean_by_coordinate(weights: Tensors, parts: Sequence[Part]) -> Tensors:
    """Returns the mean of each single weight over the parts that hold it; where none does, it stays as it was.

    Sums in float64 and in the order given, as `EdgeStrategy.combine` does: of whole tensors it is that mean, bit for
    bit. Integers are rounded.

    Args:
        weights: the global ones.
        parts: of the clients, in order.
    """
    mean = {}
    for name, old in weights.items():
        held, total = torch.zeros(old.shape, dtype=torch.float64), torch.zeros(old.shape, dtype=torch.float64)
        holding = [part for part in parts if name in part.tensors]
        shares: list[tuple[Any, float | Tensor]] = [
            part.places.get(name, Entries()).share(part.weight, old) for part in holding
        ]
        for index, share in shares:
            held[index] += share
        for (index, share), part in zip(shares, holding, strict=True):
            total[index] += part.tensors[name].double() * (share / held[index]).nan_to_num(0.0)
        new = (total if old.is_floating_point() else total.round()).to(old.dtype)
        mean[name] = torch.where(held > 0, new, old)
    return mean
