"""Robust aggregation: what some liars among the clients of a round can do to the model is bounded.

Distances and norms are those of all that is trained together; statistics are averaged beside. Clients count alike where
a source says nothing of examples: a liar could claim any number of them.

Sources, all recalled: Blanchard et al., "Machine Learning with Adversaries", NIPS 2017 (Krum, Multi-Krum); El Mhamdi et
al., "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018 (Bulyan); Sun et al., "Can You Really
Backdoor Federated Learning?", arXiv 1911.07963 (norm clipping); Cao et al., "FLTrust", NDSS 2021.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Interval, Le
from torch import Tensor

from fedsim.errors import RunError
from fedsim.grid.edge import EdgeGrid
from fedsim.messages.updates import ClientUpdate
from fedsim.messages.weights import rounded_to
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy

Liars = Annotated[int, Interval(ge=0, le=10**6)]


class RobustStrategy(EdgeStrategy):
    """Adds to the weights what `aggregated` makes of the clients' changes.

    Attributes:
        weights: of what is trained, that clients of this round began with.
    """

    takes_all_tensors: ClassVar[bool] = False
    derived: ClassVar[frozenset[str]] = frozenset({"weights"})
    weights: Tensors

    def aggregated(self, number: int, changes: Tensor, examples: Tensor) -> Tensor:
        """Returns by how much the weights change, [size] float64.

        Args:
            number: of the round.
            changes: of each client, in client order, [clients, size] float64.
            examples: of each, [clients] float64.
        """
        raise NotImplementedError

    def prepare(self, number: int, weights: Tensors, arrays: Any, grid: EdgeGrid) -> None:
        """Remembers what the round begins with."""
        self.weights = weights

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns the weights, changed."""
        start = self.flat(self.weights)
        changes = torch.stack([self.flat(update.weights) for update in updates]) - start
        examples = torch.tensor([update.num_examples for update in updates], dtype=torch.float64)
        moved = start + self.aggregated(number, changes, examples)
        parts = moved.split([t.numel() for t in self.weights.values()])
        return {
            name: rounded_to(part.view(t.shape), t.dtype)
            for (name, t), part in zip(self.weights.items(), parts, strict=True)
        }

    def flat(self, weights: Tensors) -> Tensor:
        """Returns weights as one vector, [size] float64.

        Raises:
            RunError: for those of a part of the network.
        """
        if any(name not in weights or weights[name].shape != t.shape for name, t in self.weights.items()):
            raise RunError(
                f"{type(self).__name__} compares changes of the whole network, and clients sent parts of it; take a "
                "trainer that sends all weights, such as trainer=sgd"
            )
        return torch.cat([weights[name].double().reshape(-1) for name in self.weights])


def squared_distances(vectors: Tensor) -> Tensor:
    """Returns |a - b|^2 of each pair, [n, n]: by differences, so that the digits of close ones are not lost."""
    return torch.stack([(vectors - one).square().sum(1) for one in vectors])


def krum_scores(distances: Tensor, liars: int) -> Tensor:
    """Returns each vector's sum of squared distances to its n - f - 2 nearest others, and to one at least, [n].

    Args:
        distances: squared, [n, n].
        liars: f.
    """
    count = len(distances)
    others = distances.clone().fill_diagonal_(torch.inf).sort(1).values
    return others[:, : max(1, count - liars - 2)].sum(1)


class MultiKrum(RobustStrategy):
    """The mean of the clients whose changes are closest to their neighbours'.

    Args:
        num_malicious_nodes: f, liars in a round that it withstands; rounds need more than 2 f + 2 clients.
        num_nodes_to_select: m, clients that are averaged, all alike; None: n - f.
        sampling: arguments of FedAvg.
    """

    def __init__(
        self,
        num_malicious_nodes: Liars = 1,
        num_nodes_to_select: Annotated[int, Ge(1), Le(10**6)] | None = None,
        **sampling: Any,
    ):
        super().__init__(**sampling)
        self.num_malicious_nodes, self.num_nodes_to_select = num_malicious_nodes, num_nodes_to_select

    def aggregated(self, number: int, changes: Tensor, examples: Tensor) -> Tensor:
        """Returns the mean of the selected changes."""
        if len(changes) == 1:
            return changes[0]
        scores = krum_scores(squared_distances(changes), self.num_malicious_nodes)
        count = self.num_nodes_to_select or max(1, len(changes) - self.num_malicious_nodes)
        chosen = scores.sort(stable=True, dim=0).indices[:count].sort().values
        return changes[chosen].mean(0)


class Bulyan(RobustStrategy):
    """Krum selects n - 2 f clients, one by one; each coordinate is a mean around the median of theirs.

    Args:
        num_malicious_nodes: f, liars in a round that it withstands; rounds need at least 4 f + 3 clients.
        sampling: arguments of FedAvg.
    """

    def __init__(self, num_malicious_nodes: Liars = 1, **sampling: Any):
        super().__init__(**sampling)
        self.num_malicious_nodes = num_malicious_nodes

    def aggregated(self, number: int, changes: Tensor, examples: Tensor) -> Tensor:
        """Returns by coordinate the mean of the n - 4 f selected changes that are closest to their median."""
        liars, distances = self.num_malicious_nodes, squared_distances(changes)
        left, chosen = list(range(len(changes))), list[int]()
        while len(left) > 1 and len(chosen) < len(changes) - 2 * liars:
            place = int(krum_scores(distances[left][:, left], liars).argmin())
            chosen.append(left.pop(place))
        chosen += left if len(chosen) < max(1, len(changes) - 2 * liars) else []
        selected = changes[sorted(chosen)]
        away = (selected - middle(selected)).abs()
        nearest = away.sort(stable=True, dim=0).indices[: max(1, len(selected) - 2 * liars)]
        return selected.gather(0, nearest).mean(0)


def middle(vectors: Tensor) -> Tensor:
    """Returns the median of each coordinate, the mean of the two in the middle of an even number, [size]."""
    ordered, count = vectors.sort(0).values, len(vectors)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


class NormClipping(RobustStrategy):
    """Federated averaging of changes that are cut to a norm: nobody moves the model further than most.

    Args:
        norm: the largest of a change; None: the median norm of the round.
        sampling: arguments of FedAvg.
    """

    def __init__(self, norm: Annotated[float, Gt(0), Le(1e9)] | None = None, **sampling: Any):
        super().__init__(**sampling)
        self.norm = norm

    def aggregated(self, number: int, changes: Tensor, examples: Tensor) -> Tensor:
        """Returns the mean of the clipped changes, weighted by examples as in FedAvg."""
        norms = changes.norm(dim=1)
        most = middle(norms) if self.norm is None else torch.tensor(self.norm, dtype=torch.float64)
        factors = torch.where(norms > most, most / norms, torch.ones_like(norms))
        weights = examples / examples.sum() * factors
        return (weights[:, None] * changes).sum(0)
