"""Selects a network under limits: the best score among those whose predicted costs, with a margin, are allowed.

Scores and costs are arrays over candidates, whatever they are and wherever they are from, so that the same selection
serves a search space on one device and each client of a federation on its own. It looks at a true cost only by
measuring a network that it has selected, and says how often it did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from devices.errors import DeviceError

Measure = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Limit:
    """What a device allows of one cost.

    Attributes:
        cost: its name, with the unit, e.g. "ms".
        predicted: of each candidate, [n].
        most: the limit itself.
        margin: relative error to allow for: candidates with predicted * (1 + margin) <= most are eligible.
    """

    cost: str
    predicted: np.ndarray
    most: float
    margin: float = 0.0

    def allows(self) -> np.ndarray:
        """Returns which candidates are eligible, [n] bool."""
        return np.asarray(np.asarray(self.predicted, float) * (1 + self.margin) <= self.most)


@dataclass(frozen=True)
class Check:
    """A network that was selected and measured.

    Attributes:
        network: its index.
        measured: its true costs by name, as far as they are known.
        holds: whether those are within the limits.
    """

    network: int
    measured: Mapping[str, float]
    holds: bool


@dataclass(frozen=True, eq=False)
class Selection:
    """What was selected, and why.

    Attributes:
        chosen: index of the network.
        best: the first networks that hold, best score first; `chosen` is the first of them.
        eligible: candidates that the limits allow by prediction, [n] bool.
        excluded: how many candidates each limit excludes, by cost; one may be excluded by several.
        checks: measurements in their order; the last holds. Empty where nothing was measured.
    """

    chosen: int
    best: tuple[int, ...]
    eligible: np.ndarray
    excluded: Mapping[str, int]
    checks: tuple[Check, ...]


class NothingFitsError(DeviceError):
    """No candidate is within the limits.

    Attributes:
        cheapest: the candidate that comes nearest: the least predicted, or of those measured, the least measured.
        checks: of a search whose every eligible network failed when measured.
    """

    def __init__(self, sentence: str, cheapest: int, checks: tuple[Check, ...] = ()):
        super().__init__(sentence)
        self.cheapest, self.checks = cheapest, checks


def select(
    scores: np.ndarray,
    limits: Sequence[Limit],
    measure: Measure | None = None,
    name_of: Callable[[int], str] = "network {}".format,
    best: int = 1,
) -> Selection:
    """Selects the candidate with the best score among those within every limit.

    Of equal scores the one that needs the least share of the first limit comes first, then the lower index. With
    `measure`, a selected network is measured, and the next is taken where it breaks a limit.

    Args:
        scores: what is to be large: predicted accuracies, say, [n].
        limits: at least one.
        measure: returns the true costs of a network by name; a cost that it does not know is not checked.
        name_of: returns the name of a candidate, for sentences; its number when left out.
        best: how many networks to go on to, the chosen one included; fewer come back where there are no more.

    Raises:
        NothingFitsError: with the fastest network, if none is within the limits by prediction, or when measured.
        DeviceError: for arrays of different lengths or numbers that are none.
    """
    scores = _checked(scores, limits)
    allowed = [limit.allows() for limit in limits]
    eligible = np.logical_and.reduce(allowed)
    if not eligible.any():
        raise _nothing(limits, allowed, name_of)
    order = np.lexsort((np.arange(len(scores)), limits[0].predicted, -scores))
    found: list[int] = []
    checks: list[Check] = []
    for network in order[eligible[order]].tolist():
        measured = dict(measure(network)) if measure else {}
        holds = all(measured.get(limit.cost, -np.inf) <= limit.most for limit in limits)
        if measured:
            checks.append(Check(network, measured, holds))
        if holds:
            found.append(network)
        if len(found) == best:
            break
    if not found:
        raise _all_failed(limits, checks, name_of)
    excluded = {limit.cost: int((~fits).sum()) for limit, fits in zip(limits, allowed, strict=True)}
    return Selection(found[0], tuple(found), eligible, excluded, tuple(checks))


def _checked(scores: np.ndarray, limits: Sequence[Limit]) -> np.ndarray:
    scores = np.asarray(scores, float)
    if not limits or scores.ndim != 1 or not len(scores):
        raise DeviceError(f"a selection needs candidates with a score each and a limit, got {list(scores.shape)}")
    for what, values in (("score", scores), *((limit.cost, limit.predicted) for limit in limits)):
        if np.shape(values) != scores.shape:
            raise DeviceError(f"each of the {len(scores)} candidates needs one {what}, got {list(np.shape(values))}")
        if len(bad := np.flatnonzero(~np.isfinite(values))):
            raise DeviceError(f"{what} must be a finite number, got {values[bad[0]]} for candidate {bad[0]}")
    for limit in limits:
        if not (limit.margin > -1 and np.isfinite(limit.most)):
            raise DeviceError(f"limit {limit.cost} needs a number and a margin above -1, got {limit}")
    return scores


def _nothing(limits: Sequence[Limit], allowed: Sequence[np.ndarray], name_of: Callable[[int], str]) -> NothingFitsError:
    # The limit that excludes most is the one to name; those that each alone would do come to the first.
    tight = int(np.argmin([fits.sum() for fits in allowed]))
    limit, of = limits[tight], len(allowed[tight])
    cheapest = int(np.argmin(limit.predicted))
    least = float(limit.predicted[cheapest])
    together = " together with the other limits" if allowed[tight].any() else ""
    sentence = (
        f"none of {of} networks is within {limit.most:g} {limit.cost} with a margin of {limit.margin:.1%}{together}; "
        f"the least is predicted for {name_of(cheapest)}, {least:.3g} {limit.cost}"
    )
    return NothingFitsError(sentence, cheapest)


def _all_failed(limits: Sequence[Limit], checks: Sequence[Check], name_of: Callable[[int], str]) -> NothingFitsError:
    limit = next(own for own in limits if any(own.cost in check.measured for check in checks))
    nearest = min(checks, key=lambda check: check.measured.get(limit.cost, np.inf))
    least = f"{nearest.measured[limit.cost]:.3g} {limit.cost}"
    sentence = (
        f"all of the {len(checks)} networks that were predicted to be within {limit.most:g} {limit.cost} broke the "
        f"limit when measured; {name_of(nearest.network)} took the least, {least}"
    )
    return NothingFitsError(sentence, nearest.network, tuple(checks))
