"""Masks as bits: one per entry, the first in the highest bit of the first byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Returns one bit per entry of a mask of any shape, [ceil(entries / 8)] uint8: what a message carries of it."""
    return torch.from_numpy(np.packbits(mask.detach().bool().cpu().numpy())).to(mask.device)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the mask of this shape, bool, that `pack_bits` has packed."""
    flat = np.unpackbits(bits.cpu().numpy(), count=math.prod(shape)).view(bool)
    return torch.from_numpy(flat).view(*shape).to(bits.device)
