"""Judges latency predictors on devices that they have not seen, under HELP's protocol, on a table of latencies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import nnls
from scipy.stats import kendalltau, spearmanr

from devices.errors import DeviceError, unknown
from devices.figures import new_figure, save_figure
from devices.latency.columns import TABLE_KINDS, TABLE_KINDS_0_1
from devices.latency.spaces import SPLITS, Space
from devices.latency.structured import StructuredPredictor, choose_references, predict_ms, prior_of
from devices.nas.tables import connected, network_features, network_macs
from devices.texts import NAME_LETTERS, visible

if TYPE_CHECKING:
    from devices.latency.help.weights import HelpWeights

PREDICTORS = ("structured", "macs", "flops", "help")
REFERENCES = ("chosen", "random")
METRICS = ("spearman", "kendall", "mape")
CANDIDATES = 200  # networks of the pool, drawn anew for each seed, that references are chosen from
HELP_REFERENCES = 10  # measurements that HELP spends on describing the device

# Decided by the networks alone. The cells of NAS-Bench-201 repeat in every stage, so that any sum over layers is linear
# in the counts of four operations; in FBNet the same operation costs something else at every position.
FEATURES = {"nb201": "counts", "fbnet": "layers"}

Predictions = Callable[[Space, str, np.ndarray, int, Any], np.ndarray]
Progress = Callable[[str], None]


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


def evaluate(
    space: Space,
    trial: Trial,
    devices: Sequence[str] | None = None,
    help_predictions: Predictions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a few networks of each device, predicts the networks it is judged on, and compares.

    Judged are 800 networks per device, which no predictor sees. Random references come from the device's trimmed pool,
    as in HELP; chosen ones from `CANDIDATES` random connected networks of the whole pool, so that no latency is looked
    at. Both are drawn with `numpy.random.default_rng(seed)`.

    Args:
        space: table of measured latencies.
        trial: the predictor and what it may measure.
        devices: to judge; None for the unseen devices of the space's split.
        help_predictions: (space, device, measured, seed, weights) to milliseconds of the judged networks; None for that
            of `devices.latency.help.predictor`.
        progress: called with a line of text after each device.

    Returns:
        {"devices": {name: {"spearman", "kendall", "mape"}}, "mean": {the same over devices}}; mape is a ratio.

    Raises:
        DeviceError: for an unknown device, a device that is both learned from and judged, too many measurements, or
            HELP without weights.
    """
    devices = space.split.unseen if devices is None else devices
    if leaked := sorted(set(devices) & set(trial.source)):
        raise DeviceError(f"device {leaked[0]!r} cannot be both source and judged")
    if trial.predictor == "help" and help_predictions is None:
        from devices.latency.help.predictor import help_predictions

        trial = replace(trial, weights=_weights(trial.weights, space, devices))
    judge = _Judge(space, trial)
    results = {}
    for device in devices:
        rows = []
        for seed in range(trial.seeds):
            measured = judge.references_of(device, seed)
            if trial.predictor == "help":
                assert help_predictions is not None
                predicted = help_predictions(space, device, measured, seed, trial.weights)
            else:
                predicted = judge.predictions(device, measured)
            rows.append(_scores(predicted, space.latency(device)[space.judged(device)]))
        results[device] = dict(zip(METRICS, np.mean(rows, axis=0).tolist(), strict=True))
        if progress:
            tried = f"{trial.predictor} {trial.measurements} {trial.references}"
            progress(f"{space.name} {tried} {device}: {_text(results[device])}")
    mean = {metric: float(np.mean([result[metric] for result in results.values()])) for metric in METRICS}
    return {"devices": results, "mean": mean}


def _weights(weights: HelpWeights | str | Path | None, space: Space, devices: Sequence[str]) -> HelpWeights:
    """Reads the weights once, and refuses those that know a device that they would be judged on."""
    from devices.latency.help.weights import HelpWeights, load_weights

    if weights is None:
        raise DeviceError("help predicts with meta-trained weights only; name their file (weights)")
    if not isinstance(weights, HelpWeights):
        weights = load_weights(weights, space.name)
    usual = SPLITS[space.name]
    if leaked := sorted(set(devices) & set(weights.devices or (*usual.source, *usual.valid))):
        how = "train others on the source devices of this set"
        raise DeviceError(f"these weights of HELP were trained with device {leaked[0]!r}, which is to be judged; {how}")
    return weights


class _Judge:
    """The networks of a space as features, for all devices and seeds of one trial."""

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


def _scores(predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float, float]:
    if predicted.shape != measured.shape or not np.all(np.isfinite(predicted)):
        raise DeviceError(f"a predictor must give {len(measured)} finite latencies, got {list(predicted.shape)}")
    error = float(np.mean(np.abs(predicted / measured - 1)))
    if np.ptp(predicted) == 0:
        return 0.0, 0.0, error  # says nothing about order
    return float(spearmanr(predicted, measured).statistic), float(kendalltau(predicted, measured).statistic), error


def _text(scores: dict[str, float]) -> str:
    return f"Spearman {scores['spearman']:.3f}, Kendall {scores['kendall']:.3f}, error {100 * scores['mape']:.1f} %"


def compare(
    space: Space, trials: Iterable[Trial], devices: Sequence[str] | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Evaluates some trials and returns their scores as rows for a table.

    Args:
        space: table of measured latencies.
        trials: to evaluate, e.g. from `trials_of`.
        devices: as for `evaluate`.
        progress: as for `evaluate`.

    Returns:
        Rows {"space", "predictor", "measurements", "references", "device", "spearman", "kendall", "mape", "published"}
        per device, then one for the device "mean"; published is HELP's Spearman, or None.
    """
    rows = []
    for trial in trials:
        result = evaluate(space, trial, devices, progress=progress)
        published = {device: space.split.published.get(device) for device in result["devices"]}
        known = [value for value in published.values() if value is not None]
        whole = float(np.mean(known)) if len(known) == len(published) else None
        facts = {"space": space.name, **{key: vars(trial)[key] for key in ("predictor", "measurements", "references")}}
        for device, scores in {**result["devices"], "mean": result["mean"]}.items():
            rows.append({**facts, "device": device, **scores, "published": published.get(device, whole)})
    return rows


def comparison_picture(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draws Spearman over measurements, a panel per device and a line per predictor, with HELP's published figure.

    Args:
        rows: of `compare`, of one space.
        path: file to write; its ending says the format.

    Raises:
        DeviceError: if there are no rows.
    """
    if not rows:
        raise DeviceError("there is nothing to draw: no rows")
    devices = list(dict.fromkeys(row["device"] for row in rows))
    lines = list(dict.fromkeys((row["predictor"], row["references"]) for row in rows))
    columns = min(4, len(devices))
    figure = new_figure(3.2 * columns, 2.7 * -(-len(devices) // columns))
    panels = figure.subplots(-(-len(devices) // columns), columns, squeeze=False, sharex=True).ravel()
    for panel, device in zip(panels, devices, strict=False):
        own = [row for row in rows if row["device"] == device]
        for predictor, way in lines:
            points = sorted(
                (r["measurements"], r["spearman"]) for r in own if (r["predictor"], r["references"]) == (predictor, way)
            )
            panel.plot(*zip(*points, strict=True), marker="o", label=f"{predictor}, {way}")
        if own[0]["published"] is not None:
            panel.axhline(own[0]["published"], color="0.5", linestyle="--", label="HELP, published (20)")
        panel.set(
            title=f"{rows[0]['space']}: {visible(device, NAME_LETTERS)}", xlabel="networks measured", ylabel="Spearman"
        )
    for panel in panels[len(devices) :]:
        panel.remove()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lines) + 1)
    save_figure(figure, path)
