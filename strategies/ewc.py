"""The server half of EWC: averages what clients say of each weight's importance, once per task.

Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017; averaging the Fisher
information over clients is fedsim's. Records: fisher, up, once per task: curvature [weights] float32, examples []
int64; penalty, down, from the second task on: curvature, weighted [weights], constant [] float32, the sums over tasks
of F, F w* and F w*^2, which is all that a sum of quadratics needs. May import: what `strategies.edge` may.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedsim.errors import ConfigError
from fedsim.messages import Broadcast, ClientUpdate, content_of, tensors_of
from fedsim.network import EdgeGrid, Enrolled
from fedsim.workload import Tensors
from strategies.edge import EdgeStrategy

QUESTION, FISHER, PENALTY = "query.fisher", "fisher", "penalty"


class EWC(EdgeStrategy):
    """FedAvg that asks for the Fisher information when a task has ended, and sends the penalty of all tasks.

    Args:
        tasks: of the stream; 1 where there is none.
        rounds: of the run.
        sampling: arguments of FedAvg.
    """

    def __init__(self, tasks: int = 1, rounds: int = 1, **sampling: Any):
        super().__init__(**sampling)
        if tasks < 1 or rounds < 1:
            raise ConfigError(f"strategy.tasks and strategy.rounds must be at least 1, got {tasks} and {rounds}")
        self.rounds_per_task = max(1, rounds // tasks)
        self.trained: set[int] = set()  # clients whose updates on the present task were accepted
        self.penalty: Tensors | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The cohort's messages; before the first of a task, the question about the task before."""
        if not isinstance(grid, EdgeGrid):
            raise ConfigError(f"{type(self).__name__} needs fedsim's EdgeGrid, got {type(grid).__name__}")
        if server_round > 1 and (server_round - 1) % self.rounds_per_task == 0 and self.trained:
            self.consolidate(server_round, arrays, grid)
        return super().configure_train(server_round, arrays, config, grid)

    def consolidate(self, server_round: int, arrays: ArrayRecord, grid: EdgeGrid) -> None:
        """Asks who trained on the task and is online; adds the mean of their F, by examples, to the penalty."""
        content, now_s = content_of(Broadcast(server_round, {}), arrays), grid.clock.now_s
        asked = [client for client in sorted(self.trained) if grid.fleet.online(client, now_s)]
        self.trained = set()
        replies = grid.send_and_receive([Message(content, client, QUESTION) for client in asked])
        answers = [tensors_of(reply.content.array_records[FISHER]) for reply in replies]
        if not answers:
            return
        total = sum(int(answer["examples"]) for answer in answers)
        mean = torch.stack([a["curvature"].double() * (int(a["examples"]) / total) for a in answers]).sum(0)
        weights = torch.cat(
            [tensors_of(arrays)[name].flatten() for name in self.trained_names(arrays, len(mean))]
        ).double()
        constant = (mean * weights.square()).sum()
        new = {"curvature": mean.float(), "weighted": (mean * weights).float(), "constant": constant.float()}
        self.penalty = new if self.penalty is None else {key: self.penalty[key] + t for key, t in new.items()}

    @staticmethod
    def trained_names(arrays: ArrayRecord, size: int) -> list[str]:
        """The names of the weights that F speaks of, in order: all of them.

        Raises:
            ConfigError: for models with buffers or frozen weights, whose order the server cannot know.
        """
        names = list(arrays)
        if sum(t.numel() for t in tensors_of(arrays).values()) != size:
            raise ConfigError("strategy=ewc needs a model without buffers and frozen weights; take one with group norm")
        return names

    def broadcast(self, round: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """The weights and, from the second task on, the penalty."""
        return Broadcast(round, weights, {} if self.penalty is None else {PENALTY: self.penalty})

    def combine(self, round: int, updates: list[ClientUpdate]) -> Tensors:
        self.trained |= {update.client_id for update in updates}
        return super().combine(round, updates)
