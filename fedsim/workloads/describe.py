"""Describes a split of the data in rows and lines."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedsim.workloads.base import Workload
from fedsim.workloads.classification import ClassificationWorkload

MAX_INSPECTED = 2000  # clients that summaries and histograms look at; evenly spaced when there are more


class ClientRow(NamedTuple):
    """Counts of what one client owns.

    Attributes:
        client: its id.
        train: examples to train on.
        test: examples that its personal model is judged on.
        classes: how many classes its training part holds (sequences: distinct tokens to predict), if any.
        label_counts: training examples of each class, [num_classes]; empty for sequences and where there are none.
    """

    client: int
    train: int
    test: int
    classes: int
    label_counts: tuple[int, ...]


class Split(NamedTuple):
    """A split as a picture needs it; a run keeps it, so that its page can be made without its data.

    Attributes:
        name: of the workload.
        num_clients: in all.
        class_names: of every class; empty where there are none.
        rows: of the first clients.
        sizes: training examples of all clients, or of MAX_INSPECTED evenly spaced ones.
    """

    name: str
    num_clients: int
    class_names: tuple[str, ...]
    rows: tuple[ClientRow, ...]
    sizes: tuple[int, ...]


def split_table(workload: Workload, limit: int | None = None) -> list[ClientRow]:
    """Returns one row per client, the first `limit` of them (all when None)."""
    return _rows(workload, range(min(workload.num_clients, limit or workload.num_clients)))


def summary_lines(workload: Workload) -> list[str]:
    """Returns the split in a few lines of text, for the terminal."""
    rows = _rows(workload, _spread(workload))
    of = f" (of {len(rows)} clients looked at)" if len(rows) < workload.num_clients else ""
    lines = [
        f"workload          {workload.name}",
        f"input             {' x '.join(map(str, workload.input_shape))}{_classes(workload)}",
        f"clients           {workload.num_clients}",
        f"training examples {sum(row.train for row in rows)}{of}",
        f"  per client      {_spread_of([row.train for row in rows])}",
        f"  held out each   {_spread_of([row.test for row in rows])}",
        f"test examples     {len(workload.test)}",
    ]
    if rows[0].label_counts:
        lines.append(f"classes of each   {_spread_of([row.classes for row in rows])}")
    return lines


def split_of(workload: Workload, limit: int = 50) -> Split:
    """Returns the split of a workload, with rows of the first `limit` clients."""
    sizes = tuple(row.train for row in _rows(workload, _spread(workload)))
    rows = tuple(split_table(workload, limit))
    return Split(workload.name, workload.num_clients, tuple(_class_names(workload)), rows, sizes)


def _rows(workload: Workload, clients: range | list[int]) -> list[ClientRow]:
    rows = []
    for client in clients:
        data = workload.client_data(client)
        if not isinstance(workload, ClassificationWorkload):
            rows.append(ClientRow(client, len(data.train), len(data.test), 0, ()))
            continue
        labels = data.train.labels
        if labels.dim() > 1:
            rows.append(ClientRow(client, len(data.train), len(data.test), len(labels.unique()), ()))
            continue
        counts = np.bincount(labels.numpy(), minlength=workload.num_classes)
        rows.append(ClientRow(client, len(data.train), len(data.test), int((counts > 0).sum()), tuple(counts.tolist())))
    return rows


def _spread(workload: Workload) -> list[int]:
    """Returns all clients, or evenly spaced ones when there are too many to look at."""
    spaced = np.linspace(0, workload.num_clients - 1, min(workload.num_clients, MAX_INSPECTED))
    return [int(client) for client in spaced]


def _spread_of(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}, median {np.median(values):g}"


def _class_names(workload: Workload) -> list[str]:
    return workload.class_names() if isinstance(workload, ClassificationWorkload) else []


def _classes(workload: Workload) -> str:
    return f", {workload.num_classes} classes" if isinstance(workload, ClassificationWorkload) else ""
