"""A strategy around another one, which samples the clients and averages the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from devices.bounds import Checked
from fedsim.errors import ConfigError
from fedsim.grid.edge import EdgeGrid
from fedsim.grid.exchange import Exchange
from fedsim.grid.server_half import ServerContext, ServerHalf, server_half


class WrappingStrategy(Checked, ServerHalf, FedAvg, group="strategy", error=ConfigError):
    """Leaves every hook to another strategy; override those to which a method adds something.

    Args:
        server: makes the other strategy.
        sampling: arguments of FedAvg, for both.
    """

    def __init__(self, server: Callable[..., Strategy], **sampling: Any):
        super().__init__(**sampling)
        self.server = server(**sampling)

    @property
    def device_reads(self) -> Mapping[str, str]:
        """What the other strategy decides by a client's device."""
        return server_half(self.server).device_reads

    @property
    def reads_rounds(self) -> str:
        """What the other strategy decides by the number of rounds."""
        return server_half(self.server).reads_rounds

    @property
    def asks_reachable(self) -> bool:  # type: ignore[override]
        """Whether the other strategy holds exchanges with clients that it can reach just then."""
        return server_half(self.server).asks_reachable

    @property
    def wraps(self) -> Strategy | None:
        """The other strategy."""
        return self.server

    def begin(self, context: ServerContext) -> None:
        """Tells the other strategy too."""
        super().begin(context)
        server_half(self.server).begin(context)

    def closed(self, exchange: Exchange) -> None:
        """Hands the other strategy what a training exchange brought."""
        server_half(self.server).closed(exchange)

    def complete(self, number: int, arrays: ArrayRecord, grid: EdgeGrid) -> ArrayRecord:
        """Returns what the other strategy makes of weights that are to be judged."""
        return server_half(self.server).complete(number, arrays, grid)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the other strategy's messages."""
        return self.server.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the other strategy's weights and metrics."""
        return self.server.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the other strategy's messages."""
        return self.server.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Returns the other strategy's metrics."""
        return self.server.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Logs the other strategy's settings."""
        self.server.summary()
