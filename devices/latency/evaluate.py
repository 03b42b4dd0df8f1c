"""Judges latency predictors on devices that they have not seen, under HELP's protocol, on a table of latencies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

from devices.errors import DeviceError
from devices.figures import new_figure, save_figure
from devices.latency.few_shot import FewShot, Trial
from devices.latency.spaces import SPLITS, Space
from devices.texts import NAME_LETTERS, visible

if TYPE_CHECKING:
    from devices.latency.help.weights import HelpWeights

METRICS = ("spearman", "kendall", "mape")

Predictions = Callable[[Space, str, np.ndarray, int, Any], np.ndarray]
Progress = Callable[[str], None]


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
    judge = FewShot(space, trial)
    results = {}
    for device in devices:
        rows = []
        for seed in range(trial.seeds):
            measured = judge.references_of(device, seed)
            if trial.predictor == "help":
                assert help_predictions is not None
                predicted = help_predictions(space, device, measured, seed, trial.weights)
            else:
                predicted = judge.predict(device, measured, space.judged(device))
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
