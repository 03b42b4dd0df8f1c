"""APFL: each client judges a mixture of the global model and one of its own, and learns how much of each.

Source: Deng et al., "Adaptive Personalized Federated Learning", 2020, algorithm 1 (recalled; when alpha moves: the
authors' code, FedTorch). Differs from that code: weights are mixed, as in the algorithm, where it mixes outputs; alpha
has no penalty. State: personal.*, by name, weights and statistics; mixing.alpha, [] float64.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn

from clients.trainers.base import ClientContext, Gradients
from clients.trainers.sgd import Arrays, SGDRun, SGDTrainer
from devices.cost import ModelCost
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload

PERSONAL, MIXING, ALPHA = "personal", "mixing", "alpha"  # groups of a client's state, and the name in the second
COPIES = 3.0  # the personal and the mixed model, and the gradient of the former


class APFLRun(SGDRun):
    """Each batch moves the personal model v along the mixture's gradient, then the global one w along its own.

    Attributes:
        own: weights of v, in the order of the model's parameters.
        mixed: those of the network that holds the mixture.
        alpha: share of v in it.
        velocity: of v.
    """

    trainer: APFLTrainer

    def __init__(self, trainer: APFLTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.mixed = [p for p in trainer.network.parameters() if p.requires_grad]
        self.own: list[Tensor] = []
        self.alpha, self.is_first_step = trainer.alpha_of(client), True
        self.velocity: Arrays | None = None

    def fit(self) -> ClientUpdate:
        trainer, client = self.trainer, self.client
        personal, state = trainer.personal_model(client), trainer.network.state_dict()
        self.own = [personal[name].clone() for name in trainer.trained]
        statistics = {name: state[name] for name in trainer.statistics}
        for name, t in statistics.items():
            t.copy_(personal[name])
        client.seed_dropout(trainer.network)
        update = super().fit()
        client.state.store(PERSONAL, {**dict(zip(trainer.trained, self.own, strict=True)), **statistics})
        client.state.store(MIXING, {ALPHA: torch.tensor(self.alpha, dtype=torch.float64)})
        return replace(update, metrics={**update.metrics, "mixing": self.alpha})

    def gradients(self, batch: Tensors) -> tuple[Gradients, Tensor]:
        """Trains the personal model, then returns the direction of the global one."""
        self.train_personal(batch)
        return super().gradients(batch)

    def train_personal(self, batch: Tensors) -> None:
        """Steps v along alpha g, where g is the gradient at alpha v + (1 - alpha) w; in the first step alpha moves."""
        trainer, client, alpha = self.trainer, self.client, self.alpha
        with torch.no_grad():
            for m, v, w in zip(self.mixed, self.own, client.parameters, strict=True):
                m.copy_(w).lerp_(v, alpha)
        loss = client.workload.loss(trainer.network, batch)
        gradients = torch.autograd.grad(loss, self.mixed, allow_unused=True)
        self.log_step(self.size_of(batch))
        self.note(personal_loss=loss)
        lr = trainer.learning_rate(client, self.broadcast)
        if trainer.adaptive and self.is_first_step:
            self.alpha = min(1.0, max(0.0, alpha - lr * self.slope(gradients)))
        self.is_first_step = False
        own = [None if g is None else alpha * g for g in gradients]
        self.velocity = trainer.step(self.own, own, trainer.rate_on(client.device, lr), self.velocity)

    @torch.no_grad()
    def slope(self, gradients: Gradients) -> float:
        """Returns the derivative of the mixture's loss by alpha: the product of v - w with its gradient."""
        every = zip(self.own, self.client.parameters, gradients, strict=True)
        products = [torch.sum((v - w) * g, dtype=torch.float64) for v, w, g in every if g is not None]
        return float(torch.stack(products).sum())

    def copies(self) -> float:
        """Counts the personal model, its gradient and momentum, and the mixture."""
        return super().copies() + COPIES + (1.0 if self.trainer.momentum else 0.0)


class APFLTrainer(SGDTrainer):
    """SGD of the global model, bit for bit FedAvg's, and beside it of a personal one inside a mixture of both.

    A client is judged with alpha v + (1 - alpha) w of its own v and the global w, statistics mixed alike. v begins as
    the weights that the client receives in its first round; one that has never trained is judged with the global model.

    Args:
        alpha: share of the personal model, at first where it is adaptive. With 0, not adaptive, clients are judged with
            FedAvg's model.
        adaptive: move alpha along its gradient, by the learning rate, on the first batch of each round.
        sgd: arguments of SGDTrainer; they hold for both models.
    """

    run = APFLRun
    network: nn.Module  # for the mixture; loaded anew for each client

    def __init__(self, alpha: Annotated[float, Interval(ge=0, le=1)] = 0.5, adaptive: bool = True, **sgd: Any):
        super().__init__(**sgd)
        self.alpha, self.adaptive = alpha, adaptive
        self.trained: list[str] = []  # names of parameters
        self.statistics: list[str] = []  # and of what else the mixture has of its own

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Makes the network for the mixture."""
        super().setup(workload, model, network)
        self.network = deepcopy(model).train()
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.statistics = [name for name in model.state_dict() if name not in parameters]

    def alpha_of(self, client: ClientContext) -> float:
        """Returns the client's share of its personal model; the setting where it has never trained."""
        first = torch.tensor(self.alpha, dtype=torch.float64)
        return float(client.state.restored(MIXING, {ALPHA: first})[ALPHA])

    def personal_model(self, client: ClientContext) -> Tensors:
        """Returns what the client keeps of its personal model; what it has received where it has never trained."""
        return client.state.restored(PERSONAL, {n: client.weights[n] for n in [*self.trained, *self.statistics]})

    @torch.no_grad()
    def personalise(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Mixes the client's model with the received one."""
        alpha = self.alpha_of(client)
        for name, own in self.personal_model(client).items():
            if own.is_floating_point():
                client.weights[name].lerp_(own, alpha)
        return {}
