"""Sizes of a network: in memory, by its non-zero values, and as the bytes that are sent.

The three are always reported together, because each alone flatters some method.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from devices.errors import DeviceError

MAGIC = b"FSW1"
FORMS = ("dense", "bitmap", "index")
INDEX_BYTES = 4


def dense_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Returns the bytes of all values as they lie in memory."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def nonzero_bytes(tensors: Mapping[str, Tensor], bits: Mapping[str, int] | None = None) -> float:
    """Returns the bytes of the values that are not zero, without any cost for where they are.

    Args:
        tensors: by name.
        bits: of a value, by name; those of its type for the others.
    Source: the size rule of the DCASE 2021 challenge, task 1a: only non-zero parameters count.
    """
    bits = bits or {}
    return sum(int(t.count_nonzero()) * bits.get(name, 8 * t.element_size()) / 8 for name, t in tensors.items())


def wire_bytes(tensors: Mapping[str, Tensor], bits: Mapping[str, int] | None = None) -> int:
    """Returns the length of `pack(tensors, bits)`: it is made, not estimated."""
    return len(pack(tensors, bits))


def pack(tensors: Mapping[str, Tensor], bits: Mapping[str, int] | None = None) -> bytes:
    """Packs each tensor in its smallest form: all values, a bit per value and those not zero, or their places.

    Integers of fewer than eight bits lie in a row without gaps. A header in JSON holds names, types and shapes.

    Args:
        tensors: by name; bfloat16 cannot be packed.
        bits: of a value of an integer tensor, from 1 to 8; those of its type where nothing is said.

    Raises:
        DeviceError: for values that do not fit into their bits.
    """
    bits = bits or {}
    header, parts = [], []
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous().numpy()
        width = bits.get(name, 8 * values.itemsize)
        form, part = _smallest(name, values.reshape(-1), width)
        header.append([name, values.dtype.name, list(values.shape), width, form, len(part)])
        parts.append(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([MAGIC, len(text).to_bytes(4, "little"), text, *parts])


def unpack(data: bytes) -> dict[str, Tensor]:
    """Reads the tensors from what `pack` made.

    Raises:
        DeviceError: if the bytes are not of that form.
    """
    if data[:4] != MAGIC:
        raise DeviceError(f"packed weights begin with {MAGIC!r}, got {data[:4]!r}")
    start = 8 + int.from_bytes(data[4:8], "little")
    tensors = {}
    for name, dtype, shape, width, form, length in json.loads(data[8:start]):
        part, start = data[start : start + length], start + length
        if len(part) != length:
            raise DeviceError(f"packed weights end in the middle of {name!r}")
        count = math.prod(shape)
        values = np.zeros(count, dtype)
        if form == "dense":
            values[:] = _values(part, dtype, width, count)
        elif form == "bitmap":
            mask = np.unpackbits(np.frombuffer(part, np.uint8, -(-count // 8)), count=count).astype(bool)
            values[mask] = _values(part[-(-count // 8) :], dtype, width, int(mask.sum()))
        else:
            some = int.from_bytes(part[:INDEX_BYTES], "little")
            index = np.frombuffer(part, "<u4", some, INDEX_BYTES)
            values[index] = _values(part[INDEX_BYTES * (1 + some) :], dtype, width, some)
        tensors[name] = torch.from_numpy(values.reshape(shape))
    return tensors


def _smallest(name: str, values: np.ndarray, width: int) -> tuple[str, bytes]:
    mask = values != 0
    some = int(mask.sum())
    sizes = {
        "dense": _length(len(values), width),
        "bitmap": -(-len(values) // 8) + _length(some, width),
        "index": INDEX_BYTES * (1 + some) + _length(some, width),
    }
    form = min(FORMS, key=lambda form: sizes[form])
    if form == "dense":
        return form, _bytes(name, values, width)
    where = np.packbits(mask).tobytes()
    if form == "index":
        index = np.flatnonzero(mask).astype("<u4")
        where = some.to_bytes(INDEX_BYTES, "little") + index.tobytes()
    return form, where + _bytes(name, values[mask], width)


def _length(count: int, width: int) -> int:
    return -(-count * width // 8)


def _bytes(name: str, values: np.ndarray, width: int) -> bytes:
    if width == 8 * values.itemsize:
        return values.tobytes()
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if values.dtype.kind == "i" else (0, (1 << width) - 1)
    if (
        values.dtype.kind not in "iu"
        or not 1 <= width <= 8
        or (values.size and (values.min() < low or values.max() > high))
    ):
        raise DeviceError(
            f"{name} of type {values.dtype} does not fit into {width} bits; integers from {low} to {high} do"
        )
    rows = np.unpackbits((values.astype(np.int64) & 0xFF).astype(np.uint8)[:, None], axis=1)[:, 8 - width :]
    return np.packbits(rows).tobytes()


def _values(part: bytes, dtype: str, width: int, count: int) -> np.ndarray:
    kind: Any = np.dtype(dtype)
    if width == 8 * kind.itemsize:
        return np.frombuffer(part, kind, count)
    rows = np.unpackbits(np.frombuffer(part, np.uint8), count=count * width).reshape(count, width)
    values = rows.astype(np.int64) @ (1 << np.arange(width - 1, -1, -1))
    if kind.kind == "i":
        values -= (values >> width - 1) << width  # two's complement
    return values.astype(kind)
