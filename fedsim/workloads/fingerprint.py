"""Fingerprints of a run's data, kept with the run and compared when it is taken up again.

A fingerprint is a flat map of texts: for arrays "train x" and the like, each with dtype, shape and a hash of the
content; for data that are drawn, what draws them, with the seed; for device files, traces and weights that the settings
name, a hash of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from devices.reading import read_yaml
from fedsim.errors import DataError
from fedsim.models.starting import weights_file

if TYPE_CHECKING:
    from fedsim.workloads.base import Workload

Fingerprint = Mapping[str, str]
DATA, SEED = "data", "seed"  # where it is kept, in a checkpoint's state and in summary.json; of data that are drawn
TEST = "test"  # in the names of entries on what models are judged by
MADE_BY = "made by"  # then: the class of the workload
HASHED_BYTES, ROW_BYTES = 2**24, 2**15  # of an array that is hashed as it is; of the rows that a larger one is cut into
HEX_DIGITS = 16
WITH_FILES = ("fleet", "latency")  # groups whose settings may name files


def content_of(array: np.ndarray) -> str:
    """Returns dtype, shape and a hash of an array's bytes.

    Of a large array, 64-bit sums along both axes of a table of its bytes are hashed: at the speed of the memory, so
    that gigabytes take less than a second, and no single number can change without them.
    """
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest = sha256()
    if len(data) > HASHED_BYTES:
        table = data[: len(data) // ROW_BYTES * ROW_BYTES].view(np.uint64).reshape(-1, ROW_BYTES // 8)
        for axis in (0, 1):
            digest.update(table.sum(axis, dtype=np.uint64).tobytes())
        data = data[table.nbytes :]
    digest.update(data.tobytes())
    return f"{array.dtype} {list(array.shape)} {digest.hexdigest()[:HEX_DIGITS]}"


def of_run(settings: Mapping[str, Any], workload: Workload) -> dict[str, str]:
    """Returns the fingerprint of all that a run reads: its data, and files that its fleet and latency model name."""
    return {**workload.fingerprint(), **files_of(settings)}


def files_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns a hash of each file that is named where a device, trace or weights may be, by its name there."""
    start = settings.get("start_from")
    found = {} if start is None else {"start_from": sha256(weights_file(start).read_bytes()).hexdigest()[:HEX_DIGITS]}
    for text in (text for group in WITH_FILES for text in _texts(settings[group])):
        try:
            if Path(text).suffix and Path(text).is_file():
                found[f"file {text}"] = sha256(_said_by(Path(text))).hexdigest()[:HEX_DIGITS]
        except (OSError, ValueError):  # no name of a file
            continue
    return found


def _said_by(path: Path) -> bytes:
    """Returns the content of a file; of YAML what it says, without comments."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return path.read_bytes()
    return yaml.safe_dump(read_yaml(path), sort_keys=True).encode()


def _texts(tree: Any) -> Iterator[str]:
    """Yields all texts of a tree, keys of maps too."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value)


def difference(before: Fingerprint, now: Fingerprint) -> str:
    """Returns the first entry in which two fingerprints differ, in words; empty if there is none.

    Entries that only one of them has do not count: one was made by a version that did not look at them.
    """
    for key, value in before.items():
        if key in now and not _is_same(key, value, now[key]):
            return f"{key} was {value} and is now {now[key]}"
    return ""


def _is_same(key: str, before: str, now: str) -> bool:
    """Returns whether two values agree; modules move between versions of fedsim, classes keep their names."""
    return before.rpartition(".")[2] == now.rpartition(".")[2] if key == MADE_BY else before == now


def check_same(before: Fingerprint | None, settings: Mapping[str, Any], workload: Workload, run: Path) -> None:
    """Refuses to take up a run with other data; a run of version 0.1 says nothing of its data, and is taken up.

    Raises:
        DataError: naming the run and what differs.
    """
    if changed := difference(before or {}, of_run(settings, workload)):
        raise DataError(
            f"{run} was begun with other data than those of workload {workload.name} here ({changed}); bring back the "
            "data that it was begun with, or start a new run"
        )
