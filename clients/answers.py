"""What a trainer may answer, checked where it enters: a sentence names the client, not who trips over it later."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any

import torch
from torch import Tensor

from clients.trainers.base import LocalTrainer
from fedsim.messages.updates import ClientUpdate

MOST_EXAMPLES = 2**31 - 1
WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
PACKED = frozenset({torch.float16, torch.float32, torch.float64, *WHOLE})  # numbers that a record holds


def check_update(trainer: LocalTrainer, update: Any, state: Mapping[Any, Any]) -> None:
    """Checks what a client sends after training, and what it keeps.

    Raises:
        TypeError, ValueError: naming what is wrong of it.
    """
    fit = f"fit of {type(trainer).__name__}"
    if not isinstance(update, ClientUpdate):
        raise TypeError(f"{fit} must return a ClientUpdate, got {type(update).__name__}")
    try:
        examples = index(update.num_examples)
    except TypeError:
        examples = 0
    if not 1 <= examples <= MOST_EXAMPLES:
        raise ValueError(f"num_examples of {fit} must be from 1 to {MOST_EXAMPLES}, got {update.num_examples!r}")
    check_metrics(fit, update.metrics)
    check_tensors(f"weights of {fit}", update.weights)
    check_tensors(f"what a client of {type(trainer).__name__} keeps", state)
    check_records(fit, update.extras)


def check_metrics(what: str, metrics: Any) -> None:
    """Checks names of metrics; whether they are numbers shows where they are taken.

    Raises:
        TypeError: if they are none.
    """
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) and name for name in metrics):
        raise TypeError(f"metrics of {what} must be numbers by name, got {metrics!r}")


def check_records(what: str, records: Any) -> None:
    """Checks records beside weights.

    Raises:
        TypeError: if they are none.
    """
    if not isinstance(records, Mapping) or not all(isinstance(name, str) and name for name in records):
        raise TypeError(f"records of {what} must be tensors by name, each record by its own, got {records!r}")
    for name, tensors in records.items():
        check_tensors(f"the record {name!r} of {what}", tensors)


def check_tensors(what: str, tensors: Any) -> None:
    """Checks that tensors by name can be packed.

    Raises:
        TypeError: naming the one that cannot.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{what} must be tensors by name, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"{what} must be tensors by name, got {name!r}: {type(tensor).__name__}")
        if tensor.dtype not in PACKED or tensor.layout is not torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype} {tensor.layout} on {tensor.device}".replace("torch.", "")
            raise TypeError(f"{what} must be dense tensors of real numbers that numpy has too, got {name}: {kind}")
