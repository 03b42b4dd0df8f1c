"""FedDyn's server: the mean of the clients' weights, less its state over alpha.

Source: Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, algorithm 1 (recalled; compared
with the authors' code): h <- h - alpha / N sum (y_k - x) over the round's clients, x <- mean(y_k) - h / alpha. Kept is
-h / alpha, the sum of all moves over N, which needs no alpha. Every client counts the same, as in the paper. Judged are
the weights with the state; the authors' code also judges the mean of the clients'. Statistics and counters are
averaged. Weights alone travel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord

from fedsim.grid.edge import EdgeGrid
from fedsim.messages.updates import ClientUpdate
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy


class FedDyn(EdgeStrategy):
    """The mean of the clients' weights and, added, what all clients have moved so far.

    Args:
        sampling: arguments of FedAvg.
    """

    derived: ClassVar[frozenset[str]] = frozenset({"weights"})
    weights: Tensors

    def __init__(self, **sampling: Any):
        super().__init__(**sampling)
        self.moves: Tensors = {}  # -h / alpha, float64; empty until there are some

    def prepare(self, number: int, weights: Tensors, arrays: ArrayRecord, grid: EdgeGrid) -> None:
        """Remembers what the round begins with."""
        self.weights = weights

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns the new weights, and moves the state."""
        mean = super().combine(number, [replace(update, num_examples=1) for update in updates])
        for name in self.context.trained & mean.keys():
            x = self.weights[name].double()
            total = torch.stack([update.weights[name].double() - x for update in updates]).sum(0)
            self.moves[name] = self.moves.get(name, torch.zeros_like(x)) + total / self.context.num_clients
            mean[name] = (x + total / len(updates) + self.moves[name]).to(mean[name].dtype)
        return mean
