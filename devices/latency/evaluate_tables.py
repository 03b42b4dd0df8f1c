"""Judges the structured model on public tables: networks left out, devices left out, steps, joules.

Everything is judged on what the fit did not see: a network's rows are all left out together, and the prior is that of
all other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from devices.errors import DeviceError
from devices.latency.calibrate import MANY_NETWORKS, best_believed
from devices.latency.energy import energy_columns, fit_energy
from devices.latency.learn_priors import PRIOR_NETWORKS, Watch, fits_by_id, learn_prior, of_family, unseen_errors
from devices.latency.prior import error_with, left_out, left_out_ms
from devices.latency.tables import Setting, Tables

if TYPE_CHECKING:
    from devices.latency.spaces import Space

MEASURED_NETWORKS = (0, 1, 3, 10)  # on a device that the prior has not seen


@dataclass(frozen=True)
class Figure:
    """One line of the evaluation; errors are ratios, |predicted / measured - 1|.

    Attributes:
        what: description of what is judged.
        settings, rows: how many were judged.
        mean: of the rows' errors; over several settings the median of their means.
        median: of the rows' errors; over several settings the median of their medians.
        low, high: quartiles over settings, where there are several.
    """

    what: str
    settings: int
    rows: int
    mean: float
    median: float
    low: float | None = None
    high: float | None = None


def over_settings(what: str, errors: Sequence[np.ndarray]) -> Figure:
    """Returns the median over settings of the mean error of each."""
    means = [float(e.mean()) for e in errors]
    low, middle, high = (float(x) for x in np.percentile(means, [25, 50, 75]))
    median = float(np.median([np.median(e) for e in errors]))
    return Figure(what, len(errors), int(sum(map(len, errors))), middle, median, low, high)


def of_rows(what: str, errors: np.ndarray) -> Figure:
    """Returns the mean and median error of one setting's rows."""
    return Figure(what, 1, len(errors), float(errors.mean()), float(np.median(errors)))


def evaluate_tables(folder: str | Path, watch: Watch = lambda text: None) -> list[Figure]:
    """Judges the model on a folder of tables; see `devices.latency.tables` for what it holds.

    Raises:
        DeviceError: where a table is missing or broken, or no setting has enough networks.
    """
    tables = Tables(folder)
    settings = tables.settings()
    found = _inference(settings, watch) + _other_runtimes(settings, watch)
    for family in ("cpu_forward", "cpu_train_step", "gpu_forward", "gpu_train_step"):
        found += _with_batches(settings, family, watch)
    found += _joules(tables, settings, watch)
    if not found:
        raise DeviceError(f"{folder}: no setting has {PRIOR_NETWORKS} networks or more, so nothing can be judged")
    return found


def _inference(settings: Sequence[Setting], watch: Watch) -> list[Figure]:
    chosen = of_family(settings, "mobile")
    if not chosen:
        return []
    watch("mobile: learning the prior")
    prior = learn_prior("mobile", settings)
    known = fits_by_id(settings, "mobile", prior)
    errors: dict[int, np.ndarray] = {}
    for device in dict.fromkeys(s.device for s in chosen):
        watch(f"mobile: networks left out on {device}")
        others = learn_prior("mobile", settings, device, prior, known)
        own = [i for i, s in enumerate(chosen) if s.device == device]
        for i, e in zip(own, left_out([chosen[i].sample for i in own], others), strict=True):
            errors[i] = e
    everything = [errors[i] for i in range(len(chosen))]
    single = [errors[i] for i, s in enumerate(chosen) if s.precision == "fp32"]
    found = [over_settings("ncnn on processors, network left out", everything)]
    found += [over_settings("  of these fp32", single)] if single else []
    arm = {s.device for s in chosen if s.sample.physics.isa == "arm"}
    for number, rows in unseen_errors(settings, "mobile", prior, MEASURED_NETWORKS, watch).items():
        how = "datasheet only" if number == 0 else f"{number} network{'s' if number > 1 else ''} measured"
        found.append(over_settings(f"device left out, {how}", [np.array([e]) for _, e in rows]))
        on_arm = [np.array([e]) for s, e in rows if s.device in arm]
        found += [over_settings(f"  of these Arm, {how}", on_arm)] if on_arm else []
    return found


def _other_runtimes(settings: Sequence[Setting], watch: Watch) -> list[Figure]:
    """Judges runtimes that the prior does not know, by each setting's own fit under it."""
    judged = [s for s in settings if s.family == "mobile" and s.runtime != "ncnn" and s.num_networks >= MANY_NETWORKS]
    found = []
    for s in judged:
        watch(str(s))
        prior = learn_prior("mobile", settings, s.device)
        found.append(of_rows(f"{s}, network left out", best_believed(s.sample, prior)[1]))
    return found


def _with_batches(settings: Sequence[Setting], family: str, watch: Watch) -> list[Figure]:
    found = []
    for s in of_family(settings, family):
        if s.num_networks < PRIOR_NETWORKS:
            continue
        watch(str(s))
        prior = learn_prior(family, settings, s.device)
        found.append(of_rows(f"{s}, network left out", best_believed(s.sample, prior)[1]))
        carried = error_with(s.sample, prior, [])
        found.append(Figure("  carried from the other devices", 1, len(s.sample), carried, carried))
    return found


def _joules(tables: Tables, settings: Sequence[Setting], watch: Watch) -> list[Figure]:
    """Judges joules of left-out networks, with measured times and with predicted ones."""
    found = []
    known = [s for s in settings if np.isfinite(s.energy_mj).any() and s.precision == "fp32"]
    known = [s for s in known if s.sample.physics.isa == "gpu"]
    if not known:
        return []
    parts = []
    for s in known:
        watch(f"joules of {s}")
        has = np.isfinite(s.energy_mj)
        prior = learn_prior(s.family, settings, s.device)
        (predicted_ms,) = left_out_ms([s.sample], prior)
        measured = energy_columns(tables, s, s.sample.milliseconds / 1e3)[has]
        predicted = energy_columns(tables, s, predicted_ms / 1e3)[has]
        names = np.array(s.sample.networks)[has]
        parts.append((names, measured, predicted, s.energy_mj[has] / 1e3))
    names = np.concatenate([p[0] for p in parts])
    measured, predicted = (np.concatenate([p[i] for p in parts]) for i in (1, 2))
    joules = np.concatenate([p[3] for p in parts])
    off = {"measured": np.zeros(len(joules)), "predicted": np.zeros(len(joules))}
    for name in dict.fromkeys(names):
        out = names == name
        fitted = fit_energy(measured[~out], joules[~out])
        for what, columns in (("measured", measured), ("predicted", predicted)):
            off[what][out] = np.abs(columns[out] @ fitted / joules[out] - 1)
    found += [of_rows(f"joules of cards, {what} times, network left out", e) for what, e in off.items()]
    return found


# --- the model that prices runs, inside the search spaces -------------------------------------------------------------


def evaluate_profiles(space: Space, seed: int = 0, judged: int = 800) -> list[tuple[str, float, float]]:
    """Judges the shipped prices, after one scale, on networks that no profile has.

    The networks come after the training pool and compute something; they are the same for every device. Nothing is
    trimmed and nothing measured; the batch is 1.

    Returns:
        (device, Spearman, error) and, last, their means as "mean".
    """
    from scipy.stats import spearmanr

    from devices.latency.few_shot import PROFILES
    from devices.latency.models import device_prices
    from devices.nas.tables import connected, network_features
    from devices.profile import load_profile
    from devices.trace import COLUMNS, KINDS

    candidates = np.flatnonzero(connected(space.name, space.ops))
    candidates = candidates[candidates >= space.split.pool]
    index = candidates
    if len(candidates) > judged:
        index = np.random.default_rng(seed).choice(candidates, judged, replace=False)
    tables = network_features(space.name, space.ops)[index, :-1].reshape(-1, len(KINDS), len(COLUMNS))
    rows = []
    for measured, name in PROFILES.items():
        prices = device_prices(load_profile(name)).inference
        ms = (tables * prices.matrix).sum(axis=(1, 2)) + prices.constant_ms
        true = space.latency(measured)[index]
        ms = ms * np.median(true / ms)
        rows.append((name, float(spearmanr(ms, true).statistic), float(np.mean(np.abs(ms / true - 1)))))
    mean = np.mean([row[1:] for row in rows], axis=0).tolist()
    return [*rows, ("mean", *mean)]
