"""FLTrust's server: trains on a few examples of its own, and trusts changes by how far they go the same way.

Source: Cao et al., "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS 2021, algorithm 2
(recalled): w + alpha sum_k TS_k |g_0| / |g_k| g_k / sum_k TS_k, TS_k = ReLU(cos(g_k, g_0)). Differs: statistics of the
network are averaged beside. The server's examples are the paper's case I, drawn as clients' training examples are.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Interval, Le
from torch import Tensor, nn

from fedsim.grid.server_half import ServerContext
from fedsim.models.dropout import seed_dropout
from fedsim.seeding import derive, torch_generator
from fedsim.workloads.base import Examples
from strategies.robust import RobustStrategy


class FLTrust(RobustStrategy):
    """Averages changes of one length, weighted by their trust.

    Its examples are collected before the run, and its training is the server's work: no client pays for either, and
    neither takes simulated time.

    Args:
        root_examples: of the server, none of which judges the model.
        server_lr: alpha.
        lr: of the server's own training, as the clients'.
        local_epochs: of it.
        batch_size: of it.
        lr_decay: of it, a round; other settings of clients' training, such as momentum, are not taken over.
        sampling: arguments of FedAvg.

    Attributes:
        root: the examples.
        network: that the server trains.
    """

    derived: ClassVar[frozenset[str]] = frozenset({"weights", "root", "network"})
    root: Examples
    network: nn.Module

    def __init__(
        self,
        root_examples: Annotated[int, Ge(1), Le(10**6)] = 100,
        server_lr: Annotated[float, Gt(0), Le(1e6)] = 1.0,
        lr: Annotated[float, Gt(0), Le(1e6)] = 0.1,
        local_epochs: Annotated[int, Ge(1), Le(10_000)] = 5,
        batch_size: Annotated[int, Ge(1), Le(10**6)] = 16,
        lr_decay: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        **sampling: Any,
    ):
        super().__init__(**sampling)
        self.root_examples, self.server_lr = root_examples, server_lr
        self.lr, self.local_epochs, self.batch_size, self.lr_decay = lr, local_epochs, batch_size, lr_decay

    def begin(self, context: ServerContext) -> None:
        """Takes the server's examples."""
        super().begin(context)
        self.root, self.network = context.model.root(self.root_examples), context.model.build_model()

    def aggregated(self, number: int, changes: Tensor, examples: Tensor) -> Tensor:
        """Returns the trusted mean; nothing where no change goes the server's way."""
        own = self.own_change(number)
        norms, length = changes.norm(dim=1), own.norm()
        cosines = changes @ own / (norms * length).clamp(min=torch.finfo(torch.float64).tiny)
        trust = cosines.clamp(min=0)
        if not trust.sum() > 0:
            return torch.zeros_like(own)
        scaled = trust / trust.sum() * length / norms.where(norms > 0, torch.ones_like(norms))
        mean: Tensor = (scaled[:, None] * changes).sum(0)
        return self.server_lr * mean

    def own_change(self, number: int) -> Tensor:
        """Returns by how much the server's own training changes the weights, [size] float64."""
        network, seed = self.network, self.context.seed
        draw = torch_generator(seed, "root", "batches", number)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "root", number))
            seed_dropout(network, derive(seed, "root", "dropout", number))
            network.load_state_dict(self.weights, strict=False)
            network.train()
            lr = self.lr * self.lr_decay ** (number - 1)
            optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr)
            for _ in range(self.local_epochs):
                for rows in torch.randperm(len(self.root), generator=draw).split(self.batch_size):
                    optimiser.zero_grad()
                    self.context.model.loss(network, self.root.gather(rows)).backward()
                    optimiser.step()
        return self.flat(network.state_dict()) - self.flat(self.weights)
