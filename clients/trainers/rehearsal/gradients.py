"""Gradients of single examples, as far as selection needs them: their dot products with each other and a reference.

In the space of all weights (norm layers left out, as in public code): `full` keeps what goes into each linear and
convolutional layer and the error that comes back, and multiplies them layer by layer, in one backward pass; for other
networks it is `full_vmap`, which holds one gradient per example, or, with recurrent layers, one backward pass per
example. `chunked` is `full_vmap` for two chunks at a time. Without a backward pass: `last_layer`, the weights of the
last layer, and `features`, the inputs of the last layer. Tasks that have their own outputs have nothing in common in
the last layer. Source: Yoon et al., "Online Coreset Selection for Rehearsal-based Continual Learning", ICLR 2022 (full
gradients); Goodfellow, "Efficient Per-Example Gradient Computations", 2015 (layer by layer); Mirzasoleiman et al.,
"Coresets for Data-efficient Training of Machine Learning Models", ICML 2020 (inputs of the last layer).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.utils.stateless import _reparametrize_module

from clients.trainers.base import WorkLog
from devices.cost import NetworkCost
from devices.errors import one_line
from devices.trace import KINDS
from fedsim.errors import ConfigError
from fedsim.workloads.base import Tensors, Workload
from fedsim.workloads.classification import classification

Mode = Literal["full", "full_vmap", "chunked", "last_layer", "features"]
MODES: tuple[str, ...] = get_args(Mode)
WITHOUT_BACKWARD = ("last_layer", "features")
Layer = nn.Linear | nn.Conv2d
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Products:
    """Dot products of n examples' gradients.

    Attributes:
        own: with each other, [n, n].
        past: with the reference, [n]; None without one.
        past_norm: Euclidean norm of the reference, [].
    """

    own: Tensor
    past: Tensor | None = None
    past_norm: Tensor | None = None


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode: dropout and batch statistics would make single gradients random."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        vars(module)["training"] = False  # `eval()` goes through every module's own attribute check: a third of scoring
    try:
        yield
    finally:
        for module in training:
            vars(module)["training"] = True


def products(
    mode: str, workload: Workload, model: nn.Module, batch: Tensors, reference: Tensor | None = None, chunk: int = 8
) -> Products:
    """The products of a batch's gradients in one of the MODES.

    Args:
        mode: see the module.
        workload: its loss.
        model: in the mode in which it is to be scored (see `scoring`).
        batch: n examples.
        reference: a gradient in the same space, flat; see `mean_gradient`.
        chunk: examples per chunk of `chunked`.
    """
    if mode == "last_layer":
        return _last_layer(workload, model, batch, reference)
    if mode == "features":
        return _of_rows(feature_gradients(workload, model, batch), reference)
    if mode == "full" and layers_of(model):
        return _by_layers(workload, model, batch, reference)
    if mode == "chunked":
        return _chunked(workload, model, batch, reference, chunk)
    return _of_rows(per_sample(workload, model, batch), reference)


def mean_gradient(mode: str, workload: Workload, model: nn.Module, batch: Tensors) -> Tensor:
    """Gradient of the mean loss of a batch in the space of `mode`, flat: [weights] or [classes * (features + 1)]."""
    if mode == "last_layer":
        return mean_of_outputs(mode, model, *last_layer(workload, model, batch))
    if mode == "features":
        return mean_of_outputs(mode, model, *last_layer(workload, model, batch))
    return _flat(workload, model, batch, space(model))


def mean_of_outputs(mode: str, model: nn.Module, error: Tensor, features: Tensor) -> Tensor:
    """`mean_gradient` in the two modes without a backward pass, from what `last_layer` gave."""
    flat, inputs = error.flatten(0, -2), features.flatten(0, -2)
    if mode == "features":
        return flat.mean(0) @ head_of(model).weight.detach()
    parts = [(flat.T @ inputs).flatten(), *([flat.sum(0)] if head_of(model).bias is not None else [])]
    return torch.cat(parts) / len(flat)


def _flat(workload: Workload, model: nn.Module, batch: Tensors, weights: dict[str, nn.Parameter]) -> Tensor:
    own = list(weights.values())
    gradients = torch.autograd.grad(workload.loss(model, batch), own, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.reshape(-1) for p, g in zip(own, gradients, strict=False)]
    )


def space(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights whose gradients are compared: all trained ones but those of norm layers."""
    found = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, NORMS):
            for name, p in module.named_parameters(recurse=False):
                if p.requires_grad:
                    found[f"{prefix}.{name}" if prefix else name] = p
    return found


def recurrent(model: nn.Module) -> bool:
    """Whether the model has layers that cannot be mapped over examples."""
    return any(isinstance(m, nn.RNNBase) for m in model.modules())


def per_sample(
    workload: Workload, model: nn.Module, batch: Tensors, weights: dict[str, nn.Parameter] | None = None
) -> Tensor:
    """The gradient of every example's loss, [n, weights]; of the weights in `space` where none are given."""
    compared = space(model) if weights is None else weights
    if recurrent(model):
        rows = torch.arange(len(batch["y"])).split(1)
        return torch.stack([_flat(workload, model, {k: t[r] for k, t in batch.items()}, compared) for r in rows])
    plain = torch.contiguous_format  # mapped operators know no other memory format
    own = {name: p.detach().clone(memory_format=plain) for name, p in compared.items()}

    def of_one(parameters: Tensors, example: Tensors) -> Tensor:
        with _reparametrize_module(model, parameters):
            return workload.loss(model, {key: t.unsqueeze(0) for key, t in example.items()})

    examples = {key: t.contiguous() for key, t in batch.items()}
    # Dropout asks for this even in evaluation mode, where it draws nothing.
    gradients = vmap(grad(of_one), in_dims=(None, 0), randomness="different")(own, examples)
    return torch.cat([gradients[name].reshape(len(batch["y"]), -1) for name in own], 1)


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers that hold the compared weights, in order; none where one is neither linear nor convolutional."""
    found: list[Layer] = []
    for module in model.modules():
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        plain = isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        )
        if trained and plain:
            found.append(module)  # type: ignore[arg-type]
        elif trained and not isinstance(module, NORMS):
            return []
    return found


def head_of(model: nn.Module) -> nn.Linear:
    """The last linear layer: `model.head`, or the one that was defined last.

    Raises:
        ConfigError: if there is none.
    """
    own = getattr(model, "head", None)
    layers = [own] if isinstance(own, nn.Linear) else [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no linear layer at its end; take trainer.grad_mode=full_vmap")
    return layers[-1]


@torch.no_grad()
def last_layer(workload: Workload, model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensor]:
    """Softmax - label and the features before the last layer, [n, classes] and [n, features] ([n, steps, ...]).

    Their outer product is the gradient of the last layer's weights, the first alone that of its bias.

    Raises:
        ConfigError: if what `head_of` finds takes no part in the outputs.
    """
    seen: list[Tensor] = []
    hook = head_of(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = classification(workload).logits(model, batch)
    finally:
        hook.remove()
    if not seen:
        raise ConfigError(
            f"the last linear layer of model {type(model).__name__} takes no part in its outputs; call the one that "
            "makes them `head`"
        )
    return error_of(logits, batch["y"]), seen[-1]


def error_of(logits: Tensor, y: Tensor) -> Tensor:
    """Softmax - label, [n, classes] or [n, steps, classes], for labels that are classes or probabilities."""
    error = logits.softmax(-1)
    return (
        error - y
        if y.is_floating_point()
        else error.scatter_add_(-1, y.unsqueeze(-1), -torch.ones_like(error[..., :1]))
    )


@torch.no_grad()
def feature_gradients(workload: Workload, model: nn.Module, batch: Tensors) -> Tensor:
    """The gradient of every example's loss with respect to the inputs of the last layer, [n, features]."""
    error, _ = last_layer(workload, model, batch)
    gradients = error @ head_of(model).weight
    return gradients if gradients.dim() == 2 else gradients.mean(1)


def _last_layer(workload: Workload, model: nn.Module, batch: Tensors, reference: Tensor | None) -> Products:
    error, features = last_layer(workload, model, batch)
    bias = head_of(model).bias is not None
    if error.dim() == 3:  # a mean over steps is no outer product
        steps = error.shape[1]
        weight = torch.einsum("nsc,nsh->nch", error, features).flatten(1) / steps
        return _of_rows(torch.cat([weight, error.mean(1)], 1) if bias else weight, reference)
    own, past = _layer_products(error, features, bias, reference)
    return _with_reference(own, past, reference)


def _by_layers(workload: Workload, model: nn.Module, batch: Tensors, reference: Tensor | None) -> Products:
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    logits = _watched(workload, model, batch, inputs, outputs)
    total = F.cross_entropy(logits, batch["y"], reduction="sum")
    layers = [layer for layer in layers_of(model) if layer in outputs]
    errors = dict(zip(layers, torch.autograd.grad(total, [outputs[layer] for layer in layers]), strict=True))
    own = logits.new_zeros(len(logits), len(logits))
    past, start = None if reference is None else logits.new_zeros(len(logits)), 0
    for layer in layers_of(model):
        size = sum(p.numel() for p in layer.parameters())
        part = None if reference is None else reference[start : start + size]
        start += size
        if layer not in errors:  # it took no part
            continue
        if isinstance(layer, nn.Linear):
            among, along = _layer_products(errors[layer], inputs[layer], layer.bias is not None, part)
        else:
            rows = _convolution_gradients(layer, errors[layer], inputs[layer])
            among, along = rows @ rows.T, None if part is None else rows @ part
        own += among
        if past is not None and along is not None:
            past += along
    return _with_reference(own.detach(), past, reference)


def _watched(
    workload: Workload,
    model: nn.Module,
    batch: Tensors,
    inputs: dict[nn.Module, Tensor],
    outputs: dict[nn.Module, Tensor],
) -> Tensor:
    """Logits of a batch; what went into and came out of every layer is put into the two."""

    def keep(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        inputs[module], outputs[module] = given[0].detach(), made

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(model)]
    try:
        return classification(workload).logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def _convolution_gradients(layer: nn.Conv2d, error: Tensor, inputs: Tensor) -> Tensor:
    """Each example's gradient of a convolution's weights and bias, [n, weights], from its patches."""
    n, groups = len(error), layer.groups
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    patches = patches.view(n * groups, -1, patches.shape[-1])  # [n * groups, in / groups * kernel, places]
    flat = error.flatten(2)
    weight = torch.bmm(flat.reshape(n * groups, -1, flat.shape[-1]), patches.transpose(1, 2)).view(n, -1)
    return torch.cat([weight, flat.sum(2)], 1) if layer.bias is not None else weight


def _layer_products(
    error: Tensor, inputs: Tensor, bias: bool, reference: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """<g_m, g_n> = (e_m . e_n)(a_m . a_n + 1) of one linear layer, and e_n' R a_n + e_n . r."""
    own = (error @ error.T) * (inputs @ inputs.T + float(bias))
    if reference is None:
        return own, None
    size = error.shape[1] * inputs.shape[1]
    weight = reference[:size].view(error.shape[1], inputs.shape[1])
    past = ((error @ weight) * inputs).sum(1)
    return own, past + error @ reference[size:] if bias else past


def _chunked(workload: Workload, model: nn.Module, batch: Tensors, reference: Tensor | None, chunk: int) -> Products:
    pieces = torch.arange(len(batch["y"])).split(chunk)
    parts = [{key: t[rows] for key, t in batch.items()} for rows in pieces]
    own, past = None, []
    for i, rows in enumerate(pieces):
        ours = per_sample(workload, model, parts[i])
        if own is None:
            own = ours.new_zeros(len(batch["y"]), len(batch["y"]))
        past.append(ours @ reference if reference is not None else ours[:, 0])
        for j in range(i, len(pieces)):
            theirs = ours if i == j else per_sample(workload, model, parts[j])
            block = ours @ theirs.T
            own[rows[0] : rows[-1] + 1, pieces[j][0] : pieces[j][-1] + 1] = block
            own[pieces[j][0] : pieces[j][-1] + 1, rows[0] : rows[-1] + 1] = block.T
    assert own is not None
    return _with_reference(own, torch.cat(past) if reference is not None else None, reference)


def log_products(
    log: WorkLog, network: NetworkCost, mode: str, outputs: Outputs, n: int, past: bool, chunk: int
) -> None:
    """Reports what `products` of `n` examples cost.

    Args:
        log: of the client.
        network: what a pass costs.
        mode: one of MODES.
        outputs: sizes, see `outputs_of`.
        n: examples.
        past: whether there is a reference.
        chunk: examples per chunk of `chunked`.
    """
    classes, features, steps = outputs.classes, outputs.features, outputs.steps
    sizes: list[tuple[int, int]] = []
    if mode == "last_layer":
        log.add(network, n, forwards=1)
        if steps:
            log.add(matrix_product(classes * steps, features), n, forwards=1)
            log.add(matrix_product(classes * (features + 1), n), n, forwards=1)
            return
        sizes = [(classes, features)]
    elif mode == "features":
        log.add(network, n, forwards=1)
        log.add(matrix_product(classes * max(1, steps), features), n, forwards=1)
        log.add(matrix_product(features, n), n, forwards=1)
        return
    elif mode == "full" and outputs.layers:
        log.add(network, n, forwards=1)
        for number, layer in enumerate(outputs.layers):
            if number:  # no gradient of what the network is fed
                log.add(matrix_product(layer.out * layer.places, layer.into), n, forwards=1)
            if layer.linear:
                sizes.append((layer.out, layer.into))
            else:
                log.add(matrix_product(layer.out * layer.places, layer.into), n, forwards=1)
                log.add(matrix_product(layer.weights, n), n, forwards=1)
    elif outputs.recurrent:
        log.add(network, 1, forwards=n, backwards=n)
        log.add(matrix_product(outputs.weights, n), n, forwards=1)
        return
    else:
        starts = range(0, n, chunk if mode == "chunked" else n)
        for start in starts:
            size = min(starts.step, n - start)
            for _ in range(0, start + 1, starts.step):
                log.add(network, size, forwards=1, backwards=1)
            log.add(matrix_product(outputs.weights, start + size), size, forwards=1)
        return
    for out, into in sizes:
        log.add(matrix_product(out, n), n, forwards=1)
        log.add(matrix_product(into, n), n, forwards=1)
        if past:
            log.add(matrix_product(out, into), n, forwards=1)


def log_mean_gradient(log: WorkLog, network: NetworkCost, mode: str, outputs: Outputs, n: int) -> None:
    """Reports what `mean_gradient` of `n` examples costs."""
    if mode in WITHOUT_BACKWARD:
        log.add(network, n, forwards=1)
        log_mean_of_outputs(log, outputs, n)
    else:
        log.add(network, n, forwards=1, backwards=1)


def log_mean_of_outputs(log: WorkLog, outputs: Outputs, n: int) -> None:
    """Reports what `mean_of_outputs` of `n` examples costs."""
    log.add(matrix_product(outputs.classes * max(1, outputs.steps), outputs.features), n, forwards=1)


class LayerSize(NamedTuple):
    """One layer as a matrix: [out, into] at each of its places; `weights` with the bias."""

    linear: bool
    out: int
    into: int
    places: int
    weights: int


@dataclass(frozen=True)
class Outputs:
    """Sizes that the price of products depends on; `layers` where `full` goes layer by layer."""

    classes: int
    features: int
    steps: int  # 0: one label per example
    weights: int
    layers: tuple[LayerSize, ...] = ()
    recurrent: bool = False

    def held(self, mode: str, n: int, chunk: int) -> int:
        """Bytes of what scoring `n` examples keeps at once, beside the passes themselves."""
        pairs = 4 * n * n
        if mode in WITHOUT_BACKWARD:
            return 4 * n * (self.classes + self.features) * max(1, self.steps) + pairs
        if mode == "full" and self.layers:
            kept = sum(
                layer.out * layer.places + layer.into * (layer.places if layer.linear else 1) for layer in self.layers
            )
            own = max(
                (layer.weights + layer.into * layer.places for layer in self.layers if not layer.linear), default=0
            )
            return 4 * n * (kept + own) + pairs
        return 4 * self.weights * (min(n, 2 * chunk) if mode == "chunked" else n) + pairs


def require_single_examples(workload: Workload, model: nn.Module) -> None:
    """Makes sure that an example has a gradient of its own: that it does not hang on the rest of a batch.

    Raises:
        ConfigError: if the model takes no example by itself.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), scoring(model):
        try:
            classification(workload).logits(model, workload.sample_on(device, 1))
        except Exception as error:
            raise ConfigError(
                f"model {type(model).__name__} takes no example by itself ({one_line(error)}), and its "
                "gradient is asked for; take norms with running statistics"
            ) from error


def require_head(workload: Workload, model: nn.Module) -> None:
    """Makes sure that `last_layer` finds the layer that makes the outputs.

    Raises:
        ConfigError: as it does.
    """
    device = next(model.parameters()).device
    with scoring(model):
        last_layer(workload, model, workload.sample_on(device, 2))


def outputs_of(workload: Workload, model: nn.Module) -> Outputs:
    """Looks at one example's way through the model.

    Raises:
        ConfigError: as `require_single_examples`.
    """
    require_single_examples(workload, model)
    head, sample = head_of(model), workload.sample(1)
    steps = sample["y"].shape[1] if sample["y"].dim() == 2 else 0
    weights = sum(p.numel() for p in space(model).values())
    outputs: dict[nn.Module, Tensor] = {}
    device = next(model.parameters()).device
    with torch.no_grad(), scoring(model):
        _watched(workload, model, {key: t.to(device) for key, t in sample.items()}, {}, outputs)
    sizes = []
    for layer in (layer for layer in layers_of(model) if layer in outputs):
        out = len(layer.weight)
        into, size = layer.weight[0].numel(), sum(p.numel() for p in layer.parameters())
        sizes.append(LayerSize(isinstance(layer, nn.Linear), out, into, outputs[layer][0].numel() // out, size))
    return Outputs(head.out_features, head.in_features, steps, weights, tuple(sizes), recurrent(model))


@lru_cache(maxsize=256)
def matrix_product(inner: int, outer: int) -> NetworkCost:
    """What [n, inner] @ [inner, outer] costs per row: its multiply-adds, and nothing else.

    A runtime would do such a product inside of the step; it is no network that somebody loads and starts.
    """
    macs = float(inner * outer)
    rows = tuple((macs if kind == "fc" else 0.0, 0.0, 0.0, 0.0) for kind in KINDS)
    return NetworkCost(f"product {inner}x{outer}", 2 * macs, 0.0, 0, 0, calls=0, layers=rows)


def _of_rows(gradients: Tensor, reference: Tensor | None) -> Products:
    return _with_reference(gradients @ gradients.T, None if reference is None else gradients @ reference, reference)


def _with_reference(own: Tensor, past: Tensor | None, reference: Tensor | None) -> Products:
    if reference is None or past is None:
        return Products(own.detach())
    return Products(own.detach(), past.detach(), torch.linalg.vector_norm(reference))
