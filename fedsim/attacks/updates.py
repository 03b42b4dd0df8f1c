"""Attacks on what a malicious client sends, each by itself."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt, Le

from fedsim.attacks.base import Attack, Share
from fedsim.workloads.base import Tensors


class SignFlip(Attack):
    """Sends w - scale (w_k - w) in place of the trained weights w_k.

    Args:
        share: of the fleet's clients that are malicious.
        scale: how far it goes back.

    Source: Li et al., "RSA: Byzantine-Robust Stochastic Aggregation Methods", AAAI 2019 (recalled).
    """

    def __init__(self, share: Share = 0.2, scale: Annotated[float, Gt(0), Le(1e6)] = 1.0):
        super().__init__(share)
        self.scale = scale

    def changed(self, changes: Tensors, draw: torch.Generator) -> Tensors:
        """Returns the way back."""
        return {name: -self.scale * change for name, change in changes.items()}


class GaussianNoise(Attack):
    """Adds normal noise to the trained weights.

    Args:
        share: of the fleet's clients that are malicious.
        deviation: of the noise.
        relative: in units of the root mean square of the client's own change; else of the weights.

    Source: after Blanchard et al., NIPS 2017, whose attackers send noise alone (recalled).
    """

    def __init__(self, share: Share = 0.2, deviation: Annotated[float, Gt(0), Le(1e6)] = 10.0, relative: bool = True):
        super().__init__(share)
        self.deviation, self.relative = deviation, relative

    def changed(self, changes: Tensors, draw: torch.Generator) -> Tensors:
        """Returns the changes with noise; without a change, relative noise is none."""
        unit = 1.0
        if self.relative:
            squares = sum(float(change.double().square().sum()) for change in changes.values())
            unit = (squares / max(1, sum(change.numel() for change in changes.values()))) ** 0.5
        return {
            name: change + self.deviation * unit * torch.randn(change.shape, generator=draw).to(change)
            for name, change in changes.items()
        }
