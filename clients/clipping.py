"""Clips what a client changed, before it is compressed and sent.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, flat clipping.
"""

from __future__ import annotations

import math

import torch

from fedsim.messages.weights import rounded_to
from fedsim.workloads.base import Tensors


@torch.no_grad()
def clipped(weights: Tensors, received: Tensors, most: float) -> tuple[Tensors, bool]:
    """Returns weights whose difference to those received is no longer than `most`, and whether it was longer.

    The norm is taken over all tensors, in float64; weights that are near enough stay as they are, bit for bit. A
    tensor of another shape is part of another network, for the server to refuse.

    Args:
        weights: after training; they are not changed.
        received: before it.
        most: the largest norm.
    """
    names = [name for name, t in received.items() if name in weights and weights[name].shape == t.shape]
    moved = [name for name in names if received[name].is_floating_point()]
    squares = 0.0
    for name in moved:
        change = (weights[name].double() - received[name].double()).reshape(-1)
        squares += float(torch.dot(change, change))
    norm = math.sqrt(squares)
    if not norm > most:
        return weights, False
    near = {}
    for name in moved:
        start = received[name].double()
        near[name] = rounded_to(start + (most / norm) * (weights[name].double() - start), weights[name].dtype)
    return {name: near.get(name, t) for name, t in weights.items()}, True
