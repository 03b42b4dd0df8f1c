"""A data set as one vector: attention over the images of a class, then over the classes, blind to their order.

Source: Lee et al., "Rapid Neural Architecture Search by Learning to Generate Graphs from Datasets" (MetaD2A), ICLR
2021; the blocks are those of Lee et al., "Set Transformer", ICML 2019. Differs: the vector is normalised (mean 0,
variance 1), so that an unseen data set's is not far from all that were learned from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 56
HEADS = 4


class Attention(nn.Module):
    """Queries that look at a set: o = q + softmax(q k / sqrt(width)) v by heads, then o + relu(W o)."""

    def __init__(self, query: int, inputs: int, width: int):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(query, width), nn.Linear(inputs, width), nn.Linear(inputs, width)
        self.out = nn.Linear(width, width)

    def forward(self, query: Tensor, x: Tensor, values: Tensor | None = None) -> Tensor:
        """Returns [sets, queries, width] from query [sets, queries, ...] and x [sets, elements, inputs].

        Where `values` [sets, elements, inputs] are given, elements are found by x and tell what is there.
        """
        values = x if values is None else values
        q, k, v = (self._by_head(part) for part in (self.query(query), self.key(x), self.value(values)))
        scale = (q.shape[-1] * HEADS) ** -0.5  # the width's, as in the authors' code, not a head's
        o = (q + F.scaled_dot_product_attention(q, k, v, scale=scale)).transpose(1, 2).flatten(2)
        mixed: Tensor = o + F.relu(self.out(o))
        return mixed

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], HEADS, -1).transpose(1, 2)


class Pool(nn.Module):
    """One vector of a set: two blocks of attention among its elements, one of a learned query, a linear layer."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.first, self.second = Attention(inputs, inputs, width), Attention(width, width, width)
        self.seed = nn.Parameter(torch.empty(1, 1, width))
        self.pool, self.out = Attention(width, width, width), nn.Linear(width, width)
        nn.init.xavier_uniform_(self.seed)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [sets, width] from x [sets, elements, inputs]."""
        x = self.first(x, x)
        x = self.second(x, x)
        pooled: Tensor = self.out(self.pool(self.seed.expand(len(x), -1, -1), x)).squeeze(1)
        return pooled


class SetEncoder(nn.Module):
    """The vector of a data set; the order of classes, and of images in a class, does not matter.

    Args:
        features: numbers that an image is given as.
        width: of the vector.
    """

    def __init__(self, features: int, width: int = WIDTH):
        super().__init__()
        self.images, self.classes = Pool(features, width), Pool(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [width] from x [classes, images, features]."""
        vector: Tensor = self.classes(self.images(x).unsqueeze(0)).squeeze(0)
        return F.layer_norm(vector, vector.shape)
