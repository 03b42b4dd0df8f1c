"""Fits prices to measured milliseconds: robust, inside physical bounds, drawn to a prior, many problems at once.

A problem's prices w [k] minimise

    sum_i c^2 log(1 + (r_i / c)^2) + (log w - m)' P (log w - m),    r_i = log(predicted_i / measured_i) / sigma

over low <= w <= high: relative errors with a Cauchy loss (c = 2), and a Gaussian prior on the logarithms of the prices,
so that what the rows cannot tell apart is shared out as on other devices, and a device with one row gets a scale. A
prediction is (launches^p + work^p)^(1/p), launches the columns of calls, work the others: p = 1 is a sum (processors
run one thing after the other), larger p lets launches hide behind work (graphics cards). Source: fedsim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from devices.latency.columns import IS_CALL

ROUNDS = 60
CAUCHY = 2.0
LARGEST_STEP = 1.5  # of a logarithm in one round
TINY = 1e-300
TOLERANCE = 1e-8  # change of the loss, relatively, at which a problem is solved


@dataclass(frozen=True, eq=False)
class Problems:
    """Problems of equal shape; rows that a problem does not have are masked.

    Attributes:
        counts: of each row, [problems, rows, k] float64.
        log_ms: logarithms of the measured milliseconds, [problems, rows].
        mask: 1 where there is a row, [problems, rows].
        low, high: bounds of the prices in milliseconds, [problems, k].
        mean: of the prior of their logarithms, [problems, k].
        precision: of that prior, [k, k] or [problems, k, k].
        sigma: relative error that rows are believed to have, [problems].
        overlap: p, [problems].
        groups: columns of one-hot marks [problems, rows, g]: each mark's rows share a factor of their own, whose
            logarithm has the standard deviation `group_sigma` around 0.
        group_sigma: [g].
        is_call: which columns are launches, [k].
    """

    counts: np.ndarray
    log_ms: np.ndarray
    mask: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    precision: np.ndarray
    sigma: np.ndarray
    overlap: np.ndarray
    groups: np.ndarray | None = None
    group_sigma: np.ndarray | None = None
    is_call: np.ndarray = field(default_factory=lambda: IS_CALL)

    @property
    def usual(self) -> np.ndarray:
        """The logarithms of the prior's prices inside the bounds, [problems, k]."""
        return np.asarray(np.clip(self.mean, np.log(self.low), np.log(self.high)))


@dataclass(frozen=True, eq=False)
class Fitted:
    """What `solve` found for each problem.

    Attributes:
        prices: in milliseconds, [problems, k].
        covariance: of their logarithms, [problems, k, k].
        factors: of the groups, [problems, g].
        residuals: logarithms of predicted over measured milliseconds, [problems, rows].
    """

    prices: np.ndarray
    covariance: np.ndarray
    factors: np.ndarray
    residuals: np.ndarray


def predict(counts: np.ndarray, prices: np.ndarray, overlap: float | np.ndarray = 1.0) -> np.ndarray:
    """Returns the milliseconds of counts [..., k] at prices that broadcast to them."""
    parts = counts * prices
    launches, work = parts[..., IS_CALL].sum(-1), parts[..., ~IS_CALL].sum(-1)
    p = np.asarray(overlap, float)
    if np.all(p == 1):
        return np.asarray(launches + work)
    return _together(launches, work, p)


def _together(launches: np.ndarray, work: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Returns (launches^p + work^p)^(1/p) without overflow."""
    larger = np.maximum(np.maximum(launches, work), TINY)
    return np.asarray(larger * ((launches / larger) ** p + (work / larger) ** p) ** (1 / p))


def _with_groups(problems: Problems, extra: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns bounds, means [problems, k + extra] and precision of the logarithms of prices and groups' factors."""
    size, _, columns = problems.counts.shape
    low = np.concatenate([np.log(problems.low), np.full((size, extra), -np.inf)], axis=1)
    high = np.concatenate([np.log(problems.high), np.full((size, extra), np.inf)], axis=1)
    mean = np.concatenate([problems.usual, np.zeros((size, extra))], axis=1)
    precision = np.zeros((size, columns + extra, columns + extra))
    precision[:, :columns, :columns] = problems.precision
    if extra and problems.group_sigma is not None:
        precision[:, range(columns, columns + extra), range(columns, columns + extra)] = problems.group_sigma**-2.0
    return low, high, mean, precision


def solve(problems: Problems, guess: np.ndarray | None = None) -> Fitted:
    """Fits all problems by Levenberg and Marquardt's method with prices that sit at a bound held there.

    Args:
        problems: to fit.
        guess: prices to start from, [problems, k]; those of the prior's mean when left out.
    """
    counts, mask = problems.counts, problems.mask
    size, _, columns = counts.shape
    marks = np.zeros((*mask.shape, 0)) if problems.groups is None else problems.groups
    extra = marks.shape[2]
    low, high, mean, precision = _with_groups(problems, extra)
    p, is_call = problems.overlap[:, None], problems.is_call

    def residuals(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = counts * np.exp(x[:, None, :columns])
        launches = np.maximum(parts[:, :, is_call].sum(2), TINY)
        work = np.maximum(parts[:, :, ~is_call].sum(2), TINY)
        ms = _together(launches, work, p)
        off = np.log(ms) + np.einsum("bng,bg->bn", marks, x[:, columns:]) - problems.log_ms
        shares = np.where(is_call, ((launches / ms) ** p / launches)[:, :, None], ((work / ms) ** p / work)[:, :, None])
        return off * mask, parts * shares

    def loss(x: np.ndarray, off: np.ndarray) -> np.ndarray:
        r = off / problems.sigma[:, None]
        d = x - mean
        return np.asarray((CAUCHY**2 * np.log1p((r / CAUCHY) ** 2)).sum(1) + np.einsum("bk,bkl,bl->b", d, precision, d))

    def normal(x: np.ndarray, off: np.ndarray, slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        jacobian = np.concatenate([slopes, marks], axis=2) * mask[:, :, None] / problems.sigma[:, None, None]
        r = off / problems.sigma[:, None]
        trust = mask / (1 + (r / CAUCHY) ** 2)
        weighted = jacobian * trust[:, :, None]
        gradient = np.einsum("bnk,bn->bk", weighted, r) + np.einsum("bkl,bl->bk", precision, x - mean)
        return weighted.transpose(0, 2, 1) @ jacobian + precision, gradient

    x = mean.copy()
    if guess is not None:
        x[:, :columns] = np.clip(np.log(guess), low[:, :columns], high[:, :columns])
    damping = np.full(size, 1e-2)
    off, slopes = residuals(x)
    value = loss(x, off)
    unit = np.eye(columns + extra)
    for _ in range(ROUNDS):
        curvature, gradient = normal(x, off, slopes)
        held = ((x <= low + 1e-12) & (gradient > 0)) | ((x >= high - 1e-12) & (gradient < 0))
        diagonal = np.einsum("bkk->bk", curvature)
        matrix = curvature + (damping[:, None] * diagonal)[:, :, None] * unit
        matrix = np.where(held[:, :, None] | held[:, None, :], 0.0, matrix) + held[:, :, None] * unit
        step = np.linalg.solve(matrix, np.where(held, 0.0, -gradient)[:, :, None])[:, :, 0]
        tried = np.clip(x + np.clip(step, -LARGEST_STEP, LARGEST_STEP), low, high)
        new_off, new_slopes = residuals(tried)
        new_value = loss(tried, new_off)
        better = new_value <= value
        done = np.abs(value - new_value) <= TOLERANCE * (1 + value)
        x = np.where(better[:, None], tried, x)
        off = np.where(better[:, None], new_off, off)
        slopes = np.where(better[:, None, None], new_slopes, slopes)
        value = np.where(better, new_value, value)
        damping = np.where(better, np.maximum(damping / 3, 1e-7), np.minimum(damping * 5, 1e6))
        if np.all(done):
            break
    curvature, _ = normal(x, off, slopes)
    covariance = np.linalg.inv(curvature)[:, :columns, :columns]
    return Fitted(np.exp(x[:, :columns]), covariance, np.exp(x[:, columns:]), off)
