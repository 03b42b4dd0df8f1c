"""Which channels a client of prototype-based personalised pruning deploys: its own mask, and those to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clients.trainers.base import ClientContext
from devices.compression.channels import Kept
from devices.compression.gates import GatedNetwork, Gates, personal_masks
from devices.compression.prune import channel_scores
from fedsim.errors import ConfigError
from fedsim.exchanges.ppp import GATES
from fedsim.messages.updates import Broadcast
from fedsim.seeding import torch_generator
from fedsim.workloads.base import Tensors

if TYPE_CHECKING:
    from clients.trainers.widths.ppp import PPPTrainer


@dataclass
class Deployment:
    """What a mask is chosen from.

    Attributes:
        gates: trained ones, or where the broadcast has none, any that know the groups.
        ratio: the keep ratio, below 1.
    """

    trainer: PPPTrainer
    client: ClientContext
    broadcast: Broadcast
    gates: Gates
    ratio: float

    @cached_property
    def dense(self) -> ClientContext:
        """Returns the client with the whole network."""
        return self.trainer.narrowed(self.client, self.trainer.slices.groups.all(), self.broadcast.weights)

    def budget(self) -> Tensors:
        """Returns masks with exactly the keep ratio in every group."""
        return self.gates.masks(self.gates.at_ratio(self.ratio))

    def everybody(self) -> list[tuple[Tensors, Tensors]]:
        """Returns prototypes and masks of all clients under the dense network: an oracle, kept until weights change."""
        tensors, found = [*self.broadcast.weights.values(), *self.broadcast.extras[GATES].values()], []
        key, on_demand = (self.ratio, *(float(t.double().sum()) for t in tensors)), self.trainer.on_demand
        if on_demand.prototypes[0] != key:
            network, workload = GatedNetwork(self.dense.model, self.gates), self.client.oracle()
            for other in range(workload.num_clients):
                x = self.trainer.supported(workload.client_data(other).train, self.client.seed, other)
                one = personal_masks(network, x.to(self.client.device), self.ratio, self.trainer.mask_mode)
                found.append((one.prototypes, one.masks))
            on_demand.prototypes = (key, found)
        return on_demand.prototypes[1]


def personal(of: Deployment) -> Tensors:
    """Returns the client's own mask; one forward pass."""
    return of.trainer.personal(of.dense, of.gates, of.trainer.slices.groups.all(), of.ratio).masks


def other(of: Deployment) -> Tensors:
    """Returns the next client's mask."""
    everybody = of.everybody()
    return everybody[(of.client.client_id + 1) % len(everybody)][1]


def mean_of_all(of: Deployment) -> Tensors:
    """Returns the mask of the mean prototype of all clients."""
    everybody = of.everybody()
    mean = {n: torch.stack([prototypes[n] for prototypes, _ in everybody]).mean(0) for n in of.gates.names}
    return {n: of.gates.choose(n, prototype, of.ratio, of.trainer.mask_mode) for n, prototype in mean.items()}


def random(of: Deployment) -> Tensors:
    """Returns a permutation of the client's own mask, the same in every round."""
    own = personal(of) if GATES in of.broadcast.extras else of.budget()
    draw = torch_generator(of.client.seed, "random-mask", of.client.client_id)
    return {n: mask.cpu()[torch.randperm(len(mask), generator=draw)] for n, mask in own.items()}


def magnitude(of: Deployment) -> Tensors:
    """Returns the filters with the largest weights, as many as the client's own mask has."""
    own = of.budget() if of.trainer.mask_mode == "topk" else personal(of)
    scores = channel_scores(of.trainer.slices.groups, {n: t.cpu() for n, t in of.broadcast.weights.items()})
    return {n: _largest(scores[n].view(len(mask), -1).mean(1), int(mask.sum())) for n, mask in own.items()}


def _largest(scores: Tensor, count: int) -> Tensor:
    best = scores.argsort(descending=True, stable=True)[:count]
    return torch.zeros(len(scores)).bool().index_fill_(0, best, True)


CHOICES: dict[str, Callable[[Deployment], Tensors]] = {
    "personal": personal,
    "other": other,
    "global": mean_of_all,
    "random": random,
    "magnitude": magnitude,
}


def deployed(trainer: PPPTrainer, client: ClientContext, broadcast: Broadcast, mask: str, ratio: float) -> Kept:
    """Returns the channels that a client deploys under one of CHOICES; with keep ratio 1 all of them.

    Raises:
        ConfigError: if the choice needs trained gates, and the broadcast has none.
    """
    if ratio == 1:
        return trainer.slices.groups.all()
    trained = GATES in broadcast.extras
    if not trained and (mask not in ("random", "magnitude") or trainer.mask_mode != "topk"):
        raise ConfigError(
            f"trainer.mask={mask} with trainer.mask_mode={trainer.mask_mode} needs trained gates; with "
            "strategy.ratio=1 there are none, so take mask=magnitude or random with mask_mode=topk"
        )
    gates = trainer.gates(broadcast) if trained else trainer.plan
    return gates.kept(CHOICES[mask](Deployment(trainer, client, broadcast, gates, ratio)))
