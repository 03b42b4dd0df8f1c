"""Sub-FedAvg: each coordinate is averaged over the clients whose own mask keeps it.

Source: Vahidian et al., "Personalized Federated Learning by Structured and Unstructured Pruning under Data
Heterogeneity", ICDCS Workshops 2021, the unstructured form. Differs: the mean is weighted by examples, as everywhere
here. Records: arrays, both ways: the network, zero where pruned, up; mask, up: by weight, bits [ceil(entries / 8)]
uint8.
"""

from __future__ import annotations

from typing import ClassVar

from fedsim.exchanges.slices import unpack_bits
from fedsim.grid.edge import Enrolled
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from strategies.coordinates import Mask, Part, mean_by_coordinate
from strategies.edge import EdgeStrategy

MASK = "mask"


class SubFedAvg(EdgeStrategy):
    """Averages over those who keep a coordinate; where nobody does, it stays. Without masks this is the plain mean."""

    derived: ClassVar[frozenset[str]] = frozenset({"weights"})
    weights: Tensors

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns the whole network; the client puts its mask on."""
        self.weights = weights
        return super().broadcast(number, client, weights)

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns the mean of each coordinate."""
        return mean_by_coordinate(self.weights, [self.part(update) for update in updates])

    def part(self, update: ClientUpdate) -> Part:
        """Returns a client's network with its masks."""
        masks = {name: Mask(unpack_bits(b, self.weights[name].shape)) for name, b in update.extra(MASK).items()}
        return Part(update.num_examples, update.weights, masks)
