"""Sub-FedAvg: each coordinate is averaged over the clients whose own mask keeps it.

Source: Vahidian et al., "Personalized Federated Learning by Structured and Unstructured Pruning under Data
Heterogeneity", ICDCS Workshops 2021, the unstructured form. Differs: the mean is weighted by examples, as everywhere
here. Records: arrays, both ways: the network, zero where pruned, up; mask, up: by weight, bits [ceil(entries / 8)]
uint8.
"""

from __future__ import annotations

from fedsim.exchanges.slices import unpack_bits
from fedsim.grid.edge import Enrolled
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy, mean_by_coordinate

MASK = "mask"


class SubFedAvg(EdgeStrategy):
    """The mean over those who keep a coordinate; where nobody does, it stays. Without masks this is the plain mean."""

    derived = frozenset({"weights"})
    weights: Tensors

    def broadcast(self, round: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """The whole network; the client puts its mask on."""
        self.weights = weights
        return super().broadcast(round, client, weights)

    def combine(self, round: int, updates: list[ClientUpdate]) -> Tensors:
        """Per coordinate, in client order and float64."""
        parts = []
        for update in updates:
            masks = {name: unpack_bits(bits, self.weights[name].shape) for name, bits in update.extra(MASK).items()}
            parts.append((update.num_examples, update.weights, masks))
        return mean_by_coordinate(self.weights, parts)
