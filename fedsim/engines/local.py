"""The engine that runs every client in this process, one after the other: no start-up, real tracebacks, the default."""

from __future__ import annotations

from collections.abc import Iterator

from fedsim.engines.base import Engine, Serve, assume_task_identity
from fedsim.messages.cohort import CohortAnswer, CohortTask


class LocalEngine(Engine):
    """The process of the run itself; tensors are handed on as they are.

    Args:
        serve: lets the worker of this process do a task.
        threads, device, batch_clients, slots, tf32: for the worker, which reads them from the settings it is sent.
    """

    def __init__(
        self,
        serve: Serve,
        threads: int = 1,
        device: str = "auto",
        batch_clients: int = 1,
        slots: int | None = 0,
        tf32: bool = False,
    ):
        assume_task_identity()
        self.serve = serve

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        """An answer for each unit of the task, as it is made."""
        if task.clients:
            yield from self.serve(task)
