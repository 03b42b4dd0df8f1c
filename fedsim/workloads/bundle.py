"""Data from a folder: train.npz and test.npz with arrays x, y and optionally client, and a meta.json beside them.

meta.json holds `classes` (their names; for next-token prediction, the vocabulary), `kind` (image, text, audio or
tabular) and optionally the bundle's `name`. Nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from devices.errors import FileError
from devices.reading import read_json, read_npz
from fedsim.errors import DataError
from fedsim.workloads.arrays import LAYOUT, Arrays, ArrayWorkload, DataSet, Features, Kind

FILES = ("train.npz", "test.npz", "meta.json")


class Bundle(ArrayWorkload):
    """A bundle of arrays.

    Args:
        path: the folder, or the bare name of one in $FEDSIM_DATA or ./data.
        name: of the workload.
        arrays: arguments of ArrayWorkload.

    Raises:
        DataError: if the bundle is not there or cannot be used.
    """

    def __init__(self, path: str, name: str = "bundle", **arrays: Any):
        self.path = path
        super().__init__(name=name, **arrays)

    def read(self) -> DataSet:
        folder = find_bundle(self.path)
        data = read_bundle(folder)
        if self.features is not None:
            _check_rate(folder, self.features)
        return data

    @staticmethod
    def locate(settings: Mapping[str, Any]) -> tuple[str, bool, str]:
        """Returns the kind, whether the data are here, and where or how to get them."""
        path = str(settings.get("path", "???"))
        if path == "???":
            here = bundle_names()
            found = f" (here: {', '.join(here)})" if here else ""
            return "any", bool(here), f"any folder or name of a bundle: workload.path=...{found}"
        try:
            folder = find_bundle(path)
            return _read_meta(folder)[1], True, str(folder)
        except DataError as error:
            return "?", False, str(error)


def data_roots() -> list[Path]:
    """Returns where bare names and official files are looked up: $FEDSIM_DATA, then ./data."""
    given = os.environ.get("FEDSIM_DATA")
    return ([Path(given).expanduser()] if given else []) + [Path("data")]


def bundle_names() -> list[str]:
    """Returns the names of the bundles in the data roots."""
    found = {meta.parent.name for root in data_roots() for meta in root.glob("*/meta.json")}
    return sorted(name for name in found if not name.startswith("."))  # a dot: still being unpacked


def find_bundle(path: str) -> Path:
    """Returns the folder that `path` (a folder, or a bare name) stands for.

    Raises:
        DataError: if there is none; says where it was looked for and what is there.
    """
    given = Path(path).expanduser()
    bare = len(given.parts) == 1 and given.name not in ("..", "~") and not given.is_absolute()
    tried = [root / path for root in data_roots()] if bare else []
    tried.append(given)
    for folder in tried:
        if folder.is_dir() and any((folder / file).exists() for file in FILES):
            return folder
    for folder in tried[-1:]:
        if folder.is_dir():
            raise DataError(f"folder {folder} is no bundle: it has none of {', '.join(FILES)}")
    names = bundle_names()
    near = get_close_matches(given.name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    back = "bring it back" if given.is_absolute() else f"start fedsim in the folder from which {path!r} is found"
    roots = (" or FEDSIM_DATA to where bundles are", ", or set FEDSIM_DATA") if bare else ("", "")
    raise DataError(
        f"no bundle {path!r}{hint} (looked for {', '.join(str(folder.absolute()) for folder in tried)}; bundles found: "
        f"{', '.join(names) or 'none'}): set workload.path to a folder{roots[0]}; a run that goes on keeps its "
        f"workload.path: {back}{roots[1]}"
    )


def name_of(path: str) -> str:
    """Returns the name that a bundle gives itself; empty where it gives none, or is not there."""
    try:
        name = _meta(find_bundle(path)).get("name")
    except DataError:
        return ""
    return name.strip() if isinstance(name, str) else ""


def read_bundle(folder: Path) -> DataSet:
    """Returns what the bundle in `folder` holds.

    Raises:
        DataError: if a file is missing, broken or lacks an entry; values are checked by `ArrayWorkload`.
    """
    for file in FILES:
        if not (folder / file).is_file():
            raise DataError(f"bundle {folder} has no {file}; a bundle is a folder with {', '.join(FILES)}")
    classes, kind = _read_meta(folder)
    train, test = (_read_part(folder / f"{part}.npz") for part in ("train", "test"))
    return DataSet(train, test, classes, kind, f"bundle {folder}")


def _read_part(path: Path) -> Arrays:
    try:
        arrays = read_npz(path, ("x", "y"), ("client",))
    except FileError as error:
        raise DataError(f"{error}; write it again with numpy.savez: x and y, one row per example") from None
    part = Arrays(arrays["x"], arrays["y"], arrays.get("client"))
    if part.x.ndim == 0 or part.y.ndim == 0:
        raise DataError(f"{path}: x and y must have one row per example, got a single value")
    return part


def _check_rate(folder: Path, features: Features) -> None:
    """Refuses a front-end for another sample rate than the one that meta.json names, if it names one."""
    said, wanted = _meta(folder).get("sample_rate_hz"), getattr(features, "sample_rate_hz", None)
    if None not in (said, wanted) and said != wanted:
        raise DataError(
            f"bundle {folder} has {said} samples a second; set workload.features.sample_rate_hz to that, not {wanted}"
        )


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = read_json(path)
    except FileError as error:
        raise DataError(str(error)) from None
    return meta if isinstance(meta, dict) else {}


def _read_meta(folder: Path) -> tuple[list[str], Kind]:
    path, meta = folder / "meta.json", _meta(folder)
    classes = meta.get("classes")
    if not isinstance(classes, list) or not classes or not all(isinstance(c, str | int) for c in classes):
        raise DataError(f"{path} must hold `classes`, a list with the name of every class")
    kind: Any = meta.get("kind")
    if kind not in get_args(Kind):
        allowed = "; ".join(f"{kind} {layout}" for kind, layout in LAYOUT.items())
        raise DataError(f"{path} must hold `kind`, what x is ({allowed}), got {kind!r}")
    return [str(name) for name in classes], kind
