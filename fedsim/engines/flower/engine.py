"""Flower's own runtime as an engine: the nodes of the grid that a ServerApp is given under `flwr run`.

Flower starts the ServerApp before its nodes are registered, and drops what does not answer; both are handled here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle

from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.engines.base import Engine
from fedsim.engines.cutting import cut
from fedsim.errors import ClientError, RunError
from fedsim.messages.cohort import PLAN, CohortAnswer, CohortTask
from fedsim.messages.packing import pack_task, unpack_answer

NODES_TIMEOUT_S = 300.0  # host seconds until the first nodes must be there


class FlowerEngine(Engine):
    """Waits for nodes, and raises when a worker's reply is missing instead of going on without it.

    Args:
        grid: Flower's own grid, whose nodes serve `clients.app`.
        timeout_s: host seconds that one exchange may take.
    """

    def __init__(self, grid: Grid, timeout_s: float = 12 * 3600.0):
        self.grid, self.timeout_s = grid, timeout_s
        self._nodes: list[int] = []

    def start(self) -> None:
        """Waits until there are nodes, and their number has been the same for a second.

        Raises:
            RunError: if there are none in time.
        """
        if self._nodes:
            return
        end = time.monotonic() + NODES_TIMEOUT_S
        seen: list[int] = []
        while time.monotonic() < end:
            nodes = sorted(self.grid.get_node_ids())
            if nodes and nodes == seen:
                self._nodes = nodes
                return
            seen = nodes
            time.sleep(1.0)
        raise RunError(f"no Flower node connected within {NODES_TIMEOUT_S:g} s; start SuperNodes or set num-supernodes")

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        """The answers of all nodes, when all have answered.

        Raises:
            RunError: if some do not answer in time.
            ClientError: if a node fails as a whole.
        """
        self.start()
        # Flower allows train, evaluate and query; what it is in truth travels in the task.
        kind, parts = task.phase.partition(".")[0], cut(task, len(self._nodes))
        kind = "query" if kind == PLAN else kind
        sent = [Message(pack_task(part), node, kind) for part, node in zip(parts, cycle(self._nodes), strict=False)]
        replies = list(self.grid.send_and_receive(sent, timeout=self.timeout_s)) if sent else []
        if len(replies) < len(sent):
            raise RunError(
                f"{len(sent) - len(replies)} of {len(sent)} workers did not answer within {self.timeout_s:g} s"
            )
        for reply in replies:
            if reply.has_error():
                raise ClientError(f"a worker failed in round {task.round}: {reply.error.reason}")
            yield unpack_answer(reply.content)
