"""Flower's own runtime as an engine: the grid that a ServerApp is given under `flwr run`.

Flower starts the ServerApp before its nodes are registered, and drops what does not answer; both are handled here, so
that the edge grid above sees an engine like any other.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedsim.engines.base import EngineGrid
from fedsim.errors import RunError

NODES_TIMEOUT_S = 300.0  # host seconds until the first nodes must be there


class FlowerGrid(EngineGrid):
    """Waits for nodes, and raises when a worker's reply is missing instead of going on without it.

    Args:
        grid: Flower's own grid.
        timeout_s: host seconds that one exchange may take.
    """

    def __init__(self, grid: Grid, timeout_s: float = 12 * 3600.0):
        super().__init__()
        self.grid, self.timeout_s = grid, timeout_s
        self._nodes: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        """Flower's node ids, sorted; waits until the number of nodes has been the same for a second."""
        if self._nodes:
            return self._nodes
        end = time.monotonic() + NODES_TIMEOUT_S
        seen: list[int] = []
        while time.monotonic() < end:
            nodes = sorted(self.grid.get_node_ids())
            if nodes and nodes == seen:
                self._nodes = nodes
                return nodes
            seen = nodes
            time.sleep(1.0)
        raise RunError(f"no Flower node connected within {NODES_TIMEOUT_S:g} s; start SuperNodes or set num-supernodes")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        sent = list(messages)
        replies = list(self.grid.send_and_receive(sent, timeout=timeout or self.timeout_s))
        if len(replies) < len(sent):
            raise RunError(
                f"{len(sent) - len(replies)} of {len(sent)} workers did not answer within {self.timeout_s:g} s"
            )
        return replies

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run
