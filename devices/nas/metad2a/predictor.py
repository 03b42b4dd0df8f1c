"""MetaD2A's predictor: how accurate a cell will be on a data set that it was never trained on.

Source: Lee et al., "Rapid Neural Architecture Search by Learning to Generate Graphs from Datasets" (MetaD2A), ICLR
2021, section 3.3. Differs: the states of vertices have 56 numbers (512 there); the loss also has errors relative to the
set's mean, since cells of one set are what is ranked.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from devices.nas.metad2a.cell_graph import VERTICES, cell_arrows, cell_types
from devices.nas.metad2a.graph_layers import Walk
from devices.nas.metad2a.set_encoder import WIDTH, SetEncoder


class AccuracyPredictor(nn.Module):
    """Predicts accuracies, as deviations from the mean of all trained ones in units of their spread.

    A cell is walked from input to output and back; both last states, and the vector of the data set, are mixed.

    Args:
        features: numbers that an image is given as.
        width: of the vectors of data set and cell.
    """

    def __init__(self, features: int, width: int = WIDTH):
        super().__init__()
        self.sets = SetEncoder(features, width)
        self.there, self.back = Walk(width), Walk(width)
        self.cell = nn.Linear(2 * width, width)
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x: Tensor, ops: Tensor) -> Tensor:
        """Returns [n] for a data set x [classes, images, features] and cells, operation ids [n, 6]."""
        types, arrows = cell_types(ops), cell_arrows()
        turned = torch.arange(VERTICES - 1, -1, -1)
        ways = [self.there(types, arrows), self.back(types[:, turned], arrows.T[turned][:, turned])]
        joint = torch.cat([self.cell(torch.cat(ways, 1)), self.sets(x).expand(len(types), -1)], dim=1)
        predicted: Tensor = self.head(joint).squeeze(1)
        return predicted


def predictor_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Returns the mean squared error, and that around the means of the set, relative to the set's own spread.

    Args:
        predicted: of cells on one data set, [n].
        wanted: their accuracies, in the same units.
    """
    inside = wanted - wanted.mean()
    error = predicted - wanted
    spread = inside.square().mean().clamp(min=1e-4)  # where all cells do alike, nothing is to be ranked
    return error.square().mean() + (error - error.mean()).square().mean() / spread
