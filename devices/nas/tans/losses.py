"""What TANS learns by: a network is to be nearer to its own data set than to any other.

Source: Jeong et al., "Task-Adaptive Neural Network Search with Meta-Contrastive Learning" (TANS), NeurIPS 2021,
with the margin and the sum over all others of the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = 0.2


def contrastive_loss(queries: Tensor, nets: Tensor, margin: float = MARGIN) -> Tensor:
    """Returns sum_i sum_j [margin - S_ii + S_ij]_+ for j other than i, and the same of the transposed S.

    Args:
        queries: points of data sets, [n, width] of length 1.
        nets: point of a network of each, [n, width] of length 1.
        margin: by which a match must be nearer than every other pair.
    """
    similarity = nets @ queries.T
    others = ~torch.eye(len(similarity), dtype=torch.bool)
    losses = [F.relu(margin - s.diagonal()[:, None] + s)[others].sum() for s in (similarity, similarity.T)]
    return losses[0] + losses[1]
