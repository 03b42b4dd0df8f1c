"""What every engine can do: serve the clients of a cohort, wherever they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from flwr.supercore.task_identity import TaskIdentity

from devices.bounds import Checked
from fedsim.errors import ConfigError
from fedsim.messages.cohort import CohortAnswer, CohortTask

Serve = Callable[[CohortTask], Iterable[CohortAnswer]]  # `clients.app.serve`: lets this process's worker do a task
RUN_ID, NODE_ID, TASK_ID = 1, 0, 1


def assume_task_identity() -> None:
    """Lets Messages be made outside Flower's runtime, which would set these numbers itself.

    No other place touches Flower's internal task identity.
    """
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, NODE_ID, TASK_ID


class Engine(Checked, ABC, group="engine", error=ConfigError):
    """Where clients really run. Results never depend on it."""

    def start(self) -> None:
        """Starts what `run` needs; a later call does nothing.

        Raises:
            ConfigError, RunError: if it cannot be started.
        """

    @abstractmethod
    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        """Answers as they are made, in any order; each client of the task is in one of them.

        A unit of the task (see `CohortTask.units`) that no single place could serve is answered client by client,
        without the sum of its block.

        Raises:
            ConfigError, DataError, DeviceError, RunError: where no client can be served.
        """

    def close(self) -> None:
        """Ends what the engine has started; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
