"""Figures drawn from the reports of a run, and the means over clients that are in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.grid.edge import ClientReport
    from fedsim.report.rounds import RoundReport

ACCURACY, LOSS = "accuracy", "loss"
NOT_FINITE = "not_finite"  # in place of both, 1: the output of the judged model is NaN or infinite
BY_EXAMPLES, BY_CLIENTS = "examples", "clients"
# How what clients report becomes one number of the round: weighted by their examples, as what is itself a mean over
# examples, or every client alike, as what is a fact about the client, its device or its network. A name also stands for
# names that go on behind it with an underscore, such as accuracy_at_0.5 and latency_ms_on_pixel3. Other names are
# weighted by examples, as Flower does.
AVERAGED: Mapping[str, str] = {
    **dict.fromkeys(("accuracy", "loss", "train_loss", "personal_loss", "head_loss"), BY_EXAMPLES),
    **dict.fromkeys(("own_loss", "partner_loss", "taylor"), BY_EXAMPLES),
    **dict.fromkeys(("similarity", "diversity", "affinity"), BY_EXAMPLES),
    **dict.fromkeys(("latency_ms", "flops", "keep_ratio", "sparsity"), BY_CLIENTS),
    **dict.fromkeys(("dense_bytes", "nonzero_bytes", "wire_bytes"), BY_CLIENTS),
    **dict.fromkeys(("memory_examples", "pool_pairs", "data_version", "oracle"), BY_CLIENTS),
}


@cache
def averaged_by(name: str) -> str:
    """Whether a metric of clients is averaged by examples or by clients; see AVERAGED."""
    known = [key for key in AVERAGED if name == key or name.startswith(f"{key}_")]
    return AVERAGED[max(known, key=len)] if known else BY_EXAMPLES


def means(clients: Iterable[ClientReport]) -> dict[str, float]:
    """The mean of each metric over the clients that report it; none where it would be weighted by no examples."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for client in clients:
        for name, value in client.metrics.items():
            if isinstance(value, int | float):
                weight = client.num_examples if averaged_by(name) == BY_EXAMPLES else 1
                sums[name] = sums.get(name, 0.0) + value * weight
                weights[name] = weights.get(name, 0) + weight
    return {name: total / weights[name] for name, total in sums.items() if weights[name] > 0}


def judged(reports: Sequence[RoundReport]) -> list[RoundReport]:
    """The rounds after which the global model was evaluated on the held-out test set, finite or not."""
    return [r for r in reports if ACCURACY in r.metrics or NOT_FINITE in r.metrics]


def not_finite(reports: Sequence[RoundReport]) -> list[int]:
    """The rounds after which the output of the global model is NaN or infinite."""
    return [r.round for r in reports if NOT_FINITE in r.metrics]


def read(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Metrics as they are in JSON: null is NaN; where that is a judgement, there is the mark instead."""
    found = {name: math.nan if value is None else value for name, value in metrics.items()}
    if any(not math.isfinite(found.get(name, 0.0)) for name in (ACCURACY, LOSS)):
        found = {name: value for name, value in found.items() if name not in (ACCURACY, LOSS)} | {NOT_FINITE: 1.0}
    return found


def final(reports: Sequence[RoundReport]) -> dict[str, float | None]:
    """Test accuracy and loss of the last evaluation; None where that was not finite."""
    last = judged(reports)[-1:]
    return {key: last[0].metrics.get(key) if last else None for key in (ACCURACY, LOSS)}


def best(reports: Sequence[RoundReport]) -> dict[str, Any]:
    """The highest test accuracy and the first round that reached it."""
    top = max(
        (r for r in reports if ACCURACY in r.metrics), key=lambda r: (r.metrics[ACCURACY], -r.round), default=None
    )
    return {"accuracy": top.metrics[ACCURACY], "round": top.round} if top else {"accuracy": None, "round": None}


def took_part(reports: Sequence[RoundReport]) -> set[int]:
    """The clients that completed the training of at least one round."""
    return {client for report in reports for client in report.outcomes.get("completed", ())}


def to_target(reports: Sequence[RoundReport], target_accuracy: float | None) -> dict[str, Any] | None:
    """Round, seconds, joules and bytes until the test accuracy first reaches the target; None if it never does."""
    if target_accuracy is None:
        return None
    spent: dict[str, Any] = {"energy_j": 0.0, "down_bytes": 0, "up_bytes": 0}
    for report in reports:
        spent["energy_j"] += report.joules
        spent["down_bytes"] += report.down_bytes
        spent["up_bytes"] += report.up_bytes
        if report.metrics.get(ACCURACY, -1.0) >= target_accuracy:
            return {"accuracy": target_accuracy, "round": report.round, "simulated_s": report.now_s, **spent}
    return None
