"""The edge grid: everything that is simulated hangs here, between a Flower strategy and the engine that runs clients.

`EdgeGrid` is a Flower `Grid` with stable client ids 0..N-1 over any engine. It weighs messages, asks who is online,
hands the cohort to the engine, prices the clients' work, keeps the simulated clock, withholds late replies and stores
client state. Never a method.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from devices.cost import LatencyModel
from devices.fleet import Fleet
from devices.profile import DeviceProfile
from fedsim.engines.base import Engine
from fedsim.errors import ConfigError, RunError
from fedsim.grid.clock import SimClock
from fedsim.grid.contact import Contact
from fedsim.grid.events import Event, EventQueue
from fedsim.grid.exchange import ClientReport, Exchange
from fedsim.grid.round_sum import RoundSum
from fedsim.grid.serving import Serving
from fedsim.messages.cohort import Close
from fedsim.messages.records import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    record_of,
)
from fedsim.messages.updates import Instruction
from fedsim.workloads import metrics as figures

TOO_LATE = "the round closed before its reply arrived"
TOO_FEW = "too few others were left to take the masks off the sum"  # of secure aggregation
NOT_NEEDED = "enough others had replied before"  # of over-selection
ONE_METHOD = "so take the strategy and the trainer of one method"
EMPTY_ROUND_S = 60.0  # when nobody answers and there is no deadline, the server tries again after this long


@dataclass(frozen=True)
class Enrolled:
    """What the server knows of a client before it answers."""

    client_id: int
    profile: DeviceProfile


class EdgeGrid(Grid):
    """A Flower Grid whose nodes are simulated edge devices.

    Args:
        engine: where clients really run.
        fleet: which client owns which device.
        latency: turns work into seconds.
        config_json: the resolved settings of the run, sent along so that workers can build the same world.
        deadline_s: simulated seconds after which replies of an exchange are withheld; None waits for all.
        keep: accept only the first `keep` training replies (over-selection); None accepts all.
        averages: the strategy only needs the mean weighted by examples, so it gets one reply that holds it.
        alike: in that mean clients count the same.
        on_client_error: "stop" raises ClientError for a failing client; "drop" counts it as failed.
        batch_clients: how many clients a worker trains at once; they stay together whatever the number of workers.
        observe: called with each client's id when its reply came from the engine (progress).
        pauses: a client that goes offline goes on with its work when it is back, instead of losing it.
        fewest: returns how many of those that begin a round must be left for it to bring anything; None: one.

    Attributes:
        in_flight: clients that were dispatched and have not arrived, by the time at which the server hears of them.
        dispatched: how many clients ever were.
        busy_until_s: when clients end for which nobody waits any longer.
        offered: clients that a strategy may sample; None: all.
        choose: chooses clients for a round, at most so many, for the so-many-th time; None: the strategy draws them.
    """

    def __init__(
        self,
        engine: Engine,
        fleet: Fleet,
        latency: LatencyModel,
        config_json: str,
        *,
        seed: int = 0,
        deadline_s: float | None = None,
        keep: int | None = None,
        averages: bool = False,
        alike: bool = False,
        on_client_error: str = "stop",
        batch_clients: int = 1,
        observe: Callable[[int], None] | None = None,
        pauses: bool = False,
        fewest: Callable[[int], int] | None = None,
    ):
        self.fewest = fewest
        self.engine, self.fleet, self.latency, self.settings = engine, fleet, latency, config_json
        self.deadline_s, self.keep, self.averages, self.alike = deadline_s, keep, averages, alike
        self.serving = Serving(
            engine, fleet, latency, config_json, seed, on_client_error, batch_clients, observe, pauses
        )
        self.in_flight = EventQueue[Contact]()
        self.offered: Sequence[int] | None = None
        self.choose: Callable[[int, int | None, int], list[int]] | None = None
        self.dispatched = 0
        self.busy_until_s: dict[int, float] = {}
        self.store, self.tails = self.serving.store, self.serving.tails
        self.clock = SimClock()
        self.round = 0
        self.reports: list[ClientReport] = []
        self._pushed: dict[str, list[Message]] = {}

    # --- what a strategy sees -----------------------------------------------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        """Client ids 0..N-1, in order, or those that are offered; population costs nothing."""
        return range(len(self.fleet)) if self.offered is None else self.offered

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
        """The accepted replies of an `exchange`."""
        return self.exchange(messages, timeout).replies

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Runs the exchange at once; `pull_messages` with the ids hands out its replies."""
        ticket = f"edge-{uuid.uuid4().hex}"
        self._pushed[ticket] = self.send_and_receive(messages)
        return [ticket]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies of earlier pushes, once."""
        return [reply for ticket in message_ids for reply in self._pushed.pop(ticket, [])]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def set_run(self, run: Any) -> None:
        """The simulated grid belongs to no run of Flower's."""

    @property
    def run(self) -> Any:
        raise RuntimeError("this grid belongs to no Flower run")

    # --- what the run sees --------------------------------------------------------------------------------------

    def take_reports(self) -> list[ClientReport]:
        """The reports of all exchanges since the last call."""
        reports, self.reports = self.reports, []
        return reports

    def state(self) -> dict[str, Any]:
        """Between two rounds, everything that later results depend on."""
        clock = {"now_s": self.clock.now_s, "round_began_s": self.clock.round_began_s}
        self.tails.forget(self.clock.now_s)
        return {**clock, "clients": self.store.packed(), "awake_until_s": dict(self.tails.awake_until_s)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where another grid of the same run was."""
        self.clock.now_s = state["now_s"]
        self.clock.round_began_s = state.get("round_began_s")  # not in older checkpoints
        self.store.restore(state["clients"])
        self.tails.awake_until_s = dict(state.get("awake_until_s", {}))

    def instruction(self, message: Message) -> Instruction:
        """All that a client is sent with a message of this round: its records, and what the client keeps."""
        return self.serving.instruction(message, self.round)

    # --- one exchange, step by step -----------------------------------------------------------------------------

    def exchange(self, messages: Iterable[Message], timeout: float | None = None) -> Exchange:
        """Sends each client its message, lets simulated time pass, and takes the replies that come in time.

        A client that is asleep when it is asked costs nobody time or energy: the server knows it at once, without the
        seconds until a connection that is not there would time out.

        Args:
            messages: instructions addressed by client id, at most one per client.
            timeout: simulated seconds; together with `deadline_s` the earlier one counts.

        Raises:
            ClientError: when a client fails and `on_client_error` is "stop".
            ValueError: when a message is addressed twice or to no client.
        """
        asked = self.in_client_order(messages)
        if not asked:
            return Exchange([])
        phase, start_s = asked[0].metadata.message_type, self.clock.now_s
        limit_s = min((s for s in (self.deadline_s, timeout) if s is not None), default=None)
        keep = self.keep if phase == "train" else None
        total = RoundSum(limit_s, self.alike) if self.averages and phase == "train" else None
        # Who is among the first `keep` is known when all have answered: only then can they be added up.
        close = Close(start_s, limit_s, self.alike) if total is not None and keep is None else None

        contacts = self.serving.reach(asked, self.round, start_s)
        self.serving.serve([c for c in contacts if c.task is not None], close, total)
        round_s = self._close(contacts, limit_s, keep)
        if self.fewest is not None and phase == "train":
            self._lose_if_few(contacts, self.fewest(sum(contact.task is not None for contact in contacts)))
        reports = tuple(self.record(contact, round_s) for contact in contacts)
        self.reports += reports

        accepted = [contact for contact in contacts if contact.is_accepted]
        clients = tuple(contact.client for contact in accepted)
        if total is None or not accepted:
            return Exchange(self._replies(accepted), clients, reports)
        if close is None:
            total.add_accepted(accepted)
        return Exchange([self._mean(accepted, total, reports)], clients, reports)

    # --- clients that nobody waits for together -----------------------------------------------------------------

    def can_be_sent(self, client: int) -> bool:
        """Returns whether a client does no work for the server now, and is online."""
        idle = client not in self.in_flight and self.busy_until_s.get(client, 0.0) <= self.clock.now_s
        return idle and self.fleet.online(client, self.clock.now_s)

    def first_idle_s(self) -> float:
        """Returns when the first client ends that still works though it was given up; inf where none does."""
        return min((s for s in self.busy_until_s.values() if s > self.clock.now_s), default=math.inf)

    def dispatch(self, messages: Iterable[Message], repeats: dict[int, int]) -> None:
        """Sends idle clients messages and lets no time pass: each is in flight until it arrives.

        After `deadline_s` the server hears of it at the latest: then its reply is late, and it goes on working.

        Args:
            messages: instructions addressed by client id.
            repeats: how often clients were sent out in this round before.
        """
        now_s = self.clock.now_s
        contacts = self.serving.reach(self.in_client_order(messages), self.round, now_s, repeats)
        self.serving.dispatch([contact for contact in contacts if contact.task is not None])
        for contact in contacts:
            heard_s = contact.end_s
            if self.deadline_s is not None and heard_s > now_s + self.deadline_s:
                heard_s, contact.late = now_s + self.deadline_s, TOO_LATE
                self.busy_until_s[contact.client] = contact.end_s
            self.dispatched += 1
            self.in_flight.put(Event(heard_s, contact.client, self.dispatched), contact)

    def arrive(self) -> Contact:
        """Lets time pass until the server hears of a client, and takes it out of flight.

        Raises:
            ClientError: if it has failed and is not to be dropped.
        """
        event, contact = self.in_flight.pop()
        self.clock.now_s = max(self.clock.now_s, event.time_s)
        self.busy_until_s = {c: s for c, s in self.busy_until_s.items() if s > self.clock.now_s}
        self._check_alive(contact)
        return contact

    def train_again(self) -> None:
        """Lets those train again who had done so before the run was interrupted; errors wait until they arrive."""
        self.serving.train(c for _, c in self.in_flight if c.trains_at_once and c.is_planned)

    def train(self, contacts: Sequence[Contact], beside: Iterable[Contact] = ()) -> None:
        """Lets clients that have arrived do the work for which they were priced; others in flight may do it, too.

        Raises:
            ClientError: if one has failed and is not to be dropped.
        """
        planned = [contact for contact in contacts if contact.is_planned]
        if planned:
            self.serving.train([*planned, *(contact for contact in beside if contact.is_planned)])
            for contact in planned:
                self._check_alive(contact)

    def _check_alive(self, contact: Contact) -> None:
        if contact.answer.outcome == "failed" and contact.task and self.serving.on_client_error == "stop":
            raise self.serving.failure(contact)

    def in_client_order(self, messages: Iterable[Message]) -> list[Message]:
        """The messages of one exchange by client id.

        Raises:
            ValueError: when one is addressed twice or to no client.
        """
        asked = sorted(messages, key=lambda m: m.metadata.dst_node_id)
        ids = [m.metadata.dst_node_id for m in asked]
        if any(one == other for one, other in pairwise(ids)):
            raise ValueError("a strategy sent one client two messages in one exchange; send one message per client")
        for client_id in ids[:1] + ids[-1:]:
            if not 0 <= client_id < len(self.fleet):
                raise ValueError(f"no client {client_id}: the fleet has clients 0..{len(self.fleet) - 1}")
        return asked

    def _close(self, contacts: Sequence[Contact], limit_s: float | None, keep: int | None) -> float:
        """Decides who is late and lets the round's time pass; its seconds."""
        arrival_s = {c.client: c.cost.total_s for c in contacts if c.priced.outcome == "completed"}
        timing = self.clock.close_round(arrival_s, limit_s, keep)
        late = set(timing.late)
        for contact in contacts:
            if contact.client in late:
                in_time = limit_s is None or contact.cost.total_s <= limit_s
                contact.late = NOT_NEEDED if in_time else TOO_LATE
        if timing.on_time or timing.round_s > 0.0:
            return timing.round_s
        last_drop_s = max(contact.cost.total_s for contact in contacts)
        round_s = max(EMPTY_ROUND_S, last_drop_s) if limit_s is None else limit_s
        self.clock.advance(round_s)
        return round_s

    def _lose_if_few(self, contacts: Sequence[Contact], fewest: int) -> None:
        """Takes no reply of a round in which fewer than so many are left."""
        left = [contact for contact in contacts if contact.is_accepted]
        if len(left) < fewest:
            for contact in left:
                contact.late = TOO_FEW

    def record(self, contact: Contact, round_s: float) -> ClientReport:
        """Stores what the client has for later rounds, and says what became of it.

        Args:
            contact: whose part has ended.
            round_s: seconds until the exchange closed.
        """
        self.serving.store_state(contact)
        wait_s = max(0.0, round_s - contact.cost.total_s) if contact.is_accepted else 0.0
        return self.report(contact, wait_s)

    def report(self, contact: Contact, wait_s: float = 0.0, noted: Mapping[str, float] | None = None) -> ClientReport:
        """Says what became of a client.

        Args:
            contact: whose part has ended.
            wait_s: how long it waited for the exchange to close.
            noted: metrics beside the client's own.
        """
        answer, priced = contact.answer, contact.priced
        return ClientReport(
            round=self.round,
            phase=contact.phase,
            client=contact.client,
            device=self.fleet.device_name(contact.client),
            outcome="late" if contact.late else priced.outcome,
            reason=contact.late or priced.reason,
            start_s=contact.start_s,
            cost=contact.cost,
            wait_s=wait_s,
            wait_joules=wait_s * self.fleet[contact.client].idle_watts,
            work=contact.spent,
            whole_work=answer.work,
            num_examples=answer.num_examples,
            metrics={**answer.metrics, **(noted or {})},
        )

    def _replies(self, accepted: Sequence[Contact]) -> list[Message]:
        """What the strategy gets of each accepted client."""
        # A client without held-out examples has judged nothing, and a mean over such clients does not exist.
        return [c.reply() for c in accepted if c.phase != "evaluate" or c.answer.num_examples]

    def _mean(self, accepted: Sequence[Contact], total: RoundSum, reports: Sequence[ClientReport]) -> Message:
        """One reply that stands for all: a strategy that only averages takes it as a cohort of one."""
        for contact in accepted:
            _check_alike(contact, accepted[0])
        counted = [report for report in reports if report.outcome == "completed"]
        means, examples = figures.means(counted), sum(report.num_examples for report in counted)
        first = accepted[0]
        assert first.task is not None
        mean = record_of(total.mean({c.client for c in accepted}, first.task.broadcast.weights))
        content = RecordDict({ARRAYS: mean, METRICS: MetricRecord({NUM_EXAMPLES: examples, **means})})
        return Message(content, reply_to=first.message)


def _check_alike(contact: Contact, first: Contact) -> None:
    """Refuses what a strategy that only averages would drop or average wrongly, as Flower does for single replies."""
    extras, metrics = sorted(contact.answer.extras), contact.answer.metrics
    if extras:
        raise ConfigError(f"the clients sent {extras} beside their weights, which the strategy drops, {ONE_METHOD}")
    if metrics.keys() != first.answer.metrics.keys():
        names, others = sorted(metrics), sorted(first.answer.metrics)
        who = f"client {contact.client} reported metrics {names}, client {first.client} {others}"
        raise RunError(f"{who}; a mean needs the same metrics from every client")
