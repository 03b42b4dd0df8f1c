"""Turns measurements, few or many or none, into the prices of a runtime on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from devices.errors import DeviceError
from devices.latency.columns import _CELLS, IS_CALL, IS_MAC, TABLE_KINDS, Phase, Physics
from devices.latency.fitting import Problems, predict, solve
from devices.latency.prices import Prices
from devices.latency.prior import Facts, Prior, Sample, left_out, problems_of

MANY_NETWORKS = 10  # from which on a fit chooses its believed error by itself
SIGMAS = (0.04, 0.06, 0.08, 0.12, 0.15)  # believed relative errors of rows that a fit chooses from
KIND_SPREAD = 1.0  # deviation of a kind's log price from that of its column, where rows tell kinds apart
RUNTIME_SPREAD = 2.0  # factor on the prior's width for a runtime that no prior knows
CALL_SPREAD = 10.0  # the same for calls, which differ most between runtimes
GROUP_SIGMA = 0.3  # deviation of a search space's log factor


@dataclass(frozen=True, eq=False)
class Calibration:
    """Prices and how well they meet the rows that they were fitted to.

    Attributes:
        prices: in milliseconds, [17].
        own_error: median relative error on the measured rows.
        left_out_error: mean relative error on networks that are left out; None for a single network.
        networks: that were measured.
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
        chosen, errors = best_believed(sample, prior, SIGMAS if networks >= MANY_NETWORKS else (prior.sigma,))
        left = float(np.mean(errors))
    problems = problems_of([sample], chosen)
    prices = solve(problems).prices[0]
    ms = predict(problems.counts[0, : len(sample)], prices, chosen.overlap)
    return Calibration(prices, float(np.median(np.abs(ms / sample.milliseconds - 1))), left, networks)


def best_believed(sample: Sample, prior: Prior, sigmas: Sequence[float] = SIGMAS) -> tuple[Prior, np.ndarray]:
    """Chooses the believed error of rows that predicts left-out networks best; returns the prior and rows' errors."""
    tried = [replace(prior, sigma=sigma) for sigma in sigmas]
    errors = [left_out([sample], p)[0] for p in tried]
    best = int(np.argmin([e.mean() for e in errors]))
    return tried[best], errors[best]


def basis_of(networks: int) -> str:
    """Returns the basis of a set of prices by the number of measured networks, e.g. "few rows"."""
    return (
        "datasheet"
        if networks == 0
        else "one row"
        if networks == 1
        else "few rows"
        if networks < MANY_NETWORKS
        else "rows"
    )


@dataclass(frozen=True)
class Backend:
    """The software that runs networks on a device.

    Attributes:
        runtime: its name, e.g. "ncnn".
        fused: whether it folds norms and rectifiers into the layers before them.
        precision: of its arithmetic: fp32, tf32, fp16, bf16 or int8.
    """

    runtime: str
    fused: bool
    precision: str = "fp32"


def prices_of(
    sample: Sample, prior: Prior, backend: Backend, batches: Sequence[int] | np.ndarray = (1,)
) -> tuple[Prices, Calibration]:
    """Fits prices to measured rows, as a set for a profile.

    Args:
        sample: the rows, one or more.
        prior: of the family of runtimes.
        backend: what the rows were measured with.
        batches: examples per pass of each row, [rows], or one number for all.

    Returns:
        The prices with where they come from, and what the fit reaches on the rows.
    """
    if sample.phase == "train_step" and len(set(np.asarray(batches).tolist())) == 1:
        sample = replace(sample, physics=replace(sample.physics, weights_told=False))
    found = calibrate(sample, prior, sample.physics, sample.facts, sample.phase)
    error = found.left_out_error
    if error is None and prior.errors:
        # A row that its own prices do not meet says that the prior is off by at least so much here.
        error = max(found.own_error or 0.0, prior.errors.get(1) or 0.0)
    made = replace(
        _as_prices(found, prior, sample.facts, sample.phase, backend),
        basis=basis_of(found.networks),
        error=error,
        rows=len(sample),
        networks=found.networks,
        batches=(int(min(batches)), int(max(batches))),
        largest_macs=_largest_macs(sample, batches),
        kinds=_kinds(sample),
    )
    return made, found


def datasheet_prices(
    prior: Prior, physics: Physics, facts: Facts, phase: Phase, backend: Backend, basis: str = "datasheet"
) -> Prices:
    """Returns the prices of a device without a measurement: the prior's mean inside the bounds.

    Args:
        prior: of the family of runtimes.
        physics: of the device.
        facts: of the device.
        phase: that is priced.
        backend: that the device would run.
        basis: how the prices came about, e.g. "carried"; only those of a datasheet have an error to expect.
    """
    found = calibrate(None, prior, physics, facts, phase)
    error = prior.errors.get(0) if prior.errors and basis == "datasheet" else None
    return replace(_as_prices(found, prior, facts, phase, backend), basis=basis, error=error)


def _as_prices(found: Calibration, prior: Prior, facts: Facts, phase: Phase, backend: Backend) -> Prices:
    return Prices.of_columns(
        found.prices,
        backend.fused,
        runtime=backend.runtime,
        threads=facts.threads,
        precision=backend.precision,
        overlap=prior.overlap,
        extra_calls=prior.step_calls if phase == "train_step" else 0.0,
    )


def _largest_macs(sample: Sample, batches: Sequence[int] | np.ndarray) -> float:
    per_row = np.broadcast_to(np.asarray(batches, float), (len(sample),)) if len(batches) in (1, len(sample)) else 1.0
    return float((sample.counts[:, IS_MAC].sum(axis=1) / per_row).max())


def _kinds(sample: Sample) -> tuple[str, ...]:
    """Lists the kinds that any row has; recurrent layers share fc's column of multiply-adds and are told by calls."""
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
    """Fits prices of every cell of a layer table [10, 4] to rows of search spaces, which tell kinds apart.

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


def at_least(prices: Prices, floor: Prices) -> Prices:
    """Returns the dearer of two sets, cell by cell: a step is never cheaper than its own forward pass.

    Raises:
        DeviceError: for sets of other overlaps, whose cells do not compare.
    """
    if prices.overlap > floor.overlap:
        raise DeviceError("a step whose launches hide better than those of its forward pass cannot be compared with it")
    cells = tuple(tuple(map(max, a, b)) for a, b in zip(prices.cells, floor.cells, strict=True))
    return replace(prices, cells=cells)  # type: ignore[arg-type]
