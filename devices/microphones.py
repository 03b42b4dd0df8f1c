"""Microphones: what a kind of device makes of a sound before any network hears it.

A microphone is a smooth curve over frequency, a gain and a floor of noise. All are drawn by its name, so that equal
names are equal microphones in every fleet and run; none was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Interval

from devices.bounds import Checked
from devices.draws import stream
from devices.errors import DeviceError

KNOTS = 16  # of a curve, evenly spaced from 0 to half the sample rate
FULL_DB = 20.0  # decibels of a factor of ten in amplitude


@dataclass(frozen=True)
class Microphone:
    """One kind of microphone.

    Attributes:
        name: of the kind.
        taps: of the filter, gain included, [taps] float32; odd, so that sound is not delayed.
        floor: noise that it adds to everything, [samples of noise] float32, repeated.
    """

    name: str
    taps: np.ndarray
    floor: np.ndarray

    def record(self, clips: np.ndarray) -> np.ndarray:
        """Returns what it makes of sound [n, samples] float32 in [-1, 1): as long, and cut at full volume.

        Clip by clip: a clip does not depend on what else is recorded. Where its noise begins depends on the clip.
        """
        return np.stack([self._one(clip) for clip in clips]) if len(clips) else clips

    def _one(self, clip: np.ndarray) -> np.ndarray:
        heard = np.convolve(clip, self.taps)[len(self.taps) // 2 :][: len(clip)]
        if len(self.floor):
            begin = int(np.abs(clip.astype(np.float64)).sum() * 1e3) % len(self.floor)
            heard = heard + np.resize(np.roll(self.floor, -begin), len(heard))
        return np.clip(heard, -1, 1).astype(np.float32)


class Microphones(Checked, group="fleet.microphones"):
    """The microphones of a fleet: one kind for each device, by its name, and others that nobody trains with.

    Args:
        curve_db: deviation of a curve over frequency, in decibels; a random walk, brought to this deviation.
        gain_db: deviation of the gain, in decibels.
        noise_db: level of the noise floor below full volume, in decibels; each kind's own lies within 6 of it. None: no
            noise.
        taps: of the filters, odd.
        unseen: names of microphones that no client has, on which models are judged, too.
        seed: of all curves; not that of the run, so that a microphone stays the same.
    """

    def __init__(
        self,
        curve_db: Annotated[float, Interval(ge=0, le=30)] = 6.0,
        gain_db: Annotated[float, Interval(ge=0, le=30)] = 3.0,
        noise_db: Annotated[float, Interval(ge=-120, le=0)] | None = -60.0,
        taps: Annotated[int, Interval(ge=1, le=4095)] = 127,
        unseen: Sequence[str] = ("unseen_1", "unseen_2", "unseen_3"),
        seed: Annotated[int, Ge(0)] = 0,
    ):
        if taps % 2 == 0:
            raise DeviceError(f"fleet.microphones.taps must be odd, got {taps}")
        if len(set(unseen)) < len(unseen) or not all(name.strip() for name in unseen):
            raise DeviceError(f"fleet.microphones.unseen must be different names, got {list(unseen)}")
        self.curve_db, self.gain_db, self.noise_db, self.taps = curve_db, gain_db, noise_db, taps
        self.unseen, self.seed = tuple(unseen), seed
        self._drawn: dict[str, Microphone] = {}

    def of(self, name: str) -> Microphone:
        """Returns the microphone of that name, a kind of the fleet; drawn once."""
        if name not in self._drawn:
            self._drawn[name] = self.drawn(name)
        return self._drawn[name]

    def drawn(self, name: str) -> Microphone:
        """Returns the microphone of that name, which nobody may ask for again."""
        draw = stream(self.seed, "microphone", name)
        decibels = self._curve(draw) + self.gain_db * draw.standard_normal()
        taps = _filter(10 ** (decibels / FULL_DB), self.taps)
        floor = np.zeros(0)
        if self.noise_db is not None:
            level = 10 ** ((self.noise_db + draw.uniform(-6, 6)) / FULL_DB)
            floor = level * draw.standard_normal(2**14)
        return Microphone(name, taps.astype(np.float32), floor.astype(np.float32))

    def _curve(self, draw: np.random.Generator) -> np.ndarray:
        """Draws decibels at `KNOTS` frequencies, with mean 0 and deviation `curve_db`."""
        walk = np.cumsum(draw.standard_normal(KNOTS))
        walk -= walk.mean()
        return np.asarray(self.curve_db * walk / max(walk.std(), 1e-12))


def _filter(gains: np.ndarray, taps: int) -> np.ndarray:
    """Returns a symmetric filter [taps] with these gains at evenly spaced frequencies, smooth in between."""
    bins = np.linspace(0, len(gains) - 1, taps // 2 + 1)
    response = np.interp(bins, np.arange(len(gains)), gains)
    centred = np.fft.fftshift(np.fft.irfft(response, taps))
    return np.asarray(centred * np.hamming(taps) if taps > 1 else gains.mean(keepdims=True))
