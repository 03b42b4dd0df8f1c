"""One exchange with Ray's workers: who gets which message, and what happens to messages whose worker is lost.

Everything here follows the host's clock and the order of arrival, and none of it reaches a result: a client's update
depends on its message alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty
from typing import Any

from flwr.app import Error, Message, RecordDict

from devices.cost import Work, pack_works
from devices.errors import UserError, one_line
from fedsim.engines.ray.wire import Letter, Loan, content_of, letter_of, pack, records_in_common
from fedsim.engines.ray.workers import Call, Pool, Slot, living_nodes
from fedsim.errors import RunError
from fedsim.messages.records import SETTINGS, cohort_header, pack_cohort, split_cohort

LOG = logging.getLogger(__name__)
START_S = 60.0  # host seconds within which a worker must start while there is no other
WINDOW_PER_WORKER, LEAST_WINDOW = 4, 8  # messages that may change places, so that the longest of them start first
NODES_S = 5.0  # host seconds between looks at which nodes are alive
CHECK_S = 1.0  # host seconds between looks at whether Ray itself is alive
DEPTH = 2  # messages that a worker has at most: the one it runs, and the next so that it need not wait for the driver


class Job:
    """A message, or a single client of one, on its way to a worker.

    Args:
        message: whose reply is awaited.
        content: what is sent: its own content, or a part of it.
    """

    def __init__(self, message: Message, content: RecordDict):
        header = cohort_header(content)
        self.message, self.content = message, content
        self.clients: list[int] = header["clients"]
        self.cost = float(header.get("cost", len(self.clients)))
        self.losses = 0  # workers that died while they ran it


class Exchange:
    """The messages of one `send_and_receive`, until all are answered.

    Args:
        pool: the workers.
        messages: at least one.
        size: workers that there is room for.
        retries: workers that a message may lose before its clients are tried one by one.
        client_timeout_s: host seconds that a client may take; None for ever.
        check: called at least every second; raises when Ray itself is gone.
    """

    def __init__(
        self,
        pool: Pool,
        messages: Sequence[Message],
        size: int,
        retries: int,
        client_timeout_s: float | None,
        check: Callable[[], None] = lambda: None,
    ):
        import ray

        self.pool, self.size, self.retries, self.client_timeout_s = pool, size, retries, client_timeout_s
        self.check = check
        self.wanted = min(size, len(messages))
        jobs = [Job(message, message.content) for message in messages]
        self.waiting = deque(longest_first(jobs, max(WINDOW_PER_WORKER * size, LEAST_WINDOW)))
        self.open = len(jobs)  # replies that are still to come
        self.common = records_in_common(job.content for job in jobs)
        self.numbers = {id(record): number for number, record in enumerate(self.common)}
        self.shared = ray.put([pack(record) for record in self.common]) if self.common else None
        self.first = jobs[0]
        self.world: tuple[Any, ...] = (self.first.content.get(SETTINGS),)
        self.alone_since = time.monotonic()  # when there was a worker last
        self.look_again = self.alone_since + NODES_S  # at the nodes

    def replies(self) -> Iterator[Message]:
        """The replies as they come. An array of one may be a view of Ray's memory until the next but one is there."""
        loans: deque[Loan] = deque()
        try:
            for reply in self._replies():
                if reply.has_content():
                    loans.append(Loan(reply.content))
                yield reply
                while len(loans) > 1:
                    loans.popleft().end()
        finally:
            for loan in loans:
                loan.end()

    def _replies(self) -> Iterator[Message]:
        self.pool.resize(self.wanted, self.size)
        while self.open:
            self._hand_out()
            for slot in self._arrived():
                for call in slot.answered():
                    yield from self._settle(slot, call)
            yield from self._look_at_the_clock()

    # --- handing out --------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Gives every idle worker a message and, while there are enough, every busy one its next."""
        for depth in range(DEPTH):
            for slot in self.pool.slots:
                # The last messages wait for whoever is free first.
                if len(self.waiting) <= depth * len(self.pool.slots):
                    return
                if self._prepare(slot) and len(slot.calls) == depth:
                    self._send(slot, self.waiting.popleft())

    def _prepare(self, slot: Slot) -> bool:
        """Lets a worker build its world by a message without clients, so that no client's time or fault is in it."""
        if slot.world != self.world:
            slot.world = self.world
            header = {**cohort_header(self.first.content), "clients": [], "separate": True}
            self._serve(slot, None, letter_of(pack_cohort(header, [], self.world[0])))
        return slot.prepared

    def _send(self, slot: Slot, job: Job) -> None:
        letter = letter_of(job.content, self.numbers)
        if self.shared is None or slot.shared is self.shared:
            self._serve(slot, job, letter)
        else:
            slot.shared = self.shared
            self._serve(slot, job, letter, self.shared)

    def _serve(self, slot: Slot, job: Job | None, letter: Letter, *shared: Any) -> None:
        metadata = (job or self.first).message.metadata
        slot.call(job, slot.actor.serve, letter, metadata.message_type, metadata.message_id, *shared)

    # --- taking in ----------------------------------------------------------------------------------------------

    def _arrived(self) -> Iterator[Slot]:
        """Waits for an answer, or until the clock has to be looked at; then gives all that have answered by now."""
        with suppress(Empty):
            yield self.pool.arrivals.get(timeout=self._patience_s())
            while True:
                yield self.pool.arrivals.get_nowait()

    def _settle(self, slot: Slot, call: Call) -> Iterator[Message]:
        if call.error is not None:
            self.check()  # the cause, where Ray itself is gone
            yield from self._lost(slot, call.job, _loss(call.error))
        elif call.job is None:
            slot.node = slot.node or call.answer  # its first call is the start
            self.pool.failed_starts = 0 if slot.prepared else self.pool.failed_starts
        else:
            self.open -= 1
            self._hand_out()  # first: whoever takes the reply may be busy with it for a while
            yield _reply(call.take(), call.job.message)

    # --- faults -------------------------------------------------------------------------------------------------

    def _lost(self, slot: Slot, running: Job | None, error: BaseException) -> Iterator[Message]:
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

    def _look_at_the_clock(self) -> Iterator[Message]:
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

    def _look_at_the_nodes(self) -> Iterator[Message]:
        """Ray may wait for ever for an answer that was finished, but lay on a node that has died since."""
        nodes = living_nodes()
        for slot in [slot for slot in self.pool.slots if slot.node and slot.node not in nodes]:
            running = slot.calls.popleft().job if slot.calls else None
            yield from self._lost(slot, running, RuntimeError("its node died"))
        self.look_again = time.monotonic() + NODES_S

    def _give_up(self, job: Job, reason: str) -> Iterator[Message]:
        """Tries the clients of a message one by one; a client that was alone has failed."""
        if len(job.clients) > 1:
            self.open += len(job.clients) - 1
            self.waiting.extendleft(Job(job.message, content) for content in reversed(split_cohort(job.content)))
            return
        self.open -= 1
        fact = {"client": job.clients[0], "outcome": "failed", "reason": reason, "traceback": ""}
        yield Message(pack_cohort({"clients": [fact], **pack_works([Work()])}, [RecordDict()]), reply_to=job.message)

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
        return slot.running_since + self.client_timeout_s * len(call.job.clients)

    def _patience_s(self) -> float:
        due = [self._due(slot) for slot in self.pool.slots]
        due.append(self.look_again if any(slot.node for slot in self.pool.slots) else self.alone_since + START_S)
        return min(CHECK_S, max(0.0, min(due) - time.monotonic()) + 0.001)


def _reply(answer: Letter | Error, message: Message) -> Message:
    return Message(answer if isinstance(answer, Error) else content_of(answer), reply_to=message)


def longest_first(jobs: Sequence[Job], window: int) -> Iterator[Job]:
    """The jobs in their order, but within each window by cost: a long one that starts last keeps all others waiting.

    Only within a window, because early replies are what the sums over clients wait for.
    """
    for start in range(0, len(jobs), window):
        yield from sorted(jobs[start : start + window], key=lambda job: -job.cost)


def _loss(error: BaseException) -> BaseException:
    """The error, if it means that a worker or what it made is lost.

    Raises:
        UserError, RunError: as the client app raised them.
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
