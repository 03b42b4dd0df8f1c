"""Figures of continual learning, from the accuracy on every task after every task.

a[t, s] is the test accuracy on task s after task t, a0[s] that of the untrained model. Source: Lopez-Paz and Ranzato,
"Gradient Episodic Memory for Continual Learning", NeurIPS 2017 (backward and forward transfer); Chaudhry et al.,
"Riemannian Walk for Incremental Learning", ECCV 2018 (forgetting).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.workloads.by_class import or_none

if TYPE_CHECKING:
    from fedsim.report.rounds import RoundReport

Matrix = np.ndarray  # [tasks, tasks] float64, rows: after which task; NaN where it was not measured


def key_of(task: int) -> str:
    """Names the metric of a task in a round's report."""
    return f"task_{task}_accuracy"


def average_accuracy(a: Matrix) -> float:
    """Returns A: mean accuracy over all tasks after the last one."""
    return float(a[-1].mean())


def forgetting(a: Matrix, diagonal: bool = True) -> float | None:
    """Returns F: mean over all tasks but the last of the best earlier accuracy minus the final one; None for one task.

    Args:
        a: the matrix.
        diagonal: task s was first seen in row s; otherwise every earlier row counts.
    """
    last = len(a) - 1
    if not last:
        return None
    best = [np.nanmax(a[s if diagonal else 0 : last, s]) for s in range(last)]
    return float(np.mean(best - a[last, :last]))


def backward_transfer(a: Matrix) -> float | None:
    """Returns BWT: mean over all tasks but the last of the final accuracy minus that just after learning it."""
    last = len(a) - 1
    return float(np.mean([a[last, s] - a[s, s] for s in range(last)])) if last else None


def forward_transfer(first: np.ndarray, a: Matrix) -> float | None:
    """Returns FWT: mean over all tasks but the first of the accuracy just before learning it minus the untrained one's.

    Args:
        first: a0, [tasks].
        a: the matrix.

    Returns:
        None for one task, or where the tasks that come next were not judged.
    """
    gains = [a[s - 1, s] - first[s] for s in range(1, len(a))]
    return float(np.mean(gains)) if gains and np.isfinite(gains).all() else None


def learning_accuracy(a: Matrix) -> float:
    """Returns LA: mean accuracy on each task just after learning it."""
    return float(np.diagonal(a).mean())


def summary(first: np.ndarray, a: Matrix) -> dict[str, Any]:
    """Returns all figures of a run in which task t was learned in phase t; of its finished phases."""
    if not len(a):
        return {"finished_tasks": 0}
    own = a[:, : len(a)]
    return {
        "finished_tasks": len(a),
        "average_accuracy": average_accuracy(own),
        "forgetting": forgetting(own),
        "backward_transfer": backward_transfer(own),
        "forward_transfer": forward_transfer(first[: len(a)], own),
        "learning_accuracy": learning_accuracy(own),
        "accuracy_matrix": [[or_none(v) for v in row] for row in a],
        "untrained_accuracy": [or_none(v) for v in first],
    }


def mean_over_orders(first: np.ndarray, a: Matrix, orders: Sequence[Sequence[int]]) -> dict[str, float | None]:
    """Returns the figures as clients see them who met the tasks in their own orders: the mean over clients.

    Args:
        first: a0 by task, [tasks].
        a: rows by phase, columns by task.
        orders: of each client, its tasks by phase.
    """
    seen = [summary(first[list(order)], a[:, list(order)]) for order in orders] if len(a) else []
    means: dict[str, float | None] = {}
    for key in ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer", "learning_accuracy"):
        values = [s[key] for s in seen if s[key] is not None]
        means[key] = float(np.mean(values)) if values else None
    return means


def accuracy_matrix(reports: Sequence[RoundReport], tasks: int, rounds_per_task: int) -> tuple[np.ndarray, Matrix]:
    """Returns a0 [tasks] and the rows of all finished and judged phases, [finished, tasks]; NaN: not judged."""
    ends: dict[int, np.ndarray] = {}
    for report in reports:
        if report.round % rounds_per_task == 0 and key_of(0) in report.metrics:
            row = np.array([report.metrics.get(key_of(s), np.nan) for s in range(tasks)])
            ends[report.round // rounds_per_task] = row
    first = ends.pop(0, np.full(tasks, np.nan))
    finished = next((t for t in range(tasks) if t + 1 not in ends), tasks)
    return first, np.array([ends[t + 1] for t in range(finished)]).reshape(finished, tasks)
