"""Forward derivatives of a network's output along a direction, at the price of a second pass.

torch's own forward mode convolves values and tangents apart, and takes 2.7 to 3 training steps for what counts as two.
Here they are one batch of twice the size, the values before the tangents, which goes through convolutions, fully
connected layers, ReLU and max-pooling as it is; every other operator is left to torch's forward mode, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._pytree import tree_map


class Dual:
    """A tensor and its derivative, which torch's functions take in the place of a tensor.

    Attributes:
        both: values, then tangents, [2 batch, ...].
    """

    def __init__(self, both: Tensor):
        self.both = both

    @property
    def value(self) -> Tensor:
        """Returns the values, [batch, ...]."""
        return self.both.chunk(2)[0]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _apply(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """Returns a method of tensors, which gives a Dual, or another attribute, which is the value's."""
        attribute = getattr(self.value, name)
        if not callable(attribute):
            return attribute
        method = getattr(Tensor, name)
        return lambda *args, **kwargs: _apply(method, (self, *args), kwargs)


def jvp(network: Callable[[Any], Any], x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a network's output and its derivative at `x` along `direction`, both differentiable once more.

    Args:
        network: from [batch, ...] to [batch, ...], made of torch's functions.
        x: where.
        direction: of the shape of x, or one that expands to it.

    Raises:
        NotImplementedError, RuntimeError: where an operator of the network has no forward derivative.
    """
    out = network(Dual(torch.cat([x, direction.expand_as(x)])))
    if not isinstance(out, Dual):
        raise NotImplementedError("the network does not pass on forward derivatives")
    value, tangent = out.both.chunk(2)
    return value, tangent


def _apply(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(function, "__name__", "")
    if kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__")):
        first, *rest = args  # its values may be needed again, so they are replaced, not overwritten
        first.both = _apply_to_new(function, (Dual(first.both.clone()), *rest), kwargs).both
        return first
    return _apply_to_new(function, args, kwargs)


def _apply_to_new(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    rule = RULES.get(function)
    if rule and isinstance(args[0], Dual) and not any(isinstance(other, Dual) for other in args[1:]):
        out = rule(args[0].both, *args[1:], **kwargs)
        if out is not None:
            return Dual(out)
    if function is F.group_norm:  # torch's derivative of it takes no other layout
        args = (Dual(args[0].both.contiguous()), *args[1:])
    with forward_ad.dual_level():
        args, kwargs = tree_map(_packed, (args, kwargs))
        return tree_map(_unpacked, function(*args, **kwargs))


def _packed(leaf: Any) -> Any:
    if not isinstance(leaf, Dual):
        return leaf
    halves = leaf.both.view(2, -1, *leaf.both.shape[1:])
    return forward_ad.make_dual(halves[0], halves[1])


def _unpacked(leaf: Any) -> Any:
    """Returns a result as a Dual; integers, and what does not depend on the input, as they are."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    value, tangent = forward_ad.unpack_dual(leaf)
    return leaf if tangent is None else Dual(torch.cat([value, tangent]))


# --- operators that take both at once: from [2 batch, ...] to the same, or None where they do not apply --------------


def _linear(layer: Callable[..., Tensor], size: int) -> Callable[..., Tensor | None]:
    """Makes the rule of a layer that is linear in its input, of `size` dimensions; the bias belongs to the values."""

    def rule(both: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
        if both.dim() < 2 or (size and both.dim() != size):
            return None
        out = layer(both, weight, None, *args, **kwargs)
        if bias is None:
            return out
        half = _half(len(out), out.dim(), out.dtype, out.device)
        return out.add_(half * bias.view(-1, *[1] * (size - 2) if size else ()))

    return rule


@lru_cache(maxsize=64)
def _half(length: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ones for values, zeros for tangents, [length, 1, ...]."""
    half = torch.ones(length, *[1] * (dim - 1), dtype=dtype, device=device)
    half[length // 2 :] = 0
    return half


def _relu(both: Tensor, inplace: bool = False) -> Tensor:
    halves = both.view(2, -1, *both.shape[1:])
    values = halves[0].detach()
    passes = torch.gt(values, 0, out=torch.empty_like(values))  # as numbers: masked_fill takes ten times as long
    return (halves * passes).view(both.shape)


def _max_pool2d(both: Tensor, kernel_size: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    kwargs.pop("return_indices", None)
    if both.dim() != 4:
        return None
    halves = both.view(2, -1, *both.shape[1:])
    best = F.max_pool2d(halves[0].detach(), kernel_size, *args, **kwargs, return_indices=True)[1]
    rows = best.flatten(2).expand(2, *best.shape[:2], -1)
    pooled: Tensor = halves.flatten(-2).gather(-1, rows).unflatten(-1, best.shape[2:])
    return pooled.flatten(0, 1)


def _flatten(both: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor | None:
    return both.flatten(start_dim, end_dim) if start_dim > 0 else None


RULES: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear(F.linear, 0),
    F.conv1d: _linear(F.conv1d, 3),
    F.conv2d: _linear(F.conv2d, 4),
    F.relu: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    F.max_pool2d: _max_pool2d,
    torch.flatten: _flatten,
    Tensor.flatten: _flatten,
}


def _operator(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)
    return lambda *args: _apply(method, args, {})


def _in_place(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    def operator(dual: Dual, other: Any) -> Dual:
        dual.both = _apply(method, (dual, other), {}).both
        return dual

    return operator


for _name in ("add", "sub", "mul", "truediv", "matmul"):
    setattr(Dual, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(Dual, f"__r{_name}__", _operator(f"__r{_name}__"))
    setattr(Dual, f"__i{_name}__", _in_place(f"__{_name}__"))
for _name in ("__getitem__", "__neg__", "__pow__"):
    setattr(Dual, _name, _operator(_name))
