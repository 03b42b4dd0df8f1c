"""Mixup among a client's own examples: the baseline that needs no exchange.

Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, with a constant ratio, as "Local Mixup" in
Yoon et al., "FedMix", ICLR 2021.
"""

from __future__ import annotations

import torch

from clients.trainers.base import ClientContext
from clients.trainers.mixing.mixup import MixupTrainer
from fedsim.workloads.base import Tensors, on_device


class LocalMixupTrainer(MixupTrainer):
    """Mixes each batch with a random permutation of itself.

    Args: see MixupTrainer.
    """

    def partner(self, client: ClientContext, batch: Tensors, draw: torch.Generator) -> Tensors:
        order = on_device(torch.randperm(len(batch["y"]), generator=draw), batch["y"].device)
        return {"partner_x": batch["x"][order], "partner_y": batch["y"][order]}
