"""Integers for weights and activations: after training, or fake ones in training, whose gradients pass the rounding.

Everything here computes in floats what integer kernels would: for accuracy and bytes. `kernels.py` runs real ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from devices.compression.masks import PRUNABLE
from devices.errors import DeviceError

AVERAGING = 0.01  # how far a batch moves the range of an activation


def limits(bits: int, signed: bool = True, symmetric: bool = False) -> tuple[int, int]:
    """Returns the least and largest integer of a width: (-2^(b-1), 2^(b-1) - 1), or (0, 2^b - 1) unsigned.

    Args:
        bits: from 2 to 8.
        signed: whether there are negative ones.
        symmetric: leave out the most negative one, so that the range is the same on both sides.
    """
    if not 2 <= bits <= 8:
        raise DeviceError(f"bits must be from 2 to 8, got {bits!r}")
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return (-high - (not symmetric) if signed else 0), high


# --- after training ---------------------------------------------------------------------------------------------------


def quantise_weight(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Rounds to symmetric integers, a scale per output channel: scale = max |w| / Q, q = clip(round(w / scale), -Q, Q).

    Args:
        weight: [out, ...].
        bits: from 2 to 8.

    Returns:
        Integers [out, ...] int8 and scales [out] float32; the scale of a channel of zeros is 1.
    """
    low, high = limits(bits, symmetric=True)
    weight = weight.detach()
    scales = weight.abs().flatten(1).amax(1) / high
    scales = torch.where(scales > 0, scales, 1.0)
    return (weight / _beside(scales, weight)).round().clamp(low, high).to(torch.int8), scales


def dequantise(integers: Tensor, scales: Tensor) -> Tensor:
    """Returns the floats that integers [out, ...] with scales [out] stand for."""
    return integers.to(scales.dtype) * _beside(scales, integers)


def _beside(scales: Tensor, weight: Tensor) -> Tensor:
    return scales.view(-1, *[1] * (weight.dim() - 1))


@dataclass
class ActivationRange:
    """Affine integers for one tensor; one of them stands for 0, so that padding and ReLU stay exact.

    scale = (high - low) / (2^b - 1), zero = clip(round(-low / scale), 0, 2^b - 1), q = clip(round(x / scale) + zero).

    Attributes:
        bits: of an integer.
        low, high: range seen, always around 0; moved by `AVERAGING` per batch after the first.
    """

    bits: int = 8
    low: float = 0.0
    high: float = 0.0
    batches: int = 0

    def see(self, x: Tensor) -> None:
        """Takes a batch into the range."""
        low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
        share = AVERAGING if self.batches else 1.0
        self.low += share * (low - self.low)
        self.high += share * (high - self.high)
        self.batches += 1

    @property
    def largest(self) -> int:
        """The largest integer, 2^b - 1."""
        return (1 << self.bits) - 1

    @property
    def scale(self) -> float:
        """The width of a step between two integers."""
        return (self.high - self.low) / self.largest or 1.0

    @property
    def zero(self) -> int:
        """The integer that stands for 0."""
        return min(max(round(-self.low / self.scale), 0), self.largest)

    def fake(self, x: Tensor) -> Tensor:
        """Returns x rounded to integers and back: scale (q - zero)."""
        q = (x / self.scale).round().add(self.zero).clamp(0, self.largest)
        return (q - self.zero) * self.scale


@dataclass
class Quantised:
    """A network as integers.

    Attributes:
        model: computes in floats what the integers give; batch norms are folded into the layers before them.
        tensors: what a device stores: integers and scales of weights, everything else in floats.
        bits: of the integer tensors, by name.
        ranges: of the inputs of each quantised layer.
    """

    model: nn.Module
    tensors: dict[str, Tensor]
    bits: dict[str, int]
    ranges: dict[str, ActivationRange] = field(default_factory=dict)


def quantise(
    model: nn.Module, batches: Iterable[Tensor] = (), bits: int = 8, activation_bits: int | None = 8
) -> Quantised:
    """Quantises convolutions and linear layers after training; the model stays as it is.

    Args:
        model: any; batch norms are folded where torch.fx can follow the network.
        batches: of inputs, for the ranges of activations; eight or more are usual.
        bits: of weights, one scale per output channel.
        activation_bits: of what these layers read; None leaves it in floats.

    Raises:
        DeviceError: if activations are to be quantised and there is no batch to see them on.
    """
    network = fold_batch_norms(model)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, PRUNABLE)}
    ranges = {name: ActivationRange(activation_bits) for name in layers if activation_bits is not None}
    _watch(network, layers, ranges, batches)
    tensors, widths = dict(network.state_dict()), {}
    for name, layer in layers.items():
        integers, scales = quantise_weight(layer.weight, bits)
        tensors[f"{name}.weight"], tensors[f"{name}.scale"] = integers, scales
        widths[f"{name}.weight"] = bits
        layer.weight.data = dequantise(integers, scales)
    for name, seen in ranges.items():
        layers[name].register_forward_pre_hook(lambda _, given, seen=seen: (seen.fake(given[0]), *given[1:]))
    return Quantised(network, tensors, widths, ranges)


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Folds norms into a copy: w' = w gamma / sqrt(v + eps), b' = beta + (b - mean) gamma / sqrt(v + eps).

    Networks without batch norms are copied only, and so are those that torch.fx cannot follow.
    """
    copy = deepcopy(model).eval()
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in copy.modules()):
        return copy
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(copy)
    except Exception:  # paths that depend on numbers: the norms stay as they are, in floats
        return copy


@torch.no_grad()
def _watch(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    ranges: Mapping[str, ActivationRange],
    batches: Iterable[Tensor],
) -> None:
    handles = [
        layers[name].register_forward_pre_hook(lambda _, given, seen=seen: seen.see(given[0]))
        for name, seen in ranges.items()
    ]
    for batch in batches:
        network(batch)
    for handle in handles:
        handle.remove()
    unseen = [name for name, seen in ranges.items() if not seen.batches]
    if unseen:
        raise DeviceError(f"activations of {unseen[0]!r} were never seen; give batches to quantise them by")


# --- in training ------------------------------------------------------------------------------------------------------


def fake_quantise(weight: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Returns the product of step and clip(round(weight / step), low, high), with gradients for both.

    For the weight: 1 inside the range, 0 outside (straight-through). For the step: round(v) - v inside, v = weight /
    step, low below and high above, times 1 / sqrt(weights per step x high).

    Args:
        weight: any shape.
        step: above 0, one, or of a shape that broadcasts to the weight's.
        low: smallest integer.
        high: largest integer.
    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, equations 1 to 3 and section 2.2; the weight's
        gradient from Bengio et al., 2013.
    """
    product: Tensor = _FakeQuantise.apply(weight, step, low, high)  # type: ignore[no-untyped-call]
    return product


class _FakeQuantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(weight, step)
        ctx.limits = low, high
        return (weight / step).round().clamp(low, high) * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,), (weight, step), (low, high) = gradients, ctx.saved_tensors, ctx.limits
        v = weight / step
        inside = (v >= low) & (v <= high)
        by_step = torch.where(inside, v.round() - v, v.clamp(low, high))
        share = (weight.numel() / step.numel() * high) ** -0.5
        return gradient * inside, (gradient * by_step).sum_to_size(step.shape) * share, None, None


def above_zero(widths: Tensor) -> Tensor:
    """Returns widths of steps, none of them 0: where a channel is silent, a trillionth of the widest."""
    return widths.maximum(1e-12 * widths.amax()).clamp(min=torch.finfo(widths.dtype).tiny)
