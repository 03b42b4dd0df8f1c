"""Dropout whose masks are a function of a seed, the layer and its step: the same on every device and engine.

Layers of `torch.nn` draw from torch's global generators, whose numbers differ between CPU and GPU and depend on what
was drawn before. Here word i of step t of a layer is mix(seed + (2^32 t + i) golden), from a counter on the layer's own
device: no generator and no decision of the host, so that a step can be captured in a CUDA graph.

Source: SplitMix64 of Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014. Each word of 64
bits decides for four units; a rate is rounded to 1/65536.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fedsim.seeding import derive

LANES, LEVELS = 4, 2**16  # decisions of a word, and what each tells apart
SELU_FLOOR = -1.7580993408473766  # what AlphaDropout gives instead of a unit: -scale alpha of SELU


def _signed(value: int) -> int:
    return (value & 2**64 - 1) - (2**64 if value & 2**63 else 0)


GOLDEN, FIRST, SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
STEP = _signed(GOLDEN << 32)


def words(state: Tensor, count: int) -> Tensor:
    """Returns numbers 1 to `count` of SplitMix64 from a state on its device, [count] int64; the state stays."""
    z = torch.arange(1, count + 1, device=state.device).mul_(GOLDEN).add_(state)
    shifted = torch.empty_like(z)
    for shift, factor in ((30, FIRST), (27, SECOND), (31, None)):
        torch.bitwise_right_shift(z, shift, out=shifted)
        z.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - shift) - 1))  # the shift fills up with the sign
        if factor is not None:
            z.mul_(factor)
    return z


class _Seeded(_DropoutNd):
    """A dropout layer that counts its steps; before it is seeded it is torch's own.

    A step is a pass in training. The first rows of a longer batch get the mask that a shorter one gets.

    Attributes:
        state: of the layer's next step, [] int64; no buffer, so that it is in no state dict and has no price.
    """

    state: Tensor | None = None
    num_shared: Callable[[int], int] = staticmethod(lambda dim: 0)  # last dimensions that are dropped together

    def seed(self, value: int, device: torch.device) -> None:
        """Begins at step 0 of a seed, in place where it can."""
        if self.state is None or self.state.device != device:
            self.state = torch.empty((), dtype=torch.int64, device=device)
        self.state.fill_(value)

    def forward(self, input: Tensor) -> Tensor:
        """Keeps the shape of the input, [batch, ...]."""
        if self.state is None or not self.training or not 0 < self.p < 1:
            output: Tensor = super().forward(input)
            return output
        return self.dropped(input, self.kept(input, self.state))

    def kept(self, x: Tensor, state: Tensor) -> Tensor:
        """Returns 1 for what stays and 0 for the rest, [batch, ...] that expands to x, and goes to the next step."""
        shared = self.num_shared(x.dim())
        shape = x.shape[: x.dim() - shared] + (1,) * shared
        count = shape.numel()
        lanes = words(state, -(-count // LANES)).view(torch.int16)[:count]
        state.add_(STEP)
        return (lanes >= self.num_dropped - LEVELS // 2).to(x.dtype).view(shape)

    @property
    def num_dropped(self) -> int:
        """Returns how many of the levels are dropped, at most all but one."""
        return min(round(self.p * LEVELS), LEVELS - 1)

    def dropped(self, x: Tensor, kept: Tensor) -> Tensor:
        """Returns x / (1 - p) where it is kept, and 0 elsewhere."""
        kept.mul_(LEVELS / (LEVELS - self.num_dropped))
        return x.mul_(kept) if self.inplace else x * kept

    def _apply(self, fn: Any, recurse: bool = True) -> _Seeded:
        """Moves the state with the module."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.state = None if self.state is None else fn(self.state)
        return self


class Dropout(_Seeded, nn.Dropout):
    """Drops single numbers."""


class Dropout1d(_Seeded, nn.Dropout1d):
    """Drops whole channels of [batch, channels, length], or of [channels, length]."""

    num_shared = staticmethod(lambda dim: 1)


class Dropout2d(_Seeded, nn.Dropout2d):
    """Drops whole channels of [batch, channels, ...]."""

    num_shared = staticmethod(lambda dim: dim - 2)


class Dropout3d(_Seeded, nn.Dropout3d):
    """Drops whole channels of [batch, channels, depth, height, width], or of one example."""

    num_shared = staticmethod(lambda dim: 3)


class AlphaDropout(_Seeded, nn.AlphaDropout):
    """Sets single numbers to the floor of SELU, and keeps mean and variance."""

    def dropped(self, x: Tensor, kept: Tensor) -> Tensor:
        p = self.num_dropped / LEVELS
        a = ((1 - p) * (1 + p * SELU_FLOOR**2)) ** -0.5
        rest = (1 - kept).mul_(a * SELU_FLOOR).add_(-a * p * SELU_FLOOR)
        kept.mul_(a)
        return x.mul_(kept).add_(rest) if self.inplace else x * kept + rest


class FeatureAlphaDropout(_Seeded, nn.FeatureAlphaDropout):
    """Does so with whole channels of [batch, channels, ...]."""

    dropped = AlphaDropout.dropped
    num_shared = staticmethod(lambda dim: dim - 2)


SEEDED: dict[type[nn.Module], type[_Seeded]] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
    nn.AlphaDropout: AlphaDropout,
    nn.FeatureAlphaDropout: FeatureAlphaDropout,
}


def replace_dropout(model: nn.Module) -> None:
    """Makes layers of `torch.nn` seeded ones, in place: names, hooks and who else holds them stay.

    Classes below them, and what a network calls as a function, draw from torch's global generators as ever.
    """
    for module in model.modules():
        if type(module) in SEEDED:
            module.__class__ = SEEDED[type(module)]


def dropout_layers(model: nn.Module) -> dict[str, _Seeded]:
    """Returns the seeded layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Seeded)}


def seed_dropout(model: nn.Module, seed: int) -> None:
    """Begins at step 0 in every layer of a model, each with a seed of its own by its name."""
    for name, layer in dropout_layers(model).items():
        layer.seed(derive(seed, name), next(model.parameters()).device)


def rewinding(model: nn.Module) -> Callable[[], None]:
    """Returns a function that takes the layers of a model back to the steps at which they are now."""
    states = [(layer.state, layer.state.clone()) for layer in dropout_layers(model).values() if layer.state is not None]

    def rewind() -> None:
        for state, before in states:
            state.copy_(before)

    return rewind


def unseeded(model: nn.Module) -> nn.Module:
    """Returns the model with torch's own layers, as devices run them, for its price; a copy where it was seeded."""
    if all(layer.state is None for layer in dropout_layers(model).values()):
        return model
    copy = deepcopy(model)
    for layer in dropout_layers(copy).values():
        layer.state = None
    return copy
