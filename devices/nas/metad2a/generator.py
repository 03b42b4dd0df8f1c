"""MetaD2A's generator: a cell for a data set, vertex by vertex, from a vector drawn for the set.

A data set gives a normal distribution of z; from z a decoder draws each vertex's type and, back from its neighbour, the
arrows that lead to it.

Source: Lee et al., "Rapid Neural Architecture Search by Learning to Generate Graphs from Datasets" (MetaD2A), ICLR
2021, section 3.2; decoder of Zhang et al., "D-VAE", NeurIPS 2019. Differs: the arrows of the output are drawn like all
others (D-VAE ties loose ends to it), and a graph with other arrows than a cell's is no cell; a vertex is told its
place, without which those with the same predecessors could not be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from devices.nas.metad2a.cell_graph import FIRST, LAST, TYPES, VERTICES, are_cells, cell_arrows, cell_types, cells_of
from devices.nas.metad2a.graph_layers import Messages
from devices.nas.metad2a.set_encoder import WIDTH, SetEncoder

KL_WEIGHT = 0.005
SPREAD = 6.0  # of the log of a variance, either way: beyond it, the divergence's exponential ends a training
BATCH = 500  # graphs drawn at once


@dataclass(frozen=True)
class Generated:
    """What a generator drew.

    Attributes:
        cells: valid and distinct, in the order in which they came, operation ids [cells, 6].
        drawn: graphs, valid or not.
        valid: of them, cells of NAS-Bench-201.
        found: of these, distinct ones, beyond those of `cells` too.
    """

    cells: np.ndarray
    drawn: int
    valid: int
    found: int


class CellGenerator(nn.Module):
    """Draws cells that do well on a data set.

    Args:
        features: numbers that an image is given as.
        width: of z and of the states of vertices.
    """

    def __init__(self, features: int, width: int = WIDTH):
        super().__init__()
        self.width = width
        self.sets = SetEncoder(features, width)
        self.mean, self.log_variance = nn.Linear(width, width), nn.Linear(width, width)
        self.start = nn.Linear(width, width)
        self.messages, self.cell = Messages(width), nn.GRUCell(len(TYPES) + VERTICES, width)
        self.type_scores = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, len(TYPES)))
        self.arrow_score = nn.Sequential(nn.Linear(2 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 1))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log of the variance of z, [width] each, for a data set x [classes, images, features]."""
        vector = self.sets(x)
        return self.mean(vector), self.log_variance(vector).clamp(-SPREAD, SPREAD)

    def log_likelihood(self, z: Tensor, types: Tensor, arrows: Tensor) -> Tensor:
        """Returns log p(graph | z), [n]: of the types of all vertices but the input, and of all arrows and gaps.

        Args:
            z: [n, width].
            types: of vertices, [n, vertices] int64, the first an input.
            arrows: row i says which vertices lead to vertex i, [n, vertices, vertices] bool.
        """
        arrows = arrows.to(z.dtype)
        states = [self._first(z)]
        sent = [self.messages(states[0], 0)]
        total = z.new_zeros(len(z))
        for vertex in range(1, types.shape[1]):
            scores = self.type_scores(states[-1]).log_softmax(1)
            total = total + scores.gather(1, types[:, vertex : vertex + 1]).squeeze(1)
            # From the nearest vertex back; what was said before each arrow is decided is a sum of those before it.
            wanted = arrows[:, vertex, :vertex].flip(1)
            heard = F.pad((torch.stack(sent[::-1], 1) * wanted.unsqueeze(2)).cumsum(1), (0, 0, 1, 0))
            seen = _marked(types[:, vertex], vertex, z.dtype).unsqueeze(1).expand(-1, vertex + 1, -1)
            own = self.cell(seen.flatten(0, 1), heard.flatten(0, 1)).unflatten(0, (len(z), -1))
            pairs = torch.cat([own[:, :-1], torch.stack(states[::-1], 1)], dim=2)
            score = self.arrow_score(pairs).squeeze(2)
            total = total - F.binary_cross_entropy_with_logits(score, wanted, reduction="none").sum(1)
            states.append(own[:, -1])
            sent.append(self.messages(states[-1], vertex))
        return total

    @torch.no_grad()
    def decode(self, z: Tensor, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draws a graph of eight vertices for each z [n, width]: types [n, 8] int64 and arrows [n, 8, 8] bool.

        A graph ends with its first output, at the latest with the eighth vertex; what stands behind one that ended
        earlier does not count, and such a graph is no cell.
        """
        count = len(z)
        types = torch.full((count, VERTICES), FIRST)
        arrows = torch.zeros(count, VERTICES, VERTICES, dtype=torch.bool)
        states = [self._first(z)]
        sent = [self.messages(states[0], 0)]
        for vertex in range(1, VERTICES):
            bounds = self.type_scores(states[-1]).softmax(1).cumsum(1)
            chance = torch.from_numpy(draw.random((count, 1))).to(z.dtype)
            types[:, vertex] = (bounds < chance).sum(1).clamp(max=len(TYPES) - 1)
            if vertex == VERTICES - 1:
                types[:, vertex] = LAST
            mark = _marked(types[:, vertex], vertex, z.dtype)
            heard = torch.zeros_like(z)
            for other in reversed(range(vertex)):
                pair = torch.cat([self.cell(mark, heard), states[other]], dim=1)
                chance = torch.from_numpy(draw.random(count)).to(z.dtype)
                arrows[:, vertex, other] = chance < torch.sigmoid(self.arrow_score(pair).squeeze(1))
                heard = heard + sent[other] * arrows[:, vertex, other].unsqueeze(1)
            states.append(self.cell(mark, heard))
            sent.append(self.messages(states[-1], vertex))
        return types, arrows

    def _first(self, z: Tensor) -> Tensor:
        mark = _marked(torch.full((len(z),), FIRST), 0, z.dtype)
        state: Tensor = self.cell(mark, torch.tanh(self.start(z)))
        return state


def _marked(types: Tensor, vertex: int, dtype: torch.dtype) -> Tensor:
    """Returns type and place of a vertex, one-hot, [n, 15], from its types [n]."""
    place = F.one_hot(torch.tensor(vertex), VERTICES).expand(len(types), -1)
    return torch.cat([F.one_hot(types, len(TYPES)), place], dim=1).to(dtype)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Returns the KL divergence of N(mean, variance) from N(0, 1), summed over the numbers of z."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


def generator_loss(
    model: CellGenerator, sets: Sequence[tuple[Tensor, Tensor]], noise: Tensor, kl_weight: float = KL_WEIGHT
) -> Tensor:
    """Returns -log p(cell | z) + kl_weight KL(q(z | set) || N(0, 1)), mean over cells that do well on their data set.

    Args:
        model: the generator.
        sets: data sets, each with its cells: [classes, images, features] and [n, 6].
        noise: standard normal, a row for each cell, [cells, width].
        kl_weight: beta of the paper.
    """
    posteriors = [(ops, *model.posterior(x)) for x, ops in sets]
    mean = torch.cat([mean.expand(len(ops), -1) for ops, mean, _ in posteriors])
    log_variance = torch.cat([log_variance.expand(len(ops), -1) for ops, _, log_variance in posteriors])
    types = cell_types(torch.cat([ops for ops, *_ in posteriors]))
    z = mean + (0.5 * log_variance).exp() * noise
    likelihood = model.log_likelihood(z, types, cell_arrows().expand(len(types), -1, -1))
    return (kl_weight * divergence(mean, log_variance) - likelihood).mean()


@torch.no_grad()
def generate(model: CellGenerator, x: Tensor, count: int, draw: np.random.Generator, at_most: int) -> Generated:
    """Draws graphs for a data set until so many distinct cells came.

    Args:
        model: the generator.
        x: the data set, [classes, images, features].
        count: cells to find.
        draw: of z and of the graphs.
        at_most: graphs to draw; fewer cells are returned where they are not enough.
    """
    mean, log_variance = model.posterior(x)
    cells: dict[tuple[int, ...], None] = {}
    drawn = valid = 0
    while len(cells) < count and drawn < at_most:
        now = min(BATCH, at_most - drawn)
        noise = torch.from_numpy(draw.standard_normal((now, model.width))).to(mean.dtype)
        types, arrows = model.decode(mean + (0.5 * log_variance).exp() * noise, draw)
        found = cells_of(types[are_cells(types, arrows)])
        cells |= dict.fromkeys(tuple(ops) for ops in found.tolist())
        drawn, valid = drawn + now, valid + len(found)
    kept = np.array(list(cells)[:count], dtype=np.int64).reshape(-1, VERTICES - 2)
    return Generated(kept, drawn, valid, len(cells))
