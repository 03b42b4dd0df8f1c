"""Many clients through one network at once: their parameters stacked, their steps mapped over the stack.

On a GPU a small network leaves most of the device idle; K clients at once fill it. On a CPU it gains nothing for
convolutional networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.utils.stateless import _reparametrize_module

from clients.trainers.base import ClientContext
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors

IGNORED = -100  # label that cross-entropy leaves out of its mean
Loss = Callable[[ClientContext, Tensors, Broadcast], Tensor]


def reason_against(model: nn.Module) -> str:
    """Why a model cannot be trained in batches of clients; empty if it can."""
    if list(model.buffers()):
        return f"{type(model).__name__} has buffers that change while it trains"
    dropout = nn.modules.dropout._DropoutNd
    if any(isinstance(part, dropout) and part.p > 0 for part in model.modules()):
        return f"{type(model).__name__} uses dropout, which would be drawn differently"
    return ""


class Stack:
    """The same network with K sets of parameters.

    Args:
        loss: (client, batch, task) to a scalar; a function of the model's parameters, the batch and the broadcast
            alone: of `client` it may use the workload and the model.
        clients: K of them.
        tasks: theirs.
    """

    def __init__(self, loss: Loss, clients: Sequence[ClientContext], tasks: Sequence[Broadcast]):
        self.model, self.tasks = clients[0].model, tasks
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        # Mapped operators know no other memory format, and `contiguous()` leaves single channels as they are.
        plain = torch.contiguous_format
        sent = {
            name: torch.stack([task.weights[name].clone(memory_format=plain) for task in tasks])
            for name in tasks[0].weights
        }
        self.parameters = {name: sent[name].clone() for name in trained}
        self.unused: frozenset[str] | None = None  # by the loss; known from the first batch

        def of_one(parameters: Tensors, weights: Tensors, batch: Tensors) -> Tensor:
            with _reparametrize_module(self.model, parameters):
                return loss(clients[0], batch, replace(tasks[0], weights=weights))

        step = vmap(grad_and_value(of_one))
        self.step: Callable[[Tensors], tuple[Tensors, Tensor]] = lambda batch: step(self.parameters, sent, batch)

        def find_unused(batch: Tensors) -> frozenset[str]:
            live = [p for p in self.model.parameters() if p.requires_grad]
            found = torch.autograd.grad(loss(clients[0], batch, tasks[0]), live, allow_unused=True)
            return frozenset(name for name, g in zip(trained, found, strict=True) if g is None)

        self.find_unused = find_unused

    def weights(self, number: int) -> Tensors:
        """The weights of one client, in the order of the model."""
        own = self.tasks[number].weights
        return {name: self.parameters[name][number] if name in self.parameters else own[name] for name in own}


def padded(batches: Sequence[Tensors | None]) -> tuple[Tensors, Tensor]:
    """One batch of K clients from their own: shorter ones are filled up with examples that no loss counts.

    Args:
        batches: of each client, {"x": [b, ...], "y": [b] or [b, steps], ...}; None for one that has finished.

    Returns:
        {"x": [K, B, ...], "y": ...}, and which clients take part, [K] bool.
    """
    model = next(batch for batch in batches if batch is not None)
    size = max(len(batch["x"]) for batch in batches if batch is not None)
    rows: dict[str, list[Tensor]] = {name: [] for name in model}
    for batch in batches:
        for name, like in model.items():
            empty = IGNORED if name == "y" else 0
            filled = torch.full((size, *like.shape[1:]), empty, dtype=like.dtype, device=like.device)
            if batch is not None:
                filled[: len(batch[name])] = batch[name]
            rows[name].append(filled)
    active = torch.tensor([batch is not None for batch in batches], device=model["x"].device)
    return {name: torch.stack(parts) for name, parts in rows.items()}, active


def in_step(iterators: Sequence[Iterator[Tensors]]) -> Iterator[list[Tensors | None]]:
    """The n-th batch of every client, until all have finished."""
    while any(batches := [next(iterator, None) for iterator in iterators]):
        yield batches


def fit(trainer: Any, clients: Sequence[ClientContext], tasks: Sequence[Broadcast]) -> list[ClientUpdate]:
    """`SGDTrainer.fit` for K clients at once; equal to it up to rounding.

    Args:
        trainer: an SGDTrainer (or what overrides its `loss`).
        clients: K of them.
        tasks: theirs, with equal settings.
    """
    stack = Stack(trainer.loss, clients, tasks)
    lr, velocity = trainer.learning_rate(clients[0], tasks[0]), None
    losses: list[list[Tensor]] = [[] for _ in clients]
    for batches in in_step([trainer.batches(c, t) for c, t in zip(clients, tasks, strict=True)]):
        batch, active = padded(batches)
        if stack.unused is None and trainer.weight_decay:  # a mapped gradient is zero there, and would decay
            stack.unused = stack.find_unused(next(own for own in batches if own is not None))
        gradients, loss = stack.step(batch)
        with torch.no_grad():
            moved = {name: g for name, g in gradients.items() if name not in (stack.unused or ())}
            velocity = _update(trainer, stack.parameters, moved, active, lr, velocity)
        for client, own, seen, value in zip(clients, batches, losses, loss.detach(), strict=True):
            if own is not None:
                trainer.log_step(client, client.workload.batch_size_of(own))
                seen.append(value)
    return [
        ClientUpdate(c.client_id, len(c.data.train), stack.weights(k), {"train_loss": float(torch.stack(seen).mean())})
        for k, (c, seen) in enumerate(zip(clients, losses, strict=True))
    ]


def _update(
    trainer: Any, parameters: Tensors, gradients: Tensors, active: Tensor, lr: float, velocity: Tensors | None
) -> Tensors | None:
    """`SGDTrainer.step` with a leading client dimension; clients that have finished keep what they have."""

    def of(t: Tensor, like: Tensor) -> Tensor:
        return t.view(-1, *[1] * (like.dim() - 1))

    if trainer.clip_norm is not None:
        squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)  # [K]
        factor = torch.clamp(trainer.clip_norm / (squares.sqrt() + 1e-6), max=1.0)
        gradients = {name: g * of(factor, g) for name, g in gradients.items()}
    if trainer.weight_decay:
        gradients = {name: g + trainer.weight_decay * parameters[name] for name, g in gradients.items()}
    if trainer.momentum:
        if velocity is None:
            velocity = gradients
        else:
            velocity = {name: trainer.momentum * velocity[name] + g for name, g in gradients.items()}
        gradients = velocity
    for name in gradients:
        p = parameters[name]
        # What a finished client would add is NaN: its mean is over no examples.
        parameters[name] = torch.where(of(active, p), p - lr * gradients[name], p)
    return velocity
