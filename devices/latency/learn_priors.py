"""Learns the priors of prices from all devices of the public tables, and from all but one to judge them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from devices.latency.columns import IS_CALL, NUM_COLUMNS
from devices.latency.fitting import solve
from devices.latency.prior import COVARIATES, Prior, choose_networks, error_with, learn, problems_of
from devices.latency.tables import Setting

PRIOR_NETWORKS = 15  # of a setting that the prior of mobile runtimes is learned from
DISPATCH_SPREAD = 0.3  # of the logarithm of a framework's cost of a call, between devices of one clock
Watch = Callable[[str], None]

# Where each family's prior starts, in physical units: multipliers of multiply-adds (conv3x3, conv, pointwise, grouped,
# depthwise, fc), activations (dense, pointwise, depthwise, fc, pool, elementwise), weights (layers, recurrent), and
# calls in microseconds (layers, rest, recurrent). Prices that no row tells stay near these.
_START: Mapping[str, tuple[list[float], float, float, float, float, float]] = {
    # multipliers, sigma, overlap, extra calls, spread of a column, spread that columns share
    "mobile": ([0.6, 3, 1.8, 2, 5, 4.5, 2, 2, 2, 2, 3, 3, 1.1, 1, 2, 4, 2], 0.12, 1.0, 0.0, 0.3, 0.0),
    "cpu_forward": ([1, 1.3, 2, 3, 10, 1.5, 2, 2, 3, 2, 3, 3, 1.2, 0.5, 20, 20, 3], 0.08, 1.0, 0.0, 0.8, 0.55),
    "cpu_train_step": ([1.2, 1.3, 2, 4, 20, 1.5, 3, 3, 6, 3, 3, 8, 1.2, 0.5, 40, 40, 4], 0.08, 1.0, 0.0, 0.8, 0.55),
    "gpu_forward": ([1, 1.5, 1.3, 5, 10, 1.2, 1, 1, 1, 1, 1, 1, 2, 1, 6, 6, 3], 0.15, 2.0, 0.0, 0.5, 0.45),
    "gpu_train_step": ([1, 1.5, 1.3, 5, 20, 1.2, 1, 1, 1, 1, 1, 1, 2, 1, 6, 6, 3], 0.15, 2.0, 6.0, 0.5, 0.45),
    "mcu": ([2, 2, 2, 3, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 10, 10, 10], 0.06, 1.0, 0.0, 0.7, 0.5),
}


def start_of(family: str) -> tuple[Prior, np.ndarray]:
    """Returns where a family's prior starts, and the covariance that counts as some devices in learning it."""
    multipliers, sigma, overlap, calls, spread, shared = _START[family]
    effects = np.zeros((len(COVARIATES), NUM_COLUMNS))
    effects[0] = np.log(multipliers)
    covariance = np.eye(NUM_COLUMNS) * spread**2 + shared**2
    if family.startswith("cpu"):  # a framework's cost of a call is known from small networks, and goes with the clock
        covariance[IS_CALL] = covariance[:, IS_CALL] = 0.0
        covariance[IS_CALL, IS_CALL] = DISPATCH_SPREAD**2
    wide = covariance if family != "mobile" else np.eye(NUM_COLUMNS) * 0.5**2
    return Prior(effects, wide, sigma, overlap, calls), covariance


def of_family(settings: Sequence[Setting], family: str) -> list[Setting]:
    """Returns the settings that a family's prior is learned from."""
    least = PRIOR_NETWORKS if family == "mobile" else 1
    wanted = [s for s in settings if s.family == family and s.num_networks >= least]
    return [s for s in wanted if family != "mobile" or s.runtime == "ncnn"]


def learn_prior(
    family: str,
    settings: Sequence[Setting],
    without: str = "",
    start: Prior | None = None,
    known: Mapping[int, np.ndarray] | None = None,
) -> Prior:
    """Learns the prior of a family from all devices, or from all but one.

    Args:
        family: of runtimes.
        settings: of the tables.
        without: name of a device that is left out; empty for none.
        start: the prior of all devices to start from, which saves rounds.
        known: prices of samples under `start`, by the sample's id (`fits_by_id`).
    """
    first, spread = start_of(family)
    samples = [s.sample for s in of_family(settings, family) if s.device != without]
    if not samples:
        return first
    guess = np.stack([known[id(s)] for s in samples]) if known is not None else None
    if start is not None:
        return learn(samples, start, rounds=2, spread=spread, guess=guess)
    return learn(samples, first, spread=spread)


def fits_by_id(settings: Sequence[Setting], family: str, prior: Prior) -> dict[int, np.ndarray]:
    """Fits a family's settings under its prior and returns their prices by the id of their samples."""
    samples = [s.sample for s in of_family(settings, family)]
    prices = solve(problems_of(samples, prior)).prices
    return {id(sample): own for sample, own in zip(samples, prices, strict=True)}


def learn_priors(settings: Sequence[Setting], watch: Watch = lambda text: None) -> dict[str, Prior]:
    """Learns all priors, and the errors that devices outside of them have with 0, 1 and 3 measured networks."""
    priors = {}
    for family in ("mobile", "cpu_forward", "cpu_train_step", "gpu_forward", "gpu_train_step"):
        watch(f"learning the prior of {family}")
        priors[family] = learn_prior(family, settings)
    for family in (
        "cpu_forward",
        "cpu_train_step",
    ):  # no row tells in-order cores from others: take the effect from inference
        effects = priors[family].effects.copy()
        effects[COVARIATES.index("in_order")] = priors["mobile"].effects[COVARIATES.index("in_order")]
        priors[family] = replace(priors[family], effects=effects)
    found = unseen_errors(settings, "mobile", priors["mobile"], (0, 1, 3), watch)
    errors = {count: float(np.median([e for _, e in rows])) for count, rows in found.items()}
    priors["mobile"] = replace(priors["mobile"], errors=errors)
    return priors


def unseen_errors(
    settings: Sequence[Setting], family: str, prior: Prior, numbers: Sequence[int], watch: Watch = lambda text: None
) -> dict[int, list[tuple[Setting, float]]]:
    """Returns the error of every setting under the prior of all other devices, by number of networks measured.

    The networks are chosen by `choose_networks`, which sees no time.
    """
    chosen = [s for s in of_family(settings, family) if s.num_networks >= PRIOR_NETWORKS]
    known = fits_by_id(settings, family, prior)
    found: dict[int, list[tuple[Setting, float]]] = {number: [] for number in numbers}
    for device in dict.fromkeys(s.device for s in chosen):
        watch(f"{family}: leaving out {device}")
        others = learn_prior(family, settings, device, prior, known)
        for s in chosen:
            if s.device != device:
                continue
            for number in numbers:
                picks = choose_networks(s.sample, others, number) if number else []
                found[number].append((s, error_with(s.sample, others, picks)))
    return found
