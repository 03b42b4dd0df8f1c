"""Images in one folder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from devices.reading import open_file
from fedsim.workloads.host_memory import check_fits
from fedsim.workloads.importing.folders import read_tree
from fedsim.workloads.importing.found import Found, Track, untracked
from fedsim.workloads.importing.pictures import GRAY, Pictures, Size, mode_of, open_image


def import_images(
    folder: Path,
    size: Size | None = None,
    gray: bool | None = None,
    owner: str | None = None,
    track: Track = untracked,
) -> Found:
    """Reads every image below the class folders as uint8 [n, height, width, 3], gray ones [n, height, width].

    Args:
        folder: holds a folder per class, or train/ and perhaps test/ that do.
        size: height and width that all are brought to; None: all must have the same.
        gray: one channel; None: where all images have one.
        owner: see `read_tree`.
        track: draws a bar.

    Raises:
        ConfigError: if an argument is wrong.
        DataError, FileError: naming the file that cannot be used.
    """
    tree = read_tree(folder, owner, "--owner")
    if gray is None:
        gray = all(mode_of(path) in GRAY for path in track(tree.paths, "looking at images"))
    pictures = Pictures(size, gray)
    x: np.ndarray = np.empty(0, np.uint8)
    for row, path in enumerate(track(tree.paths, "reading images")):
        with open_file(path) as file, open_image(file, str(path)) as image:
            array = pictures.array(image, str(path))
        if not row:
            check_fits(f"{folder} with {len(tree.paths)} images of {array.shape}", 2 * len(tree.paths) * array.size)
            x = np.empty((len(tree.paths), *array.shape), np.uint8)
        x[row] = array
    return Found(x, tree.y, tree.classes, "image", tree.owners, tree.in_test, notes=[*tree.notes, *pictures.notes()])
