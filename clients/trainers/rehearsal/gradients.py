"""Gradients of single examples, and what of a network they need: its compared weights, its layers, its last layer.

Norm layers are left out of the compared weights, as in public code. `clients.trainers.rehearsal.spaces` compares the
gradients. Source: Goodfellow, "Efficient Per-Example Gradient Computations", 2015 (layer by layer).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.utils.stateless import _reparametrize_module

from devices.errors import one_line
from fedsim.errors import ConfigError
from fedsim.workloads.base import Tensors, Workload
from fedsim.workloads.classification import classification

Convolution = nn.Conv1d | nn.Conv2d
Layer = nn.Linear | Convolution
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Keeps the model in evaluation mode: dropout and batch statistics would make single gradients random."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        vars(module)["training"] = False  # `eval()` goes through every module's own attribute check: a third of scoring
    try:
        yield
    finally:
        for module in training:
            vars(module)["training"] = True


def flat_gradient(workload: Workload, model: nn.Module, batch: Tensors, weights: dict[str, nn.Parameter]) -> Tensor:
    """Returns the gradient of a batch's loss with respect to these weights, [weights]; 0 where one takes no part."""
    own = list(weights.values())
    gradients = torch.autograd.grad(workload.loss(model, batch), own, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.reshape(-1) for p, g in zip(own, gradients, strict=False)]
    )


def compared_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weights whose gradients are compared: all trained ones but those of norm layers."""
    found = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, NORMS):
            for name, p in module.named_parameters(recurse=False):
                if p.requires_grad:
                    found[f"{prefix}.{name}" if prefix else name] = p
    return found


def recurrent(model: nn.Module) -> bool:
    """Returns whether the model has layers that cannot be mapped over examples."""
    return any(isinstance(m, nn.RNNBase) for m in model.modules())


def per_sample(
    workload: Workload, model: nn.Module, batch: Tensors, weights: dict[str, nn.Parameter] | None = None
) -> Tensor:
    """Returns the gradient of every example's loss, [n, weights]; of the compared weights where none are given."""
    compared = compared_weights(model) if weights is None else weights
    if recurrent(model):
        rows = torch.arange(workload.batch_size_of(batch)).split(1)
        return torch.stack(
            [flat_gradient(workload, model, {k: t[r] for k, t in batch.items()}, compared) for r in rows]
        )
    plain = torch.contiguous_format  # mapped operators know no other memory format
    own = {name: p.detach().clone(memory_format=plain) for name, p in compared.items()}

    def of_one(parameters: Tensors, example: Tensors) -> Tensor:
        with _reparametrize_module(model, parameters):
            return workload.loss(model, {key: t.unsqueeze(0) for key, t in example.items()})

    examples = {key: t.contiguous() for key, t in batch.items()}
    # Dropout asks for this even in evaluation mode, where it draws nothing.
    gradients = vmap(grad(of_one), in_dims=(None, 0), randomness="different")(own, examples)
    return torch.cat([gradients[name].reshape(workload.batch_size_of(batch), -1) for name in own], 1)


def layers_of(model: nn.Module) -> list[Layer]:
    """Returns the layers that hold the compared weights; none where one is neither linear nor convolutional."""
    found: list[Layer] = []
    for module in model.modules():
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        plain = isinstance(module, nn.Linear) or (
            isinstance(module, Convolution) and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        )
        if trained and plain:
            found.append(module)  # type: ignore[arg-type]
        elif trained and not isinstance(module, NORMS):
            return []
    return found


def head_of(model: nn.Module) -> nn.Linear:
    """Returns the last linear layer: `model.head`, or the one that was defined last.

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
    """Returns softmax - label and the features before the last layer, [n, classes] and [n, features] ([n, steps, ...]).

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
    """Returns softmax - label, [n, classes] or [n, steps, classes], for labels that are classes or probabilities."""
    error = logits.softmax(-1)
    return (
        error - y
        if y.is_floating_point()
        else error.scatter_add_(-1, y.unsqueeze(-1), -torch.ones_like(error[..., :1]))
    )


def watched(
    workload: Workload,
    model: nn.Module,
    batch: Tensors,
    inputs: dict[nn.Module, Tensor],
    outputs: dict[nn.Module, Tensor],
) -> Tensor:
    """Returns the logits of a batch; what went into and came out of every layer is put into the two."""

    def keep(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        inputs[module], outputs[module] = given[0].detach(), made

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(model)]
    try:
        return classification(workload).logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def convolution_gradients(layer: Convolution, error: Tensor, inputs: Tensor) -> Tensor:
    """Returns each example's gradient of a convolution's weights and bias, [n, weights], from its patches."""
    n, groups = len(error), layer.groups
    kernel, dilation, padding, stride = layer.kernel_size, layer.dilation, layer.padding, layer.stride
    if isinstance(layer, nn.Conv1d):  # one row of an image
        inputs = inputs.unsqueeze(2)
        kernel, dilation, padding, stride = (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
    patches = F.unfold(inputs, kernel, dilation, padding, stride)  # type: ignore[arg-type]
    patches = patches.view(n * groups, -1, patches.shape[-1])  # [n * groups, in / groups * kernel, places]
    flat = error.flatten(2)
    weight = torch.bmm(flat.reshape(n * groups, -1, flat.shape[-1]), patches.transpose(1, 2)).view(n, -1)
    return torch.cat([weight, flat.sum(2)], 1) if layer.bias is not None else weight


def require_single_examples(workload: Workload, model: nn.Module) -> None:
    """Makes sure that an example has a gradient of its own: that it does not hang on the rest of a batch.

    Raises:
        ConfigError: if the model takes no example by itself.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), scoring(model):
        try:
            workload.loss(model, workload.sample_on(device, 1))
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
