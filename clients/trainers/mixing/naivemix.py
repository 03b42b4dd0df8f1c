"""NaiveMix: mixup with the means of other clients' examples, and how a client shares and keeps such means.

Source: Yoon et al., "FedMix", ICLR 2021, equation 1 (read in a third party's transcription). Records: see
`fedsim.exchanges.mafl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Interval
from torch import nn
from torch.nn import functional as F

from clients.trainers.base import ClientContext
from clients.trainers.mixing.mixup import MixupRun, MixupTrainer, embedding_of
from devices.profile import BY_MEMORY
from fedsim.errors import ConfigError
from fedsim.exchanges.averages import averages, from_uint8, to_uint8
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
from fedsim.messages.records import OF_REPLY
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload, on_device
from fedsim.workloads.classification import classification

HELD = f"{OF_REPLY}{POOL}_"  # state: the pool as the server believes it to be with the client


class PoolRun(MixupRun):
    """The local loop, with the pool as the broadcast has left it.

    Raises:
        ConfigError: if the server sends no pool.
    """

    trainer: NaiveMixTrainer
    ends_later = True

    def __init__(self, trainer: NaiveMixTrainer, client: ClientContext, broadcast: Broadcast):
        trainer.check_settings(broadcast)
        trainer.keep_pool(client, broadcast)
        super().__init__(trainer, client, broadcast)

    def update(self, train_loss: float) -> ClientUpdate:
        update, trainer = super().update(train_loss), self.trainer
        facts = {"pool_pairs": float(num_pairs(self.client)), VERSION: float(trainer.data_version(self.client))}
        return replace(update, metrics={**update.metrics, **facts})

    def reserve(self) -> None:
        """Reserves a step and the pool that stays beside it."""
        self.client.log.hold("pool", self.client.state.storage_bytes)
        super().reserve()


class NaiveMixTrainer(MixupTrainer):
    """Takes the mean of a group in the place of a partner: the loss at a mean is not the mean of losses.

    Answers the server's question for the client's own means and keeps the pool that it is sent.

    Args:
        mix_ratio: see MixupTrainer.
        average_clip: largest Euclidean norm of a mean input that leaves the device; null does not clip.
        average_noise: standard deviation of Gaussian noise on every entry of a mean; labels are then brought back to
            probabilities. There is no accountant: choosing it for a formal guarantee is left to you.
        mixup: further arguments of MixupTrainer.
    """

    run = PoolRun
    known_settings = MixupTrainer.known_settings | {SIZE, KEPT}

    def __init__(
        self,
        mix_ratio: Annotated[float, Interval(ge=0, lt=1)],
        average_clip: Annotated[float, Gt(0)] | None = None,
        average_noise: Annotated[float, Ge(0)] = 0.0,
        **mixup: Any,
    ):
        super().__init__(mix_ratio, **mixup)
        self.average_clip, self.average_noise = average_clip, average_noise

    @property
    def device_reads(self) -> Mapping[str, str]:
        """Returns the size of a client's pool."""
        return {BY_MEMORY: "clients keep as many averages as their memory holds"}

    # --- sharing averages ---------------------------------------------------------------------------------------

    def answer(self, client: ClientContext, question: str, broadcast: Broadcast) -> dict[str, Tensors]:
        """Sends the client's averages, none if it has too few examples, and the room on its device for a pool."""
        if question != QUESTION:
            return super().answer(client, question, broadcast)
        asked, data = broadcast.settings, client.data.train
        size = int(asked[GROUP_SIZE]) or len(data)
        cost = self.mixed_cost or client.step_cost
        copies = self.objective.copies(MixupRun(self, client, broadcast))
        room = max(0, client.profile.memory_bytes - self.step_bytes(cost, min(self.batch_size, len(data)), copies))
        facts = {"bytes": torch.tensor(room), "version": torch.tensor(self.data_version(client))}
        records: dict[str, Tensors] = {ROOM: facts}
        if len(data) < size or size < int(asked[MIN_GROUP_SIZE]):
            return records
        tokens = not data.gather(torch.arange(1))["x"].is_floating_point()
        vocabulary = embedding_of(client.model).num_embeddings if tokens else None
        pairs = averages(data, size, classification(client.workload).num_classes, client.stream("averages"), vocabulary)
        pairs = self.protect(pairs, client.stream("average-noise"))
        if asked[POOL_DTYPE] == "uint8":
            pairs |= to_uint8(pairs["x"])
        return {**records, AVERAGES: pairs}

    def data_version(self, client: ClientContext) -> int:
        """Changes with the client's examples, so that the server asks for new averages."""
        return client.data.version

    def protect(self, pairs: Tensors, draw: torch.Generator) -> Tensors:
        """Clips averages and adds noise to them before they leave the device."""
        x, y = pairs["x"], pairs["y"]
        if self.average_clip is not None:
            norm = x.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
            x = x * (self.average_clip / norm).clamp(max=1.0).view(-1, *[1] * (x.dim() - 1))
        if self.average_noise:
            x, y = (t + self.average_noise * torch.randn(t.shape, generator=draw).to(t) for t in (x, y))
            y = y.clamp(min=0)
            total = y.sum(-1, keepdim=True)
            y = torch.where(total > 0, y / total.clamp(min=1e-12), 1 / y.shape[-1])
        return {"x": x, "y": y}

    # --- mixing with the pool -----------------------------------------------------------------------------------

    def keep_pool(self, client: ClientContext, broadcast: Broadcast) -> None:
        """Puts the new pairs behind those that are kept; counted as storage from now on."""
        if SIZE not in broadcast.settings:
            raise ConfigError(f"{type(self).__name__} got no pool of averages; take its server half, strategy=mafl")
        kept, size = int(broadcast.settings[KEPT]), int(broadcast.settings[SIZE])
        dropped = broadcast.extras.get(DROPPED, {}).get("rows", torch.zeros(0, dtype=torch.long))
        new = broadcast.extras.get(POOL, {})
        for key in [f"{HELD}{name}" for name in new] or [name for name in client.state if name.startswith(HELD)]:
            parts = []
            if key in client.state:
                stays = torch.ones(len(client.state[key]), dtype=torch.bool)
                stays[dropped] = False
                parts = [client.state[key][stays][:kept]]
            client.state[key] = torch.cat([*parts, *([new[key.removeprefix(HELD)]] if new else [])])
        if num_pairs(client) != size:
            raise ValueError(f"the pool should have {size} pairs and has {num_pairs(client)}")

    def mixes(self, client: ClientContext) -> bool:
        return super().mixes(client) and num_pairs(client) > 0

    def partner(self, client: ClientContext, batch: Tensors, draw: torch.Generator) -> Tensors:
        """Returns one pair of the pool for the whole batch."""
        row = int(torch.randint(num_pairs(client), (), generator=draw))
        names = ("x", "y", "low", "step")
        pair = {n: client.state[f"{HELD}{n}"][row : row + 1] for n in names if f"{HELD}{n}" in client.state}
        x = from_uint8(pair) if "step" in pair else pair["x"]
        return {"partner_x": on_device(x, client.device), "partner_y": on_device(pair["y"], client.device)}

    def sample_partner(self, workload: Workload, model: nn.Module, sample: Tensors) -> Tensors:
        tokens = not sample["x"].is_floating_point()
        x = F.one_hot(sample["x"], embedding_of(model).num_embeddings).float() if tokens else sample["x"]
        classes = classification(workload).num_classes
        return {"partner_x": x[:1], "partner_y": F.one_hot(sample["y"], classes).to(x.dtype)[:1]}


def num_pairs(client: ClientContext) -> int:
    """Returns how many averages the client holds."""
    return len(client.state.get(f"{HELD}y", ()))
