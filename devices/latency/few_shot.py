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
from devices.latency.models import device_prices
from devices.latency.spaces import Space
from devices.latency.structured import StructuredPredictor, choose_references, predict_ms, prior_of
from devices.nas.tables import connected, network_features, network_macs
from devices.profile import DeviceProfile, load_profile
from devices.trace import COLUMNS, KINDS

if TYPE_CHECKING:
    from devices.latency.help.weights import HelpWeights

PREDICTORS = ("structured", "macs", "flops", "help", "layerwise", "profile")
REFERENCES = ("chosen", "random")
CANDIDATES = 200  # networks of the pool, drawn anew for each seed, that references are chosen from
HELP_REFERENCES = 10  # measurements that HELP spends on describing the device
# Networks of NAS-Bench-201 whose cells hold one operation each, beside the input: skip, 1x1, 3x3, pool.
SINGLE_OPERATIONS = np.array([[0, 0, 0, operation, 0, 0] for operation in (1, 2, 3, 4)])
LEAST = {"help": HELP_REFERENCES, "layerwise": len(SINGLE_OPERATIONS) + 1}  # measurements; 1 for the others
MOST_ERROR = 1.0  # of a network that was left out, so that one gross outlier does not decide
AT_ONCE = 1000  # networks in HELP's memory

# Decided by the networks alone. The cells of NAS-Bench-201 repeat in every stage, so that any sum over layers is linear
# in the counts of four operations; in FBNet the same operation costs something else at every position.
FEATURES = {"nb201": "counts", "fbnet": "layers", "ofa": "layers"}


@dataclass(frozen=True)
class Trial:
    """A predictor, what it may measure on each device, and what it knows beforehand.

    Attributes:
        predictor: "structured"; "macs" or "flops" (the same thing: multiply-adds times a fitted scale); "help";
            "layerwise" (NAS-Bench-201 only: each operation measured in a network of its own, summed, times a scale);
            "profile" (the prices of the device's shipped profile, times a scale; some were fitted to networks of these
            very tables).
        measurements: networks measured on each device. HELP's fixed references are ten of them; as they are measured,
            it adapts to them as well as to the rest. The authors adapt to the rest only. Of "layerwise" four are the
            networks of single operations, and the scale is that of the others.
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
        least = LEAST.get(self.predictor, 1)
        if self.measurements < least or self.seeds < 1:
            needs = f"{self.predictor} needs {least} measurements and 1 seed or more"
            raise DeviceError(f"{needs}, got {self.measurements} and {self.seeds}")


def trials_of(
    predictors: Iterable[str], measurements: Iterable[int], references: Iterable[str], **same: Any
) -> list[Trial]:
    """Returns a trial for every combination; HELP and layerwise are left out below their least measurements.

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
        if count >= LEAST.get(predictor, 1)
    ]


@dataclass(frozen=True)
class Estimate:
    """Predicted latencies of some networks on a device, and how far they are off.

    Attributes:
        ms: of each network, [n].
        error: relative error to expect: root mean square of |log(predicted / measured)| over the measured networks,
            each left out of the fit in turn, none above 1.
    """

    ms: np.ndarray
    error: float


# The shipped profile of each device of HELP's tables; a card's name there ends with the batch.
PROFILES = {
    "pixel2": "pixel2",
    "pixel3": "pixel3",
    "samsung_s7": "galaxy_s7",
    "samsung_a50": "galaxy_a50",
    "essential_ph_1": "essential_ph1",
    "raspi4": "raspberry_pi_4",
    "gold_6226": "xeon_gold_6226",
    "gold_6240": "xeon_gold_6240",
    "silver_4114": "xeon_silver_4114",
    "silver_4210r": "xeon_silver_4210r",
    "eyeriss": "eyeriss",
    "fpga": "fpga_zc706",
}
CARDS = {
    "1080ti": "gtx_1080ti",
    "2080ti": "rtx_2080ti",
    "titan_rtx": "titan_rtx",
    "titanxp": "titan_xp",
    "titan_xp": "titan_xp",
    "v100": "tesla_v100",
}


def shipped_profile(device: str) -> tuple[DeviceProfile, int]:
    """Returns the shipped profile of a device of HELP's tables, and the batch that was measured.

    Raises:
        DeviceError: for a device without one.
    """
    card, _, batch = device.rpartition("_")
    if device in PROFILES:
        return load_profile(PROFILES[device]), 1
    if card in CARDS and batch.isdecimal():
        return load_profile(CARDS[card]), int(batch)
    raise DeviceError(f"there is no shipped profile of {device!r}; take another predictor")


class FewShot:
    """What a trial measures on each device, and what it predicts from that: the networks of a space as features."""

    def __init__(self, space: Space, trial: Trial):
        self.space, self.trial = space, trial
        features = trial.features or FEATURES[space.name]
        self.features = _as_published(network_features(space.name, space.ops, features), features)
        self.macs = network_macs(space.name, space.ops)
        self.zoo = self.features[: space.split.pool]
        self.connected = connected(space.name, space.ops)
        self.weights: HelpWeights | None = None
        self.known: np.ndarray | None = None  # labels of HELP on the source devices
        self.sums: dict[str, np.ndarray] = {}  # of `_scaled`, by device
        self.source: np.ndarray | None = None  # coefficients of the source devices per mean latency, [devices, f]
        if trial.source and trial.predictor == "structured":
            self.source = np.stack([self._typical(device) for device in trial.source])

    def references_of(self, device: str, seed: int) -> np.ndarray:
        """Returns the networks to measure, [measurements]: HELP's ten or single operations first, then the others."""
        space, rng = self.space, np.random.default_rng(seed)
        taken = np.array([], dtype=int)
        if self.trial.predictor == "help":
            taken = space.references
        elif self.trial.predictor == "layerwise":
            taken = self._singles()
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

    def estimate(self, device: str, measured: np.ndarray, networks: np.ndarray, seed: int = 0) -> Estimate:
        """Predicts networks from measured ones, with the error of leaving each measured one out.

        Args:
            device: whose latencies of `measured` are looked at, and no others.
            measured: of `references_of`.
            networks: to predict, indices.
            seed: of HELP's draws.
        """
        if self.trial.predictor == "structured":
            fitted = self._fit(device, measured, self._prior(device, measured))
            return Estimate(fitted.predict(self.features[networks]), fitted.sigma)
        ms = self.space.latency(device)
        # What the sum over layers is made of cannot be left out.
        begin = len(SINGLE_OPERATIONS) if self.trial.predictor == "layerwise" else 0
        errors = []
        for number in range(begin, len(measured) if len(measured) > begin + 1 else 0):
            kept, out = np.delete(measured, number), measured[number : number + 1]
            predicted = self.predict(device, kept, out, seed)[0]
            errors.append(abs(np.log(max(predicted, 1e-300) / ms[out[0]])))
        error = np.sqrt(np.mean(np.minimum(errors, MOST_ERROR) ** 2)) if errors else MOST_ERROR
        return Estimate(self.predict(device, measured, networks, seed), float(error))

    def predict(self, device: str, measured: np.ndarray, networks: np.ndarray, seed: int = 0) -> np.ndarray:
        """Predicts milliseconds of networks from those of the measured ones; arguments as of `estimate`."""
        if self.trial.predictor == "structured":
            return self._fit(device, measured, self._prior(device, measured)).predict(self.features[networks])
        if self.trial.predictor == "help":
            return self._help(device, measured, networks, seed)
        layerwise = self.trial.predictor == "layerwise"
        scaled, calibrating = self._scaled(device), measured[len(SINGLE_OPERATIONS) :] if layerwise else measured
        scale = np.median(self.space.latency(device)[calibrating] / scaled[calibrating])
        return np.asarray(scaled[networks] * scale)

    def _scaled(self, device: str) -> np.ndarray:
        """Returns what latencies are a multiple of, by the predictors that fit a scale, [networks]."""
        sums = {"layerwise": self._sums, "profile": self._priced}.get(self.trial.predictor)
        if sums is None:
            return self.macs
        if device not in self.sums:
            self.sums[device] = sums(device)
        return self.sums[device]

    def _help(self, device: str, measured: np.ndarray, networks: np.ndarray, seed: int) -> np.ndarray:
        """Adapts HELP; the latency of a reference that is not among the measured is guessed by its multiply-adds."""
        from devices.latency.help.predictor import HelpPredictor, source_labels

        if self.known is None:
            self.known = source_labels(self.space)
        space, ms = self.space, self.space.latency(device)
        guessed = self.macs[space.references] * np.median(ms[measured] / self.macs[measured])
        known = np.isin(space.references, measured)
        fitted = HelpPredictor.fit(
            self._loaded(),
            np.where(known, ms[space.references], guessed),
            space.ops[measured],
            ms[measured],
            seed,
            known_labels=self.known[measured],
            typical=~np.isin(measured, space.references),
        )
        parts = [networks[start : start + AT_ONCE] for start in range(0, len(networks), AT_ONCE)]
        return np.concatenate([fitted.predict(space.ops[part]) for part in parts])

    def _loaded(self) -> HelpWeights:
        from devices.latency.help.weights import HelpWeights, load_weights

        if self.trial.weights is None:
            raise DeviceError("help predicts with meta-trained weights only; name their file (weights)")
        if self.weights is None:
            given = self.trial.weights
            self.weights = given if isinstance(given, HelpWeights) else load_weights(given, self.space.name)
        return self.weights

    def _singles(self) -> np.ndarray:
        """Returns the networks of single operations, [4] int.

        Raises:
            DeviceError: in another space, or a table without them.
        """
        if self.space.name != "nb201":
            raise DeviceError(f"layerwise sums operations of space nb201 only, got space {self.space.name}")
        found = [np.flatnonzero((self.space.ops == ops).all(axis=1)) for ops in SINGLE_OPERATIONS]
        if not all(map(len, found)):
            raise DeviceError("layerwise measures a network with each operation alone, and the table lacks one of them")
        return np.array([index[0] for index in found])

    def _sums(self, device: str) -> np.ndarray:
        """Sums the operations of every network, as the networks of single operations tell their times, [networks]."""
        empty_ms, *with_one_ms = self.space.latency(device)[self._singles()]
        extra_ms = np.maximum(np.array(with_one_ms) - empty_ms, 0)
        return np.asarray(empty_ms + network_features("nb201", self.space.ops, "counts")[:, 1:4] @ extra_ms)

    def _priced(self, device: str) -> np.ndarray:
        """Prices every network by the shipped profile of a device of the table, [networks]."""
        profile, batch = shipped_profile(device)
        prices = device_prices(profile).inference
        tables, kind = np.unique(network_features(self.space.name, self.space.ops)[:, :-1], axis=0, return_inverse=True)
        layers = tables.reshape(-1, len(KINDS), len(COLUMNS)).tolist()
        return np.array([prices.ms(tuple(map(tuple, table)), batch) for table in layers])[kind.ravel()]

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
