"""Federated averaging of different parts of one network: each client trains the channels it was given.

The server cuts the tensors and puts what comes back where it was: each coordinate becomes the mean over the clients
that hold it, weighted by examples, and stays as it is where nobody does. With all channels everywhere this is FedAvg.
Records: arrays, down and up: the tensors of the part. kept, down, and up where the client chose: bits [ceil(C / 8)]
uint8, one bit for each of the C channels that could be removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from devices.compression.channels import ChannelGroups, Kept
from fedsim.exchanges.slices import BITS, KEPT, Slices
from fedsim.grid.edge import EdgeGrid, Enrolled
from fedsim.grid.server_half import ServerContext
from fedsim.messages.records import tensors_of
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from strategies.coordinates import Entries, Part, mean_by_coordinate
from strategies.edge import EdgeStrategy, edge_grid


class SubnetStrategy(EdgeStrategy):
    """Override `choose` to say which channels a client trains. Arguments are those of FedAvg.

    Attributes:
        slices: groups, networks and prices of narrowed networks.
        weights: the global ones of this round; not to be changed in place.
        sent: by client, the channels that it was given in this round.
        judging: whether broadcasts are for an evaluation.
        kind: what of the network may go; the trainer's is the same.
    """

    derived: ClassVar[frozenset[str]] = frozenset({"slices", "weights", "sent", "_parts"})
    kind: ClassVar[type[ChannelGroups]] = ChannelGroups
    slices: Slices
    weights: Tensors

    def __init__(self, **sampling: Any):
        super().__init__(**sampling)
        self.sent: dict[int, Kept] = {}
        self.judging = False
        self._parts: dict[bytes, tuple[Kept, Tensors, dict[str, Tensors]]] = {}

    def begin(self, context: ServerContext) -> None:
        """Finds the channel groups.

        Raises:
            ConfigError: if the model cannot be narrowed.
        """
        super().begin(context)
        self.slices = Slices(context.model, kind=self.kind)

    def choose(self, number: int, client: Enrolled) -> Kept:
        """Returns the channels of each group that the client trains in a round."""
        raise NotImplementedError(f"{type(self).__name__} does not say who trains which channels")

    # --- what a client gets -------------------------------------------------------------------------------------------

    def begin_round(self, weights: Tensors) -> None:
        """Takes the weights of a round."""
        self.weights, self._parts = weights, {}

    def prepare(self, number: int, weights: Tensors, arrays: ArrayRecord, grid: EdgeGrid) -> None:
        """Takes the weights of the round."""
        self.begin_round(weights)

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns the client's part of the tensors and its channels as bits; clients with equal parts share them."""
        kept = self.choose(number, client)
        bits = self.slices.groups.pack(kept)
        key = bits.numpy().tobytes()
        if key not in self._parts:
            self._parts[key] = (kept, self.slices.groups.slice(weights, kept), {KEPT: {BITS: bits}})
        self.sent[client.client_id], part, extras = self._parts[key]
        return Broadcast(number, part, extras)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns a message for each client that FedAvg chooses; each judges the part that its device trains."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        self.begin_round(tensors_of(arrays))
        self.judging = True
        try:
            self.fill(messages, server_round, edge_grid(self, grid), self.weights, arrays)
        finally:
            self.judging = False
        return messages

    # --- what comes back ----------------------------------------------------------------------------------------------

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns the mean of each coordinate over those who hold it."""
        return mean_by_coordinate(self.weights, [Part(self.weight(u), *self.counted(u)) for u in updates])

    def counted(self, update: ClientUpdate) -> tuple[Tensors, dict[str, Entries]]:
        """Returns the tensors of an update that count, and where they lie: here all of them."""
        return update.weights, self.places(self.trained(update))

    def trained(self, update: ClientUpdate) -> Kept:
        """Returns which channels a client trained: those that it says it chose, else those that it was sent."""
        own = update.extras.get(KEPT)
        return self.sent[update.client_id] if own is None else self.slices.groups.unpack(own[BITS])

    def places(self, kept: Kept) -> dict[str, Entries]:
        """Returns where the tensors of a part lie in the whole ones."""
        return {name: Entries(by_dim) for name, by_dim in self.slices.groups.indices(kept).items()}

    def weight(self, update: ClientUpdate) -> float:
        """Returns how much a client counts where others hold the same coordinate: here its examples."""
        return update.num_examples
