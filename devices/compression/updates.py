"""Compresses updates: chosen coordinates, fewer bits, and errors that later updates make up for.

A compressed update is one array of values, one of places and one of scales, whatever the number of tensors, so that
headers do not eat what was saved. The arrays say by themselves how they are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from devices.bounds import Checked, is_replaced
from devices.compression.bits import pack_bits, unpack_bits
from devices.errors import DeviceError

LARGEST = 127  # of symmetric int8


@dataclass(frozen=True)
class Packed:
    """One compressed update.

    Attributes:
        values: [k] float32, or int8 with scales.
        index: where they belong: nothing for all in a row, places [k] int32, a bit per coordinate [ceil(n / 8)] uint8,
            or the seed of a draw [1] int64.
        scale: of each tensor, [tensors] float32; nothing for floats.
    """

    values: Tensor
    index: Tensor
    scale: Tensor

    @property
    def wire_bytes(self) -> int:
        """Bytes of the three arrays."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.index, self.scale))


class UpdateCompressor(Checked, group="uplink"):
    """A rule for which coordinates of an update travel, and with how many bits.

    Args:
        select: "all"; "top", the ceil(ratio n) largest in magnitude; "random", as many at random, whose places cost one
            seed; "nonzero", those that changed.
        ratio: share that travels with "top" and "random", in (0, 1].
        bits: of a value: 32 (float) or 8 (integers with a scale per tensor: max |p| / 127).
        stochastic: whether 8-bit values are rounded at random, without bias; otherwise to the nearest.
        error_feedback: whether the part that did not travel is added to the client's next update.

    Raises:
        DeviceError: for a setting that is not allowed.
    Source: top-k with memory: Stich et al., "Sparsified SGD with Memory", NeurIPS 2018; stochastic rounding: Alistarh
        et al., "QSGD", NIPS 2017.
    """

    def __init__(
        self,
        select: Literal["all", "top", "random", "nonzero"] = "all",
        ratio: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        bits: Literal[8, 32] = 32,
        stochastic: bool = False,
        error_feedback: bool = True,
    ):
        self.select, self.ratio, self.bits = select, ratio, bits
        self.stochastic, self.error_feedback = stochastic, error_feedback

    @property
    def active(self) -> bool:
        """Whether an update changes at all."""
        return self.select != "all" or self.bits != 32 or self.is_own

    @property
    def may_lengthen(self) -> bool:
        """Whether an update may be longer afterwards: by what is made up for, or by rounding."""
        return self.active and (self.error_feedback or self.bits != 32 or self.is_own)

    @property
    def is_own(self) -> bool:
        """Whether a class below packs updates in another way."""
        return is_replaced(self.compress, UpdateCompressor.compress)

    def working_bytes(self, coordinates: int) -> int:
        """Returns the most memory that compressing takes, in bytes, beside the weights before and after training.

        Of each coordinate: the change, in its tensor and in the flat update; with error feedback the residuals
        before and after; magnitudes (top) or places as int64, their flags and values (nonzero); owners as int64 and the
        flag of 8-bit values.
        """
        each = 8 + (8 if self.error_feedback else 0) + {"top": 4, "nonzero": 15}.get(self.select, 0)
        whole = self.bits == 8 and self.select in ("all", "nonzero")
        return coordinates * (each + (9 if whole else 0))

    def compress(self, update: Tensor, sizes: Sequence[int], draw: torch.Generator) -> Packed:
        """Packs a flat update.

        Args:
            update: [n] float32.
            sizes: of the tensors that lie in it one behind the other.
            draw: for random places and rounding.
        """
        places, index = self._places(update, draw)
        values = update if places is None else update[places]
        if self.bits == 32:
            return Packed(values.clone(), index, update.new_empty(0))
        owner = _owners(sizes, update.device) if places is None else _owners(sizes, update.device)[places]
        largest = update.new_zeros(len(sizes)).scatter_reduce_(0, owner, values.abs(), "amax")
        scale = torch.where(largest > 0, largest / LARGEST, 1.0)
        exact = values / scale[owner]
        if self.stochastic:
            exact = (exact + torch.rand(exact.shape, generator=draw).to(exact)).floor()
        return Packed(exact.round().clamp(-LARGEST, LARGEST).to(torch.int8), index, scale)

    def _places(self, update: Tensor, draw: torch.Generator) -> tuple[Tensor | None, Tensor]:
        """Returns the chosen coordinates, ascending (None for all), and how the message says them."""
        count = math.ceil(self.ratio * len(update) - 1e-9)
        nothing = torch.empty(0, dtype=torch.int32, device=update.device)
        if self.select == "nonzero":
            mask = update != 0
            if bool(mask.all()):
                return None, nothing
            places = mask.nonzero().flatten()
            bitmap = len(update) / 8 < 4 * len(places)
            return places, pack_bits(mask) if bitmap else places.to(torch.int32)
        if self.select == "all" or count == len(update):
            return None, nothing
        if self.select == "random":
            seed = torch.randint(2**62, (1,), generator=draw)
            return _drawn(seed, count, len(update)).to(update.device), seed
        order = update.abs().argsort(descending=True, stable=True)
        places = order[:count].sort().values
        return places, places.to(torch.int32)


def restore(packed: Packed, sizes: Sequence[int]) -> Tensor:
    """Returns the flat update that a packed one stands for, [n] float32, zero where nothing travelled.

    Raises:
        DeviceError: if the arrays do not belong together.
    """
    total, values = sum(sizes), packed.values
    places = _read(packed.index, len(values), total)
    if (places is None and len(values) != total) or (places is not None and len(places) != len(values)):
        raise DeviceError(
            f"a packed update has {len(values)} values for {total if places is None else len(places)} places"
        )
    if values.dtype == torch.int8:
        owner = _owners(sizes, values.device)
        values = values.to(packed.scale.dtype) * packed.scale[owner if places is None else owner[places]]
    if places is None:
        return values.clone()
    return values.new_zeros(total).index_copy_(0, places, values)


def _read(index: Tensor, count: int, total: int) -> Tensor | None:
    if index.dtype == torch.int64:
        return _drawn(index, count, total)
    if index.dtype == torch.uint8:
        return unpack_bits(index, (total,)).nonzero().flatten()
    return index.long() if len(index) or not count else None


def _drawn(seed: Tensor, count: int, total: int) -> Tensor:
    draw = torch.Generator().manual_seed(int(seed))
    return torch.randperm(total, generator=draw)[:count].sort().values


def _owners(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Returns the number of the tensor that each coordinate lies in, [n] int64."""
    counts = torch.tensor(list(sizes), dtype=torch.int64)  # of no tensor too
    return torch.repeat_interleave(torch.arange(len(sizes)), counts).to(device)
