"""Sound files in one folder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from devices.reading import open_file
from fedsim.workloads.host_memory import check_fits
from fedsim.workloads.importing.folders import read_tree
from fedsim.workloads.importing.found import Found, Track, untracked
from fedsim.workloads.importing.sounds import Sounds


def import_audio(
    folder: Path,
    rate: int | None = None,
    seconds: float | None = None,
    speaker: str | None = None,
    track: Track = untracked,
) -> Found:
    """Reads every sound below the class folders as int16 [n, samples].

    Args:
        folder: holds a folder per class, or train/ and perhaps test/ that do.
        rate: samples a second that all are resampled to; None: all must have the same.
        seconds: length that all are cut or filled to; None: all must have the same.
        speaker: who an example is by; see `owner` of `read_tree`.
        track: draws a bar.

    Raises:
        ConfigError: if an argument is wrong.
        DataError, FileError: naming the file that cannot be used.
    """
    sounds = Sounds(rate, seconds)
    tree = read_tree(folder, speaker, "--speaker")
    x: np.ndarray = np.empty(0, np.int16)
    for row, path in enumerate(track(tree.paths, "reading sounds")):
        with open_file(path) as file:
            sound = sounds.array(file, str(path))
        if not row:
            check_fits(f"{folder} with {len(tree.paths)} sounds", 4 * len(tree.paths) * len(sound))
            x = np.empty((len(tree.paths), len(sound)), np.int16)
        x[row] = sound
    meta, notes = {"sample_rate_hz": sounds.rate}, [*tree.notes, *sounds.notes()]
    return Found(x, tree.y, tree.classes, "audio", tree.owners, tree.in_test, meta=meta, notes=notes)
