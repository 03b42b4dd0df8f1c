"""One client in one exchange: from the message to it to what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from devices.cost import Cost, Work
from fedsim.grid.pricing import Priced
from fedsim.messages.cohort import ClientAnswer, ClientTask
from fedsim.messages.records import ARRAYS, METRICS, NUM_EXAMPLES, record_of
from fedsim.messages.uplink import decompressed
from fedsim.messages.weights import SentWeights


@dataclass(slots=True)
class Contact:
    """A client that was sent a message.

    Attributes:
        message: the strategy's.
        block: of the cohort's fixed blocks, offline clients included.
        task: None for a client that was offline.
        answer: of a client that has not answered yet, or never will, one that failed.
        priced: what its part of the exchange costs.
        late: why its reply came after the round had closed; empty where it did not.
        start_s: simulated time at which it was sent the message.
        number: of the round in which that was; its draws are named by it and by `repeat`.
        repeat: how often it was sent out in that round before.
        is_planned: its answer holds the work that it will do, and it has still to do it.
        can_be_planned: its work could be told beforehand, also where it has done it since.
        trains_at_once: nobody could tell its work beforehand, and it may keep something for later rounds.
    """

    client: int
    message: Message
    block: int
    task: ClientTask | None = None
    answer: ClientAnswer = field(default_factory=lambda: ClientAnswer(-1, "failed"))
    priced: Priced = field(default_factory=lambda: Priced("failed"))
    late: str = ""
    start_s: float = 0.0
    number: int = 0
    repeat: int = 0
    is_planned: bool = False
    can_be_planned: bool = False
    trains_at_once: bool = False

    @property
    def phase(self) -> str:
        """Of its exchange: "train", "evaluate" or "query.<question>"."""
        return self.message.metadata.message_type

    @property
    def is_accepted(self) -> bool:
        """Whether the strategy gets its reply."""
        return self.priced.outcome == "completed" and not self.late

    @property
    def cost(self) -> Cost:
        """Seconds and joules until its end."""
        return self.priced.cost

    @property
    def end_s(self) -> float:
        """Simulated time at which its reply is there, or at which it is gone."""
        return self.start_s + self.cost.total_s + self.priced.paused_s

    @property
    def spent(self) -> Work:
        """Its work, with the bytes that went before it stopped."""
        work, cost = self.answer.work, self.cost
        if cost.down_share == 1 and cost.up_share == 1:
            return work
        down_bytes, up_bytes = work.down_bytes * cost.down_share, work.up_bytes * cost.up_share
        return replace(work, down_bytes=round(down_bytes), up_bytes=round(up_bytes))

    @property
    def weights(self) -> SentWeights | None:
        """The client's weights, whole again if they came compressed; None in the sum of its block."""
        if self.answer.weights is None or self.task is None:
            return None
        return decompressed(self.answer.weights, self.task.broadcast.weights)

    def take_weights(self) -> SentWeights:
        """The weights, once: nothing holds them any longer."""
        weights = self.weights
        assert weights is not None, "this client sent no weights"
        self.answer = self.answer.without_weights()
        return weights

    def reply(self) -> Message:
        """The client's reply as Flower's strategies take it."""
        answer = self.answer
        content: dict[str, ArrayRecord | ConfigRecord | MetricRecord] = {}
        if (weights := self.weights) is not None:
            assert self.task is not None
            content[ARRAYS] = record_of(weights.by_name(self.task.broadcast.weights))
        if self.phase in ("train", "evaluate"):
            content[METRICS] = MetricRecord({NUM_EXAMPLES: answer.num_examples, **answer.metrics})
        extras = {name: record_of(tensors) for name, tensors in answer.extras.items()}
        return Message(RecordDict({**content, **extras}), reply_to=self.message)
