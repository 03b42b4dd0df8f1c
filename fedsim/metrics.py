"""Figures drawn from the reports of a run. May import: the standard library and fedsim.report's types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.report import RoundReport

ACCURACY, LOSS = "accuracy", "loss"


def judged(reports: Sequence[RoundReport]) -> list[RoundReport]:
    """The rounds after which the global model was evaluated on the held-out test set."""
    return [r for r in reports if ACCURACY in r.metrics]


def final(reports: Sequence[RoundReport]) -> dict[str, float | None]:
    """Test accuracy and loss of the last evaluation."""
    last = judged(reports)[-1:]
    return {key: last[0].metrics.get(key) if last else None for key in (ACCURACY, LOSS)}


def best(reports: Sequence[RoundReport]) -> dict[str, Any]:
    """The highest test accuracy and the first round that reached it."""
    top = max(judged(reports), key=lambda r: (r.metrics[ACCURACY], -r.round), default=None)
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
