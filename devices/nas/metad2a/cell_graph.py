"""Cells of NAS-Bench-201 as MetaD2A reads and writes them: eight vertices in order, the operations on the vertices.

All cells have the same arrows (`ARROWS`), and differ in the types of vertices 1 to 6.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from devices.nas.nb201 import ARROWS, EDGES, OPERATIONS

TYPES = ("input", "output", *OPERATIONS)  # of vertices
FIRST, LAST = TYPES.index("input"), TYPES.index("output")
VERTICES = len(EDGES) + 2


def cell_arrows() -> Tensor:
    """Returns the arrows that every cell has, [8, 8] bool: row i says which vertices lead to vertex i."""
    starts, ends = torch.tensor(ARROWS).T
    arrows = torch.zeros(VERTICES, VERTICES, dtype=torch.bool)
    arrows[ends, starts] = True
    return arrows


def cell_types(ops: np.ndarray | Tensor) -> Tensor:
    """Returns the types of the vertices, [n, 8] int64, of cells given as operation ids, [n, 6]."""
    ops = torch.as_tensor(ops, dtype=torch.int64)
    ends = torch.tensor([FIRST, LAST]).expand(len(ops), 2)
    return torch.cat([ends[:, :1], ops + TYPES.index(OPERATIONS[0]), ends[:, 1:]], dim=1)


def cells_of(types: Tensor) -> np.ndarray:
    """Returns the operation ids of cells, [n, 6] int64; undoes `cell_types`."""
    ops: np.ndarray = (types[:, 1:-1] - TYPES.index(OPERATIONS[0])).numpy()
    return ops


def are_cells(types: Tensor, arrows: Tensor) -> Tensor:
    """Returns which graphs are cells of NAS-Bench-201, [n] bool.

    Args:
        types: of vertices, [n, 8] int64; what follows an output does not count.
        arrows: row i says which vertices lead to vertex i, [n, 8, 8] bool.
    """
    inside = types[:, 1:-1] >= TYPES.index(OPERATIONS[0])
    ends = (types[:, 0] == FIRST) & (types[:, -1] == LAST)
    return ends & inside.all(1) & (arrows == cell_arrows()).all(2).all(1)
