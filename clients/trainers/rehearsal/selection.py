"""Rules that pick examples for a memory: functions of a pool of examples, a size and random numbers.

Every rule gives distinct positions in the pool, [size] int64, in the order in which they were picked: a memory that
shrinks keeps the first. k-means rules are the k-means++ seeding alone, as in public code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.trainers.rehearsal.gradients import last_layer, scoring
from fedsim.workloads.base import Tensors, Workload


class Pool:
    """Examples to pick from, and what a model makes of them.

    Args:
        workload, model: the network is scored in evaluation mode, and only if a rule asks.
        batch: n examples.
    """

    def __init__(self, workload: Workload, model: nn.Module, batch: Tensors):
        self.workload, self.model, self.batch = workload, model, batch
        self.passed = 0  # examples that went forward

    def __len__(self) -> int:
        return len(self.batch["y"])

    def part(self, places: Tensor) -> Pool:
        """Returns the pool of some of the examples; what the model made of them is kept."""
        some = Pool(self.workload, self.model, {key: t[places] for key, t in self.batch.items()})
        if "outputs" in vars(self):
            vars(some)["outputs"] = tuple(t[places] for t in self.outputs)
        return some

    @cached_property
    def outputs(self) -> tuple[Tensor, Tensor]:
        """Returns softmax - label [n, classes] and features [n, features]."""
        with scoring(self.model):
            outputs = last_layer(self.workload, self.model, self.batch)
        self.passed += len(self)
        return outputs

    @property
    def labels(self) -> Tensor:
        """Class of each example, [n]; a sequence counts as its first token."""
        y = self.batch["y"]
        return y if y.dim() == 1 else y[:, 0]

    @property
    def inputs(self) -> Tensor:
        """Returns the inputs, flat, [n, numbers of an input]."""
        return self.batch["x"].flatten(1).float()

    @property
    def features(self) -> Tensor:
        """Returns the features, flat, [n, features]."""
        return self.outputs[1].flatten(1)

    @property
    def gradients(self) -> Tensor:
        """Returns gradients of the last layer's weights and bias, [n, classes * (features + 1)]."""
        error, features = self.outputs
        inputs = torch.cat([features, features.new_ones(*features.shape[:-1], 1)], -1)
        if error.dim() == 2:
            return (error.unsqueeze(2) * inputs.unsqueeze(1)).flatten(1)
        return torch.einsum("nsc,nsh->nch", error, inputs).flatten(1)

    @property
    def probabilities(self) -> Tensor:
        """Returns probabilities, [n, (steps,) classes]."""
        return self.outputs[0] + F.one_hot(self.batch["y"], self.outputs[0].shape[-1])


Rule = Callable[[Pool, int, torch.Generator], Tensor]


def uniform(pool: Pool, size: int, draw: torch.Generator) -> Tensor:
    """Draws without replacement."""
    return torch.randperm(len(pool), generator=draw)[:size]


def seeding(points: Tensor, size: int, draw: torch.Generator) -> Tensor:
    """Draws as k-means++: the first evenly, each next with probability ~ squared distance to the nearest chosen one.

    Where all that is left lies on chosen points, the next is the first of the rest.

    Args:
        points: [n, d].
        size: how many.
        draw: random numbers.
    """
    chosen, points = [int(torch.randint(len(points), (), generator=draw))], points.double()  # squares could underflow
    nearest = (points - points[chosen[0]]).square().sum(1)
    for _ in range(size - 1):
        nearest[torch.tensor(chosen)] = 0
        if nearest.sum() > 0:
            place = int(torch.multinomial(nearest.cpu(), 1, generator=draw))
        else:
            place = next(i for i in range(len(points)) if i not in set(chosen))
        chosen.append(place)
        nearest = torch.minimum(nearest, (points - points[place]).square().sum(1))
    return torch.tensor(chosen)


def farthest(points: Tensor, size: int) -> Tensor:
    """Picks by k-center: the first point, then always the one farthest from all chosen; ties to the smaller index."""
    chosen, points = [0], points.double()  # squares could underflow
    nearest = (points - points[0]).square().sum(1)
    for _ in range(size - 1):
        nearest[torch.tensor(chosen)] = -1
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def herd(points: Tensor, size: int) -> Tensor:
    """Herds: each next point brings the mean of the chosen ones closest to the mean of all.

    Source: Welling, "Herding Dynamical Weights to Learn", ICML 2009; points are brought to length 1 first.
    """
    points = F.normalize(points.double(), dim=1, eps=torch.finfo(torch.float64).tiny)
    mean, total, chosen = points.mean(0), torch.zeros_like(points[0]), []
    free = torch.ones(len(points), dtype=torch.bool, device=points.device)
    for count in range(1, size + 1):
        distance = (mean - (total + points) / count).square().sum(1)
        distance[~free] = torch.inf
        place = int(distance.argmin())
        chosen.append(place)
        free[place] = False
        total = total + points[place]
    return torch.tensor(chosen, dtype=torch.int64)


def icarl(pool: Pool, size: int, draw: torch.Generator) -> Tensor:
    """Herds features to the mean of each class, classes in turn. Source: Rebuffi et al., "iCaRL", CVPR 2017."""
    labels, order = pool.labels.cpu(), []
    for c in _in_random_order(labels.unique(), draw).tolist():
        own = torch.nonzero(labels == c).flatten()
        order.append(own[herd(pool.features[own], min(size, len(own)))])
    return _in_turns(order, size)


def entropy(pool: Pool, size: int, draw: torch.Generator) -> Tensor:
    """Picks where the model is least certain."""
    p = pool.probabilities.clamp(min=1e-12)
    return _largest(-(p * p.log()).flatten(1).sum(1), size)


def hardest(pool: Pool, size: int, draw: torch.Generator) -> Tensor:
    """Picks where the loss is largest."""
    p = pool.probabilities.gather(-1, pool.batch["y"].unsqueeze(-1)).squeeze(-1).clamp(min=1e-12)
    return _largest(-p.log().reshape(len(pool), -1).mean(1), size)


def _largest(values: Tensor, size: int) -> Tensor:
    return values.argsort(descending=True, stable=True)[:size].cpu()


RULES: dict[str, Rule] = {
    "uniform": uniform,
    "kmeans_features": lambda pool, size, draw: seeding(pool.inputs, size, draw),
    "kmeans_embedding": lambda pool, size, draw: seeding(pool.features, size, draw),
    "kmeans_grads": lambda pool, size, draw: seeding(pool.gradients, size, draw),
    "kcenter_features": lambda pool, size, draw: farthest(pool.inputs, size),
    "kcenter_embedding": lambda pool, size, draw: farthest(pool.features, size),
    "kcenter_grads": lambda pool, size, draw: farthest(pool.gradients, size),
    "icarl": icarl,
    "grad_matching": lambda pool, size, draw: herd(pool.gradients, size),
    "entropy": entropy,
    "hardest": hardest,
}
MODEL_FREE = ("uniform", "kmeans_features", "kcenter_features")


def quotas(labels: Tensor, size: int, draw: torch.Generator) -> dict[int, int]:
    """Shares `size` examples among the classes: as even as these allow, the rest to those that have more.

    Args:
        labels: of the pool, [n].
        size: how many in all; at most n are given.
        draw: for the classes that get one more, or any at all where there are more classes than examples to keep.

    Returns:
        Class to count, in random order of the classes; counts differ by at most one where every class has enough.
    """
    classes = _in_random_order(labels.unique(), draw)
    counts = (labels == classes[:, None]).sum(1)
    given = torch.zeros_like(counts)
    for _ in range(min(size, len(labels))):
        open_ = torch.nonzero(given < counts).flatten()
        given[open_[given[open_].argmin()]] += 1
    return dict(zip(classes.tolist(), given.tolist(), strict=True))


def _in_random_order(classes: Tensor, draw: torch.Generator) -> Tensor:
    return classes[torch.randperm(len(classes), generator=draw)]


def _in_turns(groups: list[Tensor], size: int) -> Tensor:
    """Returns the first of every group, then the second of each, until there are `size`."""
    turns = torch.cat([torch.arange(len(group)) for group in groups])
    return torch.cat(groups)[turns.argsort(stable=True)[:size]]


def balanced(labels: Tensor, order: Tensor, size: int) -> Tensor:
    """Returns the first of every class in turn, each turn in `order`, until there are `size`.

    Args:
        labels: of the pool, [n].
        order: of the pool, best first, [n] int64.
        size: how many.

    Returns:
        Positions in the pool, [min(size, n)].
    """
    ordered = labels[order]
    turn = torch.empty_like(order)
    for c in ordered.unique():
        own = torch.nonzero(ordered == c).flatten()
        turn[own] = torch.arange(len(own), device=own.device)
    return order[turn.argsort(stable=True)[:size]]


def pick(name: str, pool: Pool, size: int, draw: torch.Generator, class_balanced: bool) -> Tensor:
    """Picks by one of the RULES or, class-balanced, within every class, in turn; at most the pool."""
    rule, size = RULES[name], min(size, len(pool))
    if size == 0:
        return torch.empty(0, dtype=torch.int64)
    if not class_balanced:
        return rule(pool, size, draw)
    labels, order = pool.labels.cpu(), []
    if name not in MODEL_FREE:
        _ = pool.outputs  # once for all classes
    for c, count in quotas(labels, size, draw).items():
        own = torch.nonzero(labels == c).flatten()
        if count:
            order.append(own[rule(pool.part(own), count, draw)])
    return _in_turns(order, size)
