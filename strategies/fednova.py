"""FedNova's server: averages ways per unit of their length, and goes the mean length.

Source: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS
2020 (recalled; compared with the authors' code): x <- x + tau_eff sum p_i (y_i - x) / ||a_i||_1 with p_i by examples.
Differs: no momentum of the server; statistics and counters are averaged. Records: see `fedsim.exchanges.fednova`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from flwr.app import ArrayRecord

from fedsim.exchanges.fednova import NORM, STEPS, WAY
from fedsim.grid.edge import EdgeGrid
from fedsim.messages.updates import ClientUpdate
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy


class FedNova(EdgeStrategy):
    """Normalised averaging; where all ways have one length it is FedAvg, bit for bit.

    Args:
        effective: tau_eff, the mean over clients of their ||a_i||_1 (`norms`) or of their steps (`steps`, as the
            authors' code does with a proximal term, which then shortens no step).
        sampling: arguments of FedAvg.
    """

    derived: ClassVar[frozenset[str]] = frozenset({"weights"})
    weights: Tensors

    def __init__(self, effective: Literal["norms", "steps"] = "norms", **sampling: Any):
        super().__init__(**sampling)
        self.effective = effective

    def prepare(self, number: int, weights: Tensors, arrays: ArrayRecord, grid: EdgeGrid) -> None:
        """Remembers what the round begins with."""
        self.weights = weights

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns the mean of the weights, and to what was trained adds what lengths give a client more or less."""
        mean, shares, own = super().combine(number, updates), by_examples(updates), self.shares(updates)
        for name in self.context.trained & mean.keys():
            x = self.weights[name].double()
            total = torch.zeros_like(x)
            for update, p in zip(updates, shares, strict=True):
                total += update.weights[name].double() * float(p)
            for update, p, w in zip(updates, shares, own, strict=True):
                if w != p:
                    total += float(w - p) * (update.weights[name].double() - x)
            mean[name] = total.to(mean[name].dtype)
        return mean

    def shares(self, updates: list[ClientUpdate]) -> list[Fraction]:
        """Returns tau_eff p_i / ||a_i||_1 of each client, in exact fractions: equal lengths leave p_i."""
        norms = [Fraction(float(update.extra(WAY)[NORM])) for update in updates]
        lengths = norms if self.effective == "norms" else [Fraction(int(u.extra(WAY)[STEPS])) for u in updates]
        shares = by_examples(updates)
        effective = sum(p * length for p, length in zip(shares, lengths, strict=True))
        return [p * effective / norm for p, norm in zip(shares, norms, strict=True)]


def by_examples(updates: list[ClientUpdate]) -> list[Fraction]:
    """Returns p_i, each client's share of the examples."""
    total = sum(update.num_examples for update in updates)
    return [Fraction(update.num_examples, total) for update in updates]
