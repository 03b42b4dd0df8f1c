"""What the last linear layer of a network sees: the features of a batch, and a network's under other weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from fedsim.errors import ConfigError
from fedsim.workloads.base import Tensors, Workload
from fedsim.workloads.classification import classification


@dataclass(frozen=True)
class FeatureShape:
    """How large the features are.

    Attributes:
        size: of one feature vector.
        rows: vectors of one example; the steps of a sequence.
    """

    size: int
    rows: int


def last_linear(model: nn.Module) -> nn.Linear:
    """Returns the layer `head` if it is linear, else the linear layer that was defined last.

    Raises:
        ConfigError: if there is none.
    """
    named = dict(model.named_modules())
    linear = [m for m in (*named.values(), named.get("head")) if isinstance(m, nn.Linear)]
    if not linear:
        raise ConfigError(f"model {type(model).__name__} has no linear layer, before which its features would be read")
    return linear[-1]


@contextmanager
def features_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list to which every pass inside adds its features, [n, features]; of sequences, those of all steps."""
    seen: list[Tensor] = []
    hook = last_linear(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def features_under(weights: Tensors, workload: Workload, model: nn.Module, batch: Tensors) -> Tensor:
    """Returns a batch's features under other weights, in evaluation mode: nothing is drawn and no statistic moves.

    Args:
        weights: parameters and buffers by name.
        workload: with classes.
        model: whose own weights stay as they are.
        batch: of the workload.
    """
    was_training = model.training
    model.eval()
    try:
        with _reparametrize_module(model, weights), features_of(model) as seen:
            classification(workload).logits(model, batch)
    finally:
        model.train(was_training)
    return seen[-1]


def feature_shape(workload: Workload, model: nn.Module) -> FeatureShape:
    """Returns the size of a model's features.

    Raises:
        ConfigError: if it has none: no linear layer, or one that takes no part in the outputs.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), features_of(model) as seen:
        was_training = model.training
        model.eval()
        classification(workload).logits(model, workload.sample_on(device, 2))
        model.train(was_training)
    if not seen:
        raise ConfigError(
            f"the last linear layer of model {type(model).__name__} takes no part in its outputs; call the one that "
            "makes them `head`"
        )
    return FeatureShape(seen[-1].shape[-1], len(seen[-1]) // 2)
