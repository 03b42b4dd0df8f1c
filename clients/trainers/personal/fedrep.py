"""FedRep: the private part is trained with the shared one frozen, then the shared part with the private one frozen.

Source: Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021, algorithm 1
(recalled; defaults as in Flower's baseline). The setting `private` selects the private part, here the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Any

from annotated_types import Ge, Le
from torch import nn

from clients.trainers.sgd import SGDRun, SGDTrainer
from devices.cost import ModelCost
from devices.meter import measure
from fedsim.errors import ConfigError
from fedsim.messages.updates import ClientUpdate
from fedsim.workloads.base import Workload


class FedRepRun(SGDRun):
    """The private part, then the shared part; reports the mean loss of each."""

    trainer: FedRepTrainer

    def fit(self) -> ClientUpdate:
        trainer, client = self.trainer, self.client
        if not trainer.private:
            return super().fit()
        trainer.check_settings(self.broadcast)
        self.reserve()
        metrics = {}
        if trainer.head_epochs:
            with trainer.only(client.model, private=True):
                batches = trainer.shuffled(client, "head-batches", trainer.head_epochs)
                metrics["head_loss"] = self.phase(private=True).train(batches)
        with trainer.only(client.model, private=False):
            metrics["train_loss"] = self.phase(private=False).train(self.batches())
        return ClientUpdate(client.client_id, client.num_examples, client.weights, metrics)

    def phase(self, private: bool) -> SGDRun:
        """Returns the training of the parameters that are not frozen just now, at the cost of their phase."""
        parameters = [p for p in self.client.parameters if p.requires_grad]
        client = replace(self.client, parameters=parameters, step_cost=self.trainer.phase_costs[private])
        return SGDRun(self.trainer, client, self.broadcast)


class FedRepTrainer(SGDTrainer):
    """Two phases of SGD per round. Without private tensors there is one phase and this is FedAvg, bit for bit.

    Frozen are parameters: statistics of batch norm follow the data in both phases.

    Args:
        head_epochs: of the private part, with the shared one frozen; before `local_epochs` of the shared part.
        sgd: arguments of SGDTrainer; learning rate, momentum and the like hold in both phases.
    """

    run = FedRepRun

    def __init__(self, head_epochs: Annotated[int, Ge(0), Le(10_000)], **sgd: Any):
        super().__init__(**sgd)
        self.head_epochs = head_epochs
        self.phase_costs: dict[bool, ModelCost] = {}  # of a step: on the private part, on the shared part

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds the cost of a step of both phases, which need no weight gradients of what is frozen.

        Raises:
            ConfigError: if tensors are private, but one of the phases has no parameter to train, or none that matters.
        """
        super().setup(workload, model, network)
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
            self.phase_costs[private] = replace(
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
