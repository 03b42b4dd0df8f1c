"""Counts what one example costs in a network, by layer kind: the input of `devices.latency.structured`.

The network is run once on the meta device, which knows shapes and no numbers; every operation below autograd is seen,
whether a module or a function called it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from devices.errors import DeviceError, one_line
from devices.latency.columns import MAC_KINDS, TABLE_KINDS
from devices.modes import UncompiledMode
from devices.operators import macs_of, name_of

KINDS = TABLE_KINDS
COLUMNS = ("macs", "activations", "weights", "calls")
FEATURES = len(KINDS) * len(COLUMNS) + 1  # and a constant


@dataclass(frozen=True)
class LayerTable:
    """Sums over the layers of one network, by kind.

    Kinds: conv3x3 (dense 3x3 with stride 1, which mobile runtimes run as Winograd convolutions), conv (other dense
    convolutions with a kernel above 1), pointwise (kernel 1), grouped (several groups with more than one channel),
    depthwise (one channel per group), pool (also means, sums and maxima over dimensions), elementwise (activations,
    adds, copies, softmax, other norms, embeddings), foldable (batch norms, ReLU and ReLU6, which inference runtimes
    fold into the layer before), fc (matrix products, among them the projections and the two products of attention,
    fused or not, distances, decompositions and Fourier transforms), recurrent.

    Columns: macs are multiply-adds (for pool and elementwise: element operations) per example; activations are elements
    read and written per example; weights are elements of parameters read by one pass, whatever the batch; calls are
    operations started by one pass. A recurrent layer reads its weights at every step and is one call a
    step; a parameter or buffer that meets activations (a norm's, a positional encoding) counts as weights.

    Attributes:
        rows: a tuple of `COLUMNS` for each of `KINDS`.
    Source: fedsim.
    """

    rows: tuple[tuple[float, float, float, float], ...]

    def __post_init__(self) -> None:
        shape = [len(row) for row in self.rows]
        if shape != [len(COLUMNS)] * len(KINDS):
            raise DeviceError(f"a layer table has {len(KINDS)} rows of {len(COLUMNS)} numbers, got rows of {shape}")
        if not all(np.isfinite(value) and value >= 0 for row in self.rows for value in row):
            raise DeviceError(f"a layer table holds finite numbers from 0, got {self.rows}")

    @classmethod
    def empty(cls) -> LayerTable:
        return cls(((0.0,) * len(COLUMNS),) * len(KINDS))  # type: ignore[arg-type]

    @property
    def macs(self) -> float:
        """Multiply-adds of one example; twice as many are its FLOPs."""
        return sum(self.rows[KINDS.index(kind)][0] for kind in MAC_KINDS)

    def features(self, batch: int) -> np.ndarray:
        """Returns the table as a vector for one pass of `batch` examples: columns kind by kind, then 1; [41] float64.

        Raises:
            DeviceError: if the batch is below 1.
        """
        if batch < 1:
            raise DeviceError(f"batch must be 1 or more, got {batch}")
        per_column = np.array([batch, batch, 1.0, 1.0])
        return np.append(np.array(self.rows) * per_column, 1.0)

    def __add__(self, other: LayerTable) -> LayerTable:
        return _table(np.array(self.rows) + np.array(other.rows))

    def to_dict(self) -> dict[str, list[float]]:
        """Returns plain JSON types, by kind; `from_dict` is the inverse."""
        return {kind: list(row) for kind, row in zip(KINDS, self.rows, strict=True)}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Iterable[float]]) -> LayerTable:
        """Reads what `to_dict` wrote.

        Raises:
            DeviceError: for kinds or rows that do not fit.
        """
        if set(tree) != set(KINDS):
            raise DeviceError(f"a layer table has the kinds {', '.join(KINDS)}, got {', '.join(map(str, tree))}")
        return cls(tuple(tuple(map(float, tree[kind])) for kind in KINDS))  # type: ignore[misc]


MAX_REAL = 1e11  # weights times values of the input; up to here a real pass takes some tens of milliseconds


def _table(values: np.ndarray) -> LayerTable:
    return LayerTable(tuple(tuple(map(float, row)) for row in values))  # type: ignore[misc]


def trace(model: nn.Module, example: Tensor | tuple[Any, ...]) -> LayerTable:
    """Counts what `model(*example)` costs in evaluation mode, by layer kind.

    A copy without numbers runs: the model, its buffers, gradients and mode and torch's random state stay as they are.
    Networks whose path depends on numbers run once more as a real copy, and small ones do so first: shapes without
    numbers cost the import of torch's compiler. Forward hooks of the model run too. Operations on parameters alone
    (masked or normalised weights) are taken as folded, and free; so are views.

    Args:
        model: any module; its own shapes count, so that pruned and narrowed networks need nothing else.
        example: input with the examples in the first dimension, or a tuple of inputs whose first tensor has them there.

    Raises:
        DeviceError: naming the module that fails and why, for networks that cannot be run or counted, or have an
            operator that may multiply and has no formula (`devices.operators`).
    Source: fedsim.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    batch = next((len(x) for x in tree_flatten(inputs)[0] if isinstance(x, Tensor) and x.ndim), 0)
    if batch == 0:
        raise DeviceError("a network is traced on one example or more, got none; give a tensor [batch, ...]")
    size = max(x.numel() for x in tree_flatten(inputs)[0] if isinstance(x, Tensor))
    is_small = size * sum(t.numel() for t in _tensors(model)) < MAX_REAL
    ways = (_shape_of, _values_of)  # with numbers only where the path or a kernel needs them
    failures: dict[object, DeviceError] = {}
    for replace in reversed(ways) if is_small else ways:
        try:
            network = _copy(model, replace)
            given = tree_map(lambda x, new=replace: new(x.detach()) if isinstance(x, Tensor) else x, inputs)
        except Exception as error:
            name = type(model).__name__
            failures[replace] = DeviceError(f"network {name} cannot be copied for tracing: {_sentence(error)}")
            continue
        recorder, place = _Recorder(_tensors(network)), _Location(network)
        try:
            with _unchanged_random_state(), torch.no_grad(), _no_fast_path(), _WholeLayers(recorder), recorder:
                network.eval()(*given)
            return _table(recorder.sums * [[1 / batch, 1 / batch, 1, 1]])
        except Exception as error:
            failures[replace] = DeviceError(f"{place} cannot be traced: {_sentence(error)}")
    raise failures[_values_of]


def _sentence(error: Exception) -> str:
    return one_line(error)[:200] or type(error).__name__


def _shape_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().to("meta") if tensor.layout == torch.strided else tensor.to("meta")


def _values_of(tensor: Tensor) -> Tensor:
    """Clones into torch's own order of dimensions, as shapes alone come: another needs copies between some layers."""
    return tensor.clone(memory_format=torch.contiguous_format) if tensor.layout == torch.strided else tensor.clone()


def _tensors(model: nn.Module) -> list[Tensor]:
    """Returns parameters, buffers and plain attributes, as pruning and normalised weights leave them."""
    attributes = tree_flatten([dict(vars(module)) for module in model.modules()])[0]
    return [x for x in attributes if isinstance(x, Tensor)]


def _copy(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copies the model with every tensor replaced; a tensor that stands in two places stays one."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        new = replace(tensor.detach())
        memo[id(tensor)] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
    return deepcopy(model, memo)


def _unchanged_random_state() -> AbstractContextManager[None]:
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Runs attention as its parts, on every processor: fused kernels hide their products."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Location:
    """Follows which module of a network runs, to name the one that fails."""

    def __init__(self, network: nn.Module):
        self.stack: list[str] = []
        for name, module in network.named_modules():
            label = f"module {name!r} ({type(module).__name__})" if name else f"network {type(module).__name__}"
            module.register_forward_pre_hook(lambda *_, label=label: self.stack.append(label))
            module.register_forward_hook(lambda *_: self.stack.pop() and None)

    def __str__(self) -> str:
        return self.stack[-1] if self.stack else "the network"


class _Recorder(UncompiledMode):
    """Adds every operation to `sums` [kinds, 4 columns], for the whole batch."""

    def __init__(self, constants: list[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.sums = np.zeros((len(KINDS), len(COLUMNS)))
        self.paused = False
        # By storage, so that views of a parameter are parameters too; held, so that no address comes twice.
        self.constants = {_storage(tensor): tensor for tensor in constants}

    def add(self, kind: str, macs: float, activations: float, weights: float, calls: float = 1) -> None:
        self.sums[KINDS.index(kind)] += macs, activations, weights, calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation and counts it."""
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
            outputs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
            self._count(func, args, kwargs, inputs, outputs)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = func._schema.name.removeprefix("aten::")
        if func.namespace in ("quantized", "onednn"):
            raise DeviceError(f"{func} works on packed weights without a shape; trace the network before converting it")
        if func.is_view or name in FREE or not inputs or not outputs:
            return
        if all(_storage(x) in self.constants for x in inputs):
            self.constants |= {_storage(x): x for x in outputs}
            return
        if len(outputs) > 1 and name in FIRST_OUTPUT:
            outputs = outputs[:1]
        weights = [x for x in inputs if _storage(x) in self.constants]
        read = sum(x.numel() for x in inputs) - sum(x.numel() for x in weights)
        kind, macs = _kind(func, name, args, kwargs, inputs, outputs)
        if name == "embedding":  # rows that are looked up, not the whole table
            weights, read = [], read + outputs[0].numel()
        stored = sum(min(x.numel(), x.untyped_storage().nbytes() // x.itemsize) for x in weights)
        self.add(kind, macs, read + sum(x.numel() for x in outputs), stored)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


# Operations that move and compute nothing: shapes, fresh memory that something else fills, and what views become.
FREE = {
    *("detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh", "_local_scalar_dense", "is_same_size", "item"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "sym_size", "equal"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "_assert_async", "set_", "resize_"),
}
# Outputs after the first are statistics or indices, which evaluation mode does not read.
FIRST_OUTPUT = {
    *("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm"),
    *(
        "native_layer_norm",
        "native_group_norm",
        "_fused_rms_norm",
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
    ),
    *(
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "fractional_max_pool2d",
        "max",
        "min",
        "mode",
        "median",
        "native_dropout",
    ),
}
WINDOWS = ("avg_pool", "max_pool", "fractional_max_pool", "quantized_max_pool")
REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod", "logsumexp", "norm"),
    *("nansum", "linalg_vector_norm", "argmax", "argmin", "any", "all", "median", "aminmax"),
}
FOLDABLE = {
    *("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm"),
    *("batch_norm", "relu", "relu_", "relu6", "hardtanh", "hardtanh_"),
}
CONVOLUTIONS = {"aten::conv_tbc", "torchvision::deform_conv2d"}  # whose kernels stand elsewhere or move


def _kind(
    func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
) -> tuple[str, float]:
    """Returns an operation's kind and multiply-adds, or the element operations of pools and elementwise ones."""
    written = sum(x.numel() for x in outputs)
    if name in ("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution"):
        return _convolution(args, inputs[0], inputs[1], outputs[0])
    macs = macs_of(func, args, kwargs, outputs)
    if macs is not None:
        return ("conv" if name_of(func) in CONVOLUTIONS else "fc"), macs
    if name.startswith("_adaptive_avg_pool") or name.startswith("adaptive_"):
        return "pool", inputs[0].numel()
    if name.startswith(WINDOWS):
        window = args[1] if isinstance(args[1], list | tuple) else [args[1]]
        dims = int(name.split("pool")[1][0])
        return "pool", written * float(np.prod(window)) ** (dims / len(window))
    if name in REDUCTIONS:  # over one element too: a larger image would else be another kind of network
        return "pool", inputs[0].numel()
    return "foldable" if name in FOLDABLE else "elementwise", written


def _convolution(args: Any, x: Tensor, weight: Tensor, out: Tensor) -> tuple[str, float]:
    # aten::convolution has all nine arguments; mkldnn_convolution ends with stride, dilation, groups.
    strides, dilations, transposed, groups = (
        (args[3], args[5], args[6], args[8]) if len(args) > 8 else (args[-3], args[-2], False, args[-1])
    )
    kernel, unit = tuple(weight.shape[2:]), all(step == 1 for step in (*strides, *dilations)) and not transposed
    if groups > 1:
        channels = weight.shape[0] // groups if transposed else weight.shape[1]  # read by each group
        kind = "depthwise" if channels == 1 else "grouped"
    elif np.prod(kernel) == 1:
        kind = "pointwise"
    else:
        kind = "conv3x3" if kernel == (3, 3) and unit else "conv"
    # Every weight meets every position of the side that it is slid over: the output, or the input when transposed.
    slid = x.numel() / x.shape[1] if transposed else out.numel() / out.shape[1]
    return kind, weight.numel() * slid


class _WholeLayers(TorchFunctionMode):
    """Counts each recurrent layer as a whole: below autograd, every gate of every step is an operation."""

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, with the recorder paused where it is counted here."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        count = _WHOLE_LAYERS.get(name)
        if count is None or self.recorder.paused:
            return func(*args, **kwargs)
        self.recorder.paused = True
        try:
            out = func(*args, **kwargs)
        finally:
            self.recorder.paused = False
        count(self.recorder, args, kwargs, out)
        return out


def _count_recurrent(recorder: _Recorder, args: Any, kwargs: Any, out: Any) -> None:
    """Counts a call of `torch.lstm`, `gru` or `rnn_*`.

    The call is (x, state, weights, has biases, layers, dropout, training, both ways, batch first). A packed sequence
    comes as (data [rows, inputs], batch sizes [steps], state, weights, ...), all else one later.
    """
    x, packed = args[0], isinstance(args[3], list | tuple)
    weights, layers, both_ways = args[2 + packed], args[4 + packed], args[7 + packed]
    steps = len(args[1]) if packed else x.shape[1 if args[8] and x.ndim == 3 else 0]
    rows = x.numel() // x.shape[-1]  # pairs of step and example
    chains = layers * (1 + both_ways)  # each with weights of its own
    per_chain = len(weights) // chains
    inputs = sum(weights[chain * per_chain].shape[1] for chain in range(chains))
    outputs = chains * out[0].shape[-1] // (1 + both_ways)
    products = sum(w.numel() for w in weights if w.ndim == 2)
    stored = sum(w.numel() for w in weights)
    recorder.add("recurrent", rows * products, rows * (inputs + outputs), steps * stored, steps * chains)


def _count_cell(recorder: _Recorder, args: Any, kwargs: Any, out: Any) -> None:
    """Counts `torch.lstm_cell` and the like: (x [batch, inputs], state, w_ih, w_hh, b_ih, b_hh), one step."""
    x, weights = args[0], [w for w in args[2:] if isinstance(w, Tensor)]
    rows = x.numel() // x.shape[-1]
    new = out[0] if isinstance(out, tuple) else out
    macs = rows * sum(w.numel() for w in weights if w.ndim == 2)
    recorder.add("recurrent", macs, x.numel() + new.numel(), sum(w.numel() for w in weights))


_WHOLE_LAYERS = {
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _count_recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _count_cell),
}
