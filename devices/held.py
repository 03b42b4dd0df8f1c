"""The memory that a pass through a network holds, counted tensor by tensor; the same on every host.

Counted is what torch allocates for tensors, not what it takes inside of one operator. May import: torch.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Moments = tuple[tuple[int, int], ...]  # of each: bytes whatever the batch, and bytes per example


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators make while it is active, until they are freed.

    Attributes:
        moments: bytes held behind each operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[int] = []
        self._live: dict[int, int] = {}
        self._held = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True imports torch's compiler, 0.7 s, only to say that it shall not compile this

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
    """The moments at which a run holds most, each for some number of examples.

    A step holds most at the turn from forward to backward when the batch is large, and at its end, when all gradients
    are there, when it is small: one figure per example would not say both.

    What a run makes once per process and keeps, such as the constants of `fedsim.tangents`, is made before anything is
    counted, and the garbage collector waits: the moments do not depend on what the process did before.

    Args:
        run: with so many examples.
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
    if len(held[0]) != len(held[1]):  # other operators with another batch: all of it is put down to the examples
        return ((0, -(-max(held[1]) // large)),)
    lines = set()
    for few, many in zip(*held, strict=True):
        each = -(-(many - few) // (large - small))
        lines.add((few - small * each, each))
    return _envelope(lines)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Tensors in reference cycles stay: else they would go at a moment that hangs on the objects of the process."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _envelope(lines: set[tuple[int, int]]) -> Moments:
    """The lines that are highest somewhere from batch 1 on, flat to steep."""
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

    Kept for the backward pass is its workspace. Per step and example that is, with hidden size H and I inputs: the four
    gates, 4 H; the layer's input, hidden state and gradient of the input, each of two layers, 6 max(I, H); and the cell
    state and the gradients of both states, 5 H (measured with torch 2.11 for I and H from 7 to 512: within 4 %). While
    a pass runs it has scratch for the gates, and the weights, in the backward pass their gradients too, in a layout of
    its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, training: bool, *weights: Tensor) -> Tensor:
        steps, batch, inputs = x.shape
        hidden = weights[1].shape[1]
        ctx.scratch = steps * batch * 4 * hidden
        result = x.new_zeros(steps, batch, hidden)
        workspace = x.new_empty(steps * batch * (9 * hidden + 6 * max(inputs, hidden)) if training else 0)
        x.new_empty(ctx.scratch + sum(w.numel() for w in weights))
        ctx.save_for_backward(x, result, workspace, *weights)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, _, _, *weights = ctx.saved_tensors
        gradients = [torch.zeros_like(x), None, *map(torch.zeros_like, weights)]
        x.new_empty(ctx.scratch + 2 * sum(w.numel() for w in weights))
        return tuple(gradients)


def _run_lstm(self: Any, x: Any, hx: Any = None) -> Any:
    if isinstance(x, PackedSequence) or self.proj_size or x.dim() != 3:
        return nn.LSTM.forward(self, x, hx)
    x = x.transpose(0, 1).contiguous() if self.batch_first else x
    ways = 2 if self.bidirectional else 1
    for number in range(self.num_layers):
        layers = self.all_weights[number * ways : (number + 1) * ways]
        outs = [_LSTMKernel.apply(x, torch.is_grad_enabled(), *weights) for weights in layers]
        x = torch.cat(outs, -1) if ways == 2 else outs[0]
        if self.dropout and self.training and number < self.num_layers - 1:
            x = nn.functional.dropout(x, self.dropout)
    state = x.new_zeros(ways * self.num_layers, x.shape[1], self.hidden_size)
    return (x.transpose(0, 1) if self.batch_first else x), (state, state.clone())


@contextmanager
def lstm_kernels(network: nn.Module) -> Iterator[None]:
    """LSTM layers allocate what the kernel of the CPU allocates, on hosts too that do not have it; results are zeros.

    Without oneDNN torch runs an LSTM step by step and holds half as much: no device's runtime trains that way.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.LSTM)]
    for layer in layers:
        vars(layer)["forward"] = MethodType(_run_lstm, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
