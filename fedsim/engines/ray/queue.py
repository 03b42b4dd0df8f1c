"""The parts of one cohort on their way to Ray's workers: who gets which, and what happens when a worker is lost.

Everything here follows the host's clock and the order of arrival, and none of it reaches a result: a client's update
depends on its task alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty

from devices.cost import Work
from devices.errors import UserError, one_line
from fedsim.engines.ray.wire import in_common, without
from fedsim.engines.ray.workers import Call, Pool, Slot, living_nodes
from fedsim.errors import RunError
from fedsim.messages.cohort import ClientAnswer, CohortAnswer, CohortTask

LOG = logging.getLogger(__name__)
START_S = 60.0  # host seconds within which a worker must start while there is no other
WINDOW_PER_WORKER, LEAST_WINDOW = 4, 8  # jobs that may change places, so that the longest of them start first
NODES_S = 5.0  # host seconds between looks at which nodes are alive
CHECK_S = 1.0  # host seconds between looks at whether Ray itself is alive
DEPTH = 2  # jobs that a worker has at most: the one it runs, and the next so that it need not wait for the driver


class Job:
    """A part of the cohort on its way to a worker, or a single client of one."""

    def __init__(self, task: CohortTask):
        self.task = task
        self.losses = 0  # workers that died while they ran it


class TaskQueue:
    """The parts of a cohort, until all are answered.

    Args:
        pool: the workers.
        tasks: the parts, at least one.
        size: workers that there is room for.
        retries: workers that a part may lose before its clients are tried one by one.
        client_timeout_s: host seconds that a client may take; None for ever.
        check: called at least every second; raises when Ray itself is gone.
    """

    def __init__(
        self,
        pool: Pool,
        tasks: Sequence[CohortTask],
        size: int,
        retries: int,
        client_timeout_s: float | None,
        check: Callable[[], None] = lambda: None,
    ):
        import ray

        self.pool, self.size, self.retries, self.client_timeout_s = pool, size, retries, client_timeout_s
        self.check = check
        self.wanted = min(size, len(tasks))
        jobs = [Job(task) for task in tasks]
        self.waiting = deque(longest_first(jobs, max(WINDOW_PER_WORKER * size, LEAST_WINDOW)))
        self.open = len(jobs)  # answers that are still to come
        common = in_common(tasks)
        self.numbers = {id(tensors): number for number, tensors in enumerate(common.tensors)}
        self.shared = ray.put(common) if common.tensors else None
        self.world = tasks[0].of([])  # no client: a worker builds its world
        self.alone_since = time.monotonic()  # when there was a worker last
        self.look_again = self.alone_since + NODES_S  # at the nodes

    def answers(self) -> Iterator[CohortAnswer]:
        """The answers as they come."""
        self.pool.resize(self.wanted, self.size)
        while self.open:
            self._hand_out()
            for slot in self._arrived():
                for call in slot.answered():
                    yield from self._settle(slot, call)
            yield from self._look_at_the_clock()

    # --- handing out --------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Gives every idle worker a job and, while there are enough, every busy one its next."""
        for depth in range(DEPTH):
            for slot in self.pool.slots:
                # The last jobs wait for whoever is free first.
                if len(self.waiting) <= depth * len(self.pool.slots):
                    return
                if self._prepare(slot) and len(slot.calls) == depth:
                    self._send(slot, self.waiting.popleft())

    def _prepare(self, slot: Slot) -> bool:
        """Lets a worker build its world by a task without clients, so that no client's time or fault is in it."""
        if slot.world != self.world.settings:
            slot.world = self.world.settings
            slot.call(None, slot.actor.serve, self.world)
        return slot.prepared

    def _send(self, slot: Slot, job: Job) -> None:
        task = without(job.task, self.numbers)
        if self.shared is None or slot.shared is self.shared:
            slot.call(job, slot.actor.serve, task)
        else:
            slot.shared = self.shared
            slot.call(job, slot.actor.serve, task, self.shared)

    # --- taking in ----------------------------------------------------------------------------------------------

    def _arrived(self) -> Iterator[Slot]:
        """Waits for an answer, or until the clock has to be looked at; then gives all that have answered by now."""
        with suppress(Empty):
            yield self.pool.arrivals.get(timeout=self._patience_s())
            while True:
                yield self.pool.arrivals.get_nowait()

    def _settle(self, slot: Slot, call: Call) -> Iterator[CohortAnswer]:
        if call.error is not None:
            self.check()  # the cause, where Ray itself is gone
            yield from self._lost(slot, call.job, _loss(call.error))
        elif call.job is None:
            slot.node = slot.node or call.answer  # its first call is the start
            self.pool.failed_starts = 0 if slot.prepared else self.pool.failed_starts
        else:
            self.open -= 1
            self._hand_out()  # first: whoever takes the answer may be busy with it for a while
            yield call.take()

    # --- faults -------------------------------------------------------------------------------------------------

    def _lost(self, slot: Slot, running: Job | None, error: BaseException) -> Iterator[CohortAnswer]:
        """A worker is gone, and with it the job that it was running; those behind were not even begun."""
        self._replace(slot)
        LOG.warning("a worker died (killed, or out of memory); what it had to do is given to others")
        if running is None:
            self.pool.failed_starts += 1
            if self.pool.failed_starts > self.retries * self.size and not any(slot.node for slot in self.pool.slots):
                raise RunError(f"Ray's workers die while they start: {one_line(error)}")
            return
        running.losses += 1
        if running.losses < self.retries:
            self.waiting.appendleft(running)
            return
        times = "once" if running.losses == 1 else f"{running.losses} times"
        reason = f"its worker process died {times} while training it (killed, or out of memory)"
        yield from self._give_up(running, reason)

    def _look_at_the_clock(self) -> Iterator[CohortAnswer]:
        self.check()
        now = time.monotonic()
        for slot in [slot for slot in self.pool.slots if now > self._due(slot)]:
            running = slot.calls.popleft().job
            self._replace(slot)
            yield from self._give_up(running, f"ran longer than engine.client_timeout_s={self.client_timeout_s:g}")
        if now > self.look_again:
            yield from self._look_at_the_nodes()
        if any(slot.node for slot in self.pool.slots):
            self.alone_since = now
        elif now > self.alone_since + START_S:
            raise RunError(
                f"no Ray worker could be started within {START_S:g} s; each needs {self.pool.claim()}, which the "
                "cluster may not have free: see ray status"
            )

    def _look_at_the_nodes(self) -> Iterator[CohortAnswer]:
        """Ray may wait for ever for an answer that was finished, but lay on a node that has died since."""
        nodes = living_nodes()
        for slot in [slot for slot in self.pool.slots if slot.node and slot.node not in nodes]:
            running = slot.calls.popleft().job if slot.calls else None
            yield from self._lost(slot, running, RuntimeError("its node died"))
        self.look_again = time.monotonic() + NODES_S

    def _give_up(self, job: Job, reason: str) -> Iterator[CohortAnswer]:
        """Tries the clients of a part one by one; a client that was alone has failed."""
        clients = job.task.clients
        if len(clients) > 1:
            self.open += len(clients) - 1
            self.waiting.extendleft(Job(task) for task in reversed(job.task.one_by_one()))
            return
        self.open -= 1
        work = Work(down_bytes=clients[0].down_bytes)
        yield CohortAnswer((ClientAnswer(clients[0].client, "failed", reason, work=work),))

    def _replace(self, slot: Slot) -> None:
        """Ends a worker for a fresh one; what it had not begun is next again."""
        self.waiting.extendleft(reversed(slot.jobs()))
        self.pool.drop(slot)
        self.pool.resize(self.wanted, self.size)

    # --- time ---------------------------------------------------------------------------------------------------

    def _due(self, slot: Slot) -> float:
        """When the job that a worker runs must be over."""
        call = slot.calls[0] if slot.calls else None
        if self.client_timeout_s is None or call is None or call.job is None or call.answered:
            return float("inf")
        return slot.running_since + self.client_timeout_s * len(call.job.task.clients)

    def _patience_s(self) -> float:
        due = [self._due(slot) for slot in self.pool.slots]
        due.append(self.look_again if any(slot.node for slot in self.pool.slots) else self.alone_since + START_S)
        return min(CHECK_S, max(0.0, min(due) - time.monotonic()) + 0.001)


def longest_first(jobs: Sequence[Job], window: int) -> Iterator[Job]:
    """The jobs in their order, but within each window by cost: a long one that starts last keeps all others waiting.

    Only within a window, because early answers are what the sums over clients wait for.
    """
    for start in range(0, len(jobs), window):
        yield from sorted(jobs[start : start + window], key=lambda job: -job.task.expected_flops)


def _loss(error: BaseException) -> BaseException:
    """The error, if it means that a worker or what it made is lost.

    Raises:
        UserError, RunError: as the worker raised them.
        RunError: for all others, which would come again.
    """
    from ray import exceptions

    lost = (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
    )
    if isinstance(error, lost) and not getattr(error, "actor_init_failed", False):
        return error
    cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
    if isinstance(cause, UserError | RunError):
        raise cause
    raise RunError(f"a worker failed: {type(cause).__name__}: {one_line(cause)}") from error
