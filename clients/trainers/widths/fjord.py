"""FjORD: ordered dropout. In every step a client trains a random width up to the widest that its device can hold.

Source: Horvath et al., "FjORD: Fair and Accurate Federated Learning under heterogeneous targets with Ordered Dropout",
NeurIPS 2021, section 3 (recalled); the step with self-distillation as in Flower's baseline `fjord`, by one of the
authors: the widest network learns from the labels, the narrow one from the widest. Differs: models with batch norms are
refused, for which the authors keep statistics by width; a step that draws the widest itself takes one pass, where the
baseline takes a second whose gradient is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Gt, Interval, MinLen
from torch import Tensor, nn
from torch.func import functional_call

from clients.trainers.base import ClientContext
from clients.trainers.sgd import Objective
from clients.trainers.widths.subnet import SubnetRun, SubnetTrainer
from devices.compression.channel_graph import BATCH_NORMS
from devices.compression.channels import Kept
from devices.compression.distil import Remembering, divergence
from devices.cost import ModelCost
from fedsim.errors import ConfigError
from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors, Workload

BOTH_COPIES = 1.0  # as large as the weights: the gradients of one network, while those of the other are made
WIDTH = "width"  # beside the examples of a batch: which of the client's widths its step trains


class Nested(Objective):
    """CE(widest, labels) + (1 - alpha) CE(narrow, labels) + alpha T^2 KL(widest || narrow); logs its own passes.

    Only one of the networks runs where the widest was drawn, or alpha is 0.

    Args:
        alpha: see `distil` of FjORDTrainer.
        temperature: T.
    """

    def __init__(self, alpha: float, temperature: float):
        self.alpha, self.temperature = alpha, temperature

    def __call__(self, run: FjORDRun, batch: Tensors) -> Tensor:
        client, slices, size = run.client, run.trainer.slices, run.client.workload.batch_size_of(batch)
        workload, choice = client.workload, run.widths[int(batch[WIDTH])]
        if choice is run.channels:
            client.log.add(client.step_cost, size, forwards=1, backwards=1)
            return workload.loss(client.model, batch)
        client.log.add(slices.cost(choice), size, forwards=1, backwards=1)
        tensors = slices.groups.within(dict(client.model.named_parameters()), choice, run.channels)
        network = slices.network(choice).train()
        narrow = Remembering(lambda x: functional_call(network, tensors, (x,)))
        if not self.alpha:
            return workload.loss(narrow, batch)  # type: ignore[arg-type]
        client.log.add(client.step_cost, size, forwards=1, backwards=1)
        widest = Remembering(client.model)
        loss = workload.loss(widest, batch)  # type: ignore[arg-type]
        if self.alpha < 1:
            loss = loss + (1 - self.alpha) * workload.loss(narrow, batch)  # type: ignore[arg-type]
        else:
            narrow(batch["x"])
        return loss + self.alpha * divergence(narrow.logits, widest.logits, self.temperature)


class FjORDRun(SubnetRun):
    """Subnet training with a width drawn for every step.

    Attributes:
        widths: what the client may train, narrow to wide; the last is all that it has.
    """

    trainer: FjORDTrainer

    def __init__(self, trainer: FjORDTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.widths = trainer.widths(self.channels)
        for choice in self.widths[:-1]:
            client.seed_dropout(trainer.slices.network(choice))

    def batches(self) -> Iterator[Tensors]:
        """Yields the batches of plain SGD, each with the number of a width."""
        draw = self.client.stream("widths")
        for batch in super().batches():
            yield {**batch, WIDTH: torch.randint(len(self.widths), (), generator=draw)}

    def log_step(self, batch: int) -> None:
        """Reports nothing: the objective has logged what ran."""

    def reserve(self) -> None:
        """Reserves a step; with self-distillation a narrow network's activations wait beside those of the widest."""
        super().reserve()
        trainer, cost = self.trainer, self.client.step_cost
        if len(self.widths) == 1 or not trainer.distil:
            return
        batch, narrow = min(trainer.batch_size, len(self.client.data.train)), trainer.slices.cost(self.widths[-2])
        more = batch * narrow.activation_bytes + round(BOTH_COPIES * cost.parameter_bytes)
        self.client.log.reserve(trainer.step_bytes(cost, batch, self.copies()) + more)

    def copies(self) -> float:
        """Counts, for a narrow step, its weights and their gradients, each below three quarters of the whole."""
        return super().copies() + (1.5 if len(self.widths) > 1 else 0.0)


class FjORDTrainer(SubnetTrainer):
    """Subnet training with a width drawn for every step.

    Args:
        levels: keep ratios to draw from; a client uses those that its own part contains, and the part itself.
        distil: alpha in [0, 1], share of the widest network's outputs in what a narrow one learns, the rest is labels.
            Above 0, every step also trains the widest network, from the labels; 0 is ordered dropout alone, which does
            not run that one.
        temperature: of the divergence.
        sgd: arguments of SGDTrainer.
    """

    run = FjORDRun

    def __init__(
        self,
        levels: Annotated[Sequence[Annotated[float, Interval(gt=0, le=1)]], MinLen(1)],
        distil: Annotated[float, Interval(ge=0, le=1)] = 1.0,
        temperature: Annotated[float, Gt(0)] = 1.0,
        **sgd: Any,
    ):
        super().__init__(**sgd)
        self.levels, self.distil, self.objective = sorted(levels), distil, Nested(distil, temperature)
        self.needs_classes = distil > 0

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Prepares as for every part; batch norms would need statistics for each width.

        Raises:
            ConfigError: for a model with batch norms.
        """
        if any(isinstance(module, BATCH_NORMS) for module in model.modules()):
            raise ConfigError(
                f"{type(self).__name__} trains several widths, whose batch statistics differ; take a model with group "
                "norms (model.norm=group)"
            )
        super().setup(workload, model, network)

    def widths(self, kept: Kept) -> list[Kept]:
        """Returns what a client with these channels may train, narrow to wide; the last is all that it has."""
        groups = self.slices.groups
        choices = [groups.first(level) for level in self.levels]
        inside = [c for c in choices if all(len(c[name]) <= len(kept[name]) for name in kept)]
        return [c for c in inside if any(len(c[name]) < len(kept[name]) for name in kept)] + [kept]
