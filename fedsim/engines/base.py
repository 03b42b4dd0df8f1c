"""What Flower's abstract Grid asks of every engine and is the same for all of ours.

This and `fedsim.runs.federation` are the only places that touch Flower's internal task identity.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any, Self

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from devices.bounds import Checked
from fedsim.errors import ConfigError

RUN_ID, NODE_ID, TASK_ID = 1, 0, 1
WORKER_ID = 1  # the node that a worker believes to be; who trains is said by the message


def assume_task_identity() -> None:
    """Lets Messages be made outside Flower's runtime, which would set these numbers itself."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, NODE_ID, TASK_ID


def worker_context() -> Context:
    """What a client app is told of its node by the engines that have no Flower nodes."""
    return Context(RUN_ID, WORKER_ID, {"partition-id": 0, "num-partitions": 1}, RecordDict(), {})


class EngineGrid(Checked, Grid, group="engine", error=ConfigError):
    """A Flower Grid that runs cohort messages; subclasses say where, in `get_node_ids` and `send_and_receive`.

    Attributes:
        small_messages: whether many small messages balance the load better than a few large ones.
    """

    small_messages = False

    def __init__(self) -> None:
        self._ids = count(1)
        self._done: dict[str, list[Message]] = {}

    def number(self, message: Message) -> Message:
        """Gives an instruction an id, as Flower's runtime would: a reply must be able to name it."""
        message.metadata.__dict__["_message_id"] = f"engine-{next(self._ids)}"
        return message

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Runs the messages at once; `pull_messages` with the ids hands out the replies."""
        ids = {}
        for reply in self.send_and_receive(messages):
            ids[reply.metadata.reply_to_message_id] = True
            self._done.setdefault(reply.metadata.reply_to_message_id, []).append(reply)
        return list(ids)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to earlier pushes, once."""
        return [reply for i in list(message_ids) for reply in self._done.pop(i, [])]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def set_run(self, run: Any) -> None:
        """There is no run to register outside Flower's runtime."""

    @property
    def run(self) -> Any:
        raise RuntimeError("this grid belongs to no Flower run")

    def close(self) -> None:
        """Ends what the engine has started; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
