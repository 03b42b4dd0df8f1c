"""The mean of a round without its single updates: workers add up blocks, the server adds up the blocks.

Both leave out the clients that are late, and both price them alike; see `messages.blocks` for the order of the sums.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from torch import Tensor

from devices.cost import LatencyModel
from devices.fleet import Fleet
from fedsim.errors import RunError
from fedsim.grid.contact import Contact
from fedsim.grid.pricing import Prices
from fedsim.messages.blocks import BlockSum, WeightedSum
from fedsim.messages.cohort import BlockAnswer, ClientAnswer, ClientTask, Close, CohortAnswer
from fedsim.messages.uplink import decompressed
from fedsim.messages.weights import Form, SentWeights
from fedsim.workloads.base import Tensors

WAITING_BYTES = 2**26  # of updates that wait to be priced


class BlockSums:
    """The worker's half: sums of blocks over the clients whose replies will be accepted.

    Args:
        fleet, latency: of the run.
        round_number: of the exchange.
        close: when it begins and ends, and what clients count for.
    """

    def __init__(self, fleet: Fleet, latency: LatencyModel, round_number: int, close: Close):
        self.prices, self.limit_s = Prices(fleet, latency, round_number, close.start_s), close.limit_s
        self.alike = close.alike
        self._blocks: dict[int, tuple[BlockSum, list[int]]] = {}
        self._forms: dict[int, Form] = {}
        self._waiting: list[tuple[ClientTask, ClientAnswer]] = []  # clients are priced together: one by one is slow
        self._waiting_bytes = 0
        self._answers: list[ClientAnswer] = []

    def add(self, task: ClientTask, answer: ClientAnswer) -> None:
        """Adds a client's weights if its reply is in time.

        Raises:
            ValueError: if they do not have the names and shapes of the others in the block.
        """
        self._blocks.setdefault(task.block, (BlockSum(), []))
        self._waiting.append((task, answer))
        self._waiting_bytes += answer.weights.nbytes if answer.weights else 0
        if self._waiting_bytes > WAITING_BYTES:
            self._add_waiting()

    def answer(self) -> CohortAnswer:
        """The clients' answers without their weights, and the sum of each block."""
        self._add_waiting()
        sums = tuple(
            BlockAnswer(number, tuple(clients), block.weight, self._total(number, block) if clients else None)
            for number, (block, clients) in self._blocks.items()
        )
        return CohortAnswer(tuple(self._answers), sums)

    def _add_waiting(self) -> None:
        in_time = self.prices.arrivals([answer for _, answer in self._waiting], self.limit_s)
        for (task, answer), arrives in zip(self._waiting, in_time, strict=True):
            if answer.weights is not None and arrives:
                block, clients = self._blocks[task.block]
                weights = decompressed(answer.weights, task.broadcast.weights)
                block.add(weights.tensors, 1.0 if self.alike else float(answer.num_examples))
                clients.append(task.client)
                self._forms[task.block] = weights.form
            self._answers.append(answer.without_weights())
        self._waiting, self._waiting_bytes = [], 0

    def _total(self, number: int, block: BlockSum) -> SentWeights:
        return SentWeights(dict(block.tensors), self._forms[number])


class RoundSum:
    """The server's half: adds up the blocks of a round in their order, as they come; holds only what came early.

    A worker that trained a whole block sends its sum; where it could not, the updates themselves are added up here.

    Args:
        limit_s: after which replies are late; None waits for all.
        alike: clients count the same, instead of by their examples.
    """

    def __init__(self, limit_s: float | None, alike: bool = False):
        self.limit_s, self.alike = limit_s, alike
        self.total = WeightedSum()
        self.clients: set[int] = set()
        self._form: Form = "named"
        self._awaited: deque[int] = deque()
        self._missing: Counter[int] = Counter()
        self._separate: dict[int, list[Contact]] = {}
        self._early: dict[int, tuple[Mapping[str, Tensor], float, int] | None] = {}

    def expect(self, online: Iterable[Contact]) -> None:
        """Says which clients will answer, in order."""
        self._missing = Counter(contact.block for contact in online)
        self._awaited = deque(self._missing)

    def add_sums(self, sums: Sequence[BlockAnswer]) -> None:
        """Takes whole blocks that a worker has added up."""
        for block in sums:
            if block.total is None:
                self._put(block.block, (), None)
            else:
                self._form = block.total.form
                self._put(block.block, block.clients, (block.total.tensors, block.weight, len(block.clients)))

    def add_separate(self, contacts: Iterable[Contact]) -> None:
        """Takes clients with their own updates; a block is added up when the last of it is here."""
        for contact in contacts:
            self._missing[contact.block] -= 1
            group = self._separate.setdefault(contact.block, [])
            if contact.priced.arrives(self.limit_s):
                group.append(contact)
            if self._missing[contact.block] == 0:
                self._put_separate(contact.block, sorted(group, key=lambda c: c.client))
                del self._separate[contact.block]

    def add_accepted(self, accepted: Sequence[Contact]) -> None:
        """Takes all accepted replies of a round at once, in client order."""
        self.expect(accepted)
        for number, group in groupby(accepted, key=lambda contact: contact.block):
            self._put_separate(number, list(group))

    def mean(self, accepted: set[int], model: Tensors) -> Tensors:
        """The mean over the accepted clients, in the names, shapes and dtypes of `model`.

        Raises:
            RunError: if others were added up: a worker has priced them differently.
        """
        if self.clients != accepted:
            odd = sorted(self.clients ^ accepted)[:5]
            raise RunError(
                f"workers and server disagree on whether clients {odd} were in time; do their versions differ?"
            )
        mean = self.total.mean({name: t.dtype for name, t in model.items()})
        return SentWeights(mean, self._form).on_host().by_name(model)

    def _put_separate(self, number: int, group: Sequence[Contact]) -> None:
        block = BlockSum()
        for contact in group:
            weights = contact.take_weights()
            block.add(weights.tensors, 1.0 if self.alike else float(contact.answer.num_examples))
            self._form = weights.form
        clients = [contact.client for contact in group]
        self._put(number, clients, (block.tensors, block.weight, block.clients) if group else None)

    def _put(self, number: int, clients: Iterable[int], block: tuple[Mapping[str, Tensor], float, int] | None) -> None:
        self.clients.update(clients)
        self._early[number] = block
        while self._awaited and self._awaited[0] in self._early:
            ready = self._early.pop(self._awaited.popleft())
            if ready is not None:
                self.total.add(*ready)
