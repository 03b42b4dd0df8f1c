"""FedProto: the mean features of each class are averaged, and no weights.

Source: Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022, algorithm 1
(recalled), and the authors' code. Differs: clients count by their labels of a class, as in the paper, where the code
counts them alike; a class that no client of a round has keeps its prototype, where the code's clients take part in
every round. Records: see `fedsim.exchanges.fedproto`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fedsim.exchanges.fedproto import PROTOTYPES, averaged
from fedsim.grid.edge import Enrolled
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy


class FedProto(EdgeStrategy):
    """Averages prototypes by class, and as FedAvg the weights that are not private: with `private=[all]` none.

    Args:
        sampling: arguments of FedAvg.

    Attributes:
        prototypes: of all classes that were ever sent.
    """

    sends_to_judge: ClassVar[bool] = True

    def __init__(self, **sampling: Any):
        super().__init__(**sampling)
        self.prototypes: Tensors = {}

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns the prototypes, once there are any."""
        return Broadcast(number, weights, {PROTOTYPES: self.prototypes} if self.prototypes else {})

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Averages prototypes, and what comes of the weights."""
        self.prototypes = averaged([update.extra(PROTOTYPES) for update in updates], self.prototypes)
        return super().combine(number, updates)
