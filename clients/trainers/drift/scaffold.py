"""SCAFFOLD: steps corrected by control variates, of which each client keeps its own.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, algorithm 1
(recalled; its update rules were compared with a public summary). Step: y <- y - lr (g(y) - c_i + c). Then option I:
c_i+ = gradient at x; option II: c_i+ = c_i - c + (x - y) / (K lr) after K steps, which is the mean gradient of the way.
Differs: variates are zero, and not sent, until there are some; batch statistics and dropout are switched off in the
passes of option I; weights that stay on the device are not corrected. Records: see `fedsim.exchanges.scaffold`. State:
reply.variate.*, by weight: c_i.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clients.trainers.base import RECEIVED, ClientContext
from clients.trainers.drift.corrected import CorrectedRun, CorrectedTrainer
from fedsim.errors import ConfigError
from fedsim.exchanges.scaffold import VARIATE
from fedsim.messages.records import OF_REPLY
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors

OWN = f"{OF_REPLY}variate"  # group of a client's state


class ScaffoldRun(CorrectedRun):
    """A round of corrected steps, and the client's next variate.

    Attributes:
        own: c_i, by weight; empty where it is zero.
        gradient: at the received weights, by weight, with option I.
    """

    trainer: ScaffoldTrainer

    def __init__(self, trainer: ScaffoldTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.own, self.gradient = self.kept(OWN), dict[str, Tensor]()
        common = broadcast.extras.get(VARIATE, {})
        for name in trainer.shared if self.own or common else ():
            c, c_i = common.get(name), self.own.get(name)
            here = torch.zeros_like(client.weights[name]) if c is None else c.to(client.device)
            self.correction[name] = here if c_i is None else here - c_i

    def take_steps(self, batches: Iterable[Any]) -> None:
        """Takes the steps of the round, with option I after a pass for the gradient where they begin."""
        if self.trainer.option == 1:
            self.gradient = self.gradient_here()
        super().take_steps(batches)

    def update(self, train_loss: float) -> ClientUpdate:
        """Returns the weights, and by how much the client's variate changes."""
        found = super().update(train_loss)
        found.extras[VARIATE] = self.renewed()
        return found

    def renewed(self) -> Tensors:
        """Stores the next variate, one weight after the other, and returns its change."""
        changes, way = {}, self.steps * self.trainer.learning_rate(self.client, self.broadcast)
        for name in self.trainer.shared:
            if self.trainer.option == 1:
                new = self.gradient.pop(name)
            else:
                new = (self.broadcast.weights[name] - self.client.weights[name]) / way
                if self.correction:
                    new -= self.correction.pop(name)
            self.client.state.store(OWN, {name: new})
            changes[name] = new - self.own.pop(name) if name in self.own else new
        return changes

    def gradient_here(self) -> Tensors:
        """Returns the gradient of the client's loss at the weights as they are, weight decay included."""
        client, trainer, count = self.client, self.trainer, len(self.client.data.train)
        parameters = dict(zip(trainer.order, client.parameters, strict=True))
        total = {name: trainer.weight_decay * parameters[name].detach() for name in trainer.shared}
        quiet = [m for m in client.model.modules() if m.training and not isinstance(m, nn.RNNBase)]
        for module in quiet:  # recurrent layers have no backward pass on a card but while they train
            module.training = False
        for batch in client.data.train.gather_batches(torch.arange(count), trainer.batch_size):
            loss, size = self.objective(self, batch), self.size_of(batch)
            found = torch.autograd.grad(loss, [parameters[name] for name in total], allow_unused=True)
            for name, g in zip(total, found, strict=True):
                if g is not None:
                    total[name].add_(g, alpha=size / count)
            self.log_step(size)
        for module in quiet:
            module.training = True
        return total

    def reserve(self) -> None:
        """Reserves a step beside the variates, and what is left of both when the next variate is made."""
        weights = {name: self.client.weights[name] for name in self.trainer.shared}
        self.hold("control variates", self.own)
        self.hold("correction", self.correction)
        self.hold("gradient at the received weights" if self.trainer.option == 1 else RECEIVED, weights)
        super().reserve()
        self.client.log.reserve((2 if self.correction else 3) * self.client.step_cost.parameter_bytes)


class ScaffoldTrainer(CorrectedTrainer):
    """SGD whose steps are corrected by the difference of the server's control variate and the client's own.

    Args:
        option: of the paper, how a client's variate is renewed: 2 from the way that it went, for nothing; 1 by the
            gradient of all its examples at the received weights, a pass more.
        sgd: arguments of SGDTrainer; weight decay counts as a part of the loss.

    Raises:
        ConfigError: if the way that a client goes would not be its mean gradient.
    """

    run = ScaffoldRun

    def __init__(self, option: Literal[1, 2] = 2, **sgd: Any):
        super().__init__(**sgd)
        self.option = option
        if option == 2 and (self.momentum or self.clip_norm is not None):
            key, value = ("momentum", self.momentum) if self.momentum else ("clip_norm", self.clip_norm)
            raise ConfigError(
                f"trainer.{key}={value} and trainer.option=2 exclude each other: the way that a client went would not "
                "be its mean gradient; take trainer.option=1"
            )
