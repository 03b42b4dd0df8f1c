"""What every local trainer is given and must answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clients.state import ClientState
from devices.bounds import Checked
from devices.cost import NetworkCost, Passes, Work
from devices.meter import inference_memory_bytes
from devices.profile import DeviceProfile
from fedsim.errors import ConfigError
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.seeding import torch_generator
from fedsim.workloads.base import JUDGED_AT_ONCE, ClientData, Tensors, Workload

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
        self.judged: dict[str, NetworkCost] = {}  # networks that were judged: "" is the client's own, others by name
        # By identity of the network: hashing its fields at every step would cost more than the counting.
        self._passes: dict[tuple[int, int], tuple[NetworkCost, list[int]]] = {}

    def hold(self, name: str, held_bytes: int) -> None:
        """Declares what stays in memory from now on, beside all that is reserved; once per name."""
        self._held[name] = held_bytes

    def reserve(self, peak_bytes: int) -> None:
        """Declares memory before it is used, without what `hold` has declared.

        Raises:
            OutOfMemoryError: when the device has less.
        """
        peak_bytes += sum(self._held.values())
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_bytes)
        if peak_bytes > self.memory_bytes:
            raise OutOfMemoryError(f"needs {peak_bytes} bytes at its peak, the device has {self.memory_bytes}")

    def store(self, stored_bytes: int) -> None:
        """Declares what the device keeps between rounds beside the tensors of its state: examples that they name."""
        self.stored_bytes = stored_bytes

    def add(self, network: NetworkCost, batch: int, forwards: int = 0, backwards: int = 0) -> None:
        """Counts passes through `network` with batches of `batch` examples."""
        key = (id(network), batch)
        if key not in self._passes:
            self._passes[key] = (network, [0, 0])
        counts = self._passes[key][1]
        counts[0] += forwards
        counts[1] += backwards

    def add_examples(self, network: NetworkCost, count: int, batch: int, backward: bool = False) -> None:
        """Counts one pass of each of `count` examples, in batches of `batch` and a smaller last one."""
        full, rest = divmod(count, batch)
        for size, passes in ((batch, full), (rest, 1 if rest else 0)):
            if passes:
                self.add(network, size, forwards=passes, backwards=passes if backward else 0)

    def judge(self, network: NetworkCost, count: int) -> None:
        """Declares the memory and the passes of judging `network` on so many examples.

        Memory: weights, buffers, the batch and the activations that an inference of it holds at once.

        Raises:
            OutOfMemoryError: when the device has less.
        """
        if count:
            batch = min(count, JUDGED_AT_ONCE)
            self.reserve(inference_memory_bytes(network, batch))
            self.add_examples(network, count, JUDGED_AT_ONCE)

    def work(self, storage_bytes: int = 0) -> Work:
        """All that was counted, in the order in which it first came."""
        passes = tuple(Passes(network, batch, *counts) for (_, batch), (network, counts) in self._passes.items())
        return Work(passes, self.peak_memory_bytes, storage_bytes + self.stored_bytes)


@dataclass
class ClientContext:
    """One client as its trainer sees it in one round.

    Attributes:
        model: holds the broadcast weights when the trainer starts, in training mode; one object reused for all clients.
        parameters: the model's trainable parameters.
        weights: the model's live weights and buffers by name, detached: what a trainer usually returns.
        network: what one example costs in `model`.
        state: what this client kept from earlier rounds; change it in place.
        log: where the trainer reports its work.
    """

    client_id: int
    round: int
    seed: int
    workload: Workload
    model: nn.Module
    parameters: list[Tensor] = field(repr=False)
    weights: Tensors = field(repr=False)
    network: NetworkCost
    profile: DeviceProfile
    state: ClientState
    device: torch.device
    log: WorkLog = field(repr=False)
    data: ClientData = field(repr=False)

    def stream(self, *names: str | int) -> torch.Generator:
        """Random numbers for one purpose of this client in this round; other purposes and clients never shift them."""
        return torch_generator(self.seed, *names, self.round, self.client_id)


class LocalTrainer(Checked, group="trainer", error=ConfigError):
    """What a client does with a broadcast. Trainers are stateless: state belongs to `client.state`.

    Attributes:
        private: names in the model's state dict of what stays with each client; known before `setup`. The model and
            `task.weights` hold the client's own values of them, and an update may hold the whole model: the app sends
            the shared part and stores the rest.
        own_network: the trainer puts the broadcast into a network of its own, whose shapes may differ from the model's.
    """

    private: frozenset[str] = frozenset()
    own_network = False

    def setup(self, workload: Workload, model: nn.Module, network: NetworkCost) -> None:
        """Called once per process, before any client: for what depends on the model only, such as its price."""

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        """Trains on the client's data and reports the work in `client.log`."""
        raise NotImplementedError(f"{type(self).__name__} does not train")

    def fit_together(self, clients: Sequence[ClientContext], tasks: Sequence[Broadcast]) -> list[ClientUpdate]:
        """Trains several clients at once (`engine.batch_clients`); called where `reason_against_together` is empty."""
        raise NotImplementedError(f"{type(self).__name__} trains one client after the other")

    def reason_against_together(self, model: nn.Module) -> str:
        """Why this trainer cannot train several clients at once; empty if it can."""
        return f"{type(self).__name__} trains one client after the other"

    def ends_in_one(self, examples: int) -> bool:
        """Whether a client with so many examples trains on a batch of one of them; False where that is not known."""
        return False

    def evaluate(self, client: ClientContext, task: Broadcast) -> dict[str, float]:
        """Metrics of the client's model on its own held-out part; empty when it has none."""
        data = client.data.test
        if len(data):
            client.log.judge(client.network, len(data))
            client.log.judged[""] = client.network
        return client.workload.evaluate(client.model, data)

    def answer(self, client: ClientContext, question: str, task: Broadcast) -> dict[str, Tensors]:
        """Side exchanges beside training: records by name.

        Raises:
            KeyError: for a question this trainer does not know.
        """
        raise KeyError(
            f"{type(self).__name__} has no answer to {question!r}; take a strategy and trainer of one method"
        )
