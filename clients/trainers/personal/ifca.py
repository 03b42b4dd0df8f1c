"""IFCA's client: it chooses the cluster whose model fits its examples best, and trains that.

Source: Ghosh et al., "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020, algorithm 1 (recalled).
Losses are of the network as it is used, without dropout and with running statistics. Records: see
`fedsim.exchanges.ifca`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from clients.trainers.base import ClientContext
from clients.trainers.sgd import SGDRun, SGDTrainer
from fedsim.exchanges.ifca import CHOSEN, CLUSTER, models_in
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.messages.weights import bytes_of
from fedsim.workloads.base import JUDGED_AT_ONCE, Tensors


class IFCARun(SGDRun):
    """Chooses a model, then trains it."""

    trainer: IFCATrainer

    def fit(self) -> ClientUpdate:
        self.trainer.check_settings(self.broadcast)
        cluster = self.trainer.choose(self.client, self.broadcast)
        update, chosen = super().fit(), {CLUSTER: torch.tensor(cluster)}
        return replace(update, metrics={**update.metrics, CLUSTER: cluster}, extras={CHOSEN: chosen})


class IFCATrainer(SGDTrainer):
    """SGD from the model of lowest loss on the client's training examples, with which it is judged, too.

    Each choice costs a pass of these examples through every model; among equal ones it is the first. With one cluster
    there is nothing to choose.

    Args:
        sgd: arguments of SGDTrainer.
    """

    run = IFCARun

    def choose(self, client: ClientContext, broadcast: Broadcast) -> int:
        """Puts the model that fits best into the network, and returns its cluster.

        Memory: all models that were received, beside the network that runs.
        """
        models = models_in(broadcast)
        if len(models) == 1:
            return 0
        client.log.hold("cluster models", bytes_of(broadcast.weights) + sum(map(bytes_of, broadcast.extras.values())))
        losses = []
        for model in models:
            put(client, model)
            client.log.judge(client.step_cost, len(client.data.train))
            loss = mean_loss(client)
            losses.append(loss if math.isfinite(loss) else math.inf)
        client.log.hold("cluster models", 0)  # all but one are dropped
        best = losses.index(min(losses))
        put(client, models[best])
        return best

    def personalise(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Chooses a model, and pays for it; says which."""
        return {CLUSTER: self.choose(client, broadcast)}


@torch.no_grad()
def put(client: ClientContext, model: Tensors) -> None:
    """Puts a model into the client's network."""
    torch._foreach_copy_(list(client.weights.values()), [model[name] for name in client.weights])


@torch.no_grad()
def mean_loss(client: ClientContext) -> float:
    """Returns the mean loss of the client's network on its training examples."""
    data, workload, was_training = client.data.train, client.workload, client.model.training
    client.model.eval()
    batches = data.gather_batches(torch.arange(len(data)), JUDGED_AT_ONCE)
    sums = [float(workload.loss(client.model, batch)) * workload.batch_size_of(batch) for batch in batches]
    client.model.train(was_training)
    return sum(sums) / len(data)
