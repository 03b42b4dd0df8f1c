"""Federated averaging of different parts of one network: each client trains the channels it was given.

The server cuts the tensors and puts what comes back where it was: each coordinate becomes the mean over the clients
that hold it, weighted by examples, and stays as it is where nobody does. With all channels everywhere this is FedAvg.
Records: arrays, down and up: the tensors of the part. kept, down, and up where the client chose: bits [ceil(C / 8)]
uint8, one bit for each of the C channels that could be removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from devices.compression.channels import Kept
from fedsim.errors import ConfigError
from fedsim.exchanges.slices import BITS, KEPT, Slices
from fedsim.grid.edge import EdgeGrid, Enrolled
from fedsim.messages.records import Broadcast, ClientUpdate, tensors_of
from fedsim.settings.build import World, build_world
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy, mean_by_coordinate


class SubnetStrategy(EdgeStrategy):
    """Override `choose` to say which channels a client trains. Arguments are those of FedAvg.

    Attributes:
        slices: groups, networks and prices of narrowed networks; there from the first round on.
        world: of the run; likewise.
        weights: the global ones of this round; not to be changed in place.
        sent: by client, the channels that it was given in this round.
        judging: whether broadcasts are for an evaluation.
    """

    derived = frozenset({"grid", "slices", "world", "weights", "sent", "_parts"})
    slices: Slices
    world: World
    weights: Tensors

    def __init__(self, **sampling: Any):
        super().__init__(**sampling)
        self.sent: dict[int, Kept] = {}
        self.judging = False
        self._parts: dict[bytes, tuple[Kept, Tensors, dict[str, Tensors]]] = {}

    def choose(self, round: int, client: Enrolled) -> Kept:
        """Which channels of each group the client trains."""
        raise NotImplementedError(f"{type(self).__name__} does not say who trains which channels")

    def broadcast(self, round: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """The client's part of the tensors and its channels as bits; clients with equal parts share them."""
        kept = self.choose(round, client)
        bits = self.slices.groups.pack(kept)
        key = bits.numpy().tobytes()
        if key not in self._parts:
            self._parts[key] = (kept, self.slices.groups.slice(weights, kept), {KEPT: {BITS: bits}})
        self.sent[client.client_id], part, extras = self._parts[key]
        return Broadcast(round, part, extras)

    def combine(self, round: int, updates: list[ClientUpdate]) -> Tensors:
        """The mean over those who hold a coordinate, in client order and float64; integers are rounded."""
        return mean_by_coordinate(self.weights, [(self.weight(u), *self.counted(u)) for u in updates])

    def counted(self, update: ClientUpdate) -> tuple[Tensors, dict[str, dict[int, torch.Tensor]]]:
        """The tensors of an update that count, and where they belong: here all of them."""
        return update.weights, self.indices(update)

    def weight(self, update: ClientUpdate) -> float:
        """How much a client counts where others hold the same coordinate: here its examples."""
        return update.num_examples

    def indices(self, update: ClientUpdate) -> dict[str, dict[int, torch.Tensor]]:
        """Where an update's tensors belong: its own choice of channels where it says one, else what it was sent."""
        groups = self.slices.groups
        own = update.extras.get(KEPT)
        return groups.indices(groups.unpack(own[BITS]) if own is not None else self.sent[update.client_id])

    def prepare(self, round: int, weights: Tensors, arrays: ArrayRecord, grid: EdgeGrid) -> None:
        """Takes the weights of the round."""
        self.open(weights, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's choice of clients; each judges the part that its device trains."""
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        self.open(tensors_of(arrays), grid)
        self.judging = True
        try:
            self.fill(messages, server_round, self.grid, self.weights, arrays)
        finally:
            self.judging = False
        return messages

    def open(self, weights: Tensors, grid: Grid) -> None:
        """Takes the weights of a round; at the first, finds the channel groups.

        Raises:
            ConfigError: if the model cannot be narrowed, or the grid is not ours.
        """
        if not isinstance(grid, EdgeGrid):
            raise ConfigError(f"{type(self).__name__} needs fedsim's EdgeGrid, got {type(grid).__name__}")
        self.grid = grid
        if not hasattr(self, "slices"):
            self.world = build_world(str(grid.settings["json"]))
            self.slices = Slices(self.world.workload)
        self.weights, self._parts = weights, {}
