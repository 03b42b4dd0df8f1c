"""Mean augmented federated learning (MAFL): clients share means of their examples once, and train with everybody's.

Source: Yoon et al., "FedMix: Approximation of Mixup under Mean Augmented Federated Learning", ICLR 2021, algorithm 1
(recalled; the exchange before round 1 as in Flower's baseline, which however sends the pool anew in every round).
Records: see `fedsim.exchanges.mafl`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
import torch
from annotated_types import Ge
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.exchanges.averages import from_uint8, to_uint8
from fedsim.exchanges.mafl import (
    AVERAGES,
    DROPPED,
    GROUP_SIZE,
    KEPT,
    MIN_GROUP_SIZE,
    POOL,
    POOL_DTYPE,
    QUESTION,
    ROOM,
    SIZE,
    VERSION,
)
from fedsim.grid.edge import EdgeGrid
from fedsim.grid.exchange import Exchange
from fedsim.messages.records import record_of, tensors_of
from fedsim.seeding import generator, torch_generator
from fedsim.workloads.base import Tensors
from strategies.edge import edge_grid
from strategies.wrapping import WrappingStrategy

ALL: Final = "all"
RETIRED = -1  # owner of pairs of data that are no more


class Mafl(WrappingStrategy):
    """Puts a pool of averages beside what another strategy sends; sampling and averaging of weights stay with that one.

    Before round 1 every client that can be reached is asked for averages; another, or one that was late, is asked when
    it is next in a cohort, and so is one whose data have changed: then everybody drops its old pairs. A client is sent
    each pair once, and keeps it; a device without room for all of them gets a uniform draw. Averaging is no formal
    privacy: a label mean is a class histogram, and small groups show their examples (`fedsim data averages` draws
    them).

    Args:
        server: makes the strategy that samples the clients and averages their weights.
        group_size: M_k, examples per average; "all" makes one average of everything a client has.
        min_group_size: a client with smaller groups shares nothing.
        exclude_own: do not send clients their own averages; the paper's algorithm does.
        pool_dtype: of shared inputs; uint8 takes a quarter of the bytes and memory.
        pool_source: whose averages clients get: "global", those of all; or, to see what these are worth (table 9 of the
            paper), "local", only their own, or "noise": each input is replaced by a draw from the normal distribution
            with the mean and deviation of the pool, entry by entry, and keeps the label of the average.
        sampling: arguments of FedAvg.

    Attributes:
        pool: pairs in the order in which they came.
        owners: client of each pair, or RETIRED.
        came: true inputs, where the pool holds noise instead.
        room: bytes that a client has for pairs; of those that have answered.
        version: of a client's data when it sent its averages.
        held: rows of the pool that a client has, in its order.
        sent: rows that it will have once its reply is accepted.

    Raises:
        ConfigError: for a setting that is not allowed.
    """

    asks_reachable: ClassVar[bool] = True
    derived: ClassVar[frozenset[str]] = frozenset({"sent"})

    def __init__(
        self,
        server: Callable[..., Strategy],
        group_size: Literal["all"] | Annotated[int, Ge(1)] = ALL,
        min_group_size: Annotated[int, Ge(1)] = 5,
        exclude_own: bool = False,
        pool_dtype: Literal["float32", "uint8"] = "float32",
        pool_source: Literal["global", "local", "noise"] = "global",
        **sampling: Any,
    ):
        super().__init__(server, **sampling)
        if isinstance(group_size, int) and group_size < min_group_size:
            needed = f"all or at least {min_group_size} (strategy.min_group_size)"
            raise ConfigError(f"strategy.group_size must be {needed}, got {group_size!r}")
        if exclude_own and pool_source == "local":
            raise ConfigError("strategy.exclude_own=true leaves nothing of strategy.pool_source=local; set one of them")
        self.exclude_own, self.source = exclude_own, pool_source
        self.question = ConfigRecord(
            {
                GROUP_SIZE: 0 if group_size == ALL else int(group_size),
                MIN_GROUP_SIZE: min_group_size,
                POOL_DTYPE: pool_dtype,
            }
        )
        self.pool: Tensors = {}
        self.owners = np.zeros(0, np.int64)
        self.came: Tensor | None = None
        self.room: dict[int, int] = {}
        self.version: dict[int, int] = {}
        self.held: dict[int, np.ndarray] = {}
        self.sent: dict[int, np.ndarray] = {}

    # --- what a client gets -------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the other strategy's messages, each with the part of the pool that its client lacks."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.collect([message.metadata.dst_node_id for message in messages], edge_grid(self, grid))
        self.sent = {}
        packed: dict[bytes, ArrayRecord] = {}  # clients that lack the same pairs share one record
        for message in messages:
            client = message.metadata.dst_node_id
            rows = self.sent[client] = self.wanted(client, self.context.seed)
            held = self.held.get(client, rows[:0])
            stale = self.owners[held] == RETIRED
            kept = _common_length(rows, held[~stale])
            facts = ConfigRecord({SIZE: len(rows), KEPT: kept})
            content: dict[str, Any] = {**message.content, f"{POOL}-facts": facts}
            if stale.any():
                content[DROPPED] = record_of({"rows": torch.from_numpy(np.flatnonzero(stale))})
            lacks = rows[kept:]
            if len(lacks):
                if lacks.tobytes() not in packed:
                    packed[lacks.tobytes()] = record_of({n: t[torch.from_numpy(lacks)] for n, t in self.pool.items()})
                content[POOL] = packed[lacks.tobytes()]
            message.content = RecordDict(content)
        return messages

    def wanted(self, client: int, seed: int) -> np.ndarray:
        """Returns the rows of the pool that a client should have, in order: a draw where its device cannot hold all."""
        own = self.owners == client
        rows = np.flatnonzero(own if self.source == "local" else (self.owners != RETIRED) & ~(own & self.exclude_own))
        pair_bytes = sum(t[:1].numel() * t.element_size() for t in self.pool.values())
        fits = self.room[client] // pair_bytes if client in self.room and pair_bytes else len(rows)
        if len(rows) <= fits:
            return rows
        # The rank of a pair stays as the pool grows, so that few are sent again.
        rank = generator(seed, POOL, client).random(len(self.owners))[rows]
        return np.sort(rows[np.argsort(rank, kind="stable")[:fits]])

    # --- the pool -----------------------------------------------------------------------------------------------------

    def collect(self, cohort: Iterable[int], grid: EdgeGrid) -> None:
        """Asks those who have not answered yet: everybody before the first pool, then the cohort's."""
        before = len(self.owners)
        asked = range(self.context.num_clients) if not self.version else cohort
        missing = grid.reachable(client for client in asked if client not in self.room)
        content = RecordDict({"config": self.question})
        for reply in grid.send_and_receive([Message(content, client, f"query.{QUESTION}") for client in missing]):
            client, answer = reply.metadata.src_node_id, reply.content
            facts = tensors_of(answer.array_records[ROOM])
            self.room[client], self.version[client] = int(facts["bytes"]), int(facts["version"])
            self.owners[self.owners == client] = RETIRED
            if AVERAGES in answer:
                self.add(client, tensors_of(answer.array_records[AVERAGES]))
        if self.source == "noise":
            self.replace_with_noise(before, self.context.seed)

    def add(self, client: int, pairs: Tensors) -> None:
        """Puts a client's averages behind those that are there."""
        self.pool = {n: torch.cat([self.pool[n], t]) if self.pool else t for n, t in pairs.items()}
        self.owners = np.append(self.owners, np.full(len(pairs["y"]), client))

    def replace_with_noise(self, first: int, seed: int) -> None:
        """Replaces the inputs from row `first` on by noise with the mean and deviation of all inputs that ever came."""
        fresh = {n: t[first:] for n, t in self.pool.items()}
        if not len(fresh.get("y", ())):
            return
        x = from_uint8(fresh) if "step" in fresh else fresh["x"]
        self.came = x if self.came is None else torch.cat([self.came, x])
        draws = torch.randn(x.shape, generator=torch_generator(seed, "pool-noise", first)).to(x)
        noise = self.came.mean(0) + self.came.std(0, correction=0) * draws
        for name, t in (to_uint8(noise) if "step" in fresh else {"x": noise}).items():
            self.pool[name] = torch.cat([self.pool[name][:first], t])

    def closed(self, exchange: Exchange) -> None:
        """Notes what accepted clients now hold, and who has new data."""
        super().closed(exchange)
        self.held.update({client: self.sent[client] for client in exchange.accepted})
        for report in exchange.reports:
            if VERSION in report.metrics and report.metrics[VERSION] != self.version.get(report.client):
                self.room.pop(report.client, None)


def _common_length(rows: np.ndarray, held: np.ndarray) -> int:
    """Returns the length of the beginning that both have in common."""
    least = min(len(rows), len(held))
    differs = np.flatnonzero(rows[:least] != held[:least])
    return int(differs[0]) if len(differs) else least
