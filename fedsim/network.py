"""The edge grid: everything that is simulated hangs here, between a Flower strategy and the engine that runs clients.

`EdgeGrid` is a Flower `Grid` with stable client ids 0..N-1 over any engine's `Grid`. It weighs messages, asks who is
online, packs clients into cohort messages, prices their work, keeps the simulated clock, withholds late replies and
commits client state. May import: flwr, devices, and fedsim's clock, messages, seeding-free parts. Never a method.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from devices.cost import Cost, LatencyModel, Work, unpack_works
from devices.fleet import Fleet
from devices.profile import DeviceProfile
from fedsim.clock import SimClock
from fedsim.engines.blocks import WeightedSum, blocks
from fedsim.errors import ClientError, RunError
from fedsim.messages import ARRAYS, METRICS, NUM_EXAMPLES, STATE, pack_cohort, payload_bytes, unpack_cohort, unpacked

Outcome = Literal["completed", "late", "offline", "out_of_memory", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("completed", "late", "offline", "out_of_memory", "failed")
NO_REPLY = "the engine returned no reply"
ONE_METHOD = "so take the strategy and the trainer of one method"
CLIENTS_PER_MESSAGE = 16
EMPTY_ROUND_S = 60.0  # when nobody answers and there is no deadline, the server tries again after this long


@dataclass(frozen=True)
class Enrolled:
    """What the server knows of a client before it answers."""

    client_id: int
    profile: DeviceProfile


@dataclass(frozen=True)
class ClientReport:
    """What became of one client in one exchange; one row of `clients/*.parquet`."""

    round: int
    phase: str
    client: int
    device: str
    outcome: Outcome
    reason: str
    start_s: float
    cost: Cost
    wait_s: float
    wait_joules: float
    work: Work
    num_examples: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def joules(self) -> float:
        """Energy spent on down, compute and up; waiting for the round to close is reported apart."""
        return self.cost.joules


@dataclass
class _Reply:
    """One client's answer on its way from the engine to the strategy."""

    client: int
    block: int  # of the cohort's fixed blocks, offline clients included
    message: Message
    content: RecordDict | None
    work: Work
    outcome: Outcome
    reason: str
    cost: Cost = field(default_factory=Cost)


class ClientStore:
    """What clients keep between rounds; owned by the driver, committed only with an accepted reply."""

    def __init__(self) -> None:
        self._states: dict[int, ArrayRecord] = {}

    def get(self, client_id: int) -> ArrayRecord | None:
        return self._states.get(client_id)

    def commit(self, client_id: int, state: ArrayRecord) -> None:
        self._states[client_id] = state

    def __len__(self) -> int:
        return len(self._states)


class EdgeGrid(Grid):
    """A Flower Grid whose nodes are simulated edge devices.

    Args:
        engine: where clients really run; any Flower Grid whose nodes serve `clients.app`.
        fleet: which client owns which device.
        latency: turns work into seconds.
        config_json: the resolved settings of the run, sent along so that workers can build the same world.
        deadline_s: simulated seconds after which replies of an exchange are withheld; None waits for all.
        keep: accept only the first `keep` training replies (over-selection); None accepts all.
        averages: the strategy only needs the mean weighted by examples, so it gets one reply that holds it.
        on_client_error: "stop" raises ClientError for a failing client; "drop" counts it as failed.
        observe: called with each client's id when its reply came from the engine (progress).
    """

    def __init__(
        self,
        engine: Grid,
        fleet: Fleet,
        latency: LatencyModel,
        config_json: str,
        *,
        seed: int = 0,
        deadline_s: float | None = None,
        keep: int | None = None,
        averages: bool = False,
        on_client_error: str = "stop",
        observe: Callable[[int], None] | None = None,
    ):
        self.engine, self.fleet, self.latency = engine, fleet, latency
        self.settings = ConfigRecord({"json": config_json})
        self.seed, self.deadline_s, self.keep, self.averages = seed, deadline_s, keep, averages
        self.on_client_error, self.observe = on_client_error, observe
        self.clock, self.store = SimClock(), ClientStore()
        self.round = 0
        self.reports: list[ClientReport] = []
        self._pushed: dict[str, list[Message]] = {}

    # --- what a strategy sees -----------------------------------------------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        """Client ids 0..N-1, in order; population costs nothing."""
        return range(len(self.fleet))

    def client(self, client_id: int) -> Enrolled:
        """What is known of a client: its device."""
        return Enrolled(client_id, self.fleet[client_id])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """One exchange: sends each client its message, lets simulated time pass, returns the accepted replies.

        Args:
            messages: instructions addressed by client id, at most one per client.
            timeout: simulated seconds; together with `deadline_s` the earlier one counts.

        Returns:
            Accepted replies in client order, or one reply with their weighted mean (see `averages`).

        Raises:
            ClientError: when a client fails and `on_client_error` is "stop".
            ValueError: when a message is addressed twice or to no client.
        """
        asked = self._in_client_order(messages)
        if not asked:
            return []
        phase = asked[0].metadata.message_type
        start_s = self.clock.now_s
        replies = self._run(asked, phase)
        for reply in replies:
            self._price(reply, start_s)
        limits = [s for s in (self.deadline_s, timeout) if s is not None]
        arrival_s = {r.client: r.cost.total_s for r in replies if r.outcome == "completed"}
        keep = self.keep if phase == "train" else None
        timing = self.clock.close_round(arrival_s, min(limits, default=None), keep)
        round_s = timing.round_s
        if not timing.on_time and round_s == 0.0:
            last_drop_s = max(r.cost.total_s for r in replies)
            round_s = min(limits, default=max(EMPTY_ROUND_S, last_drop_s))
            self.clock.advance(round_s)
        late = set(timing.late)
        for reply in replies:
            if reply.client in late:
                reply.outcome, reply.reason = "late", "the round closed before its reply arrived"
        for reply in replies:
            self._record(reply, phase, start_s, round_s)
        return self._deliver([r for r in replies if r.outcome == "completed"], mean=self.averages and phase == "train")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Runs the exchange at once; `pull_messages` with the ids hands out its replies."""
        ticket = f"edge-{uuid.uuid4().hex}"
        self._pushed[ticket] = self.send_and_receive(messages)
        return [ticket]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies of earlier pushes, once."""
        return [reply for ticket in message_ids for reply in self._pushed.pop(ticket, [])]

    def set_run(self, run: Any) -> None:
        self.engine.set_run(run)

    @property
    def run(self) -> Any:
        return self.engine.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def take_reports(self) -> list[ClientReport]:
        """The reports of all exchanges since the last call."""
        reports, self.reports = self.reports, []
        return reports

    # --- one exchange, step by step -----------------------------------------------------------------------------

    def _in_client_order(self, messages: Iterable[Message]) -> list[Message]:
        asked = sorted(messages, key=lambda m: m.metadata.dst_node_id)
        ids = [m.metadata.dst_node_id for m in asked]
        if len(set(ids)) < len(ids):
            raise ValueError("a strategy sent one client two messages in one exchange; send one message per client")
        for client_id in ids[:1] + ids[-1:]:
            if not 0 <= client_id < len(self.fleet):
                raise ValueError(f"no client {client_id}: the fleet has clients 0..{len(self.fleet) - 1}")
        return asked

    def _run(self, asked: list[Message], phase: str) -> list[_Reply]:
        """Sends the clients that are online to the engine in fixed blocks; replies come back in client order."""
        now_s = self.clock.now_s
        sizes: dict[int, int] = {}  # payload by content object: stock strategies send one object to all
        replies: dict[int, _Reply] = {}
        online: list[Message] = []
        for number, block in enumerate(blocks(asked)):
            for message in block:
                client, content = message.metadata.dst_node_id, message.content
                if not self.fleet.online(client, now_s):
                    replies[client] = _Reply(
                        client, number, message, None, Work(), "offline", "offline when the round began"
                    )
                    continue
                if id(content) not in sizes:
                    sizes[id(content)] = payload_bytes(content)
                work = Work(down_bytes=sizes[id(content)])
                replies[client] = _Reply(client, number, message, None, work, "failed", NO_REPLY)
                online.append(message)
        for client, fields in self._engine_replies(self._cohort_messages(online, phase)):
            down = replies[client].work.down_bytes
            replies[client] = replace(replies[client], **fields)
            replies[client].work = replace(replies[client].work, down_bytes=down)
            if self.observe:
                self.observe(client)
        missing = [c for c, r in replies.items() if r.reason == NO_REPLY]
        if missing:
            raise ClientError(
                f"the engine returned no reply for clients {missing[:5]} in round {self.round} (seed {self.seed})"
            )
        return [replies[m.metadata.dst_node_id] for m in asked]

    def _cohort_messages(self, online: Sequence[Message], phase: str) -> list[Message]:
        """Few messages for many clients: every engine node gets some, none more than CLIENTS_PER_MESSAGE at once."""
        if not online:
            return []
        nodes = list(self.engine.get_node_ids())
        size = min(CLIENTS_PER_MESSAGE, -(-len(online) // len(nodes)))
        messages = []
        for number, start in enumerate(range(0, len(online), size)):
            some = online[start : start + size]
            clients = [m.metadata.dst_node_id for m in some]
            states = [self.store.get(client) for client in clients]
            parts = [
                m.content if s is None else RecordDict({**m.content, STATE: s})
                for m, s in zip(some, states, strict=True)
            ]
            content = pack_cohort({"round": self.round, "phase": phase, "clients": clients}, parts, self.settings)
            # Flower allows train, evaluate and query; a question's own name travels in the header.
            messages.append(Message(content, nodes[number % len(nodes)], phase.partition(".")[0]))
        return messages

    def _engine_replies(self, cohort_messages: list[Message]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Unpacks what the engine sends back: (client id, fields of its _Reply), in any order."""
        if not cohort_messages:
            return
        for answer in self.engine.send_and_receive(cohort_messages):
            if answer.has_error():
                raise ClientError(f"a worker failed in round {self.round} (seed {self.seed}): {answer.error.reason}")
            header, parts = unpack_cohort(answer.content)
            for facts, work, content in zip(header["clients"], unpack_works(header), parts, strict=True):
                client, outcome, reason = facts["client"], facts["outcome"], facts["reason"]
                if outcome == "failed" and self.on_client_error == "stop":
                    who = f"client {client} ({self.fleet.device_name(client)})"
                    where = f"failed in round {self.round} (seed {self.seed})"
                    raise ClientError(f"{who} {where}: {reason}", facts["traceback"])
                work = replace(work, up_bytes=payload_bytes(content))
                yield client, {"content": content, "work": work, "outcome": outcome, "reason": reason}

    def _price(self, reply: _Reply, start_s: float) -> None:
        """Sets the cost, and the outcome where the device itself ends the client's round early."""
        if reply.outcome == "offline":
            return
        client = reply.client
        cost = self.latency.cost(reply.work, self.fleet[client], self.fleet.jitter(client, self.round))
        if reply.outcome == "out_of_memory" or not cost.fits:
            reply.outcome = "out_of_memory"
            reply.reason = reply.reason or f"needs {reply.work.peak_memory_bytes} bytes at its peak"
            reply.cost = cost.until(cost.down_s)  # it dies when it allocates, right after the download
            return
        if reply.outcome == "failed":
            reply.cost = cost.until(cost.down_s + cost.compute_s)
            return
        leaves_s = self.fleet.online_until(client, start_s) - start_s
        crashes_s = self.fleet.crash_s(client, self.round)
        if min(leaves_s, crashes_s) < cost.total_s:
            offline = leaves_s <= crashes_s
            reply.outcome = "offline" if offline else "failed"
            reply.reason = "went offline during the round" if offline else "crashed during the round"
            reply.cost = cost.until(min(leaves_s, crashes_s))
            return
        reply.cost = cost

    def _record(self, reply: _Reply, phase: str, start_s: float, round_s: float) -> None:
        profile = self.fleet[reply.client]
        wait_s = max(0.0, round_s - reply.cost.total_s) if reply.outcome == "completed" else 0.0
        work, metrics = reply.work, {}
        if reply.cost.up_s == 0.0:
            work = replace(work, up_bytes=0)
        if reply.content is not None and METRICS in reply.content.metric_records:
            metrics = dict(reply.content.metric_records[METRICS])
        if reply.outcome == "completed":
            assert reply.content is not None
            if STATE in reply.content.array_records:
                self.store.commit(reply.client, reply.content.array_records[STATE])
        self.reports.append(
            ClientReport(
                round=self.round,
                phase=phase,
                client=reply.client,
                device=self.fleet.device_name(reply.client),
                outcome=reply.outcome,
                reason=reply.reason,
                start_s=start_s,
                cost=reply.cost,
                wait_s=wait_s,
                wait_joules=wait_s * profile.idle_watts,
                work=work,
                num_examples=int(metrics.pop(NUM_EXAMPLES, 0)),  # type: ignore[arg-type]
                metrics=metrics,
            )
        )

    def _deliver(self, accepted: Sequence[_Reply], mean: bool) -> list[Message]:
        if mean and accepted:
            return [Message(self._mean(accepted), reply_to=accepted[0].message)]
        # A client without held-out examples has judged nothing, and a mean over such clients does not exist.
        accepted = [r for r in accepted if not (r.message.metadata.message_type == "evaluate" and _judged(r) == 0)]
        for reply in accepted:
            assert reply.content is not None
            reply.content.pop(STATE, None)
            if ARRAYS in reply.content and ARRAYS in reply.message.content:
                model = reply.message.content.array_records[ARRAYS]
                reply.content[ARRAYS] = unpacked(reply.content.array_records[ARRAYS], model)
        return [Message(r.content, reply_to=r.message) for r in accepted if r.content is not None]

    def _mean(self, accepted: Sequence[_Reply]) -> RecordDict:
        """One reply that stands for all: a strategy that only averages takes it as a cohort of one."""
        total = WeightedSum()
        metrics: dict[str, float] = {}
        examples = 0
        for reply in accepted:
            content: Any = reply.content
            numbers = content[METRICS]
            weight = numbers[NUM_EXAMPLES]
            _check_alike(reply, accepted[0])
            total.add(content[ARRAYS], float(weight), reply.block)
            for key, value in numbers.items():
                if key != NUM_EXAMPLES:
                    metrics[key] = metrics.get(key, 0.0) + value * weight
            examples += weight
        means = {key: value / examples for key, value in metrics.items()}
        mean = unpacked(total.mean(), accepted[0].message.content.array_records[ARRAYS])
        return RecordDict({ARRAYS: mean, METRICS: MetricRecord({NUM_EXAMPLES: examples, **means})})


def _judged(reply: _Reply) -> float:
    assert reply.content is not None
    return float(reply.content.metric_records[METRICS][NUM_EXAMPLES])  # type: ignore[arg-type]


def _check_alike(reply: _Reply, first: _Reply) -> None:
    """Refuses what a strategy that only averages would drop or average wrongly, as Flower does for single replies."""
    extras = sorted(set(reply.content.array_records) - {ARRAYS, STATE})  # type: ignore[union-attr]
    if extras:
        raise RunError(f"the clients sent {extras} beside their weights, which the strategy drops, {ONE_METHOD}")
    names, others = (sorted(set(r.content.metric_records[METRICS]) - {NUM_EXAMPLES}) for r in (reply, first))  # type: ignore[union-attr]
    if names != others:
        who = f"client {reply.client} reported metrics {names}, client {first.client} {others}"
        raise RunError(f"{who}; a mean needs the same metrics from every client")
