"""FedAdam as published: Flower's, without a correction of the bias that the paper does not have.

Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2: x + eta m / (sqrt(v) + tau). Flower's
class multiplies eta by sqrt(1 - beta_2^(t + 1)) / (1 - beta_1^(t + 1)) in round t, with the usual betas 0.74 in round
1, 0.47 in round 10 and 0.80 in round 100, and its FedYogi does not: the two would be compared at different rates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy

from fedsim.grid.server_half import ServerHalf


class FedAdam(ServerHalf, strategy.FedAdam):
    """Adam on the server with a constant rate. Arguments are those of Flower's FedAdam."""

    takes_the_mean: ClassVar[bool] = True

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Takes one step of algorithm 2."""
        eta, steps = self.eta, server_round + 1.0
        self.eta = eta * (1 - self.beta_1**steps) / (1 - self.beta_2**steps) ** 0.5
        try:
            return super().aggregate_train(server_round, replies)
        finally:
            self.eta = eta
