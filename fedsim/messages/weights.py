"""Weights on their way from a client to the server: by name, joined in one buffer, or compressed."""

from __future__ import annotations

import cmath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from fedsim.workloads.base import Tensors

# "joined last": as "joined", but every tensor of four dimensions lies as [n, h, w, c].
Form = Literal["named", "joined", "joined last", "compressed"]
HALVES = (torch.float16, torch.bfloat16)  # float16 overflows at 65504: sums of both are taken in float32
JOINED = "joined"  # name of the one tensor of joined weights


@dataclass(frozen=True, slots=True)
class SentWeights:
    """Tensors that are nobody else's, on the CPU; what never leaves its process may lie where it was made.

    Attributes:
        tensors: by name; of joined weights one, JOINED, [sum of sizes], in the order of the weights that were sent.
        form: what they are; compressed ones are a difference to the weights that were sent, see `messages.uplink`.
    """

    tensors: Tensors
    form: Form = "named"

    @property
    def nbytes(self) -> int:
        """Bytes of numbers."""
        return bytes_of(self.tensors)

    def on_host(self) -> SentWeights:
        """The same on the CPU, to leave this process."""
        return SentWeights({name: t.cpu() for name, t in self.tensors.items()}, self.form)

    def by_name(self, model: Tensors) -> Tensors:
        """One tensor per name, views where they were joined; `model` gives names and shapes."""
        if self.form not in ("joined", "joined last"):
            return self.tensors
        flat, start, found = self.tensors[JOINED], 0, {}
        for name, t in model.items():
            end, shape = start + t.numel(), t.shape
            if self.form == "joined last" and len(shape) == 4:
                n, c, h, w = shape
                found[name] = flat[start:end].view(n, h, w, c).permute(0, 3, 1, 2)
            else:
                found[name] = flat[start:end].view(shape)
            start = end
        return found

    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity."""
        return are_finite(self.tensors.values())


Place = torch.device | str


def named(tensors: Mapping[str, Tensor], device: Place = "cpu") -> SentWeights:
    """Copies of named tensors."""
    return SentWeights(own_copies(tensors, device))


def joined(buffer: Tensor, channels_last: bool = False, device: Place = "cpu") -> SentWeights:
    """A copy of weights that lie in one buffer, see `join_storage`."""
    return SentWeights({JOINED: own_copy(buffer, device)}, "joined last" if channels_last else "joined")


def joined_like(
    tensors: Mapping[str, Tensor], model: Tensors, channels_last: bool = False, device: Place = "cpu"
) -> SentWeights:
    """Copies of tensors: joined where there are any, with the names, shapes and one dtype of `model`, else by name.

    One tensor instead of one per name takes a tenth of the time to send and to add up.
    """
    if not tensors or not _are_alike(tensors, model):
        return named(tensors, device)
    every = (t.permute(0, 2, 3, 1) if channels_last and t.dim() == 4 else t for t in tensors.values())
    buffer = torch.cat([t.detach().reshape(-1) for t in every]).to(device)
    return SentWeights({JOINED: buffer}, "joined last" if channels_last else "joined")


def _are_alike(tensors: Mapping[str, Tensor], model: Tensors) -> bool:
    dtype = next((t.dtype for t in model.values()), None)
    return len(tensors) == len(model) and all(
        name == other and t.shape == old.shape and t.dtype == old.dtype == dtype
        for (name, t), (other, old) in zip(tensors.items(), model.items(), strict=True)
    )


def own_copy(tensor: Tensor, device: Place = "cpu") -> Tensor:
    """The tensor's numbers where nobody else changes them; in order, whatever its memory format."""
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)


def own_copies(tensors: Mapping[str, Tensor], device: Place = "cpu") -> Tensors:
    """`own_copy` of each."""
    return {name: own_copy(t, device) for name, t in tensors.items()}


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of numbers: itemsize x elements."""
    return sum(t.element_size() * t.numel() for t in tensors.values())


def rounded_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers in another dtype; integers and flags are rounded, not cut off."""
    return (tensor if dtype.is_floating_point else tensor.round()).to(dtype)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether there is no NaN and no infinity: a sum over each tensor finds them without a test per element."""
    return all(cmath.isfinite(total.item()) for total in sums_of(tensors))


def sums_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The sum over each tensor, a scalar; of halves in float32."""
    return [t.sum(dtype=torch.float32 if t.dtype in HALVES else None) for t in tensors]


def join_storage(tensors: Iterable[Tensor]) -> Tensor | None:
    """Moves tensors one behind the other into one buffer, in place, so that they can be copied as one.

    Each keeps its memory format: contiguous or, with four dimensions, channels last.

    Returns:
        The buffer, [sum of sizes]; None, and nothing moved, when they differ in dtype or lie in memory otherwise.
    """
    every = list(tensors)
    alike = all(t.is_contiguous() for t in every) or all(
        _is_last(t) if t.dim() == 4 else t.is_contiguous() for t in every
    )
    if len({(t.dtype, t.device) for t in every}) != 1 or not alike:
        return None
    buffer, start = every[0].new_empty(sum(prod(t.shape) for t in every)).detach(), 0
    for t in every:
        part = buffer.as_strided(t.shape, t.stride(), start)
        part.copy_(t.detach())
        t.data = part
        start += t.numel()
    return buffer


def is_channels_last(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors that `join_storage` takes lie channels last: what `joined` must know of them."""
    return any(not t.is_contiguous() for t in tensors)


def _is_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
