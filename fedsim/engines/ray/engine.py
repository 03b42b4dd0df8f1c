"""The engine that runs clients in Ray actors: on all cores of this machine, or on the machines of a cluster.

`RayEngine` decides how many workers there are; `TaskQueue` gives them tasks, and `RaySession` sees to Ray itself, which
is imported when it is needed.
"""

from __future__ import annotations

import atexit
import math
import re
import time
from collections.abc import Iterator
from typing import Annotated

from annotated_types import Ge, Gt, Le

from fedsim.engines.base import Engine, Serve, assume_task_identity
from fedsim.engines.cutting import cut
from fedsim.engines.host import usable_cores
from fedsim.engines.ray.queue import TaskQueue
from fedsim.engines.ray.session import RaySession
from fedsim.engines.ray.wire import send_tensors_as_arrays
from fedsim.engines.ray.workers import Pool
from fedsim.errors import ConfigError
from fedsim.messages.cohort import CohortAnswer, CohortTask

SHORT_S = 0.25  # host seconds of an exchange below which small parts cost more than they balance


class RayEngine(Engine):
    """Ray actors, each with a worker of its own; Ray is started or joined when it is first needed.

    Args:
        serve: does a task in a worker; pickled, so it is to be found in an importable module.
        workers: processes; None for as many as this machine's cores, or the cluster, have room for.
        address: HOST:PORT of a Ray cluster, "auto" for the one on this machine; None starts Ray for this run alone.
        cpus_per_worker, gpus_per_worker: what each worker claims of the machine or cluster.
        threads, device, batch_clients, slots, tf32: for the worker, which reads them from the settings it is sent.
        client_timeout_s: host seconds that a client may take; None waits for ever.
        retries: workers that a part of the cohort may lose before its clients are tried one by one, and then each.

    Raises:
        ConfigError: for values that cannot be, or do not go together.
    """

    def __init__(
        self,
        serve: Serve,
        workers: Annotated[int, Ge(1), Le(4096)] | None = None,
        address: str | None = None,
        cpus_per_worker: Annotated[float, Gt(0)] = 1,
        gpus_per_worker: Annotated[float, Ge(0)] = 0,
        threads: int = 1,
        device: str = "auto",
        batch_clients: int = 1,
        slots: int | None = 0,
        tf32: bool = False,
        client_timeout_s: Annotated[float, Gt(0)] | None = None,
        retries: Annotated[int, Ge(1), Le(1000)] = 3,
    ):
        if address not in (None, "auto") and re.fullmatch(r"[^\s/]+:\d{1,5}", str(address)) is None:
            raise ConfigError(f"engine.address must be null, auto or HOST:PORT, got {address!r}")
        if gpus_per_worker > 1 and gpus_per_worker != int(gpus_per_worker):
            needed = "a share in [0, 1] or a whole number"
            raise ConfigError(f"engine.gpus_per_worker must be {needed}, got {gpus_per_worker!r}")
        if device == "cuda" and not gpus_per_worker:
            raise ConfigError("engine.device=cuda needs engine.gpus_per_worker above 0, e.g. 0.5 for two workers a GPU")
        assume_task_identity()
        self.serve, self.workers, self.address = serve, workers, address
        self.cpus_per_worker, self.gpus_per_worker = cpus_per_worker, gpus_per_worker
        self.client_timeout_s, self.retries = client_timeout_s, retries
        self._session: RaySession | None = None
        self._pool: Pool | None = None
        self._client_s = 0.0  # host seconds of a worker for a client, in the last training

    def start(self) -> None:
        """Starts Ray or joins a cluster, unless that is done already.

        Raises:
            ConfigError, RunError: if it cannot be.
        """
        self._start()

    def size(self) -> int:
        """How many workers there is room for; counted anew each time, because a cluster may have grown."""
        pool = self._start()
        return self.workers or max(1, pool.room())

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        """Answers of parts of the task, as they come in.

        Raises:
            RunError: when no worker can be started, or one fails as a whole.
            ConfigError, DataError, DeviceError: as the workers raised them.
        """
        if not task.clients:
            return
        pool, size, began_s = self._start(), self.size(), time.monotonic()
        small = self._client_s * len(task.clients) / size > SHORT_S
        parts = list(cut(task, size, small))
        try:
            queue = TaskQueue(pool, parts, size, self.retries, self.client_timeout_s, self._check)
            yield from queue.answers()
        finally:
            for slot in [slot for slot in pool.slots if slot.jobs()]:  # it was broken off
                pool.drop(slot)
        if task.phase == "train":
            self._client_s = (time.monotonic() - began_s) * size / len(task.clients)

    def close(self) -> None:
        """Ends the workers, and Ray if it was started here."""
        atexit.unregister(self.close)
        session, pool, self._session, self._pool = self._session, self._pool, None, None
        if pool is not None:
            pool.close()
        if session is not None:
            session.close()

    def _start(self) -> Pool:
        if self._pool is None:
            workers = self.workers or max(1, int(usable_cores() / self.cpus_per_worker + 1e-9))
            atexit.register(self.close)
            self._session = RaySession(self.address, math.ceil(workers * self.cpus_per_worker))
            send_tensors_as_arrays()
            self._pool = Pool(self.serve, self.cpus_per_worker, self.gpus_per_worker)
            room = self._pool.room()
            if self._session.private and room < (self.workers or 1):  # of CPUs there are as many as were asked for
                self.close()
                raise ConfigError(
                    f"engine.gpus_per_worker={self.gpus_per_worker:g} needs more GPUs than there are here: they are "
                    f"enough for {room} workers"
                )
        return self._pool

    def _check(self) -> None:
        if self._session is not None:
            self._session.check()
