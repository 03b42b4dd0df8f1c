"""Data sets and trained networks as points of one sphere, near each other where the network suits the data.

Source: Jeong et al., "Task-Adaptive Neural Network Search with Meta-Contrastive Learning" (TANS), NeurIPS 2021,
with the sizes and norms of the authors' code. Differs: the head also sees both points multiplied, without which it
would rank networks alike for every data set.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 128  # of a point


class QueryEncoder(nn.Module):
    """The point of a data set: a linear layer, the mean over its examples, length 1; blind to their order.

    Args:
        features: numbers that an example is given as.
        width: of the point.
    """

    def __init__(self, features: int, width: int = WIDTH):
        super().__init__()
        self.linear = nn.Linear(features, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., width] from examples [..., examples, features]."""
        return F.normalize(self.linear(x).mean(-2), dim=-1)


class ModelEncoder(nn.Module):
    """The point of a trained network: topology and answers to the probe, each way of length 1 around a linear layer.

    Args:
        topology: numbers of an architecture.
        functional: numbers of its answers.
        width: of the point.
    """

    def __init__(self, topology: int, functional: int, width: int = WIDTH):
        super().__init__()
        self.linear = nn.Linear(topology + functional, width)

    def forward(self, topology: Tensor, functional: Tensor) -> Tensor:
        """Returns [..., width] from [..., topology] and [..., functional]."""
        both = F.normalize(torch.cat([topology, functional], dim=-1), dim=-1)
        return F.normalize(self.linear(both), dim=-1)


class PerformanceHead(nn.Module):
    """The accuracy of a network on a data set, in [0, 1]: sigmoid of a linear layer on points and their product."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.linear = nn.Linear(3 * width, 1)

    def forward(self, queries: Tensor, nets: Tensor) -> Tensor:
        """Returns [...] from points [..., width] each."""
        return torch.sigmoid(self.linear(torch.cat([queries, nets, queries * nets], dim=-1))).squeeze(-1)


class Retriever(nn.Module):
    """Both encoders and the head.

    Args:
        features: numbers that an example is given as.
        topology, functional: numbers of a network.
        width: of the points.
    """

    def __init__(self, features: int, topology: int, functional: int, width: int = WIDTH):
        super().__init__()
        self.queries, self.nets = QueryEncoder(features, width), ModelEncoder(topology, functional, width)
        self.head = PerformanceHead(width)
