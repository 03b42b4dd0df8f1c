"""Strategies on a stream of tasks: what the server asks its clients when a task has ended."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge
from flwr.app import ArrayRecord, Message

from fedsim.grid.edge import EdgeGrid
from fedsim.messages.records import Broadcast, ClientUpdate, array_record, content_of
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy


class TaskStrategy(EdgeStrategy):
    """FedAvg that asks, after a task's last round, every client that trained on it and is online.

    They are sent the aggregated weights with the question. Say which in `question`, override `learn` for the answers.

    Args:
        tasks: of the stream; 1 where there is none.
        rounds: of the run.
        sampling: arguments of FedAvg.

    Raises:
        ConfigError: for a setting that is not allowed.
    """

    question: str  # the phase of the exchange, "query.<question>"

    def __init__(self, tasks: Annotated[int, Ge(1)] = 1, rounds: Annotated[int, Ge(1)] = 1, **sampling: Any):
        super().__init__(**sampling)
        self.rounds_per_task = max(1, rounds // tasks)
        self.trained: set[int] = set()  # clients whose updates on the present task were accepted

    def learn(self, arrays: ArrayRecord, replies: list[Message]) -> None:
        """Takes the answers that were accepted, in client order.

        Args:
            arrays: the trained weights that they speak of, shared ones only.
            replies: to the question.
        """

    def prepare(self, round: int, weights: Tensors, arrays: ArrayRecord, grid: EdgeGrid) -> None:
        """Before the first round of a task, the question about the task before."""
        if (round - 1) % self.rounds_per_task or not self.trained:
            return
        content, now_s = content_of(Broadcast(round, {}), arrays), grid.clock.now_s
        asked = [client for client in sorted(self.trained) if grid.fleet.online(client, now_s)]
        self.trained = set()
        trained = array_record({name: array for name, array in arrays.items() if name in grid.trained})
        self.learn(trained, grid.send_and_receive([Message(content, client, self.question) for client in asked]))

    def combine(self, round: int, updates: list[ClientUpdate]) -> Tensors:
        """FedAvg's mean; remembers who trained."""
        self.trained |= {update.client_id for update in updates}
        return super().combine(round, updates)
