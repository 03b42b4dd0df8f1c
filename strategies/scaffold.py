"""SCAFFOLD's server: a step of its own size along the mean update, and the mean of all clients' control variates.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, algorithm 1
(recalled; its update rules were compared with a public summary): x += server_lr mean(y_i - x), and
c += |S| / N mean(c_i+ - c_i), so that c is the mean of c_i over all N clients. Differs: the mean of updates is weighted
by examples unless `weight=equal`; statistics and counters are averaged. Records: see `fedsim.exchanges.scaffold`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from flwr.app import ArrayRecord

from fedsim.exchanges.scaffold import VARIATE
from fedsim.grid.edge import EdgeGrid, Enrolled
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy


class Scaffold(EdgeStrategy):
    """FedAvg with a step size, that sends the mean of the clients' control variates.

    Args:
        server_lr: eta_g, the global step size; 1 takes the mean of the weights.
        weight: of a client in that mean: its examples, or the same for all, as in the paper.
        sampling: arguments of FedAvg.
    """

    derived: ClassVar[frozenset[str]] = frozenset({"weights", "sent"})
    weights: Tensors
    sent: Tensors  # c in the weights' own precision, once for all clients of a round

    def __init__(
        self,
        server_lr: Annotated[float, Gt(0)] = 1.0,
        weight: Literal["examples", "equal"] = "examples",
        **sampling: Any,
    ):
        super().__init__(**sampling)
        self.server_lr, self.weight = server_lr, weight
        self.variate: Tensors = {}  # c, float64; empty until there is one

    def prepare(self, number: int, weights: Tensors, arrays: ArrayRecord, grid: EdgeGrid) -> None:
        """Remembers what the round begins with."""
        self.weights = weights
        self.sent = {name: t.to(weights[name].dtype) for name, t in self.variate.items()}

    def broadcast(self, number: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """Returns the weights and, once there is one, the variate."""
        return Broadcast(number, weights, {VARIATE: self.sent} if self.sent else {})

    def combine(self, number: int, updates: list[ClientUpdate]) -> Tensors:
        """Returns the weights after a step, and moves the variate."""
        changes = [update.extra(VARIATE) for update in updates]
        for name in changes[0]:
            total = torch.stack([change[name].double() for change in changes]).sum(0)
            self.variate[name] = self.variate.get(name, torch.zeros_like(total)) + total / self.context.num_clients
        if self.weight == "equal":
            updates = [replace(update, num_examples=1) for update in updates]
        mean = super().combine(number, updates)
        if self.server_lr == 1:
            return mean
        return mean | {name: self.stepped(self.weights[name], mean[name]) for name in changes[0]}

    def stepped(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Returns a weight after a step towards the clients' mean."""
        return (x.double() + self.server_lr * (mean.double() - x.double())).to(x.dtype)
