"""All tasks at once: an upper bound for continual learning, which may look at what has not arrived yet.

May import: what `clients.trainers.sgd` may.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clients.trainers.base import ClientContext
from clients.trainers.sgd import SGDTrainer
from fedsim.messages import Broadcast
from fedsim.workload import Tensors

EVER = 10**9  # a round after all others


class JointTrainer(SGDTrainer):
    """SGD in which every epoch is an even draw from all of a client's tasks, as large as the part that has arrived.

    An ORACLE: it takes as many steps as plain SGD on the stream, in another order of the data. Without a stream it is
    plain SGD, but for that order.
    """

    def batches(self, client: ClientContext, task: Broadcast) -> Iterator[Tensors]:
        workload, draw = client.workload, client.stream("joint")
        parts = [workload.arrivals(client.client_id, part) for part in range(workload.part(EVER) + 1)]
        names, steps_left = torch.cat(parts), self.local_steps
        for _ in range(self.local_epochs if steps_left is None else steps_left):
            some = names[torch.randperm(len(names), generator=draw)[: len(client.data.train)]]
            every = {key: t.to(client.device) for key, t in workload.recall(client.client_id, some).items()}
            for rows in torch.arange(len(some)).split(self.batch_size):
                if steps_left is not None:
                    if steps_left == 0:
                        return
                    steps_left -= 1
                yield {key: t[rows] for key, t in every.items()}
