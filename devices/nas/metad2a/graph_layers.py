"""What generator and predictor share: vertices whose states are made, in order, of their predecessors' states.

Source: Zhang et al., "D-VAE: A Variational Autoencoder for Directed Acyclic Graphs", NeurIPS 2019, equations 5 and 6.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from devices.nas.metad2a.cell_graph import TYPES, VERTICES


class Messages(nn.Module):
    """What a vertex tells those that it leads to: sigmoid(W_g [h, id]) * W_m [h, id]."""

    def __init__(self, width: int):
        super().__init__()
        self.gate = nn.Linear(width + VERTICES, width)
        self.content = nn.Linear(width + VERTICES, width, bias=False)

    def forward(self, states: Tensor, vertex: int) -> Tensor:
        """Returns [n, width] from the states of one vertex, [n, width]."""
        place = F.one_hot(torch.tensor(vertex), VERTICES).to(states.dtype).expand(len(states), -1)
        marked = torch.cat([states, place], dim=1)
        message: Tensor = torch.sigmoid(self.gate(marked)) * self.content(marked)
        return message


class Walk(nn.Module):
    """One pass over the vertices: h = GRU(type, sum of the messages of the vertices that lead there)."""

    def __init__(self, width: int):
        super().__init__()
        self.messages, self.cell = Messages(width), nn.GRUCell(len(TYPES), width)

    def forward(self, types: Tensor, arrows: Tensor) -> Tensor:
        """Returns the last vertex's state, [n, width].

        Args:
            types: of the vertices in the order of the pass, [n, vertices].
            arrows: row i says which vertices lead to vertex i, in that order too, [vertices, vertices] bool.
        """
        marks = F.one_hot(types, len(TYPES)).to(self.messages.gate.weight.dtype)
        sent: list[Tensor] = []
        for vertex in range(types.shape[1]):
            heard = [sent[other] for other in range(vertex) if arrows[vertex, other]]
            state: Tensor = self.cell(marks[:, vertex], torch.stack(heard).sum(0) if heard else None)
            sent.append(self.messages(state, vertex))
        return state
