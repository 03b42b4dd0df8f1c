"""HeteroFL: nested widths, a classifier whose rows are averaged over who has the class, and static batch norm.

Statistics of static batch norms are collected when training is done, not while it runs. Source: Diao et al.,
"HeteroFL", ICLR 2021, section 3, and its code (`fed.py`: clients count alike; rows of the classifier, where labels are
masked, only those of the client's own classes). Differs: each client looks at its data through the part that it trains,
and each channel's statistics are the mean over those who hold it, weighted by examples; the authors' code passes the
data through the whole network. Records: see `fedsim.exchanges.heterofl`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, Message

from devices.compression.bits import unpack_bits
from devices.compression.channel_graph import BATCH_NORMS
from fedsim.exchanges.heterofl import CLASSES, EXAMPLES, MOMENTS, QUESTION, STATISTICS
from fedsim.exchanges.slices import BITS
from fedsim.grid.edge import EdgeGrid
from fedsim.messages.records import content_of, record_of, tensors_of
from fedsim.messages.updates import ClientUpdate
from fedsim.models.roles import head
from fedsim.workloads.base import Tensors
from strategies.coordinates import Entries, Part, mean_by_coordinate
from strategies.widths import WidthStrategy


class HeteroFL(WidthStrategy):
    """Before the weights are judged, asks every client it can reach for its batch statistics, and averages them.

    Args:
        static_norm: batch norms keep no statistics in training; without, or in a model that has none, nobody is asked.
        widths: arguments of WidthStrategy.
    """

    asks_reachable: ClassVar[bool] = True

    def __init__(self, static_norm: bool = False, **widths: Any):
        super().__init__(**widths)
        self.static_norm = static_norm

    def counted(self, update: ClientUpdate) -> tuple[Tensors, dict[str, Entries]]:
        """Returns the client's part; of the classifier, only the rows of classes that the client has."""
        tensors, places = super().counted(update)
        if CLASSES not in update.extras:
            return tensors, places
        tensors, classes = dict(tensors), self.context.model.num_outputs
        rows = torch.nonzero(unpack_bits(update.extra(CLASSES)[BITS], (classes,))).flatten()
        for name in head(self.slices.model):
            if name in tensors and tensors[name].shape[0] == classes:
                tensors[name] = tensors[name][rows]
                places[name] = Entries({**places.get(name, Entries()).by_dim, 0: rows})
        return tensors, places

    def complete(self, number: int, arrays: ArrayRecord, grid: EdgeGrid) -> ArrayRecord:
        """Returns the weights with the statistics of the clients' data in them; the devices pay for the pass."""
        self.begin_round(tensors_of(arrays))
        names = self.statistics()
        if not names:
            return arrays
        messages = []
        for client in grid.reachable(grid.get_node_ids()):
            broadcast = self.broadcast(number, grid.client(client), self.weights)
            messages.append(Message(content_of(broadcast, record_of(broadcast.weights)), client, f"query.{QUESTION}"))
        parts = []
        for reply in grid.send_and_receive(messages):
            moments = tensors_of(reply.content.array_records[STATISTICS])
            examples = float(moments.pop(EXAMPLES))
            if examples:
                parts.append(Part(examples, moments, self.places(self.sent[reply.metadata.src_node_id])))
        known = mean_by_coordinate({name: self.weights[name] for name in names}, parts)
        return record_of({**self.weights, **known})

    def statistics(self) -> list[str]:
        """Returns the names of the running statistics that clients are asked for."""
        if not self.static_norm:
            return []
        norms = [name for name, module in self.slices.model.named_modules() if isinstance(module, BATCH_NORMS)]
        return [f"{name}.{moment}" for name in norms for moment in MOMENTS if f"{name}.{moment}" in self.weights]
