"""Batches of a single example, on which some networks cannot be trained: refused before a run begins."""

from __future__ import annotations

from itertools import product

import torch
from torch import nn

from clients.trainers.base import LocalTrainer
from fedsim.errors import ConfigError
from fedsim.models.norms import needs_two_examples, refusal_of_one
from fedsim.settings.run_settings import RunSettings
from fedsim.workloads.base import Workload

INSTEAD_OF_ONE = "change trainer.batch_size, or take norms with running statistics"


def check_batches(
    settings: RunSettings, workload: Workload, model: nn.Module, trainer: LocalTrainer, device: torch.device
) -> str:
    """Refuses batches of single examples that the network cannot train on, or that never move its statistics.

    Where clients that fail are dropped, a client whose last batch it is may fail.

    Returns:
        Why the network cannot be trained on one example; empty if it can.

    Raises:
        ConfigError: names the client or the setting.
    """
    two, one = (workload.sample_on(device, size) for size in (2, 1))
    refusal = refusal_of_one(model, workload.loss, two, one)
    if refusal and settings.on_client_error != "drop":
        _check_last_batches(settings.rounds, workload, model, trainer, refusal)
    if getattr(trainer, "batch_size", None) == 1 and needs_two_examples(model, workload.inputs(one)[0]):
        raise ConfigError(
            f"trainer.batch_size=1 gives the batch norms of model {type(model).__name__} nothing to average "
            "over; take at least 2, or a model with another norm"
        )
    return refusal


def _check_last_batches(rounds: int, workload: Workload, model: nn.Module, trainer: LocalTrainer, refusal: str) -> None:
    """Refuses batches that leave a client one example at the end; looked for only where that fails."""
    parts = range(workload.part(1), workload.part(rounds) + 1)
    for part, client_id in product(parts, range(workload.num_clients)):
        examples = len(workload.client_part(client_id, part).train)
        if trainer.ends_in_one(examples):
            raise ConfigError(
                f"client {client_id} has {examples} examples to train on and ends in a batch of one, which model "
                f"{type(model).__name__} cannot be trained on ({refusal}); {INSTEAD_OF_ONE}"
            )
