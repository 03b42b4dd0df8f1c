"""Many clients through one network at once: their parameters stacked, their steps mapped over the stack.

On a GPU a small network leaves most of the device idle; K clients at once fill it. On a CPU it gains nothing for
convolutional networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.utils.stateless import _reparametrize_module

from fedsim.errors import ConfigError
from fedsim.messages.updates import ClientUpdate
from fedsim.workloads.base import Tensors

if TYPE_CHECKING:
    from clients.trainers.sgd import SGDRun, SGDTrainer

IGNORED = -100  # label that cross-entropy leaves out of its mean


def reason_against(model: nn.Module) -> str:
    """Returns why a model cannot be trained in batches of clients; empty if it can."""
    if list(model.buffers()):
        return f"{type(model).__name__} has buffers that change while it trains"
    dropout = nn.modules.dropout._DropoutNd
    if any(isinstance(part, dropout) and part.p > 0 for part in model.modules()):
        return f"{type(model).__name__} uses dropout, which would be drawn differently"
    return ""


class Stack:
    """The same network with K sets of parameters.

    Args:
        runs: of K clients, with one pure objective.
    """

    def __init__(self, runs: Sequence[SGDRun]):
        first = runs[0]
        self.model, self.received, objective = (
            first.client.model,
            [run.broadcast.weights for run in runs],
            first.objective,
        )
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        # Mapped operators know no other memory format, and `contiguous()` leaves single channels as they are.
        plain = torch.contiguous_format
        sent = {
            name: torch.stack([weights[name].clone(memory_format=plain) for weights in self.received])
            for name in self.received[0]
        }
        self.parameters = {name: sent[name].clone() for name in trained}
        self.unused: frozenset[str] | None = None  # by the objective; known from the first batch

        def of_one(parameters: Tensors, weights: Tensors, batch: Tensors) -> Tensor:
            run = copy(first)
            run.broadcast, run.notes = replace(first.broadcast, weights=weights), {}
            with _reparametrize_module(self.model, parameters):
                loss = objective(run, batch)
            if run.notes:
                raise ConfigError(f"{type(objective).__name__} notes figures of each client, {sorted(run.notes)}")
            return loss

        step = vmap(grad_and_value(of_one))
        self.step: Callable[[Tensors], tuple[Tensors, Tensor]] = lambda batch: step(self.parameters, sent, batch)

        def find_unused(batch: Tensors) -> frozenset[str]:
            live = [p for p in self.model.parameters() if p.requires_grad]
            found = torch.autograd.grad(objective(first, batch), live, allow_unused=True)
            return frozenset(name for name, g in zip(trained, found, strict=True) if g is None)

        self.find_unused = find_unused

    def weights(self, number: int) -> Tensors:
        """Returns the weights of one client, in the order of the model."""
        own = self.received[number]
        return {name: self.parameters[name][number] if name in self.parameters else own[name] for name in own}


def padded(batches: Sequence[Tensors | None]) -> tuple[Tensors, Tensor]:
    """Joins the batches of K clients into one; shorter ones are filled up with examples that no loss counts.

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
    """Yields the n-th batch of every client, until all have finished."""
    while any(batches := [next(iterator, None) for iterator in iterators]):
        yield batches


def fit(trainer: SGDTrainer, runs: Sequence[SGDRun]) -> list[ClientUpdate]:
    """Trains K clients at once, as `SGDRun.fit` trains one; equal to it up to rounding.

    Args:
        trainer: with a pure objective.
        runs: of K clients, whose broadcasts have equal settings.
    """
    stack = Stack(runs)
    lr, velocity = _one_rate([trainer.learning_rate(run.client, run.broadcast) for run in runs]), None
    losses: list[list[Tensor]] = [[] for _ in runs]
    for batches in in_step([run.batches() for run in runs]):
        batch, active = padded(batches)
        if stack.unused is None and trainer.weight_decay:  # a mapped gradient is zero there, and would decay
            stack.unused = stack.find_unused(next(own for own in batches if own is not None))
        gradients, loss = stack.step(batch)
        with torch.no_grad():
            moved = {name: g for name, g in gradients.items() if name not in (stack.unused or ())}
            velocity = _update(trainer, stack.parameters, moved, active, lr, velocity)
        for run, own, seen, value in zip(runs, batches, losses, loss.detach(), strict=True):
            if own is not None:
                run.log_step(run.size_of(own))
                seen.append(value)
    return [
        replace(run.update(float(torch.stack(seen).mean())), weights=stack.weights(number))
        for number, (run, seen) in enumerate(zip(runs, losses, strict=True))
    ]


def _one_rate(rates: Sequence[float]) -> float:
    """Returns the learning rate of clients that train at once.

    Raises:
        ConfigError: if they have several.
    """
    if len(several := sorted(set(rates))) > 1:
        raise ConfigError(f"clients of one batch have learning rates from {several[0]:g} to {several[-1]:g}")
    return rates[0]


def _update(
    trainer: SGDTrainer, parameters: Tensors, gradients: Tensors, active: Tensor, lr: float, velocity: Tensors | None
) -> Tensors | None:
    """Steps as `SGDTrainer.step` for every client; those that have finished keep what they have.

    It is written out beside that one: foreach operators round a step once, a step that leaves finished clients alone
    rounds it twice.
    """

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
