"""The server half of EWC: averages the clients' estimates of each weight's importance, once per task.

Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017; averaging the Fisher
information over clients is fedsim's. Records: see `fedsim.exchanges.ewc`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, Message

from fedsim.errors import ConfigError
from fedsim.exchanges.ewc import FISHER, PENALTY, QUESTION
from fedsim.grid.edge import Enrolled
from fedsim.messages.records import tensors_of
from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors
from strategies.tasks import TaskStrategy


class EWC(TaskStrategy):
    """FedAvg that asks for the Fisher information when a task has ended, and sends the penalty of all tasks.

    Args:
        stream: arguments of TaskStrategy: `tasks`, `rounds` and those of FedAvg.
    """

    question: ClassVar[str] = f"query.{QUESTION}"

    def __init__(self, **stream: Any):
        super().__init__(**stream)
        self.penalty: Tensors | None = None

    def learn(self, arrays: ArrayRecord, replies: list[Message]) -> None:
        """Adds the mean of the clients' F, by examples, to the penalty.

        Raises:
            ConfigError: for a model with frozen weights: the server does not know which these are.
        """
        answers = [tensors_of(reply.content.array_records[FISHER]) for reply in replies]
        if not answers:
            return
        total = sum(int(answer["examples"]) for answer in answers)
        mean = torch.stack([a["curvature"].double() * (int(a["examples"]) / total) for a in answers]).sum(0)
        weights = torch.cat([t.flatten() for t in tensors_of(arrays).values()]).double()
        if len(weights) != len(mean):
            raise ConfigError(f"strategy=ewc needs a model without frozen weights: F has {len(mean)} of {len(weights)}")
        constant = (mean * weights.square()).sum()
        new = {"curvature": mean.float(), "weighted": (mean * weights).float(), "constant": constant.float()}
        self.penalty = new if self.penalty is None else {key: self.penalty[key] + t for key, t in new.items()}

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns the weights and, from the second task on, the penalty."""
        return Broadcast(number, weights, {} if self.penalty is None else {PENALTY: self.penalty})
