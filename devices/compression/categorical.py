"""Quantising by categories: a weight is drawn to the grid point whose cell it lies in, and bits can be dropped.

Source: Lee et al., "Cluster-Promoting Quantization With Bit-Drop for Minimizing Network Quantization Loss", ICCV 2021,
reconstructed from its abstract and from the parametrisation of Relaxed Quantization (Louizos et al., ICLR 2019), on
which it builds: no figure here is the paper's. Beyond the abstract: levels are kept from the lowest up to the first
that is dropped, so that what is left is a range of integers with fewer bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Of the hard-concrete distribution: temperature, and how far it is stretched beyond 0 and 1 (Louizos et al., 2018).
HARD_TEMPERATURE, STRETCH_LOW, STRETCH_HIGH = 2 / 3, -0.1, 1.1
AT_ONCE = 8192  # weights whose probabilities are held at once


def levels(bits: int) -> list[tuple[int, int]]:
    """Returns least and largest integer of each width from 1 to `bits`: (-1, 0), (-2, 1), (-4, 3) and so on."""
    return [(-(2 ** (width - 1)), 2 ** (width - 1) - 1) for width in range(1, bits + 1)]


def nearest(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Returns the integer of the likeliest grid point: with closed cells the nearest one in the range, as floats."""
    return (x.detach() / step.detach()).round().clamp(low, high)


def probability(x: Tensor, integer: Tensor, step: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    """Returns how likely x lies in the cell of a grid point once logistic noise is added, among points that are kept.

    pi_k = v_k (F((g_k + step / 2 - x) / noise) - F((g_k - step / 2 - x) / noise)), over its sum for all points, with
    g_k = k step and F the logistic function. Neighbouring cells share a border, so the sum has one term per width.

    Args:
        x: weights; those beyond the cells count as on their border, since both differences would be 0 there.
        integer: k, of the shape of x.
        step: between grid points (alpha of the paper), [1].
        noise: sigma, likewise.
        kept: v, of each width from 1 on: in [0, 1], none above the one before it, the first is 1; [bits].
    """
    ranges = levels(len(kept))
    left = max(1, int((kept > 0).sum()))
    low, high = ranges[left - 1]
    x = x.clamp((low - 0.5) * step, (high + 0.5) * step)

    def between(lower: Tensor, upper: Tensor) -> Tensor:
        return torch.sigmoid((upper * step - x) / noise) - torch.sigmoid((lower * step - x) / noise)

    whole, following = torch.zeros_like(x), torch.cat([kept[1:], kept.new_zeros(1)])
    for (lower, upper), here, behind in zip(ranges, kept, following, strict=True):
        if not kept.requires_grad and here == behind:
            continue
        whole = whole + (here - behind) * between(x.new_tensor(lower - 0.5), x.new_tensor(upper + 0.5))
    return kept[_width(integer) - 1] * between(integer - 0.5, integer + 0.5) / whole


def _width(integer: Tensor) -> Tensor:
    """Returns the least number of bits whose range has the integer, int64."""
    size = torch.where(integer < 0, -integer - 1, integer)
    return torch.frexp(size).exponent.to(torch.int64) + 1  # frexp(0) has exponent 0, 1 has 1, 2 and 3 have 2


def categorical(x: Tensor, step: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    """Returns x rounded to the nearest grid point that is kept, with the multi-class straight-through gradient.

    The one-hot vector of the chosen point passes its gradient to that point's probability and to no other: what
    reaches x, step, noise and kept is dL/dx^ times the grid point times the derivative of its probability. The step
    also has the direct path k. A weight in the cell of 0 gets no gradient, and one in the middle of a cell hardly any.

    Args:
        x: weights.
        step: see `probability`.
        noise: likewise.
        kept: likewise; with all widths kept, values are those of rounding and clipping exactly.
    """
    rounded: Tensor = _Categorical.apply(x, step, noise, kept)  # type: ignore[no-untyped-call]
    return rounded


class _Categorical(torch.autograd.Function):
    """Probabilities are computed in the backward pass, for some weights at a time: there is one term per width."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(x, step, noise, kept)
        return _integer(x, step, kept) * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        needed = ctx.needs_input_grad
        totals = [torch.zeros_like(t) for t in others]
        parts = []
        for some, gradient in zip(x.flatten().split(AT_ONCE), gradients[0].flatten().split(AT_ONCE), strict=True):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_(n) for t, n in zip((some, *others), needed, strict=True)]
                integer = _integer(leaves[0], leaves[1], leaves[3])
                grid = integer * leaves[1]
                surrogate = grid + grid.detach() * probability(leaves[0], integer, *leaves[1:])
            wanted = [t for t in leaves if t.requires_grad]
            found = iter(torch.autograd.grad(surrogate, wanted, gradient, allow_unused=True))
            own, *rest = (next(found) if t.requires_grad else None for t in leaves)
            parts.append(torch.zeros_like(some) if own is None else own)
            for total, more in zip(totals, rest, strict=True):
                if more is not None:
                    total += more
        whole = torch.cat(parts).view(x.shape)
        return tuple(t if n else None for t, n in zip((whole, *totals), needed, strict=True))


def _integer(x: Tensor, step: Tensor, kept: Tensor) -> Tensor:
    return nearest(x, step, *levels(len(kept))[max(1, int((kept > 0).sum())) - 1])


# --- bits that are dropped ----------------------------------------------------------------------------------------


def drawn_gates(logits: Tensor, draw: torch.Generator) -> Tensor:
    """Draws hard-concrete gates in [0, 1], often exactly 0 or 1, with a gradient for their logits."""
    u = torch.rand(logits.shape, generator=draw).clamp(1e-6, 1 - 1e-6).to(logits)
    soft = torch.sigmoid(((u / (1 - u)).log() + logits) / HARD_TEMPERATURE)
    return (soft * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def usual_gates(logits: Tensor) -> Tensor:
    """Returns the gates without noise, in [0, 1]."""
    return (torch.sigmoid(logits) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def chance_open(logits: Tensor) -> Tensor:
    """Returns how likely gates are to be above 0: E[Z] of the penalty."""
    return torch.sigmoid(logits - HARD_TEMPERATURE * math.log(-STRETCH_LOW / STRETCH_HIGH))


def nested(gates: Tensor) -> Tensor:
    """Returns how far each width from 1 on is kept: 1, then the product of the gates up to it, [widths]."""
    return torch.cat([gates.new_ones(1), gates.cumprod(0)])
