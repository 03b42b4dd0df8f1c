"""Trains a network for a moment, step by step, on one thread: what cells and nets of tasks have in common."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.meta.tasks import Task

LAYOUT = torch.channels_last  # a quarter faster than channels first


def normalised(task: Task) -> tuple[Tensor, Tensor]:
    """Returns the images to train on and those held out as networks take them, by means and deviations of the first."""
    mean, std = task.train_x.mean((0, 2, 3), keepdim=True), task.train_x.std((0, 2, 3), keepdim=True) + 1e-6
    return (task.train_x - mean) / std, (task.test_x - mean) / std


def batches(count: int, size: int, draw: np.random.Generator) -> Iterator[Tensor]:
    """Yields rows of examples without an end, in an order that is drawn anew for each epoch."""
    waiting = np.zeros(0, dtype=np.int64)
    while True:
        while len(waiting) < size:
            waiting = np.concatenate([waiting, draw.permutation(count)])
        yield torch.from_numpy(waiting[:size])
        waiting = waiting[size:]


def train_steps(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rows: Iterator[Tensor],
    steps: int,
    learning_rate: float,
    one_cycle: bool = True,
) -> Iterator[int]:
    """Trains with Adam, and yields how many steps were taken after each.

    Args:
        model: changed in place.
        x: examples, [n, channels, height, width].
        y: labels, [n] int64.
        rows: of the examples of each step.
        steps: in all.
        learning_rate: at the top of the cycle, or all the time.
        one_cycle: the rate rises and falls; it is constant otherwise, so that no step depends on how many follow.
    """
    adam = torch.optim.Adam(model.parameters(), lr=learning_rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, learning_rate, total_steps=steps) if one_cycle else None
    for step in range(1, steps + 1):
        chosen = next(rows)
        adam.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        adam.step()
        if cycle is not None:
            cycle.step()
        yield step


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Returns the share of right answers in percent."""
    return 100 * float((model(x).argmax(1) == y).sum()) / len(y)
