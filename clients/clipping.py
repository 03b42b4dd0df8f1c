"""Clips what a client changed, before it is compressed and sent.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, flat clipping.
"""

from __future__ import annotations

import math

import torch

from fedsim.workloads.base import Tensors


@torch.no_grad()
def clipped(weights: Tensors, received: Tensors, most: float) -> tuple[Tensors, bool]:
    """Returns weights whose difference to those received is no longer than `most`, and whether it was longer.

    The norm is taken over all tensors, in float64; weights that are near enough stay as they are, bit for bit. A
    tensor of another shape is part of another network, for the server to refuse.

    Args:
        weights: after training; they are changed in place, so that a device needs no third copy.
        received: before it.
        most: the largest norm.
    """
    names = [name for name, t in received.items() if name in weights and weights[name].shape == t.shape]
    moved = [name for name in names if received[name].is_floating_point()]
    squares = 0.0
    for name in moved:
        change = weights[name].double().sub_(received[name]).reshape(-1)
        squares += float(torch.dot(change, change))
    norm = math.sqrt(squares)
    if not norm > most:
        return weights, False
    for name in moved:
        change = weights[name].double().sub_(received[name])
        weights[name].copy_(change.mul_(most / norm).add_(received[name]))
    return weights, True
