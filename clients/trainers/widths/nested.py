"""Training one of several networks that lie inside one another, of fewer channels or blocks than the whole one.

Records: see `fedsim.exchanges.nested`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clients.trainers.base import ClientContext
from clients.trainers.widths.subnet import SubnetRun, SubnetTrainer
from devices.compression.channels import ChannelGroups, Kept
from devices.compression.nested import NestedNetworks
from devices.cost import ModelCost
from devices.meter import inference_memory_bytes
from fedsim.errors import ConfigError
from fedsim.exchanges.nested import CANDIDATES, FEATURES, QUERY, QUESTION
from fedsim.exchanges.slices import BITS, KEPT
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.meta.features import IMAGES_FOR_QUERY, client_features, client_features_cost
from fedsim.workloads.base import Tensors, Workload


class NestedRun(SubnetRun):
    """The local loop on the client's network; says which one it is where the client chose."""

    trainer: NestedTrainer

    def __init__(self, trainer: NestedTrainer, client: ClientContext, broadcast: Broadcast):
        self.chose = CANDIDATES in broadcast.extras
        super().__init__(trainer, client, trainer.chosen(client, broadcast))

    def update(self, train_loss: float) -> ClientUpdate:
        update = super().update(train_loss)
        if not self.chose:
            return update
        bits = self.trainer.slices.groups.pack(self.channels)
        return replace(update, extras={**update.extras, KEPT: {BITS: bits}})


class NestedTrainer(SubnetTrainer):
    """SGD on the network that the server sends; tells once what its images are like, where the server asks.

    Args:
        subnet: arguments of SubnetTrainer, but for `judged_at`.
    """

    run = NestedRun
    kind: ClassVar[type[ChannelGroups]] = NestedNetworks
    query_cost: ModelCost | None = None

    def __init__(self, **subnet: Any):
        super().__init__(**subnet)
        if self.judged_at:
            raise ConfigError(
                f"trainer.judged_at must be [] with {type(self).__name__}, whose clients have no other network, got "
                f"{list(self.judged_at)}"
            )

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Prepares as for every part, and prices what a client tells."""
        super().setup(workload, model, network)
        self.query_cost = client_features_cost(workload.input_shape) if len(workload.input_shape) == 3 else None

    def evaluate(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Judges the client's network on its held-out part."""
        return super().evaluate(client, self.chosen(client, broadcast))

    @torch.no_grad()
    def chosen(self, client: ClientContext, broadcast: Broadcast) -> Broadcast:
        """Returns what was sent, cut to the network that the client takes.

        Where it may choose, that is the one that judges its held-out part best, of equal ones the larger. Nobody pays
        for that, and results are an oracle's.
        """
        if CANDIDATES not in broadcast.extras:
            return broadcast
        client.oracle()
        groups, sent = self.slices.groups, self.channels_sent(broadcast)
        candidates = [groups.unpack(bits) for bits in broadcast.extras[CANDIDATES][BITS].cpu()]
        best = candidates[-1]
        if len(client.data.test):
            scores = [self.score(client, broadcast, own, sent) for own in candidates]
            best = candidates[max(range(len(scores)), key=lambda n: (scores[n], n))]
        private = {name: broadcast.weights[name] for name in self.private}  # stay whole
        weights = {**groups.within(self.fitting(broadcast.weights, sent), best, sent), **private}
        return replace(broadcast, weights=weights, extras={KEPT: {BITS: groups.pack(best)}})

    def score(self, client: ClientContext, broadcast: Broadcast, kept: Kept, sent: Kept) -> float:
        """Returns how well a network judges the client's held-out part; larger is better."""
        primary, network = client.workload.primary, self.part(client, broadcast, kept, sent).model
        return primary.gain(client.workload.evaluate(network, client.data.test)[primary.name])

    @torch.no_grad()
    def answer(self, client: ClientContext, question: str, broadcast: Broadcast) -> dict[str, Tensors]:
        """Sends the mean features of some of the client's images.

        Raises:
            ConfigError: if its examples are no images.
        """
        if question != QUESTION:
            return super().answer(client, question, broadcast)
        x = client.data.train.gather(self.asked_about(client))["x"]
        if self.query_cost is None:
            raise ConfigError(
                f"clients tell a server what their images are like, and examples of workload {client.workload.name} "
                f"are of shape {list(x.shape[1:])}; take architecture=largest"
            )
        client.log.reserve(inference_memory_bytes(self.query_cost, len(x)))
        client.log.add(self.query_cost, len(x), forwards=1)
        return {QUERY: {FEATURES: client_features(x).mean(0)}}

    def asked_about(self, client: ClientContext) -> Tensor:
        """Returns the rows of the client's images that are looked at."""
        return torch.randperm(len(client.data.train), generator=client.stream("query"))[:IMAGES_FOR_QUERY]
