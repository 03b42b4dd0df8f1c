"""Sub-FedAvg: each coordinate is averaged over the clients whose own mask keeps it.

Source: Vahidian et al., "Personalized Federated Learning by Structured and Unstructured Pruning under Data
Heterogeneity", ICDCS Workshops 2021, the unstructured form. Differs: the mean is weighted by examples, as everywhere
here. Records: see `fedsim.exchanges.sub_fedavg`.
"""

from __future__ import annotations

from typing import ClassVar

from fedsim.exchanges.sub_fedavg import MASK, unpacked
from fedsim.grid.edge import Enrolled
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from strategies.coordinates import Mask, Part, mean_by_coordinate
from strategies.edge import EdgeStrategy


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
        masks = {name: Mask(mask) for name, mask in unpacked(update.extra(MASK), self.weights).items()}
        return Part(update.num_examples, update.weights, masks)
