"""What both halves of FedProto know (strategies/fedproto.py, clients/trainers/personal/fedproto.py).

Records: prototypes, up: of the classes that a client has; down, once there are any, and before a client judges: of all
that were ever sent: class [c] int64, ascending; mean [c, features], of the features of its labels; count [c] float32 of
these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsim.workloads.base import Tensors

PROTOTYPES = "prototypes"  # record
CLASS, MEAN, COUNT = "class", "mean", "count"


def averaged(records: Sequence[Tensors], before: Tensors) -> Tensors:
    """Returns the mean of each class over all records that have it, weighted by labels.

    Args:
        records: of clients, in order.
        before: prototypes that stay where no record has the class; none: empty.
    """
    classes = torch.cat([record[CLASS] for record in records]).unique()
    width = records[0][MEAN].shape[1]
    count, total = torch.zeros(len(classes)).double(), torch.zeros(len(classes), width).double()
    for record in records:
        rows, counts = torch.searchsorted(classes, record[CLASS]), record[COUNT].double()
        count[rows] += counts
        total[rows] += record[MEAN].double() * counts[:, None]
    means = (total / count[:, None]).to(records[0][MEAN].dtype)
    found = {CLASS: classes, MEAN: means, COUNT: count.to(records[0][COUNT].dtype)}
    if not before:
        return found
    stays = ~torch.isin(before[CLASS], classes)
    both = {name: torch.cat([before[name][stays], t]) for name, t in found.items()}
    order = both[CLASS].argsort()
    return {name: t[order] for name, t in both.items()}
