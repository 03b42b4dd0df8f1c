"""From measurements, few or many or none, to the prices of a runtime on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from devices.errors import DeviceError
from devices.latency.columns import _CELLS, IS_CALL, IS_MAC, TABLE_KINDS, Phase, Physics
from devices.latency.fitting import Problems, predict, solve
from devices.latency.prices import Prices
from devices.latency.prior import Facts, Prior, Sample, left_out, problems_of

MANY = 10  # networks from which on a fit speaks for itself
SIGMAS = (0.04, 0.06, 0.08, 0.12, 0.15)  # believed errors of rows that a fit chooses from
KIND_SPREAD = 1.0  # how far a kind's price may be from that of its column, in logarithms, where rows tell kinds apart
RUNTIME_SPREAD = 2.0  # a runtime that no prior knows: its prior is so many times as wide,
CALL_SPREAD = 10.0  # and its calls, which are the runtime's own
GROUP_SIGMA = 0.3


@dataclass(frozen=True, eq=False)
class Calibration:
    """Prices [17] in milliseconds and what they reach on the rows.

    Attributes:
        own_error: median relative error on the measured rows.
        left_out_error: mean relative error on networks that are left out; None for a single network.
    """

    prices: np.ndarray
    own_error: float | None
    left_out_error: float | None
    networks: int


def calibrate(sample: Sample | None, prior: Prior, physics: Physics, facts: Facts, phase: Phase) -> Calibration:
    """Fits prices to a device's rows under a prior; without rows they are the prior's mean inside the bounds.

    With many rows the error that they are believed to have is the one, of `SIGMAS`, under which left-out networks are
    predicted best.
    """
    if sample is None or len(sample) == 0:
        low, high = physics.bounds(phase)
        mean = prior.mean(facts, physics.units(phase))
        return Calibration(np.exp(np.clip(mean, np.log(low), np.log(high))), None, None, 0)
    networks = len(set(sample.networks))
    chosen, left = prior, None
    if networks > 1:
        chosen, errors = best_believed(sample, prior, SIGMAS if networks >= MANY else (prior.sigma,))
        left = float(np.mean(errors))
    problems = problems_of([sample], chosen)
    prices = solve(problems).prices[0]
    ms = predict(problems.counts[0, : len(sample)], prices, chosen.overlap)
    return Calibration(prices, float(np.median(np.abs(ms / sample.milliseconds - 1))), left, networks)


def best_believed(sample: Sample, prior: Prior, sigmas: Sequence[float] = SIGMAS) -> tuple[Prior, np.ndarray]:
    """The prior with the believed error of rows that predicts left-out networks best, and each row's error then."""
    tried = [replace(prior, sigma=sigma) for sigma in sigmas]
    errors = [left_out([sample], p)[0] for p in tried]
    best = int(np.argmin([e.mean() for e in errors]))
    return tried[best], errors[best]


def basis_of(networks: int) -> str:
    """How a set of prices came about, by the number of measured networks."""
    return "datasheet" if networks == 0 else "one row" if networks == 1 else "few rows" if networks < MANY else "rows"


def prices_of(
    sample: Sample | None,
    prior: Prior,
    physics: Physics,
    facts: Facts,
    phase: Phase,
    runtime: str,
    fused: bool,
    precision: str = "fp32",
    batches: Sequence[int] | np.ndarray = (1,),
    unmeasured: str = "datasheet",
) -> tuple[Prices, Calibration]:
    """`calibrate`, as a set of prices for a profile; `unmeasured` is its basis where there are no rows."""
    if sample is not None and phase == "train_step" and len(set(np.asarray(batches).tolist())) == 1:
        sample = replace(sample, physics=replace(sample.physics, weights_told=False))
    found = calibrate(sample, prior, physics, facts, phase)
    expected = found.left_out_error
    if found.own_error is not None and expected is None and prior.errors and unmeasured == "datasheet":
        # A row that its own prices do not meet says that the prior is off by at least so much here.
        expected = max(found.own_error, prior.errors.get(1) or 0.0)
    elif expected is None and prior.errors and unmeasured == "datasheet":
        expected = prior.errors.get(min(found.networks, 1))
    rows = 0 if sample is None else len(sample)
    made = Prices.of_columns(
        found.prices,
        fused,
        runtime=runtime,
        threads=facts.threads,
        precision=precision,
        basis=basis_of(found.networks) if found.networks else unmeasured,
        error=expected,
        rows=rows,
        networks=found.networks,
        batches=(int(min(batches)), int(max(batches))),
        largest_macs=float("inf") if sample is None else _largest_macs(sample, batches),
        overlap=prior.overlap,
        extra_calls=prior.step_calls if phase == "train_step" else 0.0,
        kinds=TABLE_KINDS if sample is None else _kinds(sample),
    )
    return made, found


def _largest_macs(sample: Sample, batches: Sequence[int] | np.ndarray) -> float:
    per_row = np.broadcast_to(np.asarray(batches, float), (len(sample),)) if len(batches) in (1, len(sample)) else 1.0
    return float((sample.counts[:, IS_MAC].sum(axis=1) / per_row).max())


def _kinds(sample: Sample) -> tuple[str, ...]:
    """Kinds that any row has; recurrent and fc layers share a column of multiply-adds and are told by their calls."""
    used = sample.counts.sum(axis=0) > 0
    found = []
    for number, kind in enumerate(TABLE_KINDS):
        macs, elements, _, calls = _CELLS[number]
        column = calls if kind == "recurrent" else macs if macs >= 0 else elements
        if used[column]:
            found.append(kind)
    return tuple(found)


def prices_by_kind(
    tables: np.ndarray,
    milliseconds: np.ndarray,
    groups: Sequence[str],
    prior: Prior,
    physics: Physics,
    facts: Facts,
    sigma: float = 0.05,
) -> tuple[np.ndarray, dict[str, float], float]:
    """Prices of every cell of a layer table [10, 4], for rows of search spaces, in which kinds can be told apart.

    Every cell's price is drawn to that of its column, the columns to a wide prior; each group (search space) has a
    factor of its own.

    Args:
        tables: layer tables of the rows, [rows, 10, 4].
        milliseconds: [rows].
        groups: of the rows.
        prior: of the runtime that is nearest.
        physics: of the device.
        facts: of the device.
        sigma: relative error that the rows are believed to have.

    Returns:
        Prices in milliseconds, the factors of the groups, and the median relative error on the rows.
    """
    where = np.argwhere(_CELLS >= 0)
    column = _CELLS[where[:, 0], where[:, 1]]
    spread = np.eye(prior.covariance.shape[0])[column]
    wider = np.where(IS_CALL, CALL_SPREAD, RUNTIME_SPREAD)
    covariance = spread @ (prior.covariance * np.outer(wider, wider)) @ spread.T + KIND_SPREAD**2 * np.eye(len(column))
    low, high = (bound[column] for bound in physics.bounds("forward"))
    mean = prior.mean(facts, physics.units("forward"))[column]
    names = sorted(set(groups))
    marks = np.array([[float(group == name) for name in names] for group in groups])
    counts = tables[:, where[:, 0], where[:, 1]]
    fitted = solve(
        Problems(
            counts[None], np.log(milliseconds)[None], np.ones((1, len(milliseconds))), low[None], high[None],
            mean[None], np.linalg.inv(covariance), np.array([sigma]), np.ones(1), marks[None],
            np.full(len(names), GROUP_SIGMA),
            is_call=np.zeros(len(column), bool),
        )
    )  # fmt: skip
    cells = np.zeros((len(TABLE_KINDS), 4))
    cells[where[:, 0], where[:, 1]] = fitted.prices[0]
    factors = dict(zip(names, fitted.factors[0].tolist(), strict=True))
    ms = counts @ fitted.prices[0] * (marks @ fitted.factors[0])
    return cells, factors, float(np.median(np.abs(ms / milliseconds - 1)))


def datasheet_prices(
    prior: Prior,
    physics: Physics,
    facts: Facts,
    phase: Phase,
    runtime: str,
    fused: bool,
    basis: str,
) -> Prices:
    """Prices of a device without a measurement."""
    return prices_of(None, prior, physics, facts, phase, runtime, fused, unmeasured=basis)[0]


def at_least(prices: Prices, floor: Prices) -> Prices:
    """The dearer of two sets, cell by cell: a step is never cheaper than its own forward pass.

    Raises:
        DeviceError: for sets of other overlaps, whose cells do not compare.
    """
    if prices.overlap > floor.overlap:
        raise DeviceError("a step whose launches hide better than those of its forward pass cannot be compared with it")
    cells = tuple(tuple(map(max, a, b)) for a, b in zip(prices.cells, floor.cells, strict=True))
    return replace(prices, cells=cells)  # type: ignore[arg-type]
