"""The server half of federated continual learning with coresets on the devices.

Source: Yoon et al., "Online Coreset Selection for Rehearsal-based Continual Learning", ICLR 2022, for one learner; the
federated protocol is fedsim's. Records: reference, both ways, only with trainer.ref_scope=global: direction [weights]
float32 of length 1, the gradient of the coreset (down: of all of them); examples [] int64, up. The coresets stay where
they are. May import: what `strategies.edge` may.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedsim.errors import ConfigError
from fedsim.messages import Broadcast, ClientUpdate, content_of
from fedsim.network import EdgeGrid, Enrolled
from fedsim.workload import Tensors
from strategies.edge import EdgeStrategy

QUESTION, REFERENCE = "query.end_of_task", "reference"


class OCS(EdgeStrategy):
    """FedAvg, weighted by examples used; when a task has ended, clients pick their coresets with the aggregated model.

    At the start of the round after a task's last one, every client that trained on the task and is online is sent the
    weights, and picks what it keeps. Who was not online does so when it is next in a cohort. Picking with the weights
    of its own last round instead, a client would rank by its drift.

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
        self.reference: Tensors | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The cohort's messages; before the first of a task, the question that ends the task before."""
        messages = super().configure_train(server_round, arrays, config, grid)
        assert isinstance(grid, EdgeGrid)
        if server_round > 1 and (server_round - 1) % self.rounds_per_task == 0 and self.trained:
            now_s = grid.clock.now_s
            content = content_of(Broadcast(server_round, {}), arrays)
            asked = [client for client in sorted(self.trained) if grid.fleet.online(client, now_s)]
            grid.send_and_receive([Message(content, client, QUESTION) for client in asked])
            self.trained = set()
        return messages

    def broadcast(self, round: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """The weights and, once there is one, the direction of the federation's coresets."""
        extras = {REFERENCE: self.reference} if self.reference is not None else {}
        return Broadcast(round, weights, extras)

    def combine(self, round: int, updates: list[ClientUpdate]) -> Tensors:
        """The mean weights; directions are averaged by the sizes of the coresets and brought to length 1."""
        self.trained |= {update.client_id for update in updates}
        sent = [update.extra(REFERENCE) for update in updates if REFERENCE in update.extras]
        if sent:
            total = torch.stack([record["direction"].double() * int(record["examples"]) for record in sent]).sum(0)
            length = torch.linalg.vector_norm(total)
            if length > 0:
                self.reference = {"direction": (total / length).to(sent[0]["direction"].dtype)}
        return super().combine(round, updates)
