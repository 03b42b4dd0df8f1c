"""Log-mel spectrograms of sound, the front-end that keyword spotters are fed."""

from __future__ import annotations

import torch
from torch import Tensor

from devices.bounds import Checked
from fedsim.errors import ConfigError


class LogMel(Checked, group="workload.features", error=ConfigError):
    """ln(mel power + floor) of windowed Fourier transforms. What it costs a device is not priced.

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
        sample_rate_hz: int = 16000,
        fft: int = 512,
        window: int = 480,
        hop: int = 160,
        mels: int = 40,
        floor: float = 1e-6,
    ):
        sizes = {"sample_rate_hz": sample_rate_hz, "fft": fft, "window": window, "hop": hop, "mels": mels}
        for key, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"workload.features.{key} must be a whole number of at least 1, got {value!r}")
        if fft < window:
            raise ConfigError(f"workload.features.fft must be at least workload.features.window={window}, got {fft}")
        if not isinstance(floor, int | float) or not floor > 0:
            raise ConfigError(f"workload.features.floor must be above 0, got {floor!r}")
        from torchaudio.transforms import MelSpectrogram

        self.sample_rate_hz, self.floor = sample_rate_hz, floor
        self.mel = MelSpectrogram(sample_rate_hz, n_fft=fft, win_length=window, hop_length=hop, n_mels=mels)

    def __call__(self, x: Tensor) -> Tensor:
        """Spectrograms [n, 1, mels, 1 + samples // hop] of sound [n, samples] in [-1, 1).

        Clip by clip: the numbers of one do not depend on what else is asked for with it.
        """
        return torch.stack([(self.mel(clip) + self.floor).log() for clip in x]).unsqueeze(1)
