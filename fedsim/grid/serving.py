"""What happens to clients once they are reached: they get their tasks, the engine answers, and their work is priced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Message, RecordDict

from devices.cost import LatencyModel
from devices.fleet import Fleet
from fedsim.engines.base import Engine
from fedsim.errors import ClientError, RunError
from fedsim.grid.contact import Contact
from fedsim.grid.pricing import Priced, Prices, RadioTails
from fedsim.grid.round_sum import RoundSum
from fedsim.grid.store import ClientStore
from fedsim.messages.blocks import blocks
from fedsim.messages.cohort import PLAN, ClientTask, Close, CohortAnswer, CohortTask
from fedsim.messages.records import (
    STATE,
    Instructions,
    all_finite,
    arrays_in,
    payload_bytes,
    record_of,
)
from fedsim.messages.updates import Instruction

NOT_THERE = "offline when the round began"


@dataclass
class Serving:
    """Hands tasks to an engine, and prices what clients did.

    Args:
        engine: where clients really run.
        fleet: which client owns which device.
        latency: turns work into seconds.
        settings: of the run, as JSON, for the workers.
        seed: of the run.
        on_client_error: "stop" raises ClientError for a failing client; "drop" counts it as failed.
        batch_clients: how many clients a worker trains at once; they stay together whatever the number of workers.
        observe: called with each client's id when its reply came from the engine.
        pauses: a client that goes offline goes on with its work when it is back, instead of losing it.

    Attributes:
        store: what clients keep.
        tails: of their radios.
    """

    engine: Engine
    fleet: Fleet
    latency: LatencyModel
    settings: str
    seed: int = 0
    on_client_error: str = "stop"
    batch_clients: int = 1
    observe: Callable[[int], None] | None = None
    pauses: bool = False
    store: ClientStore = field(default_factory=ClientStore)
    tails: RadioTails = field(default_factory=RadioTails)
    _flops: dict[int, float] = field(default_factory=dict)  # of each client's last training: for sharing out work

    def reach(
        self, asked: Sequence[Message], number: int, now_s: float, repeats: dict[int, int] | None = None
    ) -> list[Contact]:
        """Makes contact with each client; those that are online get their task.

        Args:
            asked: the messages, in client order.
            number: of the round.
            now_s: simulated time.
            repeats: how often clients were sent out in this round before; None: never.
        """
        instructions, sizes, checked = Instructions(), {}, set()  # type: Instructions, dict[int, int], set[int]
        usual = sum(self._flops.values()) / len(self._flops) if self._flops else 1.0
        contacts = []
        for block_number, block in enumerate(blocks(asked)):
            for message in block:
                client, content = message.metadata.dst_node_id, message.content
                repeat = repeats.get(client, 0) if repeats else 0
                contact = Contact(client, message, block_number, start_s=now_s, number=number, repeat=repeat)
                contacts.append(contact)
                if not self.fleet.online(client, now_s):
                    contact.priced = Priced("offline", NOT_THERE)
                    continue
                if id(content) not in sizes:
                    _check_sent(content, checked, number)
                    sizes[id(content)] = payload_bytes(content)
                contact.task = ClientTask(
                    client,
                    instructions.broadcast(content, number),
                    self.store.get(client),
                    block_number,
                    down_bytes=sizes[id(content)],
                    expected_flops=self._flops.get(client, usual),
                    repeat=repeat,
                )
        return contacts

    def serve(self, online: Sequence[Contact], close: Close | None = None, total: RoundSum | None = None) -> None:
        """Lets the engine serve clients that were reached at one time in one round, and prices what they did.

        Args:
            online: in client order; they get their answers and prices.
            close: given, blocks are added up as they come, in `total`.
            total: of the round.

        Raises:
            ClientError: when a client fails and is not to be dropped.
        """
        if not online:
            return
        first, early = online[0], total if close is not None else None
        if early is not None:
            early.expect(online)
        self.tails.forget(first.start_s)
        prices = self.prices(first)
        by_client = {contact.client: contact for contact in online}
        for answer in self._answers(self._task(online, close), by_client):
            self._take(answer, by_client)
            if early is not None and answer.sums:
                early.add_sums(answer.sums)
            elif early is not None:
                alone = [by_client[one.client] for one in answer.clients]
                _price(alone, prices)
                early.add_separate(alone)
        _price(online, prices)  # together: one by one is slow
        self.wake_radios(online)

    def prices(self, first: Contact) -> Prices:
        """What prices the clients that were reached when this one was."""
        return Prices(self.fleet, self.latency, first.number, first.start_s, self.pauses)

    def dispatch(self, online: Sequence[Contact]) -> None:
        """Prices clients that were reached at one time; those whose work can be told beforehand need not do it yet.

        A client that fails is an outcome here: see `failure`.
        """
        if not online:
            return
        self.tails.forget(online[0].start_s)
        self._ask(online, PLAN)
        for contact in online:
            contact.is_planned = contact.can_be_planned = contact.answer.outcome == "completed"
            contact.trains_at_once = contact.answer.outcome == "failed"  # to tell
        self._ask([contact for contact in online if contact.trains_at_once], "train")
        _price(online, self.prices(online[0]))
        self.wake_radios(online)

    def train(self, planned: Iterable[Contact]) -> None:
        """Lets clients do the work for which they have been priced.

        Raises:
            RunError: if one does other work than was planned.
        """
        left = sorted(planned, key=lambda contact: (contact.client, contact.start_s))
        while left:  # a client that was sent out twice trains twice
            first = {contact.client: contact for contact in reversed(left)}
            now = [contact for contact in left if first[contact.client] is contact]
            left = [contact for contact in left if first[contact.client] is not contact]
            expected = {contact.client: contact.answer.work for contact in now}
            self._ask(now, "train")
            for contact in now:
                contact.is_planned, answer = False, contact.answer
                if answer.outcome == "failed" and contact.priced.outcome != "failed":
                    cost = contact.cost.until(contact.cost.down_s + contact.cost.compute_s)
                    contact.priced = replace(contact.priced, outcome="failed", reason=answer.reason, cost=cost)
                elif answer.outcome == "completed" and answer.work != expected[contact.client]:
                    raise RunError(
                        f"plan_work of the trainer told other work than client {contact.client} did in round "
                        f"{contact.number}: {expected[contact.client]}, and it was {answer.work}"
                    )

    def _ask(self, online: Sequence[Contact], phase: str) -> None:
        """Takes the answers of clients to their tasks, or what they plan, whatever these are."""
        if not online:
            return
        tasks = tuple(contact.task for contact in online if contact.task is not None)
        task, by_client = CohortTask(online[0].number, phase, tasks, self.settings), {c.client: c for c in online}
        for answer in self._answers(task, by_client):
            for one in answer.clients:
                if self.observe and phase != PLAN:
                    self.observe(one.client)

    def _answers(self, task: CohortTask, by_client: Mapping[int, Contact]) -> Iterator[CohortAnswer]:
        """The engine's answers as they come, once each client has its own.

        Raises:
            ClientError: if a client has none in the end.
        """
        missing = dict.fromkeys(by_client)
        for answer in self.engine.run(task):
            for one in answer.clients:
                by_client[one.client].answer = one
                missing.pop(one.client, None)
            yield answer
        if missing:
            raise ClientError(
                f"the engine returned no reply for clients {list(missing)[:5]} in round {task.round} (seed {self.seed})"
            )

    def wake_radios(self, contacts: Iterable[Contact]) -> None:
        """Takes from each client's price the radio tail that its last contact has paid for."""
        for contact in contacts:  # in client order, whatever the order of the answers
            cost = self.tails.contact(contact.client, contact.start_s, contact.cost)
            if cost is not contact.cost:
                contact.priced = replace(contact.priced, cost=cost)

    def store_state(self, contact: Contact) -> None:
        """Stores what a client has for later rounds, and remembers how much it computed."""
        answer = contact.answer
        if contact.phase == "train" and (flops := answer.work.flops):
            self._flops[contact.client] = flops
        if contact.priced.work_ended and answer.state:
            self.store.commit(contact.client, answer.state, contact.is_accepted)

    def instruction(self, message: Message, number: int, repeat: int = 0) -> Instruction:
        """All that a client is sent with a message of a round: its records, and what the client keeps."""
        content, metadata = message.content, message.metadata
        state = self.store.get(metadata.dst_node_id)
        whole = RecordDict({**content, STATE: record_of(state)}) if state else content
        return Instruction(number, metadata.dst_node_id, metadata.message_type, whole, repeat=repeat)

    def failure(self, contact: Contact) -> ClientError:
        """Names a client that failed, and holds what it was sent, so that it can be replayed."""
        who = f"client {contact.client} ({self.fleet.device_name(contact.client)})"
        where = f"failed in round {contact.number} (seed {self.seed})"
        sent = self.instruction(contact.message, contact.number, contact.repeat)
        return ClientError(f"{who} {where}: {contact.answer.reason}", contact.answer.traceback, sent)

    def _task(self, online: Sequence[Contact], close: Close | None) -> CohortTask:
        """The tasks of all clients that are online; those that train at once in their groups."""
        tasks = tuple(contact.task for contact in online if contact.task is not None)
        task = CohortTask(online[0].number, online[0].phase, tasks, self.settings, close)
        if task.phase != "train" or self.batch_clients == 1:
            return task
        return task.of(self._grouped(task))

    def _grouped(self, task: CohortTask) -> Iterable[ClientTask]:
        """Clients in groups of `batch_clients`, which never leave a block half in a group that the block is not in."""
        units: list[list[ClientTask]] = []
        for unit in task.units():
            if units and len(units[-1]) < self.batch_clients:
                units[-1] += unit
            else:
                units.append(unit)
        for unit in units:
            for place, one in enumerate(unit):
                yield replace(one, group=unit[place - place % self.batch_clients].client)

    def _take(self, answer: CohortAnswer, online: dict[int, Contact]) -> None:
        """Takes what clients answered."""
        for one in answer.clients:
            contact = online[one.client]
            if one.outcome == "failed" and self.on_client_error == "stop":
                raise self.failure(contact)
            if self.observe:
                self.observe(one.client)


def _check_sent(content: RecordDict, checked: set[int], number: int) -> None:
    """Refuses to send NaN and infinity: clients would fail who have done nothing wrong."""
    for name, record in arrays_in(content).items():
        if id(record) not in checked and not all_finite(record):
            what = f"the {name!r} that the server would send in round {number} are NaN or infinite"
            raise RunError(
                f"{what}, though every client's update was finite; lower trainer.lr or set trainer.clip_norm"
            )
        checked.add(id(record))


def _price(contacts: Sequence[Contact], prices: Prices) -> None:
    repeats = [contact.repeat for contact in contacts]
    settled = prices.settle([contact.answer for contact in contacts], repeats)
    for contact, priced in zip(contacts, settled, strict=True):
        contact.priced = priced
