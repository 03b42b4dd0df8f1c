"""HeteroFL: a client trains the first channels of every layer, with outputs scaled as if all were there.

Source: Diao et al., "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients",
ICLR 2021, section 3. Differs: networks with batch norm average their running statistics per coordinate instead of
collecting them at the end (static batch norm); the networks here use group norms. May import: what
`clients.trainers.subnet` may.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clients.trainers.base import ClientContext
from clients.trainers.subnet import SubnetTrainer
from devices.compression.channels import Kept
from fedsim.messages import Broadcast
from fedsim.workload import Tensors


class HeteroFLTrainer(SubnetTrainer):
    """Subnet training with HeteroFL's scaler and masked loss.

    Args:
        scale: divide what a narrowed layer gives by its share of channels, in training only.
        mask_labels: logits of classes that the client has no example of are 0 in training.
        sgd: arguments of SGDTrainer.
    """

    def __init__(self, scale: bool = True, mask_labels: bool = True, **sgd: Any):
        super().__init__(**sgd)
        self.scale, self.mask_labels = scale, mask_labels

    def prepare(self, network: nn.Module, kept: Kept) -> None:
        """Hangs the scaler on every layer that makes channels of a narrowed group."""
        for name, group in self.slices.groups.groups.items():
            share = len(kept[name]) / group.channels
            if not self.scale or share == 1:
                continue
            for coupling in group.couplings:
                if coupling.side == "out":
                    network.get_submodule(coupling.layer).register_forward_hook(
                        lambda layer, _, out, share=share: out / share if layer.training else out
                    )

    def loss(self, client: ClientContext, batch: Tensors, task: Broadcast) -> Tensor:
        """The workload's loss, without the classes that the client does not have."""
        if not self.mask_labels:
            return super().loss(client, batch, task)
        absent = torch.ones(client.workload.num_classes, dtype=torch.bool, device=batch["y"].device)
        absent[client.data.train.labels.flatten().unique().to(absent.device)] = False
        handle = client.model.register_forward_hook(lambda _, given, out: out.masked_fill(absent, 0.0))
        try:
            return super().loss(client, batch, task)
        finally:
            handle.remove()
