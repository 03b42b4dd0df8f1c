"""Masks that set single weights to zero by magnitude, and the sparsity at each step.

Zeros inside a dense tensor save bytes, not time: dense kernels multiply them like any number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from devices.errors import DeviceError, unknown

Masks = dict[str, Tensor]  # by state-dict key: True where a weight stays, bool of its shape
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # _NormBase: batch and instance norms
PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
FLOOR = 0.03  # without a floor a global mask at 95 % can empty a layer
RULES = ("masked", "ste")
ATTENTIONS = ("magnitude", "none", "all")


def prunable(model: nn.Module) -> list[str]:
    """Returns state-dict keys of the weights of convolutions and linear layers; norms and biases are never masked."""
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, PRUNABLE)]


def global_masks(weights: Mapping[str, Tensor], sparsity: float, floor: float = FLOOR) -> Masks:
    """Removes the smallest weights wherever they are, exactly floor(sparsity x N) of them.

    Args:
        weights: the weights to choose from.
        sparsity: share of zeros, in [0, 1).
        floor: every layer keeps its largest max(1, ceil(floor x size)) weights, so that none runs empty; 0 promises
            nothing. Equal magnitudes go in the order in which they stand.

    Raises:
        DeviceError: for shares out of range, and when the floors leave less to remove than asked.
    """
    _share("sparsity", sparsity)
    _share("floor", floor)
    count = math.floor(sparsity * sum(w.numel() for w in weights.values()) + 1e-9)
    free: dict[str, Tensor] = {}
    for name, weight in weights.items():
        reserved = max(1, math.ceil(floor * weight.numel() - 1e-9)) if floor else 0
        order = weight.detach().cpu().abs().flatten().argsort(stable=True)
        free[name] = order[: weight.numel() - reserved].sort().values
    most = sum(map(len, free.values()))
    if count > most:
        raise DeviceError(
            f"sparsity {sparsity:g} removes {count} weights, but floor={floor:g} leaves only {most} to remove"
        )
    magnitudes = torch.cat([weights[name].detach().cpu().abs().flatten()[index] for name, index in free.items()])
    gone = torch.zeros(most, dtype=torch.bool)
    gone[magnitudes.argsort(stable=True)[:count]] = True
    masks = {}
    for (name, index), part in zip(free.items(), gone.split([len(i) for i in free.values()]), strict=True):
        mask = torch.ones(weights[name].numel(), dtype=torch.bool)
        mask[index[part]] = False
        masks[name] = mask.view(weights[name].shape)
    return masks


def filter_masks(weights: Mapping[str, Tensor], sparsity: float, floor: float = FLOOR) -> Masks:
    """Removes whole output channels, exactly floor(sparsity x N) of N: those with the smallest mean magnitudes.

    Args:
        weights: [out, ...] each.
        sparsity: share of channels without weights, in [0, 1).
        floor: share of its channels that every layer keeps, see `global_masks`.
    """
    scores = {name: weight.detach().cpu().abs().flatten(1).mean(1) for name, weight in weights.items()}
    kept = global_masks(scores, sparsity, floor)
    return {
        name: kept[name].view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape).clone()
        for name, weight in weights.items()
    }


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Returns the share of zeros among the entries of masks."""
    return 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def apply_masks(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state with zeros where masks say so; other tensors are the given ones."""
    return {name: t * masks[name].to(t) if name in masks else t for name, t in state.items()}


def masked(weight: Tensor, mask: Tensor, rule: str = "masked") -> Tensor:
    """Returns the product of weight and mask, with one of two gradients for the weight.

    Args:
        weight: of a layer.
        mask: of the same shape.
        rule: "masked" lets the gradient through where the mask is 1; "ste" everywhere, so that a removed weight learns
            on and can come back.
    """
    if rule not in RULES:
        raise DeviceError(unknown("gradient rule", rule, RULES))
    mask = mask.to(weight)
    if rule == "masked":
        return weight * mask
    product: Tensor = _StraightThrough.apply(weight, mask)  # type: ignore[no-untyped-call]
    return product


def attended(weight: Tensor, mask: Tensor, attention: str = "magnitude") -> Tensor:
    """Returns w (m + (1 - m) A), whose gradient is multiplied by the same.

    Args:
        weight: of a layer.
        mask: m, of the same shape.
        attention: A: "magnitude" is |w| / max |w|, "none" 0, "all" 1.
    """
    if attention not in ATTENTIONS:
        raise DeviceError(unknown("attention", attention, ATTENTIONS))
    mask, size = mask.to(weight), weight.detach().abs()
    shares = {"magnitude": size / size.amax().clamp(min=torch.finfo(size.dtype).tiny)}
    share = shares.get(attention, torch.full_like(mask, float(attention == "all")))
    return weight * (mask + (1 - mask) * share)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@dataclass(frozen=True)
class SparsitySchedule:
    """Sparsity by optimiser step (or epoch): cubic from `initial` to `final` between `start` and `end`.

    s(t) = final + (initial - final) (1 - (t - start) / (end - start))^3, constant outside. One shot is start = end.

    Attributes:
        final, initial: sparsities.
        start, end: steps.
    Source: Zhu and Gupta, "To prune, or not to prune", 2017, equation 1.
    """

    final: float
    end: int
    initial: float = 0.0
    start: int = 0

    def __post_init__(self) -> None:
        _share("final sparsity", self.final)
        _share("initial sparsity", self.initial)
        if not 0 <= self.start <= self.end or self.initial > self.final:
            raise DeviceError(
                "a sparsity schedule needs 0 <= start <= end and initial <= final, got "
                f"start={self.start}, end={self.end}, initial={self.initial}, final={self.final}"
            )

    def at(self, step: float) -> float:
        """Returns the sparsity after `step` steps."""
        if step >= self.end:
            return self.final
        left = 1 - max(0.0, step - self.start) / (self.end - self.start)
        return self.final + (self.initial - self.final) * left**3


def _share(what: str, value: float) -> None:
    if not 0 <= value < 1:
        raise DeviceError(f"{what} must be in [0, 1), got {value!r}")
