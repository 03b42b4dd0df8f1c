"""Mixup with raw examples of all clients: an ORACLE that no federation could run, an upper bound for comparisons.

It reads the other clients' training examples, which no message brings: no bytes are counted for them, and privacy is
given up. Its updates carry the metric `oracle`, so that results say so. Source: "Global Mixup" in Yoon et al.,
"FedMix", ICLR 2021.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from clients.trainers.base import ClientContext
from clients.trainers.mixing.mixup import MixupTrainer
from fedsim.workloads.base import Examples, Tensors, Workload, on_device


class GlobalMixupTrainer(MixupTrainer):
    """An oracle: mixes each example with one drawn uniformly from the training examples of all clients.

    Args: see MixupTrainer.
    """

    def partner(self, client: ClientContext, batch: Tensors, draw: torch.Generator) -> Tensors:
        everybody, ends = union(client.oracle())
        rows = torch.randint(int(ends[-1]), (len(batch["y"]),), generator=draw)
        owners = torch.searchsorted(ends, rows, right=True)
        found = []
        for row, owner in zip(rows.tolist(), owners.tolist(), strict=True):
            data = everybody[owner]
            found.append(data.gather(torch.tensor([row - int(ends[owner]) + len(data)])))
        return {f"partner_{n}": on_device(torch.cat([one[n] for one in found]), client.device) for n in ("x", "y")}


@lru_cache(maxsize=1)
def union(workload: Workload) -> tuple[list[Examples], Tensor]:
    """Returns the training examples of all clients, and where each one's rows end in the union of all, [clients]."""
    everybody = [workload.client_data(client).train for client in range(workload.num_clients)]
    return everybody, torch.tensor([len(data) for data in everybody]).cumsum(0)
