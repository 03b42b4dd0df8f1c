"""Log-mel spectrograms of sound, the front-end that keyword spotters are fed."""

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
        mels: frequency bands from 0 to half the sample rate.
        floor: added to the power, so that silence is ln(floor).

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
    ):
        if fft < window:
            raise ConfigError(f"workload.features.fft must be at least workload.features.window={window}, got {fft}")
        from torchaudio.transforms import MelSpectrogram

        self.sample_rate_hz, self.floor = sample_rate_hz, floor
        self.mel = MelSpectrogram(sample_rate_hz, n_fft=fft, win_length=window, hop_length=hop, n_mels=mels)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns spectrograms [n, 1, mels, 1 + samples // hop] of sound [n, samples] in [-1, 1).

        Clip by clip: the numbers of one do not depend on what else is asked for with it.
        """
        if not len(x):  # a client with so few clips that it holds none out
            return x.new_empty((0, 1, self.mel.n_mels, 1 + x.shape[1] // self.mel.hop_length))
        return torch.stack([(self.mel(clip) + self.floor).log() for clip in x]).unsqueeze(1)
