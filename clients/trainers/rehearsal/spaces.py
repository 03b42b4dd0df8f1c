"""Spaces in which gradients of single examples are compared: their dot products with each other and a reference.

The space of all weights is searched with one gradient per example (`Space`), with those of two chunks at a time
(`Chunked`), or layer by layer (`ByLayer`). Without a backward pass: the weights of the last layer (`LastLayer`), and
its inputs (`Features`). Tasks that have their own outputs have nothing in common in the last layer. Source: Yoon et
al., "Online Coreset Selection for Rehearsal-based Continual Learning", ICLR 2022 (full gradients); Mirzasoleiman et
al., "Coresets for Data-efficient Training of Machine Learning Models", ICML 2020 (inputs of the last layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.trainers.base import WorkLog
from clients.trainers.rehearsal.gradients import (
    compared_weights,
    convolution_gradients,
    flat_gradient,
    head_of,
    last_layer,
    layers_of,
    per_sample,
    recurrent,
    require_head,
    require_single_examples,
    scoring,
    watched,
)
from devices.cost import ModelCost
from devices.meter import matrix_product
from fedsim.workloads.base import Tensors, Workload

Mode = Literal["full", "full_vmap", "chunked", "last_layer", "features"]
MODES: tuple[Mode, ...] = get_args(Mode)
WITHOUT_BACKWARD = ("last_layer", "features")


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

    @classmethod
    def of(cls, own: Tensor, past: Tensor | None, reference: Tensor | None) -> Products:
        """Returns products without their graph."""
        if reference is None or past is None:
            return cls(own.detach())
        return cls(own.detach(), past.detach(), torch.linalg.vector_norm(reference))

    @classmethod
    def of_rows(cls, gradients: Tensor, reference: Tensor | None) -> Products:
        """Returns the products of gradients that are there, [n, weights]."""
        return cls.of(gradients @ gradients.T, None if reference is None else gradients @ reference, reference)


class LayerSize(NamedTuple):
    """One layer as a matrix: [out, into] at each of its places; `weights` with the bias."""

    linear: bool
    out: int
    into: int
    places: int
    weights: int


@dataclass(frozen=True)
class Sizes:
    """Sizes that the price of products depends on; `layers` where all compared weights are in layers that can be split.

    Attributes:
        steps: of a sequence; 0 where there is one label per example.
        weights: that are compared.
    """

    classes: int
    features: int
    steps: int
    weights: int
    layers: tuple[LayerSize, ...] = ()
    recurrent: bool = False


def sizes_of(workload: Workload, model: nn.Module) -> Sizes:
    """Looks at one example's way through the model.

    Raises:
        ConfigError: as `require_single_examples`.
    """
    require_single_examples(workload, model)
    head, sample = head_of(model), workload.sample(1)
    steps = sample["y"].shape[1] if sample["y"].dim() == 2 else 0
    weights = sum(p.numel() for p in compared_weights(model).values())
    outputs: dict[nn.Module, Tensor] = {}
    device = next(model.parameters()).device
    with torch.no_grad(), scoring(model):
        watched(workload, model, {key: t.to(device) for key, t in sample.items()}, {}, outputs)
    sizes = []
    for layer in (layer for layer in layers_of(model) if layer in outputs):
        out = len(layer.weight)
        into, size = layer.weight[0].numel(), sum(p.numel() for p in layer.parameters())
        sizes.append(LayerSize(isinstance(layer, nn.Linear), out, into, outputs[layer][0].numel() // out, size))
    return Sizes(head.out_features, head.in_features, steps, weights, tuple(sizes), recurrent(model))


class Space:
    """The space of all compared weights, with one gradient per example held at once; the base of the others.

    With recurrent layers, which cannot be mapped, each example takes a backward pass of its own.

    Args:
        sizes: of the model.
    """

    def __init__(self, sizes: Sizes):
        self.sizes = sizes

    def products(
        self, workload: Workload, model: nn.Module, batch: Tensors, reference: Tensor | None = None
    ) -> Products:
        """Returns the products of a batch's gradients.

        Args:
            workload: its loss.
            model: in the mode in which it is to be scored (see `scoring`).
            batch: n examples.
            reference: a gradient in this space, flat; see `mean_gradient`.
        """
        return Products.of_rows(per_sample(workload, model, batch), reference)

    def mean_gradient(self, workload: Workload, model: nn.Module, batch: Tensors) -> Tensor:
        """Returns the gradient of the mean loss of a batch in this space, flat."""
        return flat_gradient(workload, model, batch, compared_weights(model))

    def log_products(self, log: WorkLog, cost: ModelCost, n: int, with_reference: bool) -> None:
        """Reports what the products of `n` examples take of a network of this cost."""
        if self.sizes.recurrent:
            log.add(cost, 1, forwards=n, backwards=n)
        else:
            log.add(cost, n, forwards=1, backwards=1)
        log.add(matrix_product(self.sizes.weights, n), n, forwards=1)

    def log_mean_gradient(self, log: WorkLog, cost: ModelCost, n: int) -> None:
        """Reports what the mean gradient of `n` examples takes."""
        log.add(cost, n, forwards=1, backwards=1)

    def held_bytes(self, n: int) -> int:
        """Returns the bytes of what scoring `n` examples keeps at once, beside the passes themselves."""
        return 4 * self.sizes.weights * n + 4 * n * n


class Chunked(Space):
    """The space of all compared weights, with the gradients of two chunks held at a time.

    Args:
        sizes: of the model.
        chunk: examples of a chunk.
    """

    def __init__(self, sizes: Sizes, chunk: int):
        super().__init__(sizes)
        self.chunk = chunk

    def products(
        self, workload: Workload, model: nn.Module, batch: Tensors, reference: Tensor | None = None
    ) -> Products:
        n = workload.batch_size_of(batch)
        pieces = torch.arange(n).split(self.chunk)
        parts = [{key: t[rows] for key, t in batch.items()} for rows in pieces]
        own, past = torch.empty(0), []
        for i, rows in enumerate(pieces):
            ours = per_sample(workload, model, parts[i])
            own = own if i else ours.new_zeros(n, n)
            past.append(ours @ reference if reference is not None else ours[:, 0])
            for j in range(i, len(pieces)):
                theirs = ours if i == j else per_sample(workload, model, parts[j])
                block = ours @ theirs.T
                own[rows[0] : rows[-1] + 1, pieces[j][0] : pieces[j][-1] + 1] = block
                own[pieces[j][0] : pieces[j][-1] + 1, rows[0] : rows[-1] + 1] = block.T
        return Products.of(own, torch.cat(past) if reference is not None else None, reference)

    def log_products(self, log: WorkLog, cost: ModelCost, n: int, with_reference: bool) -> None:
        if self.sizes.recurrent:
            super().log_products(log, cost, n, with_reference)
            return
        for start in range(0, n, self.chunk):
            size = min(self.chunk, n - start)
            for _ in range(0, start + 1, self.chunk):
                log.add(cost, size, forwards=1, backwards=1)
            log.add(matrix_product(self.sizes.weights, start + size), size, forwards=1)

    def held_bytes(self, n: int) -> int:
        return 4 * self.sizes.weights * min(n, 2 * self.chunk) + 4 * n * n


class ByLayer(Space):
    """The space of all compared weights, layer by layer in one backward pass.

    Kept is what goes into each linear and convolutional layer, and the error that comes back.
    """

    def products(
        self, workload: Workload, model: nn.Module, batch: Tensors, reference: Tensor | None = None
    ) -> Products:
        inputs: dict[nn.Module, Tensor] = {}
        outputs: dict[nn.Module, Tensor] = {}
        logits = watched(workload, model, batch, inputs, outputs)
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
                rows = convolution_gradients(layer, errors[layer], inputs[layer])
                among, along = rows @ rows.T, None if part is None else rows @ part
            own += among
            if past is not None and along is not None:
                past += along
        return Products.of(own.detach(), past, reference)

    def log_products(self, log: WorkLog, cost: ModelCost, n: int, with_reference: bool) -> None:
        log.add(cost, n, forwards=1)
        linear = []
        for number, layer in enumerate(self.sizes.layers):
            if number:  # no gradient of what the network is fed
                log.add(matrix_product(layer.out * layer.places, layer.into), n, forwards=1)
            if layer.linear:
                linear.append((layer.out, layer.into))
            else:
                log.add(matrix_product(layer.out * layer.places, layer.into), n, forwards=1)
                log.add(matrix_product(layer.weights, n), n, forwards=1)
        for out, into in linear:
            _log_linear(log, out, into, n, with_reference)

    def held_bytes(self, n: int) -> int:
        layers = self.sizes.layers
        kept = sum(layer.out * layer.places + layer.into * (layer.places if layer.linear else 1) for layer in layers)
        own = max((layer.weights + layer.into * layer.places for layer in layers if not layer.linear), default=0)
        return 4 * n * (kept + own) + 4 * n * n


class Features(Space):
    """The space of the last layer's inputs, which takes no backward pass."""

    def products(
        self, workload: Workload, model: nn.Module, batch: Tensors, reference: Tensor | None = None
    ) -> Products:
        with torch.no_grad():
            error, _ = last_layer(workload, model, batch)
            gradients = error @ head_of(model).weight
        return Products.of_rows(gradients if gradients.dim() == 2 else gradients.mean(1), reference)

    def mean_gradient(self, workload: Workload, model: nn.Module, batch: Tensors) -> Tensor:
        return self.mean_of_outputs(model, *last_layer(workload, model, batch))

    def mean_of_outputs(self, model: nn.Module, error: Tensor, features: Tensor) -> Tensor:
        """Returns `mean_gradient` from what `last_layer` gave."""
        return error.flatten(0, -2).mean(0) @ head_of(model).weight.detach()

    def log_products(self, log: WorkLog, cost: ModelCost, n: int, with_reference: bool) -> None:
        log.add(cost, n, forwards=1)
        self.log_mean_of_outputs(log, n)
        log.add(matrix_product(self.sizes.features, n), n, forwards=1)

    def log_mean_gradient(self, log: WorkLog, cost: ModelCost, n: int) -> None:
        log.add(cost, n, forwards=1)
        self.log_mean_of_outputs(log, n)

    def log_mean_of_outputs(self, log: WorkLog, n: int) -> None:
        """Reports what `mean_of_outputs` of `n` examples takes."""
        log.add(matrix_product(self.sizes.classes * max(1, self.sizes.steps), self.sizes.features), n, forwards=1)

    def held_bytes(self, n: int) -> int:
        return 4 * n * (self.sizes.classes + self.sizes.features) * max(1, self.sizes.steps) + 4 * n * n


class LastLayer(Features):
    """The space of the last layer's weights, [classes * (features + 1)], which takes no backward pass either."""

    def products(
        self, workload: Workload, model: nn.Module, batch: Tensors, reference: Tensor | None = None
    ) -> Products:
        error, features = last_layer(workload, model, batch)
        bias = head_of(model).bias is not None
        if error.dim() == 3:  # a mean over steps is no outer product
            steps = error.shape[1]
            weight = torch.einsum("nsc,nsh->nch", error, features).flatten(1) / steps
            return Products.of_rows(torch.cat([weight, error.mean(1)], 1) if bias else weight, reference)
        own, past = _layer_products(error, features, bias, reference)
        return Products.of(own, past, reference)

    def mean_of_outputs(self, model: nn.Module, error: Tensor, features: Tensor) -> Tensor:
        flat, inputs = error.flatten(0, -2), features.flatten(0, -2)
        parts = [(flat.T @ inputs).flatten(), *([flat.sum(0)] if head_of(model).bias is not None else [])]
        return torch.cat(parts) / len(flat)

    def log_products(self, log: WorkLog, cost: ModelCost, n: int, with_reference: bool) -> None:
        classes, features, steps = self.sizes.classes, self.sizes.features, self.sizes.steps
        log.add(cost, n, forwards=1)
        if not steps:
            _log_linear(log, classes, features, n, with_reference)
            return
        log.add(matrix_product(classes * steps, features), n, forwards=1)
        log.add(matrix_product(classes * (features + 1), n), n, forwards=1)


def space_of(mode: Mode, workload: Workload, model: nn.Module, chunk: int = 8) -> Space:
    """Returns the space that a mode names, for a model.

    Args:
        mode: "full" goes layer by layer where it can; "full_vmap" and "chunked" hold whole gradients.
        workload: its samples.
        model: that is to be scored.
        chunk: examples of a chunk, for "chunked".

    Raises:
        ConfigError: if an example has no gradient of its own, or the last layer, if that is asked for, cannot be found.
    """
    sizes = sizes_of(workload, model)
    if mode in WITHOUT_BACKWARD:
        require_head(workload, model)
        return LastLayer(sizes) if mode == "last_layer" else Features(sizes)
    if mode == "full" and sizes.layers:
        return ByLayer(sizes)
    return Chunked(sizes, chunk) if mode == "chunked" else Space(sizes)


def _layer_products(
    error: Tensor, inputs: Tensor, bias: bool, reference: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns <g_m, g_n> = (e_m . e_n)(a_m . a_n + 1) of one linear layer, and e_n' R a_n + e_n . r."""
    own = (error @ error.T) * (inputs @ inputs.T + float(bias))
    if reference is None:
        return own, None
    size = error.shape[1] * inputs.shape[1]
    weight = reference[:size].view(error.shape[1], inputs.shape[1])
    past = ((error @ weight) * inputs).sum(1)
    return own, past + error @ reference[size:] if bias else past


def _log_linear(log: WorkLog, out: int, into: int, n: int, with_reference: bool) -> None:
    log.add(matrix_product(out, n), n, forwards=1)
    log.add(matrix_product(into, n), n, forwards=1)
    if with_reference:
        log.add(matrix_product(out, into), n, forwards=1)
