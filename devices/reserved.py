"""Memory that a step and an inference reserve, from shapes alone: `devices.meter` without its arithmetic.

A network runs on the meta device, where tensors have sizes and no numbers: a ResNet-50 takes a second instead of half a
minute.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from devices.cost import ModelCost
from devices.held import Moments, fullest_moments, is_kernel, lstm_kernels
from devices.meter import Loss, inference_bytes, measure

FUSED = ("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention")
RECURRENT = ("gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")


class _NumbersNeededError(Exception):
    """Raised for a network that holds other tensors on the meta device than on a CPU."""


def with_memory(cost: ModelCost, network: nn.Module, loss: Loss, batch: dict[str, Tensor]) -> ModelCost:
    """Adds what a step and an inference hold to a cost: the same as `devices.meter` measures and runs reserve.

    Some networks run on a CPU instead: those with attention, whose kernels hold less than their parts, those with most
    recurrent layers, which fall into other parts there, and those whose path depends on numbers.

    Args:
        cost: of the network, e.g. from its layer table.
        network: stays as it is.
        loss: see `devices.meter.measure`.
        batch: four examples or more.

    Raises:
        Exception: of any kind, if the network cannot be trained on this batch.
    """
    weights = sum(p.numel() * p.itemsize for p in network.parameters())
    try:
        step, judged = (_moments(network, loss, batch, training) for training in (True, False))
    except Exception:
        step = measure(network, loss, batch, cost.name).step_bytes
        judged = inference_bytes(network, loss, batch)
    return replace(cost, parameter_bytes=weights, step_bytes=step, inference_bytes=judged)


def _moments(network: nn.Module, loss: Loss, batch: dict[str, Tensor], training: bool) -> Moments:
    own = deepcopy(network).to("meta").train(training)
    given = {key: tensor.to("meta") for key, tensor in batch.items()}
    parameters = [p for p in own.parameters() if p.requires_grad]

    def run(some: int) -> None:
        with _NoOtherKernels(training):
            value = loss(own, {key: tensor[:some] for key, tensor in given.items()})
        if training:
            torch.autograd.grad(value, parameters, allow_unused=True)

    size = len(next(iter(given.values())))
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training), lstm_kernels():
        torch.default_generator.manual_seed(0)  # as in `measure`
        moments = fullest_moments(run, size // 2, size)
    state = sum(t.nbytes for t in (*own.parameters(), *own.buffers()))
    example = sum(t[:1].nbytes for t in given.values())
    return tuple((fixed + state, each + example) for fixed, each in moments)


class _NoOtherKernels(TorchFunctionMode):
    """Stops a network at a kernel that holds other tensors on a CPU than on the meta device."""

    def __init__(self, training: bool):
        super().__init__()
        self.others = RECURRENT + (FUSED if training else ())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, unless it is attention in training or a recurrent layer that is no kernel of an LSTM."""
        name = getattr(func, "__name__", "")
        if name in self.others or (name == "lstm" and not is_kernel(args)):
            raise _NumbersNeededError
        return func(*args, **(kwargs or {}))
