"""Log-mel spectrograms of sound and their cepstral coefficients, the front-ends that keyword spotters are fed."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from devices.bounds import Checked
from fedsim.errors import ConfigError


class LogMel(Checked, group="workload.features", error=ConfigError):
    """ln(mel power + floor) of windowed Fourier transforms.

    Source: the front-end of BC-ResNet's official code (Kim et al., Interspeech 2021), whose numbers are the defaults:
        40 HTK mel bands of 30 ms Hann windows every 10 ms, centred, with reflection at the ends.

    Args:
        sample_rate_hz: of the sound.
        fft: points of a transform, at least `window`.
        window, hop: samples of a window, and from one to the next.
        mels: frequency bands, from `low_hz` to `high_hz`; None is half the sample rate.
        floor: added to the power, so that silence is ln(floor).
        centred: windows stand around every `hop`-th sample, reflected at the ends; else within the sound.

    Raises:
        ConfigError: for a setting that is not allowed.
    """

    def __init__(
        self,
        sample_rate_hz: Annotated[int, Ge(1)] = 16000,
        fft: Annotated[int, Ge(1)] = 512,
        window: Annotated[int, Ge(1)] = 480,
        hop: Annotated[int, Ge(1)] = 160,
        mels: Annotated[int, Ge(1)] = 40,
        floor: Annotated[float, Gt(0)] = 1e-6,
        low_hz: Annotated[float, Ge(0)] = 0.0,
        high_hz: Annotated[float, Gt(0)] | None = None,
        centred: bool = True,
    ):
        if fft < window:
            raise ConfigError(f"workload.features.fft must be at least workload.features.window={window}, got {fft}")
        highest = sample_rate_hz / 2
        if not low_hz < (high_hz or highest) <= highest:
            raise ConfigError(
                f"workload.features must have low_hz < high_hz <= {highest:g}, half the sample rate, got {low_hz:g} "
                f"and {high_hz or highest:g}"
            )
        from torchaudio.transforms import MelSpectrogram

        self.sample_rate_hz, self.floor = sample_rate_hz, floor
        self.mel = MelSpectrogram(
            *(sample_rate_hz, fft, window, hop), f_min=low_hz, f_max=high_hz, n_mels=mels, center=centred
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Returns spectrograms [n, 1, mels, frames] of sound [n, samples] in [-1, 1).

        There are 1 + samples // hop frames, if windows are centred. Clip by clip: the numbers of one do not depend on
        what else is asked for with it.
        """
        if not len(x):  # a client with so few clips that it holds none out
            return x.new_empty((0, 1, *self.of_clip(x.new_zeros(x.shape[1])).shape))
        return torch.stack([self.of_clip(clip) for clip in x]).unsqueeze(1)

    def of_clip(self, clip: Tensor) -> Tensor:
        """Returns the spectrogram [mels, frames] of one clip [samples]."""
        spectrogram: Tensor = (self.mel(clip) + self.floor).log()
        return spectrogram


class Mfcc(LogMel):
    """Mel-frequency cepstral coefficients: the first ones of the cosine transform of every frame of a `LogMel`.

    Source: recalled: the 49 x 10 of Zhang et al., "Hello Edge: Keyword Spotting on Microcontrollers", 2017, are the
        defaults: windows of 40 ms every 20 ms, 40 bands from 20 to 4000 Hz. Differs: power, not its root, is summed.

    Args:
        sample_rate_hz: of the sound.
        coefficients: of a frame, at most `mels`.
        fft, window, hop, mels, low_hz, high_hz, centred, floor: as of `LogMel`.

    Raises:
        ConfigError: for a setting that is not allowed.
    """

    def __init__(
        self,
        sample_rate_hz: Annotated[int, Ge(1)] = 16000,
        coefficients: Annotated[int, Ge(1)] = 10,
        fft: Annotated[int, Ge(1)] = 640,
        window: Annotated[int, Ge(1)] = 640,
        hop: Annotated[int, Ge(1)] = 320,
        mels: Annotated[int, Ge(1)] = 40,
        low_hz: Annotated[float, Ge(0)] = 20.0,
        high_hz: Annotated[float, Gt(0)] | None = 4000.0,
        centred: bool = False,
        floor: Annotated[float, Gt(0)] = 1e-6,
    ):
        super().__init__(sample_rate_hz, fft, window, hop, mels, floor, low_hz, high_hz, centred)
        if coefficients > mels:
            raise ConfigError(
                f"workload.features.coefficients must be at most workload.features.mels={mels}, got {coefficients}"
            )
        from torchaudio.functional import create_dct

        self.cosines = create_dct(coefficients, mels, "ortho").T.contiguous()  # [coefficients, mels]

    def of_clip(self, clip: Tensor) -> Tensor:
        """Returns the coefficients [coefficients, frames] of one clip [samples]."""
        coefficients: Tensor = self.cosines @ super().of_clip(clip)
        return coefficients
