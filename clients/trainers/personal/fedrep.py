"""FedRep: the private part is trained with the shared one frozen, then the shared part with the private one frozen.

Source: Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021, algorithm 1
(recalled; defaults as in Flower's baseline). Which part is private says `private` in the settings, here the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Any

from annotated_types import Le
from torch import nn

from clients.trainers.base import ClientContext
from clients.trainers.sgd import SGDTrainer
from devices.cost import NetworkCost
from devices.meter import measure
from fedsim.errors import ConfigError
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.workloads.base import Workload


class FedRepTrainer(SGDTrainer):
    """Two phases of SGD per round. Without private tensors there is one phase and this is FedAvg, bit for bit.

    Frozen are parameters: statistics of batch norm follow the data in both phases.

    Args:
        head_epochs: of the private part, with the shared one frozen; before `local_epochs` of the shared part.
        sgd: arguments of SGDTrainer; learning rate, momentum and the like hold in both phases.
    """

    def __init__(self, head_epochs: Annotated[int, Le(10_000)], **sgd: Any):
        super().__init__(**sgd)
        if head_epochs < 0:
            raise ConfigError(f"trainer.head_epochs must be at least 0, got {head_epochs!r}")
        self.head_epochs = head_epochs
        self.networks: dict[bool, NetworkCost] = {}  # what a step costs: of the private part, of the shared part

    def setup(self, workload: Workload, model: nn.Module, network: NetworkCost) -> None:
        """Prices the steps of both phases, which need no weight gradients of what is frozen.

        Raises:
            ConfigError: if tensors are private, but one of the phases has no parameter to train, or none that matters.
        """
        if not self.private:
            return
        sample = workload.sample_on(next(model.parameters()).device, 4)
        for private in (True, False):
            what = "private" if private else "shared"
            with self.only(model, private):
                if not any(p.requires_grad for p in model.parameters()):
                    raise ConfigError(f"{type(self).__name__} has no {what} parameter to train; set private=[head]")
                if not workload.loss(deepcopy(model).eval(), sample).requires_grad:
                    raise ConfigError(
                        f"{type(self).__name__} has nothing to train in its {what} phase: the {what} parameters of "
                        f"model {type(model).__name__} take no part in its outputs; put those into private that do"
                    )
                cost = measure(model, workload.loss, workload.sample(4), network.name)
            self.networks[private] = replace(
                network,
                name=f"{network.name}, {what} part",
                backward_flops=cost.backward_flops,
                activation_bytes=cost.activation_bytes,
                step_bytes=cost.step_bytes,
                backward_share=cost.backward_flops / network.backward_flops,
            )

    @contextmanager
    def only(self, model: nn.Module, private: bool) -> Iterator[None]:
        """Freezes the private (or the shared) parameters, for as long as it lasts."""
        frozen = [p for name, p in model.named_parameters() if p.requires_grad and (name in self.private) != private]
        for p in frozen:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(True)

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        """The private part, then the shared part; reports the mean loss of each."""
        if not self.private:
            return super().fit(client, task)
        self.check_settings(task)
        self.reserve(client, task)
        metrics = {}
        if self.head_epochs:
            with self.only(client.model, private=True):
                batches = self.shuffled(client, "head-batches", self.head_epochs)
                metrics["head_loss"] = self.train(self.phase(client, private=True), task, batches)
        with self.only(client.model, private=False):
            metrics["train_loss"] = self.train(self.phase(client, private=False), task, self.batches(client, task))
        return ClientUpdate(client.client_id, len(client.data.train), client.weights, metrics)

    def phase(self, client: ClientContext, private: bool) -> ClientContext:
        """The client with the parameters and the price of one phase."""
        parameters = [p for p in client.parameters if p.requires_grad]
        return replace(client, parameters=parameters, network=self.networks[private])
