"""The engine that runs clients in Ray actors: on all cores of this machine, or on the machines of a cluster.

`RayGrid` decides how many workers there are; `Exchange` gives them messages, and `RaySession` sees to Ray itself. May
import: flwr, fedsim; ray only through the modules beside it, which import it when it is needed.
"""

from __future__ import annotations

import atexit
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Annotated

from annotated_types import Ge, Gt, Le
from flwr.app import Message

from fedsim.engines.base import EngineGrid, assume_task_identity
from fedsim.engines.ray.exchange import Exchange
from fedsim.engines.ray.session import RaySession
from fedsim.engines.ray.workers import ClientApp, Pool
from fedsim.errors import ConfigError


class RayGrid(EngineGrid):
    """A Flower Grid whose nodes are Ray actors; Ray is started or joined when it is first asked for its nodes.

    Args:
        client_app: called in the workers as `client_app(message, context)`; pickled, so its functions are to be found
            in importable modules.
        workers: processes; None for as many as this machine's cores, or the cluster, have room for.
        address: HOST:PORT of a Ray cluster, "auto" for the one on this machine; None starts Ray for this run alone.
        cpus_per_worker, gpus_per_worker: what each worker claims of the machine or cluster.
        threads, device, batch_clients: for the worker, which reads them from the settings it is sent.
        client_timeout_s: host seconds that a client may take; None waits for ever.
        retries: workers that a message may lose before its clients are tried one by one, and then a single client.

    Raises:
        ConfigError: for values that cannot be, or do not go together.
    """

    small_messages = True

    def __init__(
        self,
        client_app: ClientApp,
        workers: Annotated[int, Ge(1), Le(4096)] | None = None,
        address: str | None = None,
        cpus_per_worker: Annotated[float, Gt(0)] = 1,
        gpus_per_worker: Annotated[float, Ge(0)] = 0,
        threads: int = 1,
        device: str = "auto",
        batch_clients: int = 1,
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
        super().__init__()
        assume_task_identity()
        self.client_app, self.workers, self.address = client_app, workers, address
        self.cpus_per_worker, self.gpus_per_worker = cpus_per_worker, gpus_per_worker
        self.client_timeout_s, self.retries = client_timeout_s, retries
        self._session: RaySession | None = None
        self._pool: Pool | None = None

    def get_node_ids(self) -> Iterable[int]:
        """One id per worker that there is room for; a message's node is a hint that is not taken."""
        return range(1, self._size(self._start()) + 1)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies one by one as they come in; `timeout` is host time and does not apply: see `client_timeout_s`.

        Raises:
            RunError: when no worker can be started, or the client app fails as a whole.
            UserError: as the client app raised them.
        """
        numbered = [self.number(message) for message in messages]
        if not numbered:
            return
        pool = self._start()
        try:
            exchange = Exchange(pool, numbered, self._size(pool), self.retries, self.client_timeout_s, self._check)
            yield from exchange.replies()
        finally:
            for slot in [slot for slot in pool.slots if slot.jobs()]:  # it was broken off
                pool.drop(slot)

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
            workers = self.workers or max(1, int(_cores() / self.cpus_per_worker + 1e-9))
            atexit.register(self.close)
            self._session = RaySession(self.address, math.ceil(workers * self.cpus_per_worker))
            self._pool = Pool(self.client_app, self.cpus_per_worker, self.gpus_per_worker)
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

    def _size(self, pool: Pool) -> int:
        """How many workers there should be; counted at every exchange, because a cluster may have grown."""
        return self.workers or max(1, pool.room())


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
