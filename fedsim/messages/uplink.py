"""What clients send back, made smaller on the device and whole again before any strategy sees it.

A client's reply holds the difference to the weights that it was sent. Buffers (statistics of batch norms) and counts
travel as they are, in one array each; beside 8-bit values, buffers in half precision. What compression lost stays on
the device as `reply.residual`, which belongs to the reply: a client that is not sampled, is late or fails keeps the one
it had, since nothing of its update has reached the server.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from devices.compression.updates import Packed, UpdateCompressor, restore
from fedsim.messages.records import OF_REPLY
from fedsim.messages.weights import SentWeights, named
from fedsim.workloads.base import Tensors

VALUES, INDEX, SCALE = "update:values", "update:index", "update:scale"
BUFFERS, COUNTS = "update:buffers", "update:counts"
# Two bits per tensor that was sent: first of all of them whether it came compressed, then whether it is in BUFFERS or
# COUNTS. Left out where every tensor that does not come under its own name is compressed.
WHICH = "update:which"
PACKED = {torch.float32: BUFFERS, torch.int64: COUNTS}
KEYS = {VALUES, INDEX, SCALE, WHICH, BUFFERS, COUNTS}
HALF = torch.finfo(torch.float16).max
RESIDUAL = f"{OF_REPLY}residual"


def compressed(
    compressor: UpdateCompressor,
    weights: Tensors,
    received: Tensors,
    parameters: Collection[str],
    state: MutableMapping[str, Tensor],
    draw: torch.Generator,
) -> SentWeights:
    """What a client sends in place of its weights; its residual is brought up to date.

    Args:
        compressor: of the run.
        weights: after training.
        received: before it.
        parameters: names of the tensors that may be compressed, of any float type: their changes are packed as float32.
            Others travel whole, and so do those that came in another shape; these under their own names.
        state: of the client.
        draw: for random places and rounding.
    """
    same = [name for name, t in received.items() if name in weights and _alike(t, weights[name])]
    names = [name for name in same if name in parameters and received[name].dtype.is_floating_point]
    beside = [name for name in same if name not in parameters and received[name].dtype in PACKED]
    sizes = [received[name].numel() for name in names]
    changes = [_change(weights[name].detach(), received[name]) for name in names]
    update = torch.cat([torch.empty(0), *changes])
    if compressor.error_feedback and RESIDUAL in state and len(state[RESIDUAL]) == len(update):
        update = update + state[RESIDUAL].cpu()  # another length belongs to another part of the network
    packed = compressor.compress(update, sizes, draw)
    if compressor.error_feedback:
        state[RESIDUAL] = update - restore(packed, sizes)
    arrays = {VALUES: packed.values, INDEX: packed.index, SCALE: packed.scale}
    for dtype, key in PACKED.items():
        some = [weights[name].detach().reshape(-1).cpu() for name in beside if received[name].dtype == dtype]
        arrays[key] = torch.cat([torch.empty(0, dtype=dtype), *some])
    buffers = arrays[BUFFERS]
    if compressor.bits < 32 and len(buffers) and float(buffers.abs().max()) <= HALF:
        arrays[BUFFERS] = buffers.half()
    small, packs = set(names), set(beside)
    whole = {name: tensor for name, tensor in weights.items() if name not in small and name not in packs}
    if beside or any(name not in weights for name in received):
        flags = [name in some for some in (small, packs) for name in received]
        arrays[WHICH] = torch.from_numpy(np.packbits(flags))
    every = {name: t for name, t in arrays.items() if len(t) or name == VALUES} | whole
    return replace(named(every), form="compressed")


def decompressed(sent: SentWeights, received: Tensors) -> SentWeights:
    """The client's weights, whole again if they came compressed.

    Args:
        sent: by the client.
        received: what the client was sent, to which a compressed update is a difference.
    """
    if sent.form != "compressed":
        return sent
    tensors = sent.tensors
    names, beside = [name for name in received if name not in tensors], []
    if WHICH in tensors:
        flags = np.unpackbits(tensors[WHICH].numpy(), count=2 * len(received)).reshape(2, -1).astype(bool)
        names, beside = ([name for name, flag in zip(received, row, strict=True) if flag] for row in flags)
    sizes = [received[name].numel() for name in names]
    nothing = torch.empty(0, dtype=torch.int32)
    packed = Packed(tensors[VALUES], tensors.get(INDEX, nothing), tensors.get(SCALE, torch.empty(0)))
    parts = np.split(restore(packed, sizes).numpy(), np.cumsum(sizes)[:-1]) if names else []
    changed = {name: _moved(received[name], part) for name, part in zip(names, parts, strict=True)}
    for dtype, key in PACKED.items():
        if key in tensors:
            mine = [name for name in beside if received[name].dtype == dtype]
            for name, part in zip(mine, tensors[key].split([received[name].numel() for name in mine]), strict=True):
                changed[name] = part.to(dtype).view(received[name].shape)
    whole = {name: t for name, t in tensors.items() if name not in KEYS}
    both = changed | whole
    return SentWeights({name: both.pop(name) for name in received if name in both} | both)


def _change(tensor: Tensor, received: Tensor) -> Tensor:
    """The difference, flat, in float32: half precision is too coarse for it, and a small number needs no float64."""
    wide = torch.promote_types(received.dtype, torch.float32)
    return (tensor.to(wide) - received.to(wide)).float().reshape(-1).cpu()


def _moved(received: Tensor, change: np.ndarray) -> Tensor:
    """The sum in the dtype of what was received, rounded once."""
    weights = received.cpu().numpy()
    with np.errstate(over="ignore"):  # whoever takes the weights looks whether they are finite
        moved = (weights + change.reshape(weights.shape)).astype(weights.dtype)
    return torch.from_numpy(np.asarray(moved))


def _alike(received: Tensor, tensor: Tensor) -> bool:
    return received.shape == tensor.shape and received.dtype == tensor.dtype
