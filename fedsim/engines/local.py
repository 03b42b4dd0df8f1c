"""The engine that runs every client in this process, one after the other: no start-up, real tracebacks, the default."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flwr.app import Context, Message

from fedsim.engines.base import EngineGrid, assume_task_identity, worker_context


class LocalGrid(EngineGrid):
    """A Flower Grid with one node: this process.

    Args:
        client_app: called as `client_app(message, context)`, like Flower does.
        threads, device, batch_clients: for the worker, which reads them from the settings it is sent.
    """

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        threads: int = 1,
        device: str = "auto",
        batch_clients: int = 1,
    ):
        super().__init__()
        assume_task_identity()
        self.client_app, self.context = client_app, worker_context()

    def get_node_ids(self) -> Iterable[int]:
        return [self.context.node_id]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies one by one as they are made; `timeout` is host time and does not apply in one process."""
        for message in messages:
            yield self.client_app(self.number(message), self.context)
