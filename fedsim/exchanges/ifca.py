"""What both halves of IFCA know (strategies/ifca.py, clients/trainers/personal/ifca.py).

Records: arrays, down: the model of cluster 0, up: the model that the client trained. model-1, model-2 ..., down, also
before a client judges: the models of the other clusters, without what all clusters share. chosen, up: cluster [] int64,
whose model it trained.
"""

from __future__ import annotations

from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors

MODEL, CHOSEN, CLUSTER = "model", "chosen", "cluster"  # records, and what is in the second


def models_as_extras(models: list[Tensors], common: frozenset[str]) -> dict[str, Tensors]:
    """Returns the records of all models but the first, without the tensors that all have in common."""
    own = [{name: t for name, t in model.items() if name not in common} for model in models]
    return {f"{MODEL}-{number}": own[number] for number in range(1, len(models))}


def models_in(broadcast: Broadcast) -> list[Tensors]:
    """Returns the model of each cluster, whole."""
    count = sum(name.startswith(f"{MODEL}-") for name in broadcast.extras)
    others = (broadcast.extra(f"{MODEL}-{number}") for number in range(1, count + 1))
    return [broadcast.weights, *({**broadcast.weights, **other} for other in others)]
