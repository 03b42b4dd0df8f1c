"""All tasks at once: an upper bound for continual learning, which may look at what has not arrived yet.

Its updates carry the metric `oracle`, so that results say so.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clients.trainers.base import ClientContext
from clients.trainers.sgd import SGDTrainer
from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors

EVER = 10**9  # a round after all others


class JointTrainer(SGDTrainer):
    """SGD in which every epoch is an even draw from all of a client's tasks, as large as the part that has arrived.

    An ORACLE: it takes as many steps as plain SGD on the stream, in another order of the data. Without a stream it is
    plain SGD, but for that order.
    """

    def batches(self, client: ClientContext, broadcast: Broadcast) -> Iterator[Tensors]:
        workload, size = client.oracle(), self.batch_size
        names = torch.cat([workload.arrivals(client.client_id, part) for part in range(workload.part(EVER) + 1)])
        for order in self.orders(client, "joint", size, self.local_epochs, self.local_steps, among=len(names)):
            every = workload.recall(client.client_id, names[order])
            for rows in torch.arange(len(order)).split(size):
                yield {key: t[rows].to(client.device) for key, t in every.items()}
