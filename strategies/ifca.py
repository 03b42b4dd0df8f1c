"""IFCA: one model for each cluster of clients, who choose their cluster in every round.

Source: Ghosh et al., "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020, algorithm 1 with model
averaging (recalled; tensors that clusters share as in the authors' code). Differs: means are weighted by examples, as
everywhere here; there is no averaging of gradients. Records: see `fedsim.exchanges.ifca`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from flwr.app import ArrayRecord, Message, MetricRecord

from fedsim.errors import ConfigError
from fedsim.exchanges.ifca import CHOSEN, CLUSTER, models_as_extras
from fedsim.grid.edge import EdgeGrid, Enrolled
from fedsim.grid.server_half import ServerContext
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.models.roles import names_of
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy


class IFCA(EdgeStrategy):
    """Sends every client the models of all clusters, and averages each over the clients that chose it.

    The server's test set judges one model: that of the cluster which most clients chose last (`judged_cluster` in a
    round's metrics; of equal ones the first), and it is wrong for all others. `evaluate_clients` judges each client
    with its own cluster's. A cluster that nobody chose keeps its model. An `uplink` packs differences to the model of
    cluster 0, which those of others are far from: 8 bits fit, few coordinates do not.

    Args:
        clusters: k, how many. 1 is federated averaging, bit for bit as `strategy=edge_mean`.
        shared: roles or patterns of tensors, as in `private`, that all clusters have in common and send once.
        sampling: arguments of FedAvg.

    Attributes:
        models: of the clusters.
        choices: last cluster of each client that was ever heard of.

    Raises:
        ConfigError: where clusters would begin alike, or have nothing of their own.
    """

    derived: ClassVar[frozenset[str]] = frozenset({"common", "sent"})
    sends_to_judge: ClassVar[bool] = True

    def __init__(self, clusters: Annotated[int, Ge(1), Le(100)] = 2, shared: Sequence[str] = (), **sampling: Any):
        super().__init__(**sampling)
        self.clusters, self.shared = clusters, tuple(shared)
        self.common: frozenset[str] = frozenset()
        self.models: list[Tensors] = []
        self.choices: dict[int, int] = {}
        self.sent: Broadcast | None = None

    def begin(self, context: ServerContext) -> None:
        """Finds what clusters share, and that they differ in the rest."""
        super().begin(context)
        first = context.model.build_model()
        self.common = frozenset(names_of(first, self.shared, "strategy.shared"))
        if self.clusters == 1:
            return
        own = context.trained - self.common
        other = context.model.build_model(1).state_dict()
        if all(torch.equal(t, other[name]) for name, t in first.state_dict().items() if name in own):
            raise ConfigError(
                f"the {self.clusters} clusters of IFCA would begin with equal weights, and never part; leave tensors "
                "that are drawn at random out of strategy.shared, and start_from out"
            )

    def prepare(self, number: int, weights: Tensors, arrays: ArrayRecord, grid: EdgeGrid) -> None:
        """Draws the first models of all clusters but the first, which has the run's own."""
        if self.models:
            return
        drawn = (self.context.model.build_model(n).state_dict() for n in range(1, self.clusters))
        self.models = [weights, *({**weights, **self._own(state, weights)} for state in drawn)]

    def _own(self, model: Tensors, weights: Tensors) -> Tensors:
        return {name: model[name].detach().clone() for name in weights if name not in self.common}

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns all models: the same for everybody."""
        if self.sent is None or self.sent.round != number:
            self.sent = Broadcast(number, self.models[0], models_as_extras(self.models, self.common))
        return self.sent

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns the new model of the largest cluster; each is the mean over those who chose it."""
        self.sent = None
        chosen = {update.client_id: int(update.extra(CHOSEN)[CLUSTER]) for update in updates}
        self.choices |= chosen
        everybody = super().combine(number, updates) if self.common else {}
        common = {name: t for name, t in everybody.items() if name in self.common}
        for cluster in range(self.clusters):
            own = [update for update in updates if chosen[update.client_id] == cluster]
            mean = super().combine(number, own) if own else self.models[cluster]
            self.models[cluster] = {**mean, **common}
        return self.models[self.largest]

    def sizes(self) -> list[int]:
        """Returns how many clients chose each cluster, when they were last heard of."""
        choices = list(self.choices.values())
        return [choices.count(cluster) for cluster in range(self.clusters)]

    @property
    def largest(self) -> int:
        """The cluster that the server's test set judges."""
        sizes = self.sizes()
        return sizes.index(max(sizes))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Adds to the metrics how many clients each cluster has, and which one is judged."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        sizes = {f"clients_in_cluster_{cluster}": size for cluster, size in enumerate(self.sizes())}
        return arrays, metrics and MetricRecord({**metrics, **sizes, "judged_cluster": self.largest})
