"""Counts what one example costs in a network by running it, so that nobody writes FLOPs down by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from devices.cost import ModelCost
from devices.errors import DeviceError
from devices.held import Moments, fullest_moments, lstm_kernels
from devices.latency.columns import TABLE_KINDS
from devices.modes import UncompiledMode
from devices.operators import macs_of

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def _lstm_forward(x: Tensor, w_ih: Tensor, w_hh: Tensor, *_: Any, **__: Any) -> int:
    """Counts 2 * 4H(I + H) a step and example of one layer and way; x [steps, batch, I], w_ih [4H, I], w_hh [4H, H]."""
    rows = x.numel() // x.shape[-1]
    return 2 * rows * (w_ih.numel() + w_hh.numel())


def _lstm_backward(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, h: Tensor, *_: Any, **__: Any) -> int:
    """Counts the products that the gradients asked for need; h [batch, H] is the first state.

    The kernel has no output mask and may compute more. Counted is what the same layer costs as plain matrix products
    (as a GRU runs on the CPU, and an LSTM without oneDNN): nothing for an input or first state without a gradient.
    """
    rows = x.numel() // x.shape[-1]
    state_rows = rows if h.requires_grad else rows - h.numel() // h.shape[-1]
    products = w_ih.numel() * rows * (w_ih.requires_grad + x.requires_grad)
    products += w_hh.numel() * (rows * w_hh.requires_grad + state_rows)
    return 2 * products


RECURRENT_FLOPS = {
    torch.ops.aten.mkldnn_rnn_layer: _lstm_forward,
    torch.ops.aten.mkldnn_rnn_layer_backward: _lstm_backward,
}


class Flops(UncompiledMode):
    """Adds up the work of the operators that run while it is active; a multiply-add is two FLOPs.

    The LSTM kernel of the CPU counts too; GRUs and Elman networks run there as matrix products. Products, convolutions,
    attention and decompositions count; norms, activations and pooling do not. An operator that may multiply and that no
    formula knows raises `DeviceError`.

    Attributes:
        total: FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result, operator = func(*args, **kwargs), func._overloadpacket
        if operator in RECURRENT_FLOPS:
            self.total += RECURRENT_FLOPS[operator](*args, **kwargs)
        elif _has_tensors((args, kwargs)):
            self.total += round(2 * (macs_of(func, args, kwargs, result) or 0))
        return result


def _has_tensors(nest: Any) -> bool:
    return any(isinstance(x, Tensor) for x in tree_leaves(nest))


def measure(model: nn.Module, loss: Loss, batch: dict[str, Tensor], name: str) -> ModelCost:
    """Runs forward and backward passes of `loss(model, batch)` and counts what each example costs.

    It runs a copy, in training mode, on the CPU and without oneDNN, whose scratch memory differs between machines: the
    model, its gradients, buffers and mode and torch's random state stay as they are, and every host counts the same.

    Args:
        model: parameters that need no gradient are priced as frozen.
        loss: of a model and a batch; it must use those that it is given, and the batch may be larger than `batch`.
        batch: tensors with the examples in the first dimension; two or more where batch norm wants them.
        name: of the network, kept in the result.

    Returns:
        FLOPs and activation bytes per example, and what a step holds. Activations are the storages that autograd keeps
        for the backward pass, each counted once, without parameters, buffers and the batch itself. A recurrent layer is
        one call; an LSTM keeps what oneDNN's kernel does (`devices.held`).

    Raises:
        DeviceError: if the batch is empty, or an operator may multiply and has no formula (`devices.operators`).
    """
    size = min((len(tensor) for tensor in batch.values()), default=0)
    if size == 0:
        raise DeviceError(f"network {name!r} cannot be measured on an empty batch; give at least one example")
    network, batch = _copied(model, batch)
    network.train()
    calls = 0

    def count_call(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def step(value: Tensor) -> None:
        if value.requires_grad:  # only what a step needs: no gradient of a tensor that the loss made itself
            torch.autograd.grad(value, [p for p in network.parameters() if p.requires_grad], allow_unused=True)

    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _without_onednn():
        torch.default_generator.manual_seed(0)  # a network may draw which of its layers run
        # The loss has to finish before its backward pass begins: nothing of it may be held but what autograd keeps.
        moments = _moments(network, lambda some: step(loss(network, some)), batch)
        with lstm_kernels():
            saved = _saved_bytes(network, loss, batch)
        for module in network.modules():
            if next(module.children(), None) is None:
                module.register_forward_pre_hook(count_call)
        with Flops() as forward:
            value = loss(network, batch)
        with Flops() as backward:
            step(value)
    return ModelCost(
        name=name,
        forward_flops=forward.total / size,
        backward_flops=backward.total / size,
        parameter_bytes=sum(p.numel() * p.itemsize for p in network.parameters()),
        activation_bytes=-(-saved // size),
        calls=calls,
        step_bytes=moments,
    )


def inference_bytes(model: nn.Module, loss: Loss, batch: dict[str, Tensor]) -> Moments:
    """Measures what judging a batch holds: as `ModelCost.step_bytes`, in evaluation mode and without gradients.

    Args:
        model: stays as it is; a copy runs.
        loss: see `measure`.
        batch: see `measure`.
    """
    network, batch = _copied(model, batch)
    network.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _without_onednn():
        torch.default_generator.manual_seed(0)  # a network may draw which of its layers run
        return _moments(network, lambda some: loss(network, some), batch)


def _copied(model: nn.Module, batch: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    return deepcopy(model).cpu(), {key: tensor.detach().cpu() for key, tensor in batch.items()}


def _moments(network: nn.Module, run: Callable[[dict[str, Tensor]], object], batch: dict[str, Tensor]) -> Moments:
    """Finds the fullest moments of `run` on half the batch and on all of it; weights and batch are always there."""
    size = len(next(iter(batch.values())))
    if size < 4:  # a batch of one would not do for batch norm
        batch, size = {key: torch.cat([tensor, tensor]) for key, tensor in batch.items()}, 2 * size
    with lstm_kernels():
        moments = fullest_moments(lambda some: run({key: t[:some] for key, t in batch.items()}), size // 2, size)
    state = [*network.parameters(), *network.buffers()]
    weights, example = sum(t.nbytes for t in state), sum(t[:1].nbytes for t in batch.values())
    return tuple((fixed + weights, each + example) for fixed, each in moments)


def _saved_bytes(network: nn.Module, loss: Loss, batch: dict[str, Tensor]) -> int:
    """Returns the bytes that autograd saves between the forward and the backward pass."""
    own = [*network.parameters(), *network.buffers(), *batch.values()]
    excluded = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, int] = {}  # storage -> bytes; autograd holds the storages, so no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor._is_zerotensor():  # forward-mode derivatives have zeros without a storage
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that holds itself would be a reference cycle

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(network, batch)  # lives until all is counted
    del value
    return sum(saved.values())


@contextmanager
def _without_onednn() -> Iterator[None]:
    # Torch's own context manager for this also resets the precision flags, with a warning.
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def peak_memory_bytes(cost: ModelCost, batch: int, optimiser_bytes_per_parameter_byte: float) -> int:
    """Returns the most memory of a step, in bytes: weights, gradients, optimizer state, the batch, its activations.

    Args:
        cost: of the network, from `measure`; without `step_bytes`, twice the weights and the activations are taken.
        batch: examples per step.
        optimiser_bytes_per_parameter_byte: 0 for plain SGD, 1 with momentum, 2 for Adam.

    The runtime is not in it: `DeviceProfile.memory_bytes` is already without.
    """
    moments = cost.step_bytes or ((2 * cost.parameter_bytes, cost.activation_bytes),)
    return round(most_bytes(moments, batch) + optimiser_bytes_per_parameter_byte * cost.parameter_bytes)


def inference_memory_bytes(cost: ModelCost, batch: int) -> int:
    """Returns the most memory of judging a batch; the weights alone where `inference_bytes` were not measured."""
    return most_bytes(cost.inference_bytes or ((cost.parameter_bytes, 0),), batch)


def most_bytes(moments: Moments, batch: int) -> int:
    """Returns the bytes of the fullest moment with so many examples."""
    return max(fixed + batch * each for fixed, each in moments)


@lru_cache(maxsize=256)
def matrix_product(inner: int, outer: int) -> ModelCost:
    """Returns what [n, inner] @ [inner, outer] costs per row: its multiply-adds, and nothing else.

    A runtime would do such a product inside of the step; it is no network that somebody loads and starts.
    """
    macs = float(inner * outer)
    rows = tuple((macs if kind == "fc" else 0.0, 0.0, 0.0, 0.0) for kind in TABLE_KINDS)
    return ModelCost(f"product {inner}x{outer}", 2 * macs, 0.0, 0, 0, calls=0, layers=rows)
