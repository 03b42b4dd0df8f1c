"""The processes that train clients under Ray, seen from inside (`RayWorker`) and from the driver (`Slot`, `Pool`).

A worker is an actor with a process of its own that lives as long as the run, so that it builds its world once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from fedsim.engines.base import Serve, assume_task_identity
from fedsim.engines.ray.wire import Shared, send_tensors_as_arrays, whole
from fedsim.engines.session_folder import usual_files
from fedsim.messages.cohort import CohortAnswer, CohortTask
from fedsim.settings.permissions import allow_everything


class RayWorker:
    """What runs in a worker's process; calls are answered one after the other, in the order in which they came."""

    def __init__(self, serve: Serve):
        assume_task_identity()
        allow_everything()
        usual_files()
        send_tensors_as_arrays()
        self._serve = serve
        self._shared = Shared()

    def start(self) -> str:
        """Answered when the process is up: the id of its node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def serve(self, task: CohortTask, *shared: Shared) -> CohortAnswer:
        """Does a task.

        Args:
            task: without the tensors that it has in common with others.
            shared: those, with the first task of an exchange only: so all see the same objects, and the worker takes
                the weights over once.
        """
        if shared:
            self._shared = shared[0]
        return CohortAnswer.joined(list(self._serve(whole(task, self._shared))))


@dataclass(eq=False)
class Call:
    """Something that a worker was sent; `job` is None when it only prepares the worker."""

    job: Any
    answered: bool = False
    error: BaseException | None = None
    answer: Any = None

    def take(self) -> Any:
        """The answer, once: it may be a view of Ray's memory, which is free again when nobody holds it any longer."""
        answer, self.answer = self.answer, None
        return answer


class Slot:
    """A worker as the driver sees it: what it was sent and has not answered yet, in order.

    Attributes:
        node: where its process is; empty until it is up.
        world: the settings for which it has built its world, or is about to; empty at first.
        shared: the reference to the shared tensors that it has, or is being sent.
        running_since: when the first of its calls began, by the monotonic clock; at the latest.
    """

    def __init__(self, actor: Any, arrivals: SimpleQueue[Slot]):
        self.actor, self._arrivals = actor, arrivals
        self.calls: deque[Call] = deque()
        self.node = ""
        self.dead = False
        self.world = ""
        self.shared: Any = None
        self.running_since = 0.0
        self.call(None, actor.start)

    def call(self, job: Any, method: Any, *arguments: Any) -> None:
        """Calls a method of the actor; the queue of arrivals hears when it is answered."""
        call = Call(job)
        if not self.calls:
            self.running_since = time.monotonic()
        self.calls.append(call)
        # Not ray.get or ray.wait: they swallow what a handler of SIGTERM raises.
        method.remote(*arguments).future().add_done_callback(partial(self._answered, call))

    def answered(self) -> Iterator[Call]:
        """Takes out the calls that were answered, in order: answers may overtake each other on their way."""
        while not self.dead and self.calls and self.calls[0].answered:
            self.running_since = time.monotonic()
            yield self.calls.popleft()

    def jobs(self) -> list[Any]:
        """What it has not answered, the running one first; without what only prepares it."""
        return [call.job for call in self.calls if call.job is not None]

    @property
    def prepared(self) -> bool:
        """Whether it has answered all that prepares it."""
        return len(self.jobs()) == len(self.calls)

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        import ray

        self.dead = True
        with suppress(Exception):  # it is dead already
            ray.kill(self.actor)

    def _answered(self, call: Call, future: Future[Any]) -> None:  # in a thread of Ray's
        call.error = future.exception()
        if call.error is None:
            call.answer = future.result()
        call.answered = True
        self._arrivals.put(self)


class Pool:
    """The workers of a run. Needs a connection to Ray.

    Args:
        serve: does a task in a worker; pickled, so it is to be found in an importable module.
        cpus, gpus: what each of them claims.
    """

    def __init__(self, serve: Serve, cpus: float, gpus: float):
        import ray

        self.serve, self.cpus, self.gpus = serve, cpus, gpus
        self.slots: list[Slot] = []
        self.arrivals: SimpleQueue[Slot] = SimpleQueue()  # of answers; a slot may come more often than it has some
        self.failed_starts = 0  # in a row
        self._actor = ray.remote(RayWorker).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,  # a fresh one is made here, where it is known what the old one was doing
            max_task_retries=0,
            enable_task_events=False,
        )

    def resize(self, least: int, most: int) -> None:
        """Makes workers until there are `least`; those beyond `most` that have not started are given up.

        A worker for which the cluster has no room starts when there is some.
        """
        for slot in [slot for slot in self.slots if not slot.node][: max(0, len(self.slots) - most)]:
            self.drop(slot)
        while len(self.slots) < least:
            self.slots.append(Slot(self._actor.remote(self.serve), self.arrivals))

    def drop(self, slot: Slot) -> None:
        """Ends a worker."""
        slot.kill()
        self.slots.remove(slot)

    def close(self) -> None:
        """Ends all of them."""
        while self.slots:
            self.drop(self.slots[0])

    def room(self) -> int:
        """How many workers the living nodes have room for."""
        return sum(self._fitting(there) for there in living_nodes().values())

    def claim(self) -> str:
        """What each worker claims, in words."""
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")

    def _fitting(self, there: dict[str, float]) -> int:
        claims = [(there.get("CPU", 0.0), self.cpus), (there.get("GPU", 0.0), self.gpus)]
        return min(int(amount / claim + 1e-9) for amount, claim in claims if claim)


def living_nodes() -> dict[str, dict[str, float]]:
    """What the nodes have that Ray believes to be alive, by id; one that dies is found out within some 15 seconds."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
