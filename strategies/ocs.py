"""The server half of federated continual learning with coresets on the devices.

Source: Yoon et al., "Online Coreset Selection for Rehearsal-based Continual Learning", ICLR 2022, for one learner; the
federated protocol is fedsim's. Records: see `fedsim.exchanges.ocs`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from fedsim.exchanges.ocs import QUESTION, REFERENCE
from fedsim.grid.edge import Enrolled
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from strategies.tasks import TaskStrategy


class OCS(TaskStrategy):
    """FedAvg, weighted by examples used; when a task has ended, clients pick their coresets with the aggregated model.

    A client that cannot be reached then does so when it is next in a cohort. If it picked with the weights of its own
    last round, it would rank by its drift.

    Args:
        stream: arguments of TaskStrategy: `tasks`, `rounds` and those of FedAvg.
    """

    question: ClassVar[str] = f"query.{QUESTION}"

    def __init__(self, **stream: Any):
        super().__init__(**stream)
        self.reference: Tensors | None = None

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns the weights and, once there is one, the direction of the federation's coresets."""
        extras = {REFERENCE: self.reference} if self.reference is not None else {}
        return Broadcast(number, weights, extras)

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns the mean weights; averages directions by the sizes of the coresets and brings them to length 1."""
        sent = [update.extra(REFERENCE) for update in updates if REFERENCE in update.extras]
        if sent:
            total = torch.stack([record["direction"].double() * int(record["examples"]) for record in sent]).sum(0)
            length = torch.linalg.vector_norm(total)
            if length > 0:
                self.reference = {"direction": (total / length).to(sent[0]["direction"].dtype)}
        return super().combine(number, updates)
