"""The prior of prices: their distribution over devices, which draws fits and stands in for missing measurements.

A device's logarithms of (price / physical unit) are normal around a linear function of a few facts of its datasheet and
runtime; mean and covariance are learned from many measured devices by empirical Bayes (EM: fit every device under the
prior, then take the prior from the fits and their uncertainty). The covariance knows that a device slow at one thing is
slow at others, so that one measured network moves all prices, and which move apart. Source: fedsim; the shipped numbers
are learned by `fedsim devices build` and stand in `devices/priors.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from devices.errors import DeviceError, unknown
from devices.latency.columns import IS_CALL, NUM_COLUMNS, Phase, Physics
from devices.latency.fitting import Problems, predict, solve
from devices.reading import read_yaml

IN_ORDER = frozenset(
    (
        *("A5", "A7", "A53", "A55", "A510", "A520", "U74", "FTC310", "X60", "XBurst2", "GS264", "LA264", "Airmont"),
        *("KNC", "C910V", "M0", "M3", "M4", "M7", "M33"),
    )
)
COVARIATES = ("one", "many_threads", "log2_threads", "half_precision", "in_order", "x86", "other_isa", "year")
EM_ROUNDS = 12
RIDGE = 1.0  # on the effect of a fact, in devices
DEVICES_OF_THE_START = 8.0  # weight of the starting covariance, in devices
START_SPREAD = 0.3
MAX_PROBLEMS = 2000  # that are solved together
DEGREES_OF_FREEDOM = 8.0  # of a t distribution: a device unlike all others hardly moves the prior


@dataclass(frozen=True)
class Facts:
    """What the prior's mean depends on, beside the physics.

    Attributes:
        threads: in use.
        half_precision: whether the runtime computes in fp16.
        in_order: whether the cores run instructions in order.
        isa: arm, x86 or anything else.
        year: of the runtime.
    """

    threads: int = 1
    half_precision: bool = False
    in_order: bool = False
    isa: str = "arm"
    year: float = 2024.0

    @property
    def vector(self) -> np.ndarray:
        """The facts as numbers of about 0 to 1, in the order of `COVARIATES`, [covariates]."""
        return np.array(
            [
                1.0,
                float(self.threads > 1),
                np.log2(max(1, self.threads)) / 2,
                float(self.half_precision),
                float(self.in_order),
                float(self.isa == "x86"),
                float(self.isa not in ("arm", "x86", "gpu")),
                (self.year - 2022) / 4,
            ]
        )


@dataclass(frozen=True, eq=False)
class Prior:
    """A family of runtimes: how prices in physical units are distributed over its devices.

    Attributes:
        effects: of the facts on the mean of log(price / unit), [covariates, 17].
        covariance: of log(price / unit) around its mean, [17, 17].
        sigma: relative error that rows are believed to have.
        overlap: p of `devices.latency.fitting`.
        step_calls: calls of the loss and the update, added to the others of a training step.
        errors: mean relative error on devices that are not in the prior, by number of measured networks.
        devices: how many it was learned from.
    """

    effects: np.ndarray
    covariance: np.ndarray
    sigma: float
    overlap: float = 1.0
    step_calls: float = 0.0
    errors: Mapping[int, float] | None = None
    devices: int = 0

    def mean(self, facts: Facts, units: np.ndarray) -> np.ndarray:
        """Returns the mean of the logarithms of a device's prices, [17]."""
        return np.asarray(np.log(units) + facts.vector @ self.effects)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain YAML types; `from_dict` is the inverse."""
        return {
            "effects": np.round(self.effects, 4).tolist(),
            "covariance": np.round(self.covariance, 5).tolist(),
            "sigma": self.sigma,
            "overlap": self.overlap,
            "step_calls": self.step_calls,
            "errors": {int(k): round(float(v), 3) for k, v in (self.errors or {}).items()},
            "devices": self.devices,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Prior:
        """Reads what `to_dict` wrote."""
        arrays = {key: np.array(tree[key], float) for key in ("effects", "covariance")}
        return cls(**{**tree, **arrays})


@dataclass(frozen=True, eq=False)
class Sample:
    """Networks measured on one device in one way.

    Attributes:
        device: its name; settings of one device share its weight.
        networks: name of each row's network, [rows].
        counts: of the cost columns, [rows, 17].
        milliseconds: of one pass, [rows].
        physics, facts, phase: known without measuring.
        groups: name of each row's group (a search space), which shares a factor, or "" for none, [rows].
        group_sigma: deviation of the logarithm of a group's factor.
    """

    device: str
    networks: tuple[str, ...]
    counts: np.ndarray
    milliseconds: np.ndarray
    physics: Physics
    facts: Facts
    phase: Phase = "forward"
    groups: tuple[str, ...] = ()
    group_sigma: float = 1.0

    def __len__(self) -> int:
        return len(self.milliseconds)


def step_counts(counts: np.ndarray, phase: Phase, prior: Prior) -> np.ndarray:
    """Counts [..., 17] with the calls that a training step has of its own."""
    if phase == "forward" or prior.step_calls == 0:
        return counts
    extra = np.zeros(NUM_COLUMNS)
    extra[np.flatnonzero(IS_CALL)[1]] = prior.step_calls  # calls of the rest
    return counts + extra


def problems_of(samples: Sequence[Sample], prior: Prior, masks: Sequence[np.ndarray] | None = None) -> Problems:
    """Gathers the fits of many samples as one batch; `masks` leaves rows out."""
    rows = max(len(s) for s in samples)
    size = len(samples)
    counts, log_ms, mask = np.zeros((size, rows, NUM_COLUMNS)), np.zeros((size, rows)), np.zeros((size, rows))
    names = sorted({name for s in samples for name in s.groups if name})
    marks = np.zeros((size, rows, len(names)))
    low, high, mean = (np.zeros((size, NUM_COLUMNS)) for _ in range(3))
    known: dict[int, tuple[np.ndarray, ...]] = {}
    for i, s in enumerate(samples):
        n = len(s)
        if id(s) not in known:
            own = step_counts(s.counts, s.phase, prior)
            known[id(s)] = (
                own,
                np.log(s.milliseconds),
                *s.physics.bounds(s.phase),
                prior.mean(s.facts, s.physics.units(s.phase)),
            )
        counts[i, :n], log_ms[i, :n], low[i], high[i], mean[i] = known[id(s)]
        mask[i, :n] = 1.0 if masks is None else masks[i]
        for g, name in enumerate(names):
            if s.groups:
                marks[i, :n, g] = [own == name for own in s.groups]
    sigma_of_groups = np.full(len(names), max((s.group_sigma for s in samples), default=1.0))
    return Problems(
        counts, log_ms, mask, low, high, mean, np.linalg.inv(prior.covariance), np.full(size, prior.sigma),
        np.full(size, prior.overlap), marks if names else None, sigma_of_groups if names else None,
    )  # fmt: skip


def learn(
    samples: Sequence[Sample],
    start: Prior,
    rounds: int = EM_ROUNDS,
    spread: np.ndarray | None = None,
    guess: np.ndarray | None = None,
) -> Prior:
    """Learns by empirical Bayes the prior that explains these devices, starting from another.

    A device counts with the square root of its number of settings. Effects are ridge regressions of the devices' log
    multipliers; the covariance is that of what is left plus the mean posterior covariance, with the starting spread
    counting as eight devices.

    Args:
        samples: of all settings.
        start: the prior to begin with.
        rounds: of the EM.
        spread: covariance that counts as eight devices; that of `START_SPREAD` when left out.
        guess: prices of the samples to start the fits from, [samples, 17].
    """
    facts = np.stack([s.facts.vector for s in samples])
    units = np.log(np.stack([s.physics.units(s.phase) for s in samples]))
    names = [s.device for s in samples]
    weight = np.array([names.count(name) ** -0.5 for name in names])
    ridge = np.diag([1e-3] + [RIDGE] * (facts.shape[1] - 1))
    varies = np.ptp(facts, axis=0) > 0
    varies[0] = True
    facts = facts * varies
    prior = start
    floor = (np.eye(NUM_COLUMNS) * START_SPREAD**2 if spread is None else spread) * DEVICES_OF_THE_START
    for _ in range(rounds):
        fitted = solve(problems_of(samples, prior), guess)
        guess = fitted.prices
        x = np.log(fitted.prices) - units
        off = x - facts @ prior.effects
        distance = np.einsum("bk,kl,bl->b", off, np.linalg.inv(prior.covariance), off)
        trust = (
            weight * (DEGREES_OF_FREEDOM + NUM_COLUMNS) / (DEGREES_OF_FREEDOM + distance)
        )  # of the EM for a multivariate t distribution
        trusted = facts * trust[:, None]
        effects = np.linalg.solve(trusted.T @ facts + ridge, trusted.T @ x)
        off = x - facts @ effects
        seen = np.einsum("b,bk,bl->kl", trust, off, off) + np.einsum("b,bkl->kl", weight, fitted.covariance) + floor
        prior = replace(prior, effects=effects, covariance=seen / (weight.sum() + DEVICES_OF_THE_START))
    return replace(prior, devices=len(set(names)))


def left_out(samples: Sequence[Sample], prior: Prior) -> list[np.ndarray]:
    """Returns the relative error of each row when its network is left out of the fit, for each sample."""
    predicted = left_out_ms(samples, prior)
    return [np.abs(ms / s.milliseconds - 1) for ms, s in zip(predicted, samples, strict=True)]


def left_out_ms(samples: Sequence[Sample], prior: Prior) -> list[np.ndarray]:
    """Predicts the milliseconds of each row with its network left out of the fit, for each sample."""
    tasks, masks, rows = [], [], []
    for number, s in enumerate(samples):
        names = np.array(s.networks)
        for name in dict.fromkeys(s.networks):
            out = names == name
            tasks.append(s)
            masks.append(np.where(out, 0.0, 1.0))
            rows.append((number, out))
    predicted = [np.zeros(len(s)) for s in samples]
    for start in range(0, len(tasks), MAX_PROBLEMS):
        part = slice(start, start + MAX_PROBLEMS)
        problems = problems_of(tasks[part], prior, masks[part])
        fitted = solve(problems)
        for i, (number, out) in enumerate(rows[part]):
            size = len(samples[number])
            ms = predict(problems.counts[i, :size][out], fitted.prices[i], prior.overlap)
            if problems.groups is not None:
                ms = ms * np.exp(problems.groups[i, :size][out] @ np.log(fitted.factors[i]))
            predicted[number][out] = ms
    return predicted


def choose_networks(sample: Sample, prior: Prior, count: int) -> list[int]:
    """Chooses networks to measure, from the prior alone: greedily those that leave the others least uncertain.

    The uncertainty is the mean standard deviation of the logarithms of all rows' predictions, linearised at the prior's
    mean; a measurement counts with twice the variance of a row.
    """
    problems = problems_of([sample], prior)
    slopes = problems.counts[0, : len(sample)] * np.exp(problems.usual[0])
    slopes = slopes / slopes.sum(axis=1, keepdims=True)
    covariance, picks = prior.covariance, []
    for _ in range(min(count, len(sample))):
        best: tuple[float, int, np.ndarray] | None = None
        for row in range(len(sample)):
            if row in picks:
                continue
            spread = covariance @ slopes[row]
            left = covariance - np.outer(spread, spread) / (2 * prior.sigma**2 + slopes[row] @ spread)
            score = float(np.sqrt(np.maximum(np.einsum("nk,kl,nl->n", slopes, left, slopes), 0)).mean())
            if best is None or score < best[0]:
                best = (score, row, left)
        assert best is not None
        picks.append(best[1])
        covariance = best[2]
    return picks


def error_with(sample: Sample, prior: Prior, picks: Sequence[int]) -> float:
    """Returns the mean relative error on a sample's networks outside `picks`, when only those are measured."""
    mask = np.zeros(len(sample))
    mask[list(picks)] = 1.0
    problems = problems_of([sample], prior, [mask])
    prices = solve(problems).prices[0] if len(picks) else np.exp(problems.usual[0])
    measured = {sample.networks[i] for i in picks}
    others = [i for i, name in enumerate(sample.networks) if name not in measured]
    ms = predict(problems.counts[0, : len(sample)][others], prices, prior.overlap)
    return float(np.mean(np.abs(ms / sample.milliseconds[others] - 1)))


@lru_cache(maxsize=1)
def recalled() -> Mapping[str, Any]:
    """Reads the facts of `devices/peaks.yaml` that were written from memory: cores, cards, bandwidths, boards."""
    facts: Mapping[str, Any] = read_yaml(Path(__file__).parent.parent / "peaks.yaml")
    return facts


@lru_cache(maxsize=1)
def shipped_priors() -> Mapping[str, Prior]:
    """Reads the priors by family, as `fedsim devices build` learned them."""
    tree = read_yaml(Path(__file__).parent.parent / "priors.yaml")
    return {name: Prior.from_dict(prior) for name, prior in tree.items()}


def shipped_prior(family: str) -> Prior:
    """Returns a family's prior: mobile, cpu_forward, cpu_train_step, gpu_forward, gpu_train_step or mcu.

    Raises:
        DeviceError: for an unknown family.
    """
    priors = shipped_priors()
    if family not in priors:
        raise DeviceError(unknown("family of runtimes", family, priors))
    return priors[family]
