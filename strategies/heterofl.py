"""HeteroFL: nested widths, a classifier whose rows are averaged over who has the class, and static batch norm.

Statistics of static batch norms are collected when training is done, not while it runs. Source: Diao et al.,
"HeteroFL", ICLR 2021, section 3, and its code (`fed.py`: clients count alike; rows of the classifier, where labels are
masked, only those of the client's own classes). Differs: each client looks at its data through the part that it trains,
and each channel's statistics are the mean over those who hold it, weighted by examples; the authors' code passes the
data through the whole network. Records: statistics, up, asked before the weights are judged: for each batch norm
running_mean and running_var [channels of the part] float32, examples [] int64; classes, up where labels are masked:
bits [ceil(classes / 8)] uint8; else those of `strategies.subnet`.
"""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from devices.compression.channel_graph import BATCH_NORMS
from fedsim.exchanges.slices import BITS, unpack_bits
from fedsim.grid.edge import EdgeGrid
from fedsim.messages.records import ClientUpdate, content_of, record_of, tensors_of
from fedsim.models.roles import head
from fedsim.workloads.base import Tensors
from fedsim.workloads.classification import classification
from strategies.edge import mean_by_coordinate
from strategies.widths import WidthStrategy

QUERY, STATISTICS, EXAMPLES, CLASSES = "query.statistics", "statistics", "examples", "classes"
MOMENTS = ("running_mean", "running_var")


class HeteroFL(WidthStrategy):
    """Before the weights are judged, asks every client that is online for its batch statistics, and averages them.

    Without batch norms, or with trainer.static_norm=false, nobody is asked.

    Arguments are those of WidthStrategy.
    """

    def counted(self, update: ClientUpdate) -> tuple[Tensors, dict[str, dict[int, Tensor]]]:
        """Of the classifier, only the rows of classes that the client has."""
        tensors, places = super().counted(update)
        if CLASSES not in update.extras:
            return tensors, places
        classes = classification(self.world.workload).num_classes
        rows = torch.nonzero(unpack_bits(update.extra(CLASSES)[BITS], (classes,))).flatten()
        for name in head(self.slices.model):
            if tensors[name].shape[0] == classes:
                tensors = {**tensors, name: tensors[name][rows]}
                places = {**places, name: {**places.get(name, {}), 0: rows}}
        return tensors, places

    def complete(self, round: int, arrays: ArrayRecord, grid: EdgeGrid) -> ArrayRecord:
        """The weights with the statistics that the clients' data have in them; the devices pay for the pass."""
        self.open(tensors_of(arrays), grid)
        names = self.statistics()
        if not names:
            return arrays
        online = [c for c in grid.get_node_ids() if grid.fleet.online(c, grid.clock.now_s)]
        messages = []
        for client in online:
            broadcast = self.broadcast(round, grid.client(client), self.weights)
            messages.append(Message(content_of(broadcast, record_of(broadcast.weights)), client, QUERY))
        parts = []
        for reply in grid.send_and_receive(messages):
            said = tensors_of(reply.content.array_records[STATISTICS])
            examples = float(said.pop(EXAMPLES))
            if examples:
                kept = self.sent[reply.metadata.src_node_id]
                parts.append((examples, said, self.slices.groups.indices(kept)))
        known = mean_by_coordinate({name: self.weights[name] for name in names}, parts)
        return record_of({**self.weights, **known})

    def statistics(self) -> list[str]:
        """Names of the running statistics in the network."""
        if not self.world.settings["trainer"].get("static_norm", False):
            return []
        norms = [name for name, module in self.slices.model.named_modules() if isinstance(module, BATCH_NORMS)]
        return [f"{name}.{moment}" for name in norms for moment in MOMENTS if f"{name}.{moment}" in self.weights]
