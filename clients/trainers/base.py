"""What every local trainer is given and must answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clients.state import ClientState
from devices.bounds import Checked
from devices.cost import ModelCost, Passes, Work
from devices.meter import inference_memory_bytes
from devices.profile import DeviceProfile
from fedsim.errors import ConfigError
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.models.dropout import seed_dropout
from fedsim.seeding import derive
from fedsim.workloads.base import JUDGED_AT_ONCE, ClientData, Examples, Tensors, Workload

if TYPE_CHECKING:
    from clients.live_model import LiveModel
    from clients.slots.slot import Slot

Gradients = Sequence[Tensor | None]  # of each parameter; None where the pass did not use it
RECEIVED = "received weights"  # what a trainer or the uplink holds, see `WorkLog.hold`


class OutOfMemoryError(RuntimeError):
    """The device cannot hold what the trainer asked for; counted as an outcome, never a crash of the run."""


class WorkLog:
    """Collects the facts of one client's round: passes through networks and the memory they need.

    Args:
        memory_bytes: what the device has for training.
    """

    def __init__(self, memory_bytes: int):
        self.memory_bytes = memory_bytes
        self._held: dict[str, int] = {}
        self.peak_memory_bytes = 0
        self.stored_bytes = 0
        self.features_bytes = 0  # that the device keeps for its front-end, see `clients.front_end`
        self.fetched_bytes = 0  # that it downloads beside what the strategy sends
        self.judged: dict[str, ModelCost] = {}  # networks that were judged: "" is the client's own, others by name
        self.saw_everything = False  # see `ClientContext.oracle`
        # By identity of the cost: hashing its fields at every step would take longer than the counting.
        self._passes: dict[tuple[int, int], tuple[ModelCost, list[int]]] = {}

    def hold(self, name: str, held_bytes: int) -> None:
        """Reports what stays in memory from now on, beside all that is reserved; once per name."""
        self._held[name] = held_bytes

    def reserve(self, peak_bytes: int) -> None:
        """Reports memory before it is used, without what `hold` has reported.

        Raises:
            OutOfMemoryError: when the device has less.
        """
        peak_bytes += sum(self._held.values())
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_bytes)
        if peak_bytes > self.memory_bytes:
            raise OutOfMemoryError(f"needs {peak_bytes} bytes at its peak, the device has {self.memory_bytes}")

    def store(self, stored_bytes: int) -> None:
        """Reports what the device keeps between rounds beside the tensors of its state: the examples that they name."""
        self.stored_bytes = stored_bytes

    def add(self, cost: ModelCost, batch: int, forwards: int = 0, backwards: int = 0) -> None:
        """Counts passes of batches of `batch` examples through the network that has this cost."""
        key = (id(cost), batch)
        if key not in self._passes:
            self._passes[key] = (cost, [0, 0])
        counts = self._passes[key][1]
        counts[0] += forwards
        counts[1] += backwards

    def add_examples(self, cost: ModelCost, count: int, batch: int, backward: bool = False) -> None:
        """Counts one pass of each of `count` examples, in batches of `batch` and a smaller last one."""
        full, rest = divmod(count, batch)
        for size, passes in ((batch, full), (rest, 1 if rest else 0)):
            if passes:
                self.add(cost, size, forwards=passes, backwards=passes if backward else 0)

    def judge(self, cost: ModelCost, count: int) -> None:
        """Reports the memory and the passes of judging a network of this cost on so many examples.

        Memory: weights, buffers, the batch and the activations that an inference of it holds at once.

        Raises:
            OutOfMemoryError: when the device has less.
        """
        if count:
            batch = min(count, JUDGED_AT_ONCE)
            self.reserve(inference_memory_bytes(cost, batch))
            self.add_examples(cost, count, JUDGED_AT_ONCE)

    def work(self, storage_bytes: int = 0, down_bytes: int = 0, up_bytes: int = 0) -> Work:
        """Returns all that was counted, in the order in which it first came, and the bytes of the client's transfers.

        Args:
            storage_bytes: of the client's state.
            down_bytes: what it downloaded.
            up_bytes: what it will upload.
        """
        passes = tuple(Passes(cost, batch, *counts) for (_, batch), (cost, counts) in self._passes.items())
        stored_bytes = storage_bytes + self.stored_bytes + self.features_bytes
        return Work(passes, self.peak_memory_bytes, stored_bytes, down_bytes + self.fetched_bytes, up_bytes)


class ClientWorkload:
    """A workload as one client sees it in one round: all of it but the examples of others and those of later parts.

    The examples of others are those of the server, too. It stands in the place of the `Workload`; whoever needs the
    rest asks `ClientContext.oracle`, which marks results.

    Args:
        whole: the workload with everybody's data.
        client_id: whose examples may be seen; None: nobody's, as in a trainer's set-up.
        round: of which the part is the last that has arrived.
    """

    def __init__(self, whole: Workload, client_id: int | None, round: int):
        self.whole, self.client_id, self.round = whole, client_id, round

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # `isinstance` asks for it: a view of a classification is one
        return type(self.whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    @property
    def test(self) -> Examples:
        """Refuses the server's examples."""
        raise self._refusal("the test examples")

    def client_data(self, client_id: int) -> ClientData:
        """Returns the client's own data."""
        self._check(client_id)
        return self.whole.client_data(client_id)

    def client_part(self, client_id: int, part: int) -> ClientData:
        """Returns a part of the client's own data that has arrived."""
        self._check(client_id, part)
        return self.whole.client_part(client_id, part)

    def arrivals(self, client_id: int, part: int) -> Tensor:
        """Returns names of the examples of a part of the client's own data that has arrived."""
        self._check(client_id, part)
        return self.whole.arrivals(client_id, part)

    def recall(self, client_id: int, names: Tensor) -> Tensors:
        """Returns examples that the client has kept."""
        self._check(client_id)
        return self.whole.recall(client_id, names)

    def _check(self, client_id: int, part: int = 0) -> None:
        if client_id != self.client_id or part > self.whole.part(self.round):
            raise self._refusal(f"examples of client {client_id}, part {part}")

    def _refusal(self, what: str) -> OracleError:
        who = "the set-up of a trainer" if self.client_id is None else f"client {self.client_id} in round {self.round}"
        return OracleError(
            f"{who} asks for {what}, which it does not have; a trainer that may see everything takes them from "
            "client.oracle()"
        )


class OracleError(RuntimeError):
    """A trainer asked for data that its client cannot have, without saying that it is an oracle."""


@dataclass
class ClientContext:
    """One client as its trainer sees it in one round.

    Attributes:
        workload: without the data of other clients and of later rounds.
        model: holds the broadcast weights when the trainer starts, in training mode; one object reused for all clients.
        parameters: the model's trainable parameters.
        weights: the model's live weights and buffers by name, detached: what a trainer usually returns.
        step_cost: what one example costs in `model`.
        state: what this client kept from earlier rounds; change it in place.
        log: where the trainer reports its work.
        live: `model` as it lies in memory.
        slot: where that is, if it can record steps.
        repeat: how often it was sent out in this round before; draws differ.
    """

    client_id: int
    round: int
    seed: int
    workload: Workload
    model: nn.Module
    parameters: list[Tensor] = field(repr=False)
    weights: Tensors = field(repr=False)
    step_cost: ModelCost
    profile: DeviceProfile
    state: ClientState
    device: torch.device
    log: WorkLog = field(repr=False)
    data: ClientData = field(repr=False)
    live: LiveModel = field(repr=False)
    slot: Slot | None = field(default=None, repr=False)
    repeat: int = 0

    @property
    def num_examples(self) -> int:
        """Returns how many examples the client counts for in a mean of updates."""
        return self.workload.num_examples(self.data.train)

    def derived(self, *names: str | int) -> int:
        """Returns a seed for one purpose of this client and round."""
        again = (self.repeat,) if self.repeat else ()
        return derive(self.seed, *names, self.round, self.client_id, *again)

    def stream(self, *names: str | int) -> torch.Generator:
        """Returns random numbers for one purpose of this client and round; no other purpose or client shifts them."""
        return torch.Generator().manual_seed(self.derived(*names))

    def seed_dropout(self, network: nn.Module) -> None:
        """Lets a network's dropout begin anew, for this client and round; a trainer's own network needs that."""
        seed_dropout(network, self.derived("dropout"))

    def marked(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns metrics as numbers, with the mark `oracle` where the client has seen what no federation could."""
        numbers = {name: float(value) for name, value in metrics.items()}
        return {**numbers, "oracle": 1.0} if self.log.saw_everything else numbers

    def oracle(self) -> Workload:
        """Returns the workload with everybody's data, which no federation sees: results get the metric `oracle`."""
        self.log.saw_everything = True
        return self.workload.whole if type(self.workload) is ClientWorkload else self.workload  # type: ignore[comparison-overlap]


class LocalRun:
    """One client in one round, and all that its training owns; made by `LocalTrainer.start` and dropped afterwards."""

    def __init__(self, client: ClientContext, broadcast: Broadcast):
        self.client, self.broadcast = client, broadcast

    def fit(self) -> ClientUpdate:
        """Trains on the client's data and reports the work in `client.log`."""
        raise NotImplementedError(f"{type(self).__name__} does not train")


class LocalTrainer(Checked, group="trainer", error=ConfigError):
    """What a client does with a broadcast. After `setup` a trainer never changes.

    What belongs to the client that trains just now is in a `LocalRun`, what a client keeps is in `client.state`.

    Attributes:
        private: names in the model's state dict of what stays with each client; known before `setup`. The model and
            `broadcast.weights` hold the client's own values of them, and an update may hold the whole model: the app
            sends the shared part and stores the rest.
        own_network: the trainer puts the broadcast into a network of its own, whose shapes may differ from the model's.
        needs_classes: the trainer can train on classification workloads only.
        shares_beside_weights: its updates hold records that a federation can learn from without any weights, so that
            all tensors may be private.
    """

    private: frozenset[str] = frozenset()
    own_network = False
    needs_classes = False
    shares_beside_weights = False

    def integer_bits(self, round: int, profile: DeviceProfile) -> int:
        """Returns the bits in which the network that a device judges multiplies, which price it; 32: floats."""
        return 32

    @property
    def device_reads(self) -> Mapping[str, str]:
        """Returns what clients decide by their device, in words, by the figure that they read; see `ServerHalf`."""
        return {}

    @property
    def reads_rounds(self) -> str:
        """Returns what clients decide by the number of rounds, in words; empty where nothing."""
        return ""

    def check_hooks(self) -> None:
        """Refuses functions that a class below has and that nothing would call."""

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Prepares, once per process and before any client, what depends on the model only, such as its cost."""

    def start(self, client: ClientContext, broadcast: Broadcast) -> LocalRun:
        """Begins one client's round of training."""
        raise NotImplementedError(f"{type(self).__name__} does not train")

    def fit(self, client: ClientContext, broadcast: Broadcast) -> ClientUpdate:
        """Trains on the client's data and reports the work in `client.log`."""
        return self.start(client, broadcast).fit()

    def plan_work(self, client: ClientContext, broadcast: Broadcast) -> bool:
        """Reports in `client.log` what `fit` would, without training; returns False where that is not known.

        Only a trainer whose clients keep nothing between rounds can tell. The model holds no particular weights.

        Raises:
            OutOfMemoryError: as `fit`.
        """
        return False

    def fit_together(self, clients: Sequence[ClientContext], broadcasts: Sequence[Broadcast]) -> list[ClientUpdate]:
        """Trains several clients at once (`engine.batch_clients`); called where `reason_against_together` is empty."""
        raise NotImplementedError(f"{type(self).__name__} trains one client after the other")

    def reason_against_together(self, model: nn.Module) -> str:
        """Returns why this trainer cannot train several clients at once; empty if it can."""
        return f"{type(self).__name__} trains one client after the other"

    def ends_in_one(self, examples: int) -> bool:
        """Returns whether a client with so many examples trains on a batch of one; False where that is not known."""
        return False

    def personalise(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Makes the received model the client's own, before it is compressed and judged; returns metrics of that.

        What changes `client.weights` belongs here: `evaluate` may be given a compressed copy of the model. Not called
        for a client without held-out examples.
        """
        return {}

    def evaluate(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Judges the client's model on its own held-out part, here as it is; returns no metrics when it has none."""
        data = client.data.test
        if len(data):
            client.log.judge(client.step_cost, len(data))
            client.log.judged[""] = client.step_cost
        return client.workload.evaluate(client.model, data)

    def answer(self, client: ClientContext, question: str, broadcast: Broadcast) -> dict[str, Tensors]:
        """Answers a side exchange beside training with records by name.

        Raises:
            KeyError: for a question this trainer does not know.
        """
        raise KeyError(
            f"{type(self).__name__} has no answer to {question!r}; take a strategy and trainer of one method"
        )
