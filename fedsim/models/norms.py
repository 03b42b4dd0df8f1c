"""Batch norms that meet a batch with one value per channel: a single example, as at the end of an epoch.

Such a batch has no variance, and torch refuses it. Norms with running statistics can do without; others, and those that
a network calls as functions, are found by trying.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.errors import in_words, no_exit
from fedsim.models.dropout import seed_dropout

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
    """Returns whether a batch norm of the network has one value per channel when it sees a single example.

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


def refusal_of_one(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], two: Any, one: Any) -> str:
    """Returns what a network in training says to a single example; empty where it takes it, or refuses two as well.

    Args:
        model: the network; a copy of it is tried, so that no statistics move.
        loss: of the network and a batch.
        two: a batch of two examples.
        one: a batch of one.
    """

    def refusal(batch: Any) -> str:
        try:
            with no_exit(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                copy = deepcopy(model).train()
                seed_dropout(copy, 0)  # or it would draw from the generator of the device
                loss(copy, batch)
        except Exception as error:
            return in_words(error)
        return ""

    said = refusal(one)
    return "" if said and refusal(two) else said


def _is_single(given: tuple[Any, ...]) -> bool:
    return bool(given) and given[0].dim() > 1 and given[0].numel() == given[0].shape[1]


def _before(module: nn.Module, given: tuple[Any, ...]) -> None:
    if module.training and _is_single(given):
        module.training = False
        setattr(module, _LONE, True)


def _after(module: nn.Module, *_: Any) -> None:
    if module.__dict__.pop(_LONE, False):
        module.training = True
