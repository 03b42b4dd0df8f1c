"""Predicts latencies of a search space's networks on a device of its table from a few networks measured there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import nnls

from devices.errors import DeviceError, unknown
from devices.latency.columns import TABLE_KINDS, TABLE_KINDS_0_1
from devices.latency.spaces import Space
from devices.latency.structured import StructuredPredictor, choose_references, predict_ms, prior_of
from devices.nas.tables import connected, network_features, network_macs

if TYPE_CHECKING:
    from devices.latency.help.weights import HelpWeights

PREDICTORS = ("structured", "macs", "flops", "help")
REFERENCES = ("chosen", "random")
CANDIDATES = 200  # networks of the pool, drawn anew for each seed, that references are chosen from
HELP_REFERENCES = 10  # measurements that HELP spends on describing the device

# Decided by the networks alone. The cells of NAS-Bench-201 repeat in every stage, so that any sum over layers is linear
# in the counts of four operations; in FBNet the same operation costs something else at every position.
FEATURES = {"nb201": "counts", "fbnet": "layers"}


@dataclass(frozen=True)
class Trial:
    """A predictor, what it may measure on each device, and what it knows beforehand.

    Attributes:
        predictor: "structured"; "macs" or "flops" (the same thing: multiply-adds times a fitted scale); "help".
        measurements: networks measured on each device. HELP's fixed references are ten of them; as they are measured,
            it adapts to them as well as to the rest. The authors adapt to the rest only.
        references: "chosen" or "random".
        seeds: how many, from 0; results are means over them.
        source: devices that the structured predictor takes a prior from: the mixture of them that explains the measured
            latencies best; none for no prior.
        weights: of HELP, or their file.
        features: "counts" or "layers"; None for that of `FEATURES`.
        robust: whether the structured fit reweights outliers.

    Raises:
        DeviceError: for unknown names, or too few measurements or seeds.
    """

    predictor: str
    measurements: int
    references: str = "chosen"
    seeds: int = 1
    source: Sequence[str] = ()
    weights: HelpWeights | str | Path | None = None
    features: str | None = None
    robust: bool = True

    def __post_init__(self) -> None:
        for what, options in (("predictor", PREDICTORS), ("references", REFERENCES)):
            name = vars(self)[what]
            if name not in options:
                raise DeviceError(unknown(what, name, options))
        least = HELP_REFERENCES if self.predictor == "help" else 1
        if self.measurements < least or self.seeds < 1:
            needs = f"{self.predictor} needs {least} measurements and 1 seed or more"
            raise DeviceError(f"{needs}, got {self.measurements} and {self.seeds}")


def trials_of(
    predictors: Iterable[str], measurements: Iterable[int], references: Iterable[str], **same: Any
) -> list[Trial]:
    """Returns a trial for every combination; HELP is left out below its ten measurements.

    Args:
        predictors: each is tried with each of the following.
        measurements: numbers of networks measured on each device.
        references: "chosen", "random", or both.
        same: further fields of every `Trial`.
    """
    combinations = itertools.product(predictors, measurements, references)
    return [
        Trial(predictor, count, way, **same)
        for predictor, count, way in combinations
        if predictor != "help" or count >= HELP_REFERENCES
    ]


class FewShot:
    """What a trial measures on each device, and what it predicts from that: the networks of a space as features."""

    def __init__(self, space: Space, trial: Trial):
        self.space, self.trial = space, trial
        features = trial.features or FEATURES[space.name]
        self.features = _as_published(network_features(space.name, space.ops, features), features)
        self.macs = network_macs(space.name, space.ops)
        self.zoo = self.features[: space.split.pool]
        self.connected = connected(space.name, space.ops)
        self.source: np.ndarray | None = None  # coefficients of the source devices per mean latency, [devices, f]
        if trial.source and trial.predictor == "structured":
            self.source = np.stack([self._typical(device) for device in trial.source])

    def references_of(self, device: str, seed: int) -> np.ndarray:
        """Returns the networks to measure, [measurements]; for HELP its own ten and then the others."""
        space, rng = self.space, np.random.default_rng(seed)
        taken = space.references if self.trial.predictor == "help" else np.array([], dtype=int)
        count = self.trial.measurements - len(taken)
        return np.concatenate([taken, self._drawn(device, rng, count, taken)]) if count else taken

    def _drawn(self, device: str, rng: np.random.Generator, count: int, taken: np.ndarray) -> np.ndarray:
        space = self.space
        if self.trial.references == "random":
            pool = np.setdiff1d(space.pool(device), taken)
            if count > len(pool):
                raise DeviceError(f"{count} networks cannot be measured, the pool of {device} has {len(pool)}")
            # In the order of latency, as HELP's own trim leaves them: the draws of the published figures.
            return rng.choice(pool[np.argsort(space.latency(device)[pool])], count, replace=False)
        candidates = rng.choice(space.split.pool, min(CANDIDATES, space.split.pool), replace=False)
        candidates = candidates[self.connected[candidates] & ~np.isin(candidates, taken)]
        return choose_references(self.features, candidates, count)

    def predictions(self, device: str, measured: np.ndarray) -> np.ndarray:
        """Returns milliseconds of the judged networks from those of the measured ones."""
        judged = self.space.judged(device)
        if self.trial.predictor == "structured":
            return self._fit(device, measured, self._prior(device, measured)).predict(self.features[judged])
        scale = np.median(self.space.latency(device)[measured] / self.macs[measured])
        return np.asarray(self.macs[judged] * scale)

    def _typical(self, device: str) -> np.ndarray:
        pool = self.space.pool(device)
        return prior_of([self._fit(device, pool)], [self.space.latency(device)[pool].mean()])

    def _prior(self, device: str, measured: np.ndarray) -> np.ndarray | None:
        """Mixes source devices, non-negatively, by least relative errors on the measured networks, [f]."""
        if self.source is None:
            return None
        relative = predict_ms(self.source, self.features[measured]) / self.space.latency(device)[measured]
        return np.asarray(nnls(relative.T, np.ones(len(measured)))[0] @ self.source)

    def _fit(self, device: str, measured: np.ndarray, prior: np.ndarray | None = None) -> StructuredPredictor:
        latency = self.space.latency(device)[measured]
        return StructuredPredictor.fit(self.features[measured], latency, prior, self.zoo, self.trial.robust)


def _as_published(found: np.ndarray, features: str) -> np.ndarray:
    """Sums layers by the seven kinds of the published figures: few measurements tell no more apart."""
    if features != "layers":
        return found
    tables = found[:, :-1].reshape(len(found), len(TABLE_KINDS), -1)
    merged = {"conv3x3": "conv", "grouped": "depthwise", "foldable": "elementwise"}
    sums = np.zeros((len(found), len(TABLE_KINDS_0_1), tables.shape[2]))
    for number, kind in enumerate(TABLE_KINDS):
        sums[:, TABLE_KINDS_0_1.index(merged.get(kind, kind))] += tables[:, number]
    return np.column_stack([sums.reshape(len(found), -1), found[:, -1]])
