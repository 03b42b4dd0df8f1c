"""Writes split and primary metric of a run's workload into its folder, so that reports need no data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from devices.errors import FileError, one_line
from devices.writing import write_atomic
from fedsim.report.checksums import check_inside, read_signed_json, signed_json
from fedsim.report.place import SPLIT
from fedsim.settings.forms import METRIC, check_tree
from fedsim.workloads.base import Workload
from fedsim.workloads.describe import ClientRow, Split, split_of
from fedsim.workloads.metrics import PRIMARY, Metric


def write_split(workload: Workload, folder: Path) -> None:
    """Writes the split and the primary metric into a run folder, for `read_split` and `primary_of`."""
    write_atomic(folder / SPLIT, signed_json(split_of(workload)._asdict() | workload.primary.as_entry()))


def primary_of(folder: Path) -> Metric:
    """Returns the metric that the models of a run are judged by.

    Raises:
        FileError: as `read_split`.
    """
    return Metric.named_in(_tree(folder) or {})


def read_split(folder: Path) -> Split | None:
    """Reads the split from a run folder; None where there is none.

    Raises:
        FileError: if it cannot be read, or is not what the run wrote.
    """
    if (tree := _tree(folder)) is None:
        return None
    try:
        rows = tuple(
            ClientRow(int(row[0]), int(row[1]), int(row[2]), int(row[3]), tuple(map(int, row[4])))
            for row in tree["rows"]
        )
        names, sizes = tuple(map(str, tree["class_names"])), tuple(map(int, tree["sizes"]))
        split = Split(str(tree["name"]), int(tree["num_clients"]), names, rows, sizes)
        if not rows or not sizes or not all(len(row.label_counts) in (0, len(names)) for row in rows):
            raise ValueError("its rows do not fit its classes")
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise FileError(f"{folder / SPLIT} is no split of data: {one_line(error)}") from error
    return split


def _tree(folder: Path) -> dict[str, Any] | None:
    path = folder / SPLIT
    if not path.exists() and not path.is_symlink():
        return None
    tree = read_signed_json(check_inside(folder, path))
    check_tree(tree, METRIC if PRIMARY in tree else {}, str(path))
    return dict(tree)
