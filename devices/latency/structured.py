"""Predicts the latency of any network on a device from a few measured ones, by a non-negative sum over layer kinds.

The device is a vector of coefficients, the network a vector of features (`LayerTable.features`), the latency their
product, as runtimes run layers one after the other. Source: fedsim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from devices.errors import DeviceError

PENALTY = 1e-3  # of coefficients far from the prior, or from 0 without one
PRIOR_PENALTIES = (0.1, 1.0, 10.0)
ROUNDS = 6  # of reweighting
LEAST_SPREAD = 0.01  # relative residuals below this are never outliers
SHARPNESS = 0.1  # candidates whose error is this fraction above the best weigh 1/e as much
MAX_ERROR = 1.0  # of a left-out network, so that one gross outlier does not decide
FOLDS = 50
DESIGN_FLOOR = 1e-3  # the information that a design of no networks starts with, in every direction


@dataclass(frozen=True, eq=False)
class StructuredPredictor:
    """One device, whose milliseconds are coefficients . features, with no coefficient below 0.

    Attributes:
        coefficients: milliseconds per unit of each feature, [f] float64; 0 where the networks of the fit or zoo did not
            differ; their cost is in the constant then.
        sigma: relative error to expect, root mean square of the left-out errors |log(predicted / measured)|, each at
            most 1; selections under a limit use t * (1 + 2 sigma).
        measurements: how many networks were measured.
    """

    coefficients: np.ndarray
    sigma: float
    measurements: int

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        latency_ms: np.ndarray,
        prior: np.ndarray | None = None,
        zoo: np.ndarray | None = None,
        robust: bool = True,
    ) -> StructuredPredictor:
        """Fits by relative errors, under a small penalty, with less weight on networks that no fit explains.

        Minimises sum_i q_i^2 ((w . phi_i - t_i) / t_i)^2 + penalty * sum_j (S_j (w_j - s w0_j) / tbar)^2 over w >= 0,
        with S_j the mean of feature j and tbar the mean latency of the measured networks. q starts at 1; six rounds of
        q_i = (1 + (r_i / 2m)^2)^(-1/2) follow, r the relative residuals, m their 1.4826 median |r|, at least 0.01
        (Cauchy). With a prior, no prior and the prior at three penalties are averaged by their left-out errors.

        Args:
            features: of the measured networks for the batch that was measured, last column 1, [n, f].
            latency_ms: measured milliseconds, [n].
            prior: coefficients of a typical device, per mean latency (`prior_of`), [f]; its scale s is fitted.
            zoo: features of the networks to predict, [m, f]; they set the units and which features vary.
            robust: whether networks are reweighted; q stays 1 otherwise.

        Raises:
            DeviceError: for shapes that do not fit, and for latencies or features that are not numbers above or from 0.
        """
        phi, ms = _checked(features, latency_ms)
        zoo = phi if zoo is None else _matrix("zoo", zoo, phi.shape[1])
        units, varies = np.maximum(zoo.max(axis=0), phi.max(axis=0)), np.ptp(zoo, axis=0) > 0
        varies[-1] = True  # the constant
        used = np.flatnonzero(varies & (units > 0))
        scaled, candidates = phi[:, used] / units[used], [(np.zeros(len(used)), PENALTY)]
        if prior is not None:
            if np.shape(prior) != (phi.shape[1],) or not np.all(np.isfinite(prior) & (np.asarray(prior) >= 0)):
                raise DeviceError(f"the prior must be {phi.shape[1]} finite coefficients from 0, got {np.shape(prior)}")
            typical = np.asarray(prior, float)[used] * units[used]
            candidates += [(typical, penalty) for penalty in PRIOR_PENALTIES if typical.any()]
        rounds = ROUNDS if robust else 0
        left_out = [_left_out_errors(scaled, ms, w0, penalty, rounds) for w0, penalty in candidates]
        shares = _shares(np.array([errors.mean() for errors in left_out]))
        fitted = [_fit(scaled, ms, w0, penalty, rounds) for w0, penalty in candidates]
        coefficients = np.zeros(phi.shape[1])
        coefficients[used] = shares @ np.array(fitted) / units[used]
        sigma = float(shares @ [np.sqrt(np.mean(errors**2)) for errors in left_out])
        return cls(coefficients, sigma, len(ms))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Predicts milliseconds of networks with features [n, f] for the batch that is run, [n]."""
        return np.asarray(predict_ms(self.coefficients[None], features)[0])

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types; `from_dict` is the inverse."""
        return {
            "coefficients": self.coefficients.tolist(),
            "sigma": self.sigma,
            "measurements": self.measurements,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> StructuredPredictor:
        """Reads what `to_dict` wrote.

        Raises:
            DeviceError: for missing keys or coefficients that are not numbers from 0.
        """
        try:
            coefficients = np.array(tree["coefficients"], dtype=float)
            sigma, measurements = float(tree["sigma"]), int(tree["measurements"])
        except (KeyError, TypeError, ValueError) as error:
            raise DeviceError(
                f"a structured predictor needs coefficients, sigma and measurements, got a wrong one: {error}"
            ) from None
        if coefficients.ndim != 1 or not np.all(np.isfinite(coefficients) & (coefficients >= 0)):
            raise DeviceError(f"coefficients must be a list of finite numbers from 0, got {tree['coefficients']}")
        return cls(coefficients, sigma, measurements)


def predict_ms(coefficients: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Predicts the milliseconds of every network on every device at once.

    Args:
        coefficients: one row per device, [devices, f].
        features: one row per network, [n, f].

    Returns:
        [devices, n].

    Raises:
        DeviceError: if the rows differ in length.
    """
    coefficients, features = np.asarray(coefficients, float), np.asarray(features, float)
    if features.ndim != 2 or coefficients.ndim != 2 or features.shape[1] != coefficients.shape[1]:
        shapes = f"features {list(features.shape)} and coefficients {list(coefficients.shape)}"
        raise DeviceError(f"networks and devices must have the same number of features, got {shapes}")
    return np.asarray(coefficients @ features.T)


def prior_of(sources: Sequence[StructuredPredictor], mean_ms: Sequence[float]) -> np.ndarray:
    """Returns a typical device: the mean over source devices of coefficients / mean latency, [f]."""
    if not sources or len(sources) != len(mean_ms):
        raise DeviceError(
            f"a prior needs a mean latency for each of its sources, got {len(mean_ms)} for {len(sources)}"
        )
    return np.asarray(np.mean([p.coefficients / ms for p, ms in zip(sources, mean_ms, strict=True)], axis=0))


def choose_references(features: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """Chooses networks to measure, from the networks alone: a greedy D-optimal design.

    Features are standardised over the candidates, with a constant; each pick is the network x with the largest gain
    x' M^-1 x, M being 0.001 I plus the sum of x x' over the picks so far. Leave out networks that a runtime would not
    run as they stand (see `connected` in `devices.nas.tables`).

    Args:
        features: of all networks, [n, f].
        candidates: indices to choose from, [c] int.
        count: how many, at most c.

    Returns:
        Indices out of `candidates`, in the order of choice, [count] int.

    Raises:
        DeviceError: if there are fewer candidates than asked for, or features are not numbers.
    """
    candidates = np.asarray(candidates)
    if not 1 <= count <= len(candidates):
        raise DeviceError(f"cannot choose {count} references from {len(candidates)} networks")
    x = _matrix("features", np.asarray(features)[candidates])
    deviation = x.std(axis=0)
    varies = deviation > 1e-12 * np.abs(x).max(axis=0)
    x = np.column_stack([(x[:, varies] - x[:, varies].mean(axis=0)) / deviation[varies], np.ones(len(x))])
    inverse = np.eye(x.shape[1]) / DESIGN_FLOOR
    picks: list[int] = []
    for _ in range(count):
        spread = x @ inverse
        gain = np.einsum("nf,nf->n", spread, x)
        gain[picks] = -np.inf
        pick = int(np.argmax(gain))
        picks.append(pick)
        inverse = inverse - np.outer(spread[pick], spread[pick]) / (1 + gain[pick])  # of M + x x'
    return candidates[picks]


def _fit(phi: np.ndarray, ms: np.ndarray, prior: np.ndarray, penalty: float, rounds: int) -> np.ndarray:
    """Fits coefficients of scaled features phi [n, k]: a first solution and one per round of reweighting."""
    scale = float(np.median(ms / np.maximum(phi @ prior, 1e-12))) if prior.any() else 0.0
    pull = np.sqrt(penalty) * phi.mean(axis=0) / ms.mean()
    rows, doubt = phi / ms[:, None], np.ones(len(ms))
    for _ in range(rounds + 1):
        left = np.vstack([doubt[:, None] * rows, np.diag(pull)])
        weights: np.ndarray = nnls(left, np.concatenate([doubt, pull * scale * prior]))[0]
        residual = rows @ weights - 1
        spread = max(1.4826 * float(np.median(np.abs(residual))), LEAST_SPREAD)
        doubt = (1 + (residual / (2 * spread)) ** 2) ** -0.5
    return weights


def _left_out_errors(phi: np.ndarray, ms: np.ndarray, prior: np.ndarray, penalty: float, rounds: int) -> np.ndarray:
    """Returns min(1, |log(predicted / measured)|) of each left-out network, [n]; 1 for a single network.

    More than `FOLDS` networks are left out in that many groups, every fiftieth together.
    """
    if len(ms) == 1:
        return np.ones(1)
    errors, fold = np.empty(len(ms)), np.arange(len(ms)) % FOLDS
    for group in range(min(FOLDS, len(ms))):
        out = fold == group
        predicted = phi[out] @ _fit(phi[~out], ms[~out], prior, penalty, rounds)
        errors[out] = np.abs(np.log(np.maximum(predicted, 1e-300) / ms[out]))
    return np.minimum(errors, MAX_ERROR)


def _shares(errors: np.ndarray) -> np.ndarray:
    best = max(float(errors.min()), 1e-12)
    weights = np.exp(-(errors - errors.min()) / (SHARPNESS * best))
    return np.asarray(weights / weights.sum())


def _matrix(what: str, values: np.ndarray, width: int | None = None) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != 2 or 0 in values.shape or width not in (None, values.shape[1]):
        raise DeviceError(
            f"{what} must be one row of {width or 'features'} numbers per network, got {list(values.shape)}"
        )
    if not np.all(np.isfinite(values) & (values >= 0)):
        raise DeviceError(f"{what} must be finite numbers from 0")
    return values


def _checked(features: np.ndarray, latency_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    phi, ms = _matrix("features", features), np.asarray(latency_ms, float)
    if ms.shape != (len(phi),):
        raise DeviceError(f"each of the {len(phi)} networks needs one latency, got {list(ms.shape)}")
    bad = np.flatnonzero(~(np.isfinite(ms) & (ms > 0)))
    if len(bad):
        raise DeviceError(f"latencies must be positive numbers of milliseconds, but network {bad[0]} took {ms[bad[0]]}")
    if not np.all(phi[:, -1] == 1):
        raise DeviceError("the last feature must be the constant 1")
    return phi, ms
