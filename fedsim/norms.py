"""Batch norms that meet a batch with one value per channel: a single example, as at the end of an epoch.

Such a batch has no variance, and torch refuses it. May import: torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_LONE = "normalises_by_running_statistics"


def allow_single_examples(model: nn.Module) -> None:
    """Lets batch norms in training normalise a single value per channel by their running statistics, as they are.

    So a client trains on all of its examples, whatever the size of its last batch, and a client with one example trains
    at all. Larger batches are normalised by themselves, as ever.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.register_forward_pre_hook(_before)
            module.register_forward_hook(_after, always_call=True)


def needs_two_examples(model: nn.Module, example: Tensor) -> bool:
    """Whether a batch norm of the network has one value per channel when it sees a single example.

    Args:
        model: the network.
        example: an input of it, [1, ...].
    """
    found: list[bool] = []

    def look(_: nn.Module, given: tuple[Any, ...]) -> None:
        found.append(_is_single(given))

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, _BatchNorm)]
    was_training = model.training
    try:
        if handles:
            with torch.no_grad():
                model.eval()(example)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return any(found)


def _is_single(given: tuple[Any, ...]) -> bool:
    return bool(given) and given[0].dim() > 1 and given[0].numel() == given[0].shape[1]


def _before(module: nn.Module, given: tuple[Any, ...]) -> None:
    if module.training and _is_single(given):
        module.training = False
        setattr(module, _LONE, True)


def _after(module: nn.Module, *_: Any) -> None:
    if module.__dict__.pop(_LONE, False):
        module.training = True
