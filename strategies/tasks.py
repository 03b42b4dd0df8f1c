"""Strategies on a stream of tasks: what the server asks its clients when a task has ended."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from flwr.app import ArrayRecord, Message

from fedsim.grid.edge import EdgeGrid
from fedsim.messages.records import array_record, content_of
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy


class TaskStrategy(EdgeStrategy):
    """FedAvg that asks, after a task's last round, every client that trained on it and can be reached.

    They are sent the aggregated weights with the question. Name it in `question`, override `learn` for the answers.

    Args:
        tasks: of the stream; 1 where there is none.
        rounds: of the run.
        sampling: arguments of FedAvg.

    Attributes:
        question: phase of the exchange, "query.<question>".
        trained: clients whose updates on the present task were accepted.

    Raises:
        ConfigError: for a setting that is not allowed.
    """

    asks_reachable: ClassVar[bool] = True
    derived: ClassVar[frozenset[str]] = frozenset({"tasks", "rounds_per_task"})
    question: ClassVar[str]

    def __init__(self, tasks: Annotated[int, Ge(1)] = 1, rounds: Annotated[int, Ge(1)] = 1, **sampling: Any):
        super().__init__(**sampling)
        self.tasks, self.rounds_per_task = tasks, max(1, rounds // tasks)
        self.trained: set[int] = set()

    @property
    def reads_rounds(self) -> str:
        """When a task ends, where there are several."""
        return "tasks divide the rounds (strategy.tasks)" if self.tasks > 1 else ""

    def learn(self, arrays: ArrayRecord, replies: list[Message]) -> None:
        """Takes the answers that were accepted, in client order.

        Args:
            arrays: the trained weights that they speak of, shared ones only.
            replies: to the question.
        """

    def prepare(self, number: int, weights: Tensors, arrays: ArrayRecord, grid: EdgeGrid) -> None:
        """Asks the question about a task before the first round of the next one."""
        if (number - 1) % self.rounds_per_task or not self.trained:
            return
        content = content_of(Broadcast(number, {}), arrays)
        replies = grid.send_and_receive(
            Message(content, client, self.question) for client in grid.reachable(sorted(self.trained))
        )
        self.trained = set()
        of_trained = {name: array for name, array in arrays.items() if name in self.context.trained}
        self.learn(array_record(of_trained), replies)

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns FedAvg's mean; remembers who trained."""
        self.trained |= {update.client_id for update in updates}
        return super().combine(number, updates)
