"""What commands that judge on several data sets do with their scores: group them, and take means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar


class Named(Protocol):
    """A score of one data set."""

    @property
    def name(self) -> str:
        """Returns the name of the data set."""


Score = TypeVar("Score", bound=Named)


def by_name(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """Returns scores by data set, in the order in which these come."""
    found: dict[str, list[Score]] = {}
    for score in scores:
        found.setdefault(score.name, []).append(score)
    return found


def mean(scores: Sequence[Score], what: Callable[[Score], float]) -> float:
    """Returns the mean of a figure of some scores."""
    import numpy as np

    return float(np.mean([what(score) for score in scores]))
