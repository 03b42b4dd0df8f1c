"""Speech Commands from its official files: listed by torchaudio, read by soundfile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.errors import DataError
from fedsim.seeding import generator
from fedsim.workloads.arrays import Arrays, ArrayWorkload, DataSet
from fedsim.workloads.official import Official

FOLDER, NOISE = Path("SpeechCommands", "speech_commands_v0.02"), "_background_noise_"
OFFICIAL = Official("speech_commands", str(FOLDER), "kws", "workload=kws")
KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "_unknown_", "_silence_"
SAMPLES = 16000  # of a clip: one second
Sound = npt.NDArray[np.int16]  # [samples]


class Clip(NamedTuple):
    """One recording: where it is, what is said, who says it."""

    path: Path
    word: str
    speaker: str


class SpeechCommands(ArrayWorkload):
    """Speech Commands v0.02, one second at 16 kHz a clip, by speaker; 105,829 clips of 35 words.

    With 12 classes, as keyword spotters are compared: ten keywords, one in eleven clips another word ("unknown") and
    as many random seconds of the background recordings ("silence", by nobody; zeros where the recordings are missing).
    Which these are does not depend on the seed of the run. No file of the official validation list is used.

    Args:
        classes: 12, or 35 for every word.
        root: folder with the official files; None looks in $FEDSIM_DATA, then ./data.
        download: fetch the files (2.3 GB) when they are not there.
        name: of the workload.
        arrays: arguments of ArrayWorkload.
    Source: Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", 2018, section 7. Its test
        archive for 12 classes has other draws of unknown words and silence.

    Raises:
        ConfigError: for another number of classes.
        DataError: if the files are not there or broken.
    """

    def __init__(
        self,
        classes: Literal[12, 35] = 12,
        name: str = "speech_commands",
        root: str | None = None,
        download: bool = False,
        **arrays: Any,
    ):
        self.words, self.root, self.download = classes, root, download
        super().__init__(name=name, **arrays)

    def read(self) -> DataSet:
        where = OFFICIAL.root(self.root)
        train, test = (_list(where, subset, self.download) for subset in ("training", "testing"))
        words = [*KEYWORDS, UNKNOWN, SILENCE] if self.words == 12 else sorted({clip.word for clip in train})
        noise = _noise(where / FOLDER / NOISE) if self.words == 12 else []
        parts = [_read(clips, words, noise, subset) for clips, subset in ((train, "training"), (test, "testing"))]
        return DataSet(parts[0], parts[1], words, "audio", self.name)

    def noise_recordings(self) -> list[Tensor]:
        """Returns the recordings of backgrounds, in [-1, 1); without any, the train part's clips of silence."""
        folder = OFFICIAL.root(self.root) / FOLDER / NOISE
        return [torch.from_numpy(sound).float() / 32768 for sound in _noise(folder)] or super().noise_recordings()

    @staticmethod
    def locate(settings: Mapping[str, Any]) -> tuple[str, bool, str]:
        """Returns the kind, whether the data are here, and where or how to get them."""
        here, where = OFFICIAL.found(settings.get("root"))
        return "audio", here, where


def _list(root: Path, subset: str, download: bool) -> list[Clip]:
    from torchaudio.datasets import SPEECHCOMMANDS

    def facts() -> list[tuple[str, int, str, str, int]]:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        files = SPEECHCOMMANDS(root, download=download, subset=subset)
        return [files.get_metadata(i) for i in range(len(files))]

    found = OFFICIAL.read(facts, root, download)
    return [Clip(root / FOLDER.parts[0] / path, word, speaker) for path, _, word, speaker, _ in found]


def _read(clips: Sequence[Clip], words: Sequence[str], noise: Sequence[Sound], subset: str) -> Arrays:
    """Reads the clips of these words as int16 [n, 16000]; with "unknown" and "silence" among them, a draw of these."""
    from rich.progress import track

    draw = generator(0, "speech-commands", subset)
    chosen, silent = [clip for clip in clips if clip.word in words], 0
    if SILENCE in words:
        others = [clip for clip in clips if clip.word not in words]
        each = -(-len(chosen) // len(KEYWORDS))
        rows = draw.permutation(len(others))[:each]
        chosen, silent = chosen + [others[row] for row in sorted(rows)], each
    x = np.zeros((len(chosen) + silent, SAMPLES), np.int16)
    for row, clip in enumerate(track(chosen, f"reading {subset} clips", transient=True, disable=len(chosen) < 5000)):
        sound = _wav(clip.path)[:SAMPLES]
        x[row, : len(sound)] = sound
    for row in range(len(chosen), len(x)):
        if noise:
            recording = noise[int(draw.integers(len(noise)))]
            start = int(draw.integers(len(recording) - SAMPLES + 1))
            x[row] = recording[start : start + SAMPLES] * draw.random()
    said = [clip.word if clip.word in words else UNKNOWN for clip in chosen] + silent * [SILENCE]
    speakers = [clip.speaker for clip in chosen] + silent * [""]
    return Arrays(x, np.array([words.index(word) for word in said]), np.array(speakers, dtype=str))


def _noise(folder: Path) -> list[Sound]:
    recordings = [_wav(path) for path in sorted(folder.glob("*.wav"))]
    return [recording for recording in recordings if len(recording) >= SAMPLES]


def _wav(path: Path) -> Sound:
    import soundfile

    try:
        sound, rate = soundfile.read(path, dtype="int16")
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if sound.ndim != 1 or rate != SAMPLES:
        raise DataError(f"{path} must have one channel of {SAMPLES} samples a second, got {rate} and {sound.shape[1:]}")
    return np.asarray(sound, np.int16)
