"""The engine that runs every client in this process, one after the other: no start-up, real tracebacks, the default.

May import: flwr. This and `fedsim.federation` are the only places that touch Flower's internal task identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

RUN_ID, NODE_ID, TASK_ID = 1, 0, 1


def assume_task_identity() -> None:
    """Lets Messages be made outside Flower's runtime, which would set these numbers itself."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, NODE_ID, TASK_ID


class LocalGrid(Grid):
    """A Flower Grid with one node: this process.

    Args:
        client_app: called as `client_app(message, context)`, like Flower does.
        threads, device: for the worker, which reads them from the settings it is sent.
    """

    def __init__(self, client_app: Callable[[Message, Context], Message], threads: int = 1, device: str = "auto"):
        assume_task_identity()
        self.client_app = client_app
        self.context = Context(RUN_ID, 1, {"partition-id": 0, "num-partitions": 1}, RecordDict(), {})
        self._ids = count(1)
        self._done: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [self.context.node_id]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies one by one as they are made; `timeout` is host time and does not apply in one process."""
        for message in messages:
            # Real engines give every instruction an id; a reply must be able to name it.
            message.metadata.__dict__["_message_id"] = f"local-{next(self._ids)}"
            yield self.client_app(message, self.context)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for reply in self.send_and_receive(messages):
            ids.append(reply.metadata.reply_to_message_id)
            self._done[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._done.pop(i) for i in list(message_ids) if i in self._done]

    def set_run(self, run: Any) -> None:
        """There is no run to register in one process."""

    @property
    def run(self) -> Any:
        raise RuntimeError("a local grid belongs to no Flower run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def close(self) -> None:
        """Nothing to stop."""
