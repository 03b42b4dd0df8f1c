"""The edge grid: everything that is simulated hangs here, between a Flower strategy and the engine that runs clients.

`EdgeGrid` is a Flower `Grid` with stable client ids 0..N-1 over any engine's `Grid`. It weighs messages, asks who is
online, packs clients into cohort messages, prices their work, keeps the simulated clock, withholds late replies and
stores client state. Never a method.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from devices.cost import Cost, LatencyModel, Work, unpack_works
from devices.fleet import Fleet
from devices.profile import DeviceProfile
from fedsim.engines.blocks import BlockSum, WeightedSum, blocks
from fedsim.errors import ClientError, RunError
from fedsim.grid.clock import SimClock
from fedsim.grid.pricing import Outcome, Prices, RadioTails
from fedsim.messages.records import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    OF_REPLY,
    STATE,
    Instruction,
    all_finite,
    array_record,
    arrays_in,
    pack_cohort,
    payload_bytes,
    unpack_cohort,
    unpacked,
)
from fedsim.messages.uplink import decompress
from fedsim.workloads import metrics as figures

NO_REPLY, NOT_THERE = "the engine returned no reply", "offline when the round began"
ONE_METHOD = "so take the strategy and the trainer of one method"
CLIENTS_PER_MESSAGE = 16
SHORT_S = 0.25  # host seconds of an exchange below which small messages cost more than they balance
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
    content: RecordDict | None = None
    work: Work = field(default_factory=Work)
    outcome: Outcome = "failed"
    reason: str = NO_REPLY
    cost: Cost = field(default_factory=Cost)
    work_ended: bool = False


_Answer = tuple[int, RecordDict, Work, Outcome, str, str]  # client, content, work, outcome, reason, traceback
_BlockSum = tuple[int, list[int], float, RecordDict]  # block, clients, weight, the sum under `arrays` if there are any


class ClientStore:
    """What clients keep between rounds; owned by the driver, stored at the end of an exchange (see `ClientState`)."""

    def __init__(self) -> None:
        self._states: dict[int, ArrayRecord] = {}

    def get(self, client_id: int) -> ArrayRecord | None:
        return self._states.get(client_id)

    def commit(self, client_id: int, state: ArrayRecord, accepted: bool = True) -> None:
        """Stores a client's state; of a reply that was not accepted, without what is of the reply."""
        if not accepted:
            before = self._states.get(client_id, ArrayRecord())
            own = {name: array for name, array in state.items() if not name.startswith(OF_REPLY)}
            owed = {name: array for name, array in before.items() if name.startswith(OF_REPLY)}
            state = array_record(own | owed)
        if state or client_id in self._states:
            self._states[client_id] = state

    def restore(self, states: Mapping[int, ArrayRecord]) -> None:
        """Takes the states of a checkpoint, also of one that calls what is of the reply by its older names."""
        for client_id, state in states.items():
            self.commit(client_id, array_record({_moved(name): array for name, array in state.items()}))

    def all(self) -> dict[int, ArrayRecord]:
        """The states by client."""
        return dict(self._states)

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
        batch_clients: how many clients a worker trains at once; they stay together whatever the number of workers.
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
        batch_clients: int = 1,
        observe: Callable[[int], None] | None = None,
    ):
        self.engine, self.fleet, self.latency = engine, fleet, latency
        self.settings = ConfigRecord({"json": config_json})
        self.seed, self.deadline_s, self.keep, self.averages = seed, deadline_s, keep, averages
        self.on_client_error, self.batch_clients, self.observe = on_client_error, batch_clients, observe
        self.clock, self.store, self.tails = SimClock(), ClientStore(), RadioTails()
        self.round = 0
        self.reports: list[ClientReport] = []
        self.accepted: tuple[int, ...] = ()  # clients of the last exchange, also where one mean stands for all
        self._pushed: dict[str, list[Message]] = {}
        self._flops: dict[int, float] = {}  # of each client's last training: what its next one will take on the host
        self._host_s = 0.0  # of a worker for a client, in the last training; decides on messages, never on results

    # --- what a strategy sees -----------------------------------------------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        """Client ids 0..N-1, in order; population costs nothing."""
        return range(len(self.fleet))

    def client(self, client_id: int) -> Enrolled:
        """What is known of a client: its device."""
        return Enrolled(client_id, self.fleet[client_id])

    def reachable(self, clients: Iterable[int]) -> list[int]:
        """Returns those of the clients that are online now, in the order given.

        It is what a server sees at the moment of connecting, and all that it can see: a client that is asleep costs
        nobody time or energy, and when it will wake up nobody knows.
        """
        return [client for client in clients if self.fleet.online(client, self.clock.now_s)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """One exchange: sends each client its message, lets simulated time pass, returns the accepted replies.

        A client that is asleep when it is asked costs nobody time or energy: the server knows it at once, without the
        seconds until a connection that is not there would time out.

        Args:
            messages: instructions addressed by client id, at most one per client.
            timeout: simulated seconds; together with `deadline_s` the earlier one counts.

        Returns:
            Accepted replies in client order, or one reply with their weighted mean (see `averages`).

        Raises:
            ClientError: when a client fails and `on_client_error` is "stop".
            ValueError: when a message is addressed twice or to no client.
        """
        asked = self.in_client_order(messages)
        if not asked:
            return []
        phase = asked[0].metadata.message_type
        start_s = self.clock.now_s
        limit_s = min((s for s in (self.deadline_s, timeout) if s is not None), default=None)
        keep = self.keep if phase == "train" else None
        # Who is among the first `keep` is known when all have answered: only then can they be added up.
        total = _RoundSum(limit_s) if self.averages and phase == "train" else None
        early = total is not None and keep is None
        replies = self._run(asked, phase, total if early else None)
        arrival_s = {r.client: r.cost.total_s for r in replies if r.outcome == "completed"}
        timing = self.clock.close_round(arrival_s, limit_s, keep)
        round_s = timing.round_s
        if not timing.on_time and round_s == 0.0:
            last_drop_s = max(r.cost.total_s for r in replies)
            round_s = max(EMPTY_ROUND_S, last_drop_s) if limit_s is None else limit_s
            self.clock.advance(round_s)
        late = set(timing.late)
        for reply in replies:
            if reply.client in late:
                reply.outcome, reply.reason = "late", "the round closed before its reply arrived"
        for reply in replies:
            self._record(reply, phase, start_s, round_s)
        accepted = [r for r in replies if r.outcome == "completed"]
        self.accepted = tuple(r.client for r in accepted)
        if total is None or not accepted:
            return self._deliver(accepted)
        if not early:
            total.add_accepted(accepted)
        return [Message(self._mean(accepted, total, len(replies)), reply_to=accepted[0].message)]

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

    def state(self) -> dict[str, Any]:
        """Between two rounds, everything that later results depend on."""
        clock = {"now_s": self.clock.now_s, "round_began_s": self.clock.round_began_s}
        self.tails.forget(self.clock.now_s)
        return {**clock, "clients": self.store.all(), "awake_until_s": dict(self.tails.awake_until_s)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where another grid of the same run was."""
        self.clock.now_s = state["now_s"]
        self.clock.round_began_s = state.get("round_began_s")  # not in older checkpoints
        self.store.restore(state["clients"])
        self.tails.awake_until_s = dict(state.get("awake_until_s", {}))

    # --- one exchange, step by step -----------------------------------------------------------------------------

    def in_client_order(self, messages: Iterable[Message]) -> list[Message]:
        """The messages of one exchange by client id.

        Raises:
            ValueError: when one is addressed twice or to no client.
        """
        asked = sorted(messages, key=lambda m: m.metadata.dst_node_id)
        ids = [m.metadata.dst_node_id for m in asked]
        if len(set(ids)) < len(ids):
            raise ValueError("a strategy sent one client two messages in one exchange; send one message per client")
        for client_id in ids[:1] + ids[-1:]:
            if not 0 <= client_id < len(self.fleet):
                raise ValueError(f"no client {client_id}: the fleet has clients 0..{len(self.fleet) - 1}")
        return asked

    def _run(self, asked: list[Message], phase: str, total: _RoundSum | None) -> list[_Reply]:
        """Lets the engine serve the clients that are online and prices what they did; replies are in client order."""
        now_s = self.clock.now_s
        self.tails.forget(now_s)
        prices = Prices(self.fleet, self.latency, self.round, now_s)
        looked_at: set[int] = set()
        sizes: dict[int, int] = {}  # payload by content object: stock strategies send one object to all
        replies: dict[int, _Reply] = {}
        online: list[_Reply] = []
        for number, block in enumerate(blocks(asked)):
            for message in block:
                client, content = message.metadata.dst_node_id, message.content
                if not self.fleet.online(client, now_s):
                    replies[client] = _Reply(client, number, message, outcome="offline", reason=NOT_THERE)
                    continue
                if id(content) not in sizes:
                    self._check_sent(content, looked_at)
                    sizes[id(content)] = payload_bytes(content)
                replies[client] = _Reply(client, number, message, work=Work(down_bytes=sizes[id(content)]))
                online.append(replies[client])
        if total is not None:
            total.expect(online)
        messages, began_s = self._messages(online, phase, total), time.monotonic()
        for answers, sums in self._engine_replies(messages):
            for client, content, work, outcome, reason, trace in answers:
                reply = replies[client]
                if outcome == "failed" and self.on_client_error == "stop":
                    who = f"client {client} ({self.fleet.device_name(client)})"
                    where = f"failed in round {self.round} (seed {self.seed})"
                    instruction = Instruction(self.round, client, phase, self._with_state(reply))
                    raise ClientError(f"{who} {where}: {reason}", trace, instruction)
                decompress(content, reply.message.content)
                reply.content, reply.work = content, replace(work, down_bytes=reply.work.down_bytes)
                priced = prices.of(client, reply.work, outcome, reason)
                reply.outcome, reply.reason, reply.cost = priced.outcome, priced.reason, priced.cost
                reply.work_ended = priced.work_ended
                if self.observe:
                    self.observe(client)
            if total is not None and sums is not None:
                total.add_sums(sums)
            elif total is not None:
                total.add_separate([replies[answer[0]] for answer in answers])
        if phase == "train" and online:
            self._host_s = (time.monotonic() - began_s) * len(list(self.engine.get_node_ids())) / len(online)
        missing = [r.client for r in online if r.reason == NO_REPLY]
        if missing:
            raise ClientError(
                f"the engine returned no reply for clients {missing[:5]} in round {self.round} (seed {self.seed})"
            )
        for reply in online:  # once each, and not as replies come: an engine may answer for a client twice
            reply.cost = self.tails.contact(reply.client, now_s, reply.cost)
        return [replies[m.metadata.dst_node_id] for m in asked]

    def _check_sent(self, content: RecordDict, looked_at: set[int]) -> None:
        """Refuses to send NaN and infinity: clients would fail who have done nothing wrong."""
        for name, record in arrays_in(content).items():
            if id(record) not in looked_at and not all_finite(record):
                what = f"the {name!r} that the server would send in round {self.round} are NaN or infinite"
                raise RunError(
                    f"{what}, though every client's update was finite; lower trainer.lr or set trainer.clip_norm"
                )
            looked_at.add(id(record))

    def _messages(self, online: Sequence[_Reply], phase: str, total: _RoundSum | None) -> list[Message]:
        """Few messages for many clients: none with more than CLIENTS_PER_MESSAGE unless a block is larger."""
        if not online:
            return []
        nodes = list(self.engine.get_node_ids())
        expected_s = self._host_s * len(online) / len(nodes)
        small = getattr(self.engine, "small_messages", False) and expected_s > SHORT_S
        usual = sum(self._flops.values()) / len(self._flops) if self._flops else 1.0
        messages: list[Message] = []
        together = self.batch_clients if phase == "train" else 1
        for units in _cut(online, len(nodes), small, total is not None, together):
            some = [r for unit in units for r in unit]
            clients = [r.client for r in some]
            parts = [self._with_state(r) for r in some]
            header: dict[str, Any] = {"round": self.round, "phase": phase, "clients": clients}
            header["cost"] = sum(self._flops.get(c, usual) for c in clients)
            if together > 1:
                # Named by the first client of each group.
                header["groups"] = [unit[i - i % together].client for unit in units for i in range(len(unit))]
                header["each"] = ["clients", "groups"]
            if total is not None:
                header["sums"] = {"start_s": self.clock.now_s, "limit_s": total.limit_s}
                header["blocks"] = [r.block for r in some]
                header["down_bytes"] = [r.work.down_bytes for r in some]
                header["each"] = [*header.get("each", ["clients"]), "blocks", "down_bytes"]
            content = pack_cohort(header, parts, self.settings)
            # Flower allows train, evaluate and query; a question's own name travels in the header.
            messages.append(Message(content, nodes[len(messages) % len(nodes)], phase.partition(".")[0]))
        return messages

    def _with_state(self, reply: _Reply) -> RecordDict:
        """What the client is sent: the strategy's own content, and what the client keeps."""
        content, state = reply.message.content, self.store.get(reply.client)
        return content if state is None else RecordDict({**content, STATE: state})

    def _engine_replies(self, cohort_messages: list[Message]) -> Iterator[tuple[list[_Answer], list[_BlockSum] | None]]:
        """Unpacks what the engine sends back, in any order: the clients of a message and, where asked for, its sums."""
        if not cohort_messages:
            return
        for reply in self.engine.send_and_receive(cohort_messages):
            if reply.has_error():
                raise ClientError(f"a worker failed in round {self.round} (seed {self.seed}): {reply.error.reason}")
            header, parts = unpack_cohort(reply.content)
            answers: list[_Answer] = []
            for facts, work, content in zip(header["clients"], unpack_works(header), parts, strict=False):
                up_bytes = facts["up_bytes"] if "up_bytes" in facts else payload_bytes(content)
                work = replace(work, up_bytes=up_bytes)
                answers.append((facts["client"], content, work, facts["outcome"], facts["reason"], facts["traceback"]))
            sums = None
            if "sums" in header:
                blocks_of = zip(header["sums"], parts[len(answers) :], strict=True)
                sums = [(f["block"], f["clients"], f["weight"], part) for f, part in blocks_of]
            yield answers, sums

    def _record(self, reply: _Reply, phase: str, start_s: float, round_s: float) -> None:
        profile = self.fleet[reply.client]
        wait_s = max(0.0, round_s - reply.cost.total_s) if reply.outcome == "completed" else 0.0
        work, metrics = reply.work, {}
        if phase == "train" and work.flops:
            self._flops[reply.client] = work.flops
        if reply.cost.down_share < 1 or reply.cost.up_share < 1:  # only the bytes that went before it stopped
            down_bytes, up_bytes = work.down_bytes * reply.cost.down_share, work.up_bytes * reply.cost.up_share
            work = replace(work, down_bytes=round(down_bytes), up_bytes=round(up_bytes))
        if reply.content is not None and METRICS in reply.content:
            metrics = dict(reply.content[METRICS])
        if reply.work_ended and reply.content is not None and STATE in reply.content:
            self.store.commit(reply.client, _arrays(reply.content, STATE), reply.outcome == "completed")
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

    def _deliver(self, accepted: Sequence[_Reply]) -> list[Message]:
        # A client without held-out examples has judged nothing, and a mean over such clients does not exist.
        accepted = [r for r in accepted if not (r.message.metadata.message_type == "evaluate" and _judged(r) == 0)]
        for reply in accepted:
            assert reply.content is not None
            reply.content.pop(STATE, None)
            if ARRAYS in reply.content and ARRAYS in reply.message.content:
                model = _arrays(reply.message.content)
                reply.content[ARRAYS] = unpacked(_arrays(reply.content), model)
        return [Message(r.content, reply_to=r.message) for r in accepted if r.content is not None]

    def _mean(self, accepted: Sequence[_Reply], total: _RoundSum, asked: int) -> RecordDict:
        """One reply that stands for all: a strategy that only averages takes it as a cohort of one."""
        for reply in accepted:
            _check_alike(reply, accepted[0])
        reports = [report for report in self.reports[-asked:] if report.outcome == "completed"]
        means, examples = figures.means(reports), sum(report.num_examples for report in reports)
        model = _arrays(accepted[0].message.content)
        mean = unpacked(total.mean({r.client for r in accepted}, model), model)
        return RecordDict({ARRAYS: mean, METRICS: MetricRecord({NUM_EXAMPLES: examples, **means})})


class _RoundSum:
    """Adds up the blocks of a round in their order, as they come; holds only what came early.

    A worker that trained a whole block sends its sum; where it could not, the updates themselves are added up here.
    """

    def __init__(self, limit_s: float | None):
        self.limit_s = limit_s
        self.total = WeightedSum()
        self.clients: set[int] = set()
        self._awaited: deque[int] = deque()
        self._missing: Counter[int] = Counter()
        self._separate: dict[int, list[_Reply]] = {}
        self._early: dict[int, tuple[ArrayRecord, float, int] | None] = {}

    def expect(self, online: Sequence[_Reply]) -> None:
        """Says which clients will answer, in order."""
        self._missing = Counter(r.block for r in online)
        self._awaited = deque(self._missing)

    def add_sums(self, sums: Sequence[_BlockSum]) -> None:
        """Takes whole blocks that a worker has added up."""
        for number, clients, weight, part in sums:
            self._put(number, clients, (_arrays(part), weight, len(clients)) if clients else None)

    def add_separate(self, replies: Sequence[_Reply]) -> None:
        """Takes clients with their own updates; a block is added up when the last of it is here."""
        for reply in replies:
            self._missing[reply.block] -= 1
            group = self._separate.setdefault(reply.block, [])
            if reply.outcome == "completed" and (self.limit_s is None or reply.cost.total_s <= self.limit_s):
                group.append(reply)
            if self._missing[reply.block] == 0:
                self._put_separate(reply.block, sorted(group, key=lambda r: r.client))
                del self._separate[reply.block]

    def add_accepted(self, accepted: Sequence[_Reply]) -> None:
        """Takes all accepted replies of a round at once, in client order."""
        self.expect(accepted)
        for number, group in groupby(accepted, key=lambda r: r.block):
            self._put_separate(number, list(group))

    def mean(self, accepted: set[int], model: ArrayRecord) -> ArrayRecord:
        """The mean over the accepted clients.

        Raises:
            RunError: if others were added up: a worker has priced them differently.
        """
        if self.clients != accepted:
            odd = sorted(self.clients ^ accepted)[:5]
            raise RunError(
                f"workers and server disagree on whether clients {odd} were in time; do their versions differ?"
            )
        return self.total.mean(model)

    def _put_separate(self, number: int, group: Sequence[_Reply]) -> None:
        block = BlockSum()
        for reply in group:
            content: Any = reply.content
            block.add(content.pop(ARRAYS), float(content[METRICS][NUM_EXAMPLES]))
        clients = [r.client for r in group]
        self._put(number, clients, (block.record(), block.weight, block.clients) if group else None)

    def _put(self, number: int, clients: Sequence[int], block: tuple[ArrayRecord, float, int] | None) -> None:
        self.clients.update(clients)
        self._early[number] = block
        while self._awaited and self._awaited[0] in self._early:
            ready = self._early.pop(self._awaited.popleft())
            if ready is not None:
                self.total.add(*ready)


def _cut(
    online: Sequence[_Reply], nodes: int, small: bool, whole_blocks: bool, together: int
) -> Iterator[list[list[_Reply]]]:
    """Clients by message, in order, as lists of units that must not be divided.

    A block stays whole where it is added up by its worker, and so do clients that train at once. Many small messages
    balance the load but each costs some milliseconds: so they get smaller towards the end (guided self-scheduling,
    Polychronopoulos and Kuck 1987), or are as few as the limit allows.
    """
    blocks_of = [list(group) for _, group in groupby(online, key=lambda r: r.block)]
    units: list[list[_Reply]] = []
    for unit in blocks_of if whole_blocks else [[r] for r in online]:
        if units and len(units[-1]) < together:
            units[-1] += unit
        else:
            units.append(list(unit))
    start, left, idle = 0, len(online), nodes
    while start < len(units):
        size = min(CLIENTS_PER_MESSAGE, -(-left // (nodes if small else idle)))
        idle = max(1, idle - 1)
        end, count = start + 1, len(units[start])
        while end < len(units) and count + len(units[end]) <= size:
            count += len(units[end])
            end += 1
        yield units[start:end]
        start, left = end, left - count


def _moved(name: str) -> str:
    """The present name of a tensor in a client's state."""
    if name == "uplink.residual":
        return f"{OF_REPLY}residual"
    return f"{OF_REPLY}{name}" if name.startswith("pool_") else name


def _arrays(content: RecordDict, name: str = ARRAYS) -> ArrayRecord:
    record = content[name]
    assert isinstance(record, ArrayRecord)
    return record


def _judged(reply: _Reply) -> float:
    assert reply.content is not None
    return float(reply.content[METRICS][NUM_EXAMPLES])  # type: ignore[arg-type]


def _check_alike(reply: _Reply, first: _Reply) -> None:
    """Refuses what a strategy that only averages would drop or average wrongly, as Flower does for single replies."""
    assert reply.content is not None
    assert first.content is not None
    extras = sorted(set(arrays_in(reply.content)) - {ARRAYS, STATE})
    if extras:
        raise RunError(f"the clients sent {extras} beside their weights, which the strategy drops, {ONE_METHOD}")
    if reply.content[METRICS].keys() != first.content[METRICS].keys():
        names, others = (sorted(set(c[METRICS]) - {NUM_EXAMPLES}) for c in (reply.content, first.content))
        who = f"client {reply.client} reported metrics {names}, client {first.client} {others}"
        raise RunError(f"{who}; a mean needs the same metrics from every client")
