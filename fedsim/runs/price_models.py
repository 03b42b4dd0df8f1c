"""Tells which price model priced which rounds of a run: one that goes on under a newer version has two."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

PRICE_MODEL = 2  # raised when equal work comes to cost otherwise; fedsim 0.1 wrote none down
History = Sequence[tuple[int, int | None]]  # rounds from which on a model priced them; None: that of fedsim 0.1
FROM_THE_START: History = ((0, PRICE_MODEL),)


def repriced(history: History, from_round: int) -> History:
    """Returns the history of a run that goes on with a round, priced by this version."""
    return history if history[-1][1] == PRICE_MODEL else (*history, (from_round, PRICE_MODEL))


def price_models(history: History, rounds: int) -> tuple[list[dict[str, Any]], str]:
    """Returns what the summary says of the price models of a run, and a warning where there are several.

    Args:
        history: of the run.
        rounds: its last round.
    """
    used = [(since, model) for since, model in history if since <= rounds]
    models = [{"from_round": since, "model": model} for since, model in used]
    if len(used) < 2:
        return models, ""
    spans = [(since, after - 1) for (since, _), (after, _) in pairwise([*used, (rounds + 1, None)])]
    named = [
        f"rounds {first} to {last} by {'fedsim 0.1' if model is None else f'price model {model}'}"
        for (first, last), (_, model) in zip(spans, used, strict=True)
    ]
    return models, f"seconds and joules were not priced alike: {', '.join(named)}; do not add or compare them"
