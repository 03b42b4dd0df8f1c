"""Turns sound files into arrays of one rate and length."""

from __future__ import annotations

import math
from typing import IO

import numpy as np

from devices.errors import UserError, one_line
from fedsim.errors import ConfigError, DataError
from fedsim.workloads.host_memory import check_fits

MOST_RATIO = 10**7  # resampling's kernel has this many numbers
FULL = 2**15


class Sounds:
    """Makes int16 arrays of one length out of sounds.

    Args:
        rate: samples a second that all are brought to; None: the first one's, and others are refused.
        seconds: length that all are cut or filled with silence to; None: the first one's, and others are refused.

    Raises:
        ConfigError: if a figure is out of bounds.
    """

    def __init__(self, rate: int | None, seconds: float | None):
        if rate is not None and not 1 <= rate <= 10**6:
            raise ConfigError(f"--rate must be from 1 to 1000000 samples a second, got {rate}")
        if seconds is not None and not 0 < seconds <= 3600:
            raise ConfigError(f"--seconds must be above 0 and at most 3600, got {seconds:g}")
        self.rate, self.seconds, self.samples = rate, seconds, 0
        self._first, self._resampled, self._cut, self._filled, self._mixed = "", 0, 0, 0, 0
        self._resamples = rate is not None

    def array(self, file: IO[bytes], name: str) -> np.ndarray:
        """Reads a sound as int16 [samples], its channels averaged.

        Raises:
            DataError: naming it, if it is broken, empty, or has another rate or length.
        """
        sound, rate = self._read(file, name)
        if self.rate is None:
            self.rate = rate
        if rate != self.rate:
            sound = self._resample(sound, rate, name)
        if not self.samples:
            self.samples = len(sound) if self.seconds is None else max(1, round(self.seconds * self.rate))
        self._first = self._first or name
        if len(sound) != self.samples and self.seconds is None:
            raise DataError(
                f"{name} has {len(sound)} samples and {self._first} {self.samples}; bring all to one length, e.g. with "
                f"--seconds {self.samples / self.rate:g}"
            )
        self._cut += len(sound) > self.samples
        self._filled += len(sound) < self.samples
        held = np.zeros(self.samples, np.int16)
        held[: len(sound)] = np.clip(np.rint(sound[: self.samples] * FULL), -FULL, FULL - 1)
        return held

    def _read(self, file: IO[bytes], name: str) -> tuple[np.ndarray, int]:
        import soundfile

        try:
            with soundfile.SoundFile(file) as opened:
                check_fits(name, 8 * opened.frames * opened.channels)
                sound, rate = opened.read(dtype="float32", always_2d=True), int(opened.samplerate)
        except UserError:
            raise
        except soundfile.LibsndfileError as error:
            raise DataError(f"{name} cannot be read as sound: {error.error_string}") from None
        except Exception as error:  # decoders raise whatever they stumble over
            raise DataError(f"{name} cannot be read as sound: {one_line(error) or type(error).__name__}") from None
        if not len(sound) or not np.isfinite(sound).all():
            raise DataError(f"{name} holds {'values that are no numbers' if len(sound) else 'no sound'}; remove it")
        self._mixed += sound.shape[1] > 1
        return sound.mean(1) if sound.shape[1] > 1 else sound[:, 0], rate

    def _resample(self, sound: np.ndarray, rate: int, name: str) -> np.ndarray:
        assert self.rate is not None
        if not self._resamples:
            raise DataError(
                f"{name} has {rate} samples a second and {self._first} {self.rate}; bring all to one rate, e.g. with "
                f"--rate {self.rate}"
            )
        common = math.gcd(rate, self.rate)
        if (rate // common) * (self.rate // common) > MOST_RATIO:
            raise DataError(f"{name} has {rate} samples a second, too odd a ratio to {self.rate}; convert it first")
        import torch
        from torchaudio.functional import resample

        self._resampled += 1
        return np.asarray(resample(torch.from_numpy(np.ascontiguousarray(sound)), rate, self.rate).numpy())

    def notes(self) -> list[str]:
        """Says how many sounds were changed in what way."""
        done = (
            (self._mixed, "had several channels, which are averaged"),
            (self._resampled, f"were resampled to {self.rate} Hz"),
            (self._cut, "were longer and are cut"),
            (self._filled, "were shorter and end in silence"),
        )
        return [f"{count} sounds {what}" for count, what in done if count]
