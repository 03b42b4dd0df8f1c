"""The split of a run's data, kept in its folder so that its page needs no data."""

from __future__ import annotations

from pathlib import Path

from devices.errors import FileError, one_line
from devices.writing import write_atomic
from fedsim.report.checksums import inside, read_signed_json, signed_json
from fedsim.report.place import SPLIT
from fedsim.workloads.base import Workload
from fedsim.workloads.describe import ClientRow, Split, split_of


def keep_split(workload: Workload, folder: Path) -> None:
    """Writes the split into a run folder, for `kept_split`."""
    write_atomic(folder / SPLIT, signed_json(split_of(workload)._asdict()))


def kept_split(folder: Path) -> Split | None:
    """The split that a run has kept; None where it has not.

    Raises:
        FileError: if it cannot be read, or is not what the run wrote.
    """
    path = folder / SPLIT
    if not path.exists() and not path.is_symlink():
        return None
    tree = read_signed_json(inside(folder, path))
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
        raise FileError(f"{path} is no split of data: {one_line(error)}") from error
    return split
