"""Data sets of torchvision that have one class per image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from devices.errors import one_line, unknown
from fedsim.errors import ConfigError, DataError
from fedsim.workloads.bundle import data_roots
from fedsim.workloads.host_memory import check_fits
from fedsim.workloads.importing.found import Found, Track, check_names, untracked
from fedsim.workloads.importing.pictures import Pictures, Size, naming_image

SPLITS = (("train", "trainval"), ("test", "val"))  # as classes call their parts
NO_SETS = ("VisionDataset", "DatasetFolder", "ImageFolder")  # but ways to read folders: `import_images`


def import_torchvision(
    name: str,
    root: Path | None = None,
    download: bool = False,
    size: Size | None = None,
    gray: bool | None = None,
    options: Mapping[str, str] | None = None,
    track: Track = untracked,
) -> Found:
    """Reads both parts of a data set of `torchvision.datasets`.

    torchvision checks CIFAR's files against their published MD5 before it unpickles them.

    Args:
        name: of the class, e.g. "FashionMNIST".
        root: folder with the files; None: the first of $FEDSIM_DATA and ./data.
        download: fetch files that are not there.
        size: see `Pictures`.
        gray: see `Pictures`.
        options: more arguments of the class, e.g. {"split": "letters"} for EMNIST.
        track: draws a bar.

    Raises:
        ConfigError: if there is no such class, or it has another kind of parts.
        DataError: if the files are not there or broken, or have no single class per image.
    """
    from PIL.Image import Image

    made = _parts(name, root or data_roots()[0], download, options or {})
    pictures, rows = Pictures(size, gray), [(part, row) for part in range(len(made)) for row in range(len(made[part]))]
    if not rows:
        raise DataError(f"{name} has no images")
    x: np.ndarray = np.empty(0, np.uint8)
    y = np.empty(len(rows), np.int64)
    for at, (part, row) in enumerate(track(rows, f"reading {name}")):
        where = f"{name}, image {row}"
        with naming_image(where):
            image, target = made[part][row]
        if not isinstance(image, Image) or isinstance(target, bool) or not isinstance(target, int | np.integer):
            raise DataError(f"{where} has no picture with one class: {type(image).__name__}, {type(target).__name__}")
        array = pictures.array(image, where)
        if not at:
            check_fits(f"{name} with {len(rows)} images of {array.shape}", 2 * len(rows) * array.size)
            x = np.empty((len(rows), *array.shape), np.uint8)
        x[at], y[at] = array, int(target)
    classes = _classes(made[0], y, name)
    in_test = np.array([part == 1 for part, _ in rows]) if len(made) == 2 else None
    return Found(x, y, classes, "image", in_test=in_test, notes=pictures.notes())


def _parts(name: str, root: Path, download: bool, options: Mapping[str, str]) -> list[Any]:
    """Makes the data set: its training and test part, or the one that it has.

    Raises:
        ConfigError: if there is no such class, or it does not take what it is given.
        DataError: if the files are not there or broken.
    """
    from torchvision import datasets

    named = [n for n in datasets.__all__ if n not in NO_SETS]
    known = [n for n in named if "root" in inspect.signature(getattr(datasets, n)).parameters]
    if name not in known:
        raise ConfigError(unknown("data set of torchvision", name, known))
    make = getattr(datasets, name)
    takes = inspect.signature(make).parameters
    shared: dict[str, Any] = {"root": str(root), **options}
    if "download" in takes or issubclass(make, datasets.MNIST):
        shared["download"] = download
    parts: list[list[dict[str, Any]]]
    if "train" in takes or issubclass(make, datasets.MNIST):
        parts = [[{"train": True}], [{"train": False}]]
    elif "split" in takes and "split" not in options:
        parts = [[{"split": split} for split in names] for names in SPLITS]
    else:
        parts = [[{}]]
    return [_make(name, lambda part: make(**shared, **part), tried, root, download) for tried in parts]


def _make(name: str, make: Callable[[Any], Any], tried: list[Any], root: Path, download: bool) -> Any:
    """Makes the first part whose name the class knows."""
    for part in tried:
        try:
            return make(part)
        except TypeError as error:
            raise ConfigError(f"{name} cannot be made: {one_line(error)}; give it with --set KEY=VALUE") from None
        except Exception as error:  # of whatever reads its files
            if isinstance(error, ValueError) and "Unknown value" in str(error) and part is not tried[-1]:
                continue
            first = one_line(error) or type(error).__name__
            get = "" if download else "; fetch them with --download, or name their folder with --root"
            raise DataError(f"{name} cannot be read from {root}: {first}{get}") from None
    raise AssertionError("there is a last part")


def _classes(part: Any, y: np.ndarray, name: str) -> list[str]:
    """Returns the names of the classes, where the data set has one for each; else their numbers.

    Raises:
        DataError: if a label is below 0.
    """
    if y.min() < 0:
        raise DataError(f"{name} has label {y.min()}, which is no class; choose another part with --set")
    count = int(y.max()) + 1
    names = getattr(part, "classes", None)  # few have them
    if not isinstance(names, list | tuple) or len(names) < count:
        return [str(number) for number in range(count)]
    check_names("class", {str(n) for n in names}, name)
    return [str(n) for n in names]
