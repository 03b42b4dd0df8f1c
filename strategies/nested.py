"""Networks of several widths and depths that lie inside one another, one for each client, averaged where they overlap.

Widths are averaged as in HeteroFL (Diao et al., ICLR 2021, section 3); a block that a client's network leaves out is
averaged over those who have it. Which network a client gets is for a rule of `architecture=` to say. With the whole
network everywhere this is federated averaging, bit for bit. Records: see `fedsim.exchanges.nested`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Interval, MinLen
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from devices.compression.channels import ChannelGroups, Kept
from devices.compression.nested import NestedNetworks
from fedsim.exchanges.nested import CANDIDATES, FEATURES, QUERY, QUESTION
from fedsim.exchanges.slices import BITS
from fedsim.grid.edge import EdgeGrid, Enrolled
from fedsim.grid.server_half import ServerContext
from fedsim.messages.records import CONFIG, record_of, tensors_of
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from strategies.architectures import Architecture, Family
from strategies.subnet import SubnetStrategy


class NestedStrategy(SubnetStrategy):
    """Sends each client the network that a rule gives it, and averages each coordinate over those who hold it.

    Args:
        architecture: the rule.
        widths: shares of the channels of every layer, rounded up.
        depths: shares of those blocks of each stage that may be left out, rounded up; 0 leaves all of them out.
        batch_size: examples of the training step that is priced.
        weighted: weight clients by their examples; without, all count alike.
        sampling: arguments of FedAvg.

    The server's test set judges the network that most clients have (`judged_width` and `judged_depth` in a round's
    metrics); `evaluate_clients` judges each client with its own.

    Attributes:
        given: by client, the number of the network that it last trained.
        chosen: by client, the number of the network that the rule gave it, for the whole run.
        told: by client, what it told of its data, where the rule asks; None: it did not answer, and is not asked again.
    """

    derived: ClassVar[frozenset[str]] = SubnetStrategy.derived | {"architecture", "family", "_met"}
    kind: ClassVar[type[ChannelGroups]] = NestedNetworks
    family: Family

    def __init__(
        self,
        architecture: Architecture,
        widths: Annotated[Sequence[Annotated[float, Interval(gt=0, le=1)]], MinLen(1)] = (1.0, 0.5, 0.25),
        depths: Annotated[Sequence[Annotated[float, Interval(ge=0, le=1)]], MinLen(1)] = (1.0, 0.5, 0.0),
        batch_size: Annotated[int, Ge(1)] = 1,
        weighted: bool = True,
        **sampling: Any,
    ):
        super().__init__(**sampling)
        self.architecture, self.widths, self.depths = architecture, list(widths), list(depths)
        self.batch_size, self.weighted = batch_size, weighted
        self.given: dict[int, int] = {}
        self.chosen: dict[int, int] = {}
        self.told: dict[int, Tensor | None] = {}
        self._met = False

    def begin(self, context: ServerContext) -> None:
        """Prices the networks.

        Raises:
            ConfigError: if the model cannot be narrowed.
            DataError: for files of the rule that are not there, or broken.
        """
        super().begin(context)
        self.architecture.read()
        groups = self.slices.groups
        assert isinstance(groups, NestedNetworks)
        sizes = {(w, d): groups.at(w, d) for w in (1.0, *self.widths) for d in (1.0, *self.depths)}
        wanted = {(w, d): own for (w, d), own in sizes.items() if w in self.widths and d in self.depths}
        if not self.architecture.chooses:
            wanted = {(1.0, 1.0): sizes[1.0, 1.0]}
        outputs = context.model.num_outputs
        self.family = Family(self.slices, wanted, self.batch_size, context.latency, context.seed, outputs)

    @property
    def asks_reachable(self) -> bool:  # type: ignore[override]
        """Whether it asks clients for what their data are like."""
        return self.architecture.asks

    @property
    def device_reads(self) -> Mapping[str, str]:
        """The network of a client."""
        return self.architecture.device_reads

    # --- what a client gets -------------------------------------------------------------------------------------------

    def fill(
        self, messages: Iterable[Message], number: int, grid: EdgeGrid, weights: Tensors, arrays: ArrayRecord
    ) -> None:
        """Asks those who have not told yet what their data are like, and gives each message its client's network."""
        messages = list(messages)
        if not self._met:
            self.architecture.begin(self.family, map(grid.client, range(self.context.num_clients)))
            self._met = True
        if self.architecture.asks:
            self.ask([message.metadata.dst_node_id for message in messages], number, grid)
        super().fill(messages, number, grid, weights, arrays)

    def ask(self, clients: Iterable[int], number: int, grid: EdgeGrid) -> None:
        """Asks clients what their data are like: a vector each, once."""
        unknown = [client for client in grid.reachable(clients) if client not in self.told]
        self.told |= dict.fromkeys(unknown)
        content = RecordDict({CONFIG: ConfigRecord({"server-round": number})})
        for reply in grid.send_and_receive([Message(content, client, f"query.{QUESTION}") for client in unknown]):
            found = tensors_of(reply.content.array_records[QUERY])
            self.told[reply.metadata.src_node_id] = found[FEATURES]

    def choose(self, number: int, client: Enrolled) -> Kept:
        """Returns what a client's network keeps, the same in every round; where it chooses, what all that fit keep."""
        if client.client_id not in self.chosen:
            number = self.architecture.choose(client, self.told.get(client.client_id))
            if not self.architecture.asks or client.client_id in self.told:
                self.chosen[client.client_id] = number
        else:
            number = self.chosen[client.client_id]
        candidates = [*self.architecture.candidates(client), number]
        return union(self.family.members[number].kept for number in candidates)

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns the client's network; where it chooses by itself, all that fit its device."""
        part, candidates = super().broadcast(number, client, weights), self.architecture.candidates(client)
        if not candidates:
            return part
        bits = torch.stack([self.slices.groups.pack(self.family.members[n].kept) for n in candidates])
        return replace(part, extras={**part.extras, CANDIDATES: {BITS: bits}})

    # --- what comes back ----------------------------------------------------------------------------------------------

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns the mean of each coordinate over those who hold it; notes who trained which network."""
        for update in updates:
            self.given[update.client_id] = self.family.number_of(self.trained(update))
        return super().combine(number, updates)

    def judged(self, arrays: ArrayRecord) -> ArrayRecord:
        """Returns the network that most clients have, with zeros for what it leaves out; all of it before any has."""
        if not self.given:
            return arrays
        groups, kept = self.slices.groups, self.family.members[self.most].kept
        if all(len(index) == groups.sizes[name] for name, index in kept.items()):
            return arrays
        whole = tensors_of(arrays)
        shown = groups.scatter(groups.slice(whole, kept), kept, whole)[0]
        return record_of({name: shown.get(name, torch.zeros_like(tensor)) for name, tensor in whole.items()})

    @property
    def most(self) -> int:
        """The network that most clients had when they were last heard of; of equal ones the larger."""
        counts = Counter(self.given.values())
        return max(counts, key=lambda number: (counts[number], number))

    @property
    def networks(self) -> Mapping[int, str]:
        """Width and depth of each client's network."""
        return {client: str(self.family.members[number]) for client, number in self.given.items()}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Adds to the metrics which network is judged."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is None or not self.given:
            return arrays, metrics
        member = self.family.members[self.most]
        return arrays, MetricRecord({**metrics, "judged_width": member.width, "judged_depth": member.depth})

    def weight(self, update: ClientUpdate) -> float:
        """Returns its examples, or 1 where all clients count alike."""
        return update.num_examples if self.weighted else 1.0


def union(parts: Iterable[Kept]) -> Kept:
    """Returns what any of several networks keeps; as each keeps the first of everything, that is the longest list."""
    found: Kept = {}
    for kept in parts:
        found = {name: max(index, found.get(name, index), key=len) for name, index in kept.items()}
    return found
