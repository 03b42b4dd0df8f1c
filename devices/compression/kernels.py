"""Real int8 kernels of this host: the one place that knows torch's quantisation workflow, for measuring time.

The workflow is deprecated in torch and may move: only `int8_network` has to change then.
"""

from __future__ import annotations

import warnings
from copy import deepcopy

import torch
from torch import Tensor, nn

from devices.errors import DeviceError, one_line

ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")
INTEGER_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def int8_network(model: nn.Module, example: Tensor, tokens: bool = False) -> nn.Module:
    """Copies a network onto int8 kernels: static for convolutions and linear layers, dynamic for LSTMs.

    Args:
        model: in evaluation mode; stays as it is.
        example: a batch of input, which also gives the ranges of activations.
        tokens: the input is text and the network recurrent.

    Raises:
        DeviceError: if torch cannot follow or run the network, or if no operator of the result is an integer one:
            some workflows hand back the float network without a word.
    """
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch announces a move of these functions to another package
        try:
            if tokens:
                network: nn.Module = quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
            else:
                prepared = prepare_fx(_affine(model), get_default_qconfig_mapping(engine()), (example,))
                prepared(example)
                network = convert_fx(prepared)
            network(example)
        except Exception as error:
            reason = one_line(error)[:150]
            raise DeviceError(f"network {type(model).__name__} cannot run in int8 here: {reason}") from error
    if not integer_operators(network):
        raise DeviceError(
            f"network {type(model).__name__} has no int8 operator after quantising: it still runs in floats"
        )
    return network


def _affine(model: nn.Module) -> nn.Module:
    """Copies a network and gives every batch norm a scale and an offset: torch's workflow takes no others."""
    copy = deepcopy(model)
    for norm in copy.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not norm.affine and norm.running_var is not None:
            norm.affine, norm.weight = True, nn.Parameter(torch.ones_like(norm.running_var))
            norm.bias = nn.Parameter(torch.zeros_like(norm.running_var))
    return copy


def integer_operators(network: nn.Module) -> list[str]:
    """Returns the names of a network's modules and functions that run in integers."""
    found = [name for name, module in network.named_modules() if type(module).__module__.startswith(INTEGER_MODULES)]
    graph = getattr(network, "graph", None)
    for node in graph.nodes if graph is not None else ():
        if node.op == "call_function" and "quantized" in str(node.target):
            found.append(node.name)
    return found


def engine() -> str:
    """Returns the quantised engine of this host."""
    supported = torch.backends.quantized.supported_engines
    if "fbgemm" in supported:
        return "fbgemm"
    return next((name for name in ENGINES if name in supported), str(supported[-1]))
