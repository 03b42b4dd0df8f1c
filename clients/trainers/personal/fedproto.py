"""FedProto's client: its features are pulled to the mean ones that all clients have of a class.

Source: Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022, algorithm 1
(recalled), and the authors' code: the distance is theirs, by example, and so is the prediction, the nearest prototype
among the client's own classes. Differs: a client's prototypes are the means of its features when it has trained, by one
more pass that is paid for, where the code collects them while the weights move. Features are what the last linear layer
reads. Records: see `fedsim.exchanges.fedproto`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from clients.trainers.base import ClientContext
from clients.trainers.sgd import Objective, SGDRun, SGDTrainer
from devices.cost import ModelCost
from fedsim.errors import ConfigError
from fedsim.exchanges.fedproto import CLASS, COUNT, MEAN, PROTOTYPES
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.messages.weights import bytes_of
from fedsim.workloads.base import JUDGED_AT_ONCE, Tensors, Workload
from fedsim.workloads.classification import classification


@contextmanager
def features_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the last linear layer reads while it lasts, of each pass [labels, features].

    Raises:
        ConfigError: if the model has none.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"method fedproto needs a linear layer at the end of model {type(model).__name__}")
    seen: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    try:
        yield seen
    finally:
        hook.remove()


class Near(Objective):
    """The workload's loss plus pull times the mean square between features and their class's prototype, if it has one.

    Args:
        pull: weight of the distance; 0 is the loss alone, bit for bit.
    """

    def __init__(self, pull: float):
        self.pull = pull

    def __call__(self, run: FedProtoRun, batch: Tensors) -> Tensor:
        model, workload = run.client.model, run.client.workload
        if not self.pull or not run.shared:
            return workload.loss(model, batch)
        with features_of(model) as seen:
            loss = workload.loss(model, batch)
        y = batch["y"].flatten()
        distances = (seen[-1] - run.table[y]).square().mean(1)  # [labels]
        return loss + self.pull * (distances * run.known[y]).mean()

    def held(self, run: FedProtoRun) -> dict[str, int]:
        """Names the prototypes, as they came and by class, and what a batch's distances take."""
        if not self.pull or not run.shared:
            return {}
        labels = min(run.trainer.batch_size, len(run.client.data.train)) * run.trainer.labels_of_one
        row_bytes = run.table[:1].nbytes
        return {PROTOTYPES: bytes_of(run.shared) + run.table.nbytes + 3 * labels * row_bytes}


class FedProtoRun(SGDRun):
    """SGD near the shared prototypes, and a last pass for the client's own.

    Attributes:
        shared: prototypes as they came; empty where there are none yet.
        table: these by class, [classes, features].
        known: whether a class has one, [classes] bool.
    """

    trainer: FedProtoTrainer

    def __init__(self, trainer: FedProtoTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.shared = broadcast.extras.get(PROTOTYPES, {})
        self.table, self.known = trainer.by_class(client, self.shared)

    def update(self, train_loss: float) -> ClientUpdate:
        """Returns what SGD answers, with the client's prototypes."""
        return replace(super().update(train_loss), extras={PROTOTYPES: self.trainer.prototypes(self.client)})


class NearestPrototype(nn.Module):
    """A network whose scores are the negative mean squares between features and prototypes.

    Args:
        model: the network.
        table: prototypes by class, [classes, features].
        known: classes that may be predicted, [classes] bool, one at least; others score less than all of these.
    """

    def __init__(self, model: nn.Module, table: Tensor, known: Tensor):
        super().__init__()
        self.model, self.table, self.known = model, table, known

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns scores in the shape of the network's logits, [batch, ..., classes]."""
        with features_of(self.model) as seen:
            logits: Tensor = self.model(*inputs)
        classes = self.known.nonzero().flatten()
        near = torch.stack([-(seen[-1] - self.table[c]).square().mean(1) for c in classes.tolist()], 1)
        scores = (near.amin(1, keepdim=True) - 1).repeat(1, len(self.table))
        scores[:, classes] = near
        return scores.view(logits.shape)


class FedProtoTrainer(SGDTrainer):
    """SGD near the prototypes of all clients; a client is judged by the prototype that is nearest to an example.

    Args:
        pull: lambda; 0 trains each client alone where weights are private, and is FedAvg where they are shared.
        predict: prototype takes the nearest one among the classes that the client has examples of, and its loss is of
            the softmax over negative distances; head takes the network's own outputs. So it does where no prototype of
            these classes came.
        sgd: arguments of SGDTrainer.
    """

    needs_classes = True
    shares_beside_weights = True
    run = FedProtoRun

    def __init__(
        self,
        pull: Annotated[float, Ge(0), Le(1e30)] = 1.0,
        predict: Literal["prototype", "head"] = "prototype",
        **sgd: Any,
    ):
        super().__init__(**sgd)
        self.objective, self.predict = Near(pull), predict
        self.labels_of_one, self.width = 1, 0

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds how many features there are.

        Raises:
            ConfigError: if the last linear layer takes no part in the outputs.
        """
        super().setup(workload, model, network)
        sample, own = workload.sample_on(next(model.parameters()).device, 2), deepcopy(model).eval()
        with torch.no_grad(), features_of(own) as seen:
            workload.loss(own, sample)
        if not seen:
            raise ConfigError(
                f"the last linear layer of model {type(model).__name__} takes no part in its outputs, so that "
                "method=fedproto finds no features; take another model"
            )
        self.labels_of_one, self.width = len(seen[-1]) // 2, seen[-1].shape[1]

    def by_class(self, client: ClientContext, shared: Tensors) -> tuple[Tensor, Tensor]:
        """Returns prototypes by class, [classes, features], and which classes have one, [classes] bool."""
        dtype, count = client.parameters[0].dtype, classification(client.workload).num_classes
        table = torch.zeros(count, self.width, dtype=dtype, device=client.device)
        known = torch.zeros(count, dtype=torch.bool, device=client.device)
        if shared:
            classes = shared[CLASS].to(client.device)
            table[classes], known[classes] = shared[MEAN].to(table), True
        return table, known

    @torch.no_grad()
    def prototypes(self, client: ClientContext) -> Tensors:
        """Returns the record of the client's own prototypes: one pass of its examples, without dropout."""
        data, workload, model = client.data.train, classification(client.workload), client.model
        client.log.judge(client.step_cost, len(data))
        model.eval()
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        for batch in data.gather_batches(torch.arange(len(data)), JUDGED_AT_ONCE):
            with features_of(model) as seen:
                workload.logits(model, batch)
            y = batch["y"].flatten()
            for label in y.unique().tolist():
                of_class = seen[-1][y == label]
                sums[label] = sums.get(label, 0.0) + of_class.sum(0)
                counts[label] = counts.get(label, 0) + len(of_class)
        model.train()
        means = torch.stack([sums[label] / counts[label] for label in sorted(sums)])
        count = torch.tensor([counts[label] for label in sorted(sums)], dtype=torch.float32)
        return {CLASS: torch.tensor(sorted(sums)), MEAN: means, COUNT: count}

    def evaluate(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Judges by the nearest prototype, or by the head."""
        table, known = self.by_class(client, broadcast.extras.get(PROTOTYPES, {}))
        own = torch.zeros_like(known)
        own[client.data.train.labels.flatten().unique().to(known.device)] = True
        if self.predict == "head" or not bool((known & own).any()):
            return super().evaluate(client, broadcast)
        return super().evaluate(replace(client, model=NearestPrototype(client.model, table, known & own)), broadcast)
