"""FedAvg whose broadcast may differ per client and whose replies carry extras: the base of our own strategies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from devices.bounds import Checked
from fedsim.errors import ConfigError
from fedsim.grid.edge import EdgeGrid, Enrolled
from fedsim.grid.server_half import ServerHalf
from fedsim.messages.records import NUM_EXAMPLES, content_of, record_of, tensors_of, update_of
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors


class EdgeStrategy(Checked, ServerHalf, FedAvg, group="strategy", error=ConfigError):
    """Override `broadcast` to say what each client gets, `combine` to make new weights of what came back.

    Both see tensors; packing, sampling and byte counting stay here and in the grid. Arguments are those of FedAvg.

    Attributes:
        sends_to_judge: clients that judge a model get the broadcast of the round, too; else the weights alone.
    """

    takes_all_tensors: ClassVar[bool] = True
    sums_in_float64: ClassVar[bool] = True
    sends_to_judge: ClassVar[bool] = False

    def __init__(self, **sampling: Any):
        super().__init__(**sampling)

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns what a client gets in a round.

        Args:
            number: of the round.
            client: what the server knows of it.
            weights: the global ones; not to be changed in place.
        """
        return Broadcast(number, weights)

    def prepare(self, number: int, weights: Tensors, arrays: ArrayRecord, grid: EdgeGrid) -> None:
        """Holds the exchanges that come before a round's training, once its cohort is drawn.

        Args:
            number: of the round.
            weights: the global ones.
            arrays: the same, packed.
            grid: for the exchanges.
        """

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns new global weights from the accepted updates, in client order: here their mean weighted by examples.

        Sums in float64 and casts back, so that the result does not depend on the number of workers. Integers are
        rounded.
        """
        total = sum(u.num_examples for u in updates)
        mean = {}
        for name, first in updates[0].weights.items():
            stack = torch.zeros(first.shape, dtype=torch.float64)
            for update in updates:
                stack += update.weights[name].double() * (update.num_examples / total)
            mean[name] = (stack if first.is_floating_point() else stack.round()).to(first.dtype)
        return mean

    # --- packing ------------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns a message with its own broadcast for each client of FedAvg's cohort."""
        edge, weights = edge_grid(self, grid), tensors_of(arrays)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.prepare(server_round, weights, arrays, edge)
        self.fill(messages, server_round, edge, weights, arrays)
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns a message for each client that FedAvg chooses to judge a model."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        if self.sends_to_judge:
            self.fill(messages, server_round, edge_grid(self, grid), tensors_of(arrays), arrays)
        return messages

    def fill(
        self, messages: Iterable[Message], number: int, grid: EdgeGrid, weights: Tensors, arrays: ArrayRecord
    ) -> None:
        """Gives each message its client's broadcast; `arrays` is the packed form of `weights`."""
        packed = {id(weights): (weights, arrays)}  # what several clients get is packed once; held, so that ids stay
        extras: dict[str, tuple[Tensors, ArrayRecord]] = {}  # of the last client: what each has of its own is not held
        for message in messages:
            broadcast = self.broadcast(number, grid.client(message.metadata.dst_node_id), weights)
            own = broadcast.weights
            if id(own) not in packed:
                packed[id(own)] = (own, record_of(own))
            for name, tensors in broadcast.extras.items():
                if name not in extras or extras[name][0] is not tensors:
                    extras[name] = (tensors, record_of(tensors))
            message.content = content_of(
                broadcast, packed[id(own)][1], {name: extras[name][1] for name in broadcast.extras}
            )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hands the accepted updates to `combine`; metrics are averaged by examples."""
        good = [reply for reply in replies if reply.has_content()]
        if not good:
            return None, None
        updates = [update_of(reply.content, reply.metadata.src_node_id) for reply in good]
        metrics = self.train_metrics_aggr_fn([reply.content for reply in good], NUM_EXAMPLES)
        return record_of(self.combine(server_round, updates)), metrics


def edge_grid(strategy: Strategy, grid: Grid) -> EdgeGrid:
    """Returns the grid of a strategy that needs ours.

    Raises:
        ConfigError: if it is another one.
    """
    if not isinstance(grid, EdgeGrid):
        raise ConfigError(f"{type(strategy).__name__} needs fedsim's EdgeGrid, got {type(grid).__name__}")
    return grid
