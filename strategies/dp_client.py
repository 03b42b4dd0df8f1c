"""Central differential privacy whose clients clip: the server needs the sum of their updates, and no single one.

Sources: McMahan et al., ICLR 2018; Andrew et al., NeurIPS 2021; as Flower's wrappers for clipping at the client, which
need a mod in its client app. Differs as `strategies.dp` does. Records: see `fedsim.exchanges.clipping`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedsim.errors import ConfigError
from fedsim.exchanges.clipping import CLIPPED_RATE, CLIPPING_NORM, NORM_BIT
from fedsim.grid.exchange import Exchange
from fedsim.messages.records import ARRAYS, arrays_in, from_array
from strategies.dp import AdaptiveDPFedAvg, Clipped, DPFedAvg


class ClippedAtClients(DPFedAvg):
    """Has each client clip its own update: the server needs no single one, only their sum.

    Attributes:
        brought: the training exchange of the round.
    """

    weighs_alike: ClassVar[bool] = True
    asks: ClassVar[dict[str, bool]] = {}
    derived: ClassVar[frozenset[str]] = frozenset({"sent", "brought"})
    brought: Exchange

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the other strategy's messages, which say the norm."""
        asked = ConfigRecord({**config, CLIPPING_NORM: self.clipping_norm, **self.asks})
        return super().configure_train(server_round, arrays, asked, grid)

    def closed(self, exchange: Exchange) -> None:
        """Takes whose updates are in the mean, and which of them were clipped."""
        super().closed(exchange)
        self.brought = exchange

    def clipped(self, replies: Sequence[Message]) -> Clipped:
        """Takes the sum out of the one reply that stands for all.

        Raises:
            ConfigError: if clients did not clip.
        """
        (mean,) = (arrays_in(reply.content)[ARRAYS] for reply in replies)
        accepted = [report for report in self.brought.reports if report.client in set(self.brought.accepted)]
        if unclipped := [report.client for report in accepted if CLIPPED_RATE not in report.metrics]:
            raise ConfigError(
                f"{type(self).__name__} leaves the clipping to the clients, and {unclipped[:5]} did not clip; take "
                "strategy=dp_fedavg or strategy=dp_adaptive, which clip at the server"
            )
        count, longer = len(accepted), sum(int(report.metrics[CLIPPED_RATE]) for report in accepted)
        return Clipped({n: (from_array(mean[n]) - start) * count for n, start in self.sent.items()}, count, longer)


class ClientDPFedAvg(ClippedAtClients):
    """DP-FedAvg whose clients clip; arguments are those of `DPFedAvg`."""

    takes_the_mean: ClassVar[bool] = True


class ClientAdaptiveDPFedAvg(ClippedAtClients, AdaptiveDPFedAvg):
    """Adaptive DP-FedAvg whose clients clip, and say whether they did; arguments are those of `AdaptiveDPFedAvg`."""

    takes_the_mean: ClassVar[bool] = True
    asks: ClassVar[dict[str, bool]] = {NORM_BIT: True}
