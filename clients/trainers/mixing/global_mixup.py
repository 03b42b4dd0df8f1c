"""Mixup with raw examples of all clients: an ORACLE that no federation could run, an upper bound for comparisons.

It reads the other clients' training examples, which no message brings: no bytes are counted for them, and privacy is
given up. Its updates carry the metric `oracle`, so that results say so. Source: "Global Mixup" in Yoon et al.,
"FedMix", ICLR 2021.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from clients.trainers.base import ClientContext
from clients.trainers.mixing.mixup import MixupTrainer
from devices.cost import NetworkCost
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.workloads.base import Examples, Tensors, Workload


class GlobalMixupTrainer(MixupTrainer):
    """An oracle: mixes each example with one drawn uniformly from the training examples of all clients.

    Args: see MixupTrainer.
    """

    def setup(self, workload: Workload, model: nn.Module, network: NetworkCost) -> None:
        super().setup(workload, model, network)
        self.everybody: list[Examples] = []
        self.ends = torch.zeros(0, dtype=torch.long)  # of each client's rows in the union of all, [clients]

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        if not self.everybody:
            workload = client.workload
            self.everybody = [workload.client_data(other).train for other in range(workload.num_clients)]
            self.ends = torch.tensor([len(data) for data in self.everybody]).cumsum(0)
        update = super().fit(client, task)
        return replace(update, metrics={**update.metrics, "oracle": 1.0})

    def partner(self, client: ClientContext, batch: Tensors, draw: torch.Generator) -> Tensors:
        rows = torch.randint(int(self.ends[-1]), (len(batch["y"]),), generator=draw)
        owners = torch.searchsorted(self.ends, rows, right=True)
        found = []
        for row, owner in zip(rows.tolist(), owners.tolist(), strict=True):
            data = self.everybody[owner]
            found.append(data.gather(torch.tensor([row - int(self.ends[owner]) + len(data)])))
        return {f"partner_{n}": torch.cat([one[n] for one in found]).to(client.device) for n in ("x", "y")}
