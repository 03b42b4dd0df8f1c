"""The memory that a pass through a network holds, counted tensor by tensor; the same on every host.

Counted is what torch allocates for tensors, not what it takes inside of one operator.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from devices.modes import UncompiledMode

Moments = tuple[tuple[int, int], ...]  # of each: bytes whatever the batch, and bytes per example


class LiveBytes(UncompiledMode):
    """Follows the storages that operators make while it is active, until they are freed.

    Attributes:
        moments: bytes held after each operator.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moments: list[int] = []
        self._live: dict[int, int] = {}
        self._held = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {s._cdata for s in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            key = storage._cdata
            if key not in given and key not in self._live:
                self._live[key] = storage.nbytes()
                self._held += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        self.moments.append(self._held)
        return result

    def _free(self, key: int) -> None:
        self._held -= self._live.pop(key)


def _storages(nest: Any) -> Iterator[Any]:
    for t in tree_leaves(nest):
        if isinstance(t, Tensor) and not t._is_zerotensor():
            yield t.untyped_storage()


def fullest_moments(run: Callable[[int], object], small: int, large: int) -> Moments:
    """Returns the moments at which a run holds most, each for some number of examples.

    A step holds most at the turn from forward to backward when the batch is large, and at its end, when all gradients
    are there, when it is small: one figure per example would not say both.

    What a run makes once per process and keeps, such as constants, is made before anything is counted, and the garbage
    collector waits: the moments do not depend on what the process did before.

    Args:
        run: called with a number of examples.
        small: examples of the first of two runs, from which follows what grows with the batch.
        large: examples of the second.
    """
    for size in (small, large):
        run(size)
    held = []
    for size in (small, large):
        with _no_collection(), LiveBytes() as live:
            run(size)
        held.append(live.moments or [0])
    if len(held[0]) != len(held[1]):  # other operators with another batch: all bytes count as the examples'
        return ((0, -(-max(held[1]) // large)),)
    lines = set()
    for few, many in zip(*held, strict=True):
        each = -(-(many - few) // (large - small))
        lines.add((few - small * each, each))
    return _envelope(lines)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Stops the garbage collector, which frees tensors in reference cycles at moments that differ between processes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _envelope(lines: set[tuple[int, int]]) -> Moments:
    """Returns the lines that are highest somewhere from batch 1 on, flat to steep."""
    batch, found = 1.0, []
    while lines:
        own = max(lines, key=lambda line: (line[0] + batch * line[1], line[1]))
        found.append(own)
        lines = {line for line in lines if line[1] > own[1]}
        batch = min(((own[0] - line[0]) / (line[1] - own[1]) for line in lines), default=batch)
    return tuple(found)


# --- recurrent layers -------------------------------------------------------------------------------------------------


class _LSTMKernel(torch.autograd.Function):
    """Allocates what oneDNN's kernel of one LSTM layer and direction does, and computes nothing.

    Kept for the backward pass are its first and last states and its workspace. Per step and example that is, with
    hidden size H and I inputs: the four gates, 4 H; the layer's input, hidden state and gradient of the input, each of
    two layers, 6 max(I, H); and the cell state and the gradients of both states, 5 H (measured with torch 2.11 for I
    and H from 7 to 512: within 4 %). While a pass runs it has scratch for the gates, and the weights, in the backward
    pass their gradients too, in a layout of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, training: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        steps, batch, inputs = x.shape
        hidden = weights[1].shape[1]
        ctx.scratch = steps * batch * 4 * hidden
        result = x.new_zeros(steps, batch, hidden)
        last = torch.zeros_like(h), torch.zeros_like(c)
        workspace = x.new_empty(steps * batch * (9 * hidden + 6 * max(inputs, hidden)) if training else 0)
        x.new_empty(ctx.scratch + sum(w.numel() for w in weights))
        ctx.save_for_backward(x, h, c, result, workspace, *last, *weights)
        return result, *last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, h, c, _, _, _, _, *weights = ctx.saved_tensors
        made = [*map(torch.zeros_like, (x, h, c)), None, *map(torch.zeros_like, weights)]
        x.new_empty(ctx.scratch + 2 * sum(w.numel() for w in weights))
        return tuple(made)


def is_kernel(args: Any) -> bool:
    """Returns whether oneDNN runs a call of `torch.lstm`: not of packed sequences and not with projections."""
    if isinstance(args[3], list | tuple):  # (data, batch sizes, state, weights, ...)
        return False
    _, (h, c), *_ = args
    return bool(h.shape[-1] == c.shape[-1])


class _LSTMCall(NamedTuple):
    """Holds the arguments of a call of `torch.lstm`, by its names and in its order."""

    input: Tensor
    hx: tuple[Tensor, Tensor]
    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the stand-in of the kernel layer by layer; returns what `torch.lstm` does, in zeros."""
        x = self.input.transpose(0, 1).contiguous() if self.batch_first else self.input
        ways, each = 2 if self.bidirectional else 1, 4 if self.has_biases else 2
        last: list[tuple[Tensor, Tensor]] = []
        for number in range(self.num_layers):
            outs = []
            for chain in range(number * ways, (number + 1) * ways):
                state, own = [part[chain] for part in self.hx], self.params[chain * each : (chain + 1) * each]
                out, *ends = _LSTMKernel.apply(x, *state, torch.is_grad_enabled(), *own)  # type: ignore[no-untyped-call]
                outs.append(out)
                last.append(tuple(ends))
            x = torch.cat(outs, -1) if ways == 2 else outs[0]
            if self.dropout and self.train and number < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout)
        h, c = (torch.stack(ends) for ends in zip(*last, strict=True))
        return (x.transpose(0, 1) if self.batch_first else x), h, c


class _Kernels(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, or what stands for the kernel of an LSTM."""
        if getattr(func, "__name__", "") == "lstm" and is_kernel(args):
            return _LSTMCall(*args, **(kwargs or {})).run()
        return func(*args, **(kwargs or {}))


@contextmanager
def lstm_kernels() -> Iterator[None]:
    """Lets LSTMs allocate what the CPU's kernel allocates, also on hosts that do not have it; results are zeros.

    The call of the kernel is replaced and no module's `forward`, which may be the user's own. Without oneDNN torch runs
    an LSTM step by step and holds half as much: no device's runtime trains that way.
    """
    with _Kernels():
        yield
