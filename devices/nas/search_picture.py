"""Draws a search under a limit: score against latency, predicted and, where it is known, true."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from devices.figures import new_figure, save_figure

TALL = 0.98  # quantile of latencies that the axis ends at, or thrice the limit where that is further

MANY = 500  # candidates, whose dots are small


def search_picture(
    path: str | Path,
    title: str,
    score_label: str,
    scores: np.ndarray,
    predicted_ms: np.ndarray,
    true_ms: np.ndarray | None,
    limit: tuple[float, float],
    chosen: int,
) -> None:
    """Writes the picture.

    Args:
        path: file to write; its ending says the format.
        title: above it.
        score_label: at the upright axis.
        scores: of each candidate, [n].
        predicted_ms: of each candidate, [n].
        true_ms: of each candidate where a table has them, NaN for one that is not known, [n]; None where none is.
        limit: milliseconds, and the margin on predictions.
        chosen: index of the selected network.
    """
    limit_ms, margin = limit
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    size = 3 if len(scores) > MANY else 7
    if true_ms is not None:
        axes.plot(true_ms, scores, ".", color="C1", ms=size, alpha=0.3, label="true latency", rasterized=True)
    axes.plot(predicted_ms, scores, ".", color="C0", ms=size, alpha=0.4, label="predicted latency", rasterized=True)
    axes.axvline(limit_ms, color="black", lw=1.2, label=f"limit {limit_ms:g} ms")
    if margin:
        within = limit_ms / (1 + margin)
        axes.axvline(within, color="black", lw=1, ls=":", label=f"limit for predictions (margin {margin:.1%})")
    found = [(predicted_ms[chosen], "X", "selected, predicted")]
    if true_ms is not None and np.isfinite(true_ms[chosen]):
        found.append((true_ms[chosen], "o", "selected, measured"))
    axes.plot([ms for ms, *_ in found], [scores[chosen]] * len(found), color="C3", lw=1)
    for ms, marker, label in found:
        axes.plot(ms, scores[chosen], marker, color="C3", ms=10, mec="white", label=label)
    low, high = np.quantile(scores, 0.02), scores.max()
    room = 0.04 * (high - low) or 1.0
    axes.set(
        xlim=(0, max(3 * limit_ms, float(np.quantile(predicted_ms, TALL)))),
        ylim=(min(low, scores[chosen]) - room, high + room),
        xlabel="milliseconds of one forward pass",
        ylabel=score_label,
        title=title,
    )
    axes.legend(fontsize=8, loc="lower right", framealpha=1.0)
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)
