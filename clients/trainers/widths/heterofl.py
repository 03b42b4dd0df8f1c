"""HeteroFL: a client trains the first channels of every layer, with outputs scaled as if all were there.

Source: Diao et al., "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients",
ICLR 2021, section 3, and its code (gradients clipped to norm 1). Batch norms are static (sBN): in training they
normalise by the batch and keep no statistics, which are collected when the weights are judged, see
`strategies.heterofl`. Records: see `fedsim.exchanges.heterofl`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clients.trainers.base import ClientContext
from clients.trainers.sgd import Objective
from clients.trainers.widths.subnet import SubnetRun, SubnetTrainer
from devices.compression.bits import pack_bits
from devices.compression.channel_graph import BATCH_NORMS
from devices.compression.channels import Kept
from devices.meter import inference_memory_bytes
from fedsim.exchanges.heterofl import CLASSES, EXAMPLES, MOMENTS, QUESTION, STATISTICS
from fedsim.exchanges.slices import BITS
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from fedsim.workloads.classification import classification


class OwnClasses(Objective):
    """The workload's loss with logits of 0 for the classes that the client has no example of."""

    def __call__(self, run: HeteroFLRun, batch: Tensors) -> Tensor:
        client, absent = run.client, ~run.present.to(batch["y"].device)
        handle = client.model.register_forward_hook(lambda _, given, out: out.masked_fill(absent, 0.0))
        try:
            return client.workload.loss(client.model, batch)
        finally:
            handle.remove()


class HeteroFLRun(SubnetRun):
    """The local loop on the part; with masked labels, says which classes there are.

    Attributes:
        present: which classes the client has examples of, [classes] bool.
    """

    trainer: HeteroFLTrainer

    def __init__(self, trainer: HeteroFLTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.present = torch.zeros(classification(client.workload).num_classes, dtype=torch.bool)
        self.present[client.data.train.labels.flatten().unique().cpu()] = True

    def update(self, train_loss: float) -> ClientUpdate:
        extras = {CLASSES: {BITS: pack_bits(self.present)}} if self.trainer.mask_labels else {}
        return replace(super().update(train_loss), extras=extras)


class HeteroFLTrainer(SubnetTrainer):
    """Subnet training with HeteroFL's scaler and masked loss.

    Args:
        scale: divide what a narrowed layer gives by its share of channels, in training only; with batch norms also when
            the part is judged, as their statistics are of what was divided.
        mask_labels: logits of classes that the client has no example of are 0 in training, and the server leaves its
            rows of the classifier for these out of the mean; it is told which they are.
        static_norm: batch norms keep no running statistics in training; without, they are averaged like weights.
        subnet: arguments of SubnetTrainer.
    """

    run = HeteroFLRun

    def __init__(self, scale: bool = True, mask_labels: bool = True, static_norm: bool = True, **subnet: Any):
        super().__init__(**subnet)
        self.scale, self.mask_labels, self.static_norm = scale, mask_labels, static_norm
        self.needs_classes = mask_labels
        if mask_labels:
            self.objective = OwnClasses()

    def prepare(self, network: nn.Module, kept: Kept) -> None:
        """Hangs the scaler on every layer that makes channels of a narrowed group, and makes batch norms static."""
        norms = _batch_norms(network)
        for norm in norms.values():
            norm.track_running_stats = not self.static_norm  # with statistics at hand, evaluation still uses them
        for name, group in self.slices.groups.groups.items():
            share = len(kept[name]) / group.channels
            if not self.scale or share == 1:
                continue
            for coupling in group.couplings:
                if coupling.side == "out":
                    network.get_submodule(coupling.layer).register_forward_hook(
                        lambda layer, _, out, share=share: out / share if layer.training or norms else out
                    )

    @torch.no_grad()
    def answer(self, client: ClientContext, question: str, broadcast: Broadcast) -> dict[str, Tensors]:
        """Sends means and variances of the batches of the client's own examples, through its part.

        Batches differ by one example at most, and count alike; a client with a single example says nothing.
        """
        if question != QUESTION:
            return super().answer(client, question, broadcast)
        sent = self.channels_sent(broadcast)
        narrowed = self.narrowed(client, sent, self.fitting(broadcast.weights, sent))
        norms, examples = _batch_norms(narrowed.model), len(client.data.train)
        client.log.reserve(inference_memory_bytes(narrowed.step_cost, min(examples, max(2, self.batch_size))))
        if examples > 1:
            for norm in norms.values():
                norm.reset_running_stats()
                norm.track_running_stats, norm.momentum = True, None  # the mean over all batches
            for rows in torch.arange(examples).tensor_split(-(-examples // max(2, self.batch_size))):
                narrowed.model(client.data.train.gather(rows)["x"])
                client.log.add(narrowed.step_cost, len(rows), forwards=1)
            for norm in norms.values():
                norm.track_running_stats = False
        found = {f"{name}.{m}": getattr(norm, m).clone() for name, norm in norms.items() for m in MOMENTS}
        return {STATISTICS: {**found, EXAMPLES: torch.tensor(examples if examples > 1 else 0)}}


def _batch_norms(network: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in network.named_modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None}
