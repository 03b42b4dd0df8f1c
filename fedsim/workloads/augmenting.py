"""Augmentation of training sounds: what clips go through anew in every round, before and behind the front-end.

Every draw is the client's and the round's own, so results do not depend on who trains beside whom. A clip is changed
once a round, however many local epochs there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from devices.bounds import Checked
from devices.microphones import Microphones
from fedsim.errors import ConfigError
from fedsim.workloads.translating import Translator

Probability = Annotated[float, Interval(ge=0, le=1)]
Noise = Callable[[torch.Generator], Tensor]  # draws a recording of noise, [samples] in [-1, 1)


class Augmentation(Checked, group="workload.augment", error=ConfigError):
    """Time shift and background noise on the sound, masks on its spectrogram (SpecAugment).

    In this order, as in the official code of BC-ResNet: with `probability`, a clip is shifted and gets noise; then come
    the front-end and the masks. Clips of silence always get noise, up to `silence_noise` of its full volume. Before
    the front-end a clip may come through a curve drawn at random, behind it be translated to another microphone.

    Args:
        sample_rate_hz: of the sound.
        shift_s: a clip is shifted by at most so many seconds either way, filled with zeros; 0 never shifts.
        noise: largest volume of added noise; 0 adds none.
        silence_noise: the same for clips of silence.
        probability: that a clip is shifted and gets noise.
        frequency_masks, time_masks: how many of each a spectrogram gets.
        frequency_width, time_width: a mask is narrower than that, in bands or frames.
        curve_share: share of the clips that come through a microphone drawn at random.
        curve_db: deviation of its curve over frequency, in decibels.
        translated_share: share of the clips that are translated to another kind of microphone of the fleet.

    Source: Kim et al., "Broadcasted Residual Learning for Efficient Keyword Spotting", Interspeech 2021, and its
        official code; masks as in Park et al., "SpecAugment", Interspeech 2019.
    """

    changes = "sound"

    def __init__(
        self,
        sample_rate_hz: Annotated[int, Ge(1)] = 16000,
        shift_s: Annotated[float, Ge(0)] = 0.1,
        noise: Annotated[float, Interval(ge=0, le=1)] = 0.1,
        silence_noise: Annotated[float, Interval(ge=0, le=1)] = 1.0,
        probability: Probability = 0.8,
        frequency_masks: Annotated[int, Ge(0)] = 0,
        frequency_width: Annotated[int, Ge(1)] = 1,
        time_masks: Annotated[int, Ge(0)] = 0,
        time_width: Annotated[int, Ge(1)] = 20,
        curve_share: Probability = 0.0,
        curve_db: Annotated[float, Interval(ge=0, le=30)] = 6.0,
        translated_share: Probability = 0.0,
    ):
        self.sample_rate_hz = sample_rate_hz
        self.shift, self.noise, self.silence_noise = int(shift_s * sample_rate_hz), noise, silence_noise
        self.probability, self.curve_share, self.translated_share = probability, curve_share, translated_share
        self.curves = Microphones(curve_db=curve_db, gain_db=0.0, noise_db=None, unseen=())
        self.masks = ((2, frequency_masks, frequency_width), (3, time_masks, time_width))  # dimension, count, width

    @property
    def changes_sound(self) -> bool:
        """Returns whether it acts before the front-end, which then runs again in every round."""
        return (self.probability > 0 and (self.shift > 0 or self.noise > 0)) or self.curve_share > 0

    @property
    def acts(self) -> bool:
        """Returns whether it changes anything."""
        return self.changes_sound or self.changes_spectrogram or self.translated_share > 0

    @property
    def needs_noise(self) -> bool:
        """Returns whether recordings of noise are needed."""
        return self.probability > 0 and self.noise > 0

    def sound(self, x: Tensor, is_silence: Tensor, noise: Noise | None, draw: torch.Generator) -> Tensor:
        """Returns shifted and noisy copies of sound [n, samples] in [-1, 1).

        Args:
            x: the clips.
            is_silence: which are silence, [n] bool.
            noise: where noise comes from; None where there is none.
            draw: of this client and round.
        """
        made = torch.empty_like(x)
        for row, clip in enumerate(x):
            silent = bool(is_silence[row])
            happens, shift, volume, curved = torch.rand(4, generator=draw).tolist()
            if silent or happens < self.probability:
                clip = shifted(clip, int((2 * shift - 1) * self.shift))
                if self.noise and noise is not None:
                    clip = clip + (self.silence_noise if silent else self.noise) * volume * noise(draw)
                clip = clip.clamp(-1, 1)
            if curved < self.curve_share:
                name = int(torch.randint(2**31, (), generator=draw))
                clip = torch.from_numpy(self.curves.drawn(f"random {name}").record(clip[None].numpy())[0])
            made[row] = clip
        return made

    def num_translated(self, examples: int) -> int:
        """Returns how many of so many clips are translated."""
        return round(self.translated_share * examples)

    def translated(self, x: Tensor, kind: str, translator: Translator, draw: torch.Generator) -> Tensor:
        """Returns spectrograms of which a share is as another microphone would make them.

        Args:
            x: spectrograms [n, 1, bands, frames].
            kind: the microphone that made them.
            translator: of the fleet's kinds.
            draw: of this client and round.
        """
        count, kinds = self.num_translated(len(x)), len(translator.kinds)
        rows, own = torch.randperm(len(x), generator=draw)[:count], translator.kinds.index(kind)
        target = (own + 1 + torch.randint(kinds - 1, (count,), generator=draw)) % kinds
        made = x.clone()
        with torch.no_grad():
            for row, other in zip(rows.tolist(), target, strict=True):  # one by one: numbers do not depend on the rest
                made[row] = translator(x[row : row + 1], torch.tensor([own]), other[None])[0]
        return made

    def spectrogram(self, x: Tensor, draw: torch.Generator) -> Tensor:
        """Returns spectrograms [n, 1, bands, frames] with bands of frequency and of time set to 0."""
        made = x.clone()
        for one in made.unsqueeze(1):
            for dimension, count, width in self.masks:
                for _ in range(count):
                    size = min(int(torch.rand((), generator=draw) * width), one.shape[dimension])
                    start = int(torch.randint(one.shape[dimension] - size + 1, (), generator=draw))
                    one.narrow(dimension, start, size).zero_()
        return made

    @property
    def changes_spectrogram(self) -> bool:
        """Returns whether it masks anything."""
        return any(count and width > 1 for _, count, width in self.masks)


def shifted(clip: Tensor, by: int) -> Tensor:
    """Returns a clip [samples] that begins `by` samples later, or earlier, filled with zeros."""
    if by == 0 or abs(by) >= len(clip):
        return clip if by == 0 else torch.zeros_like(clip)
    moved = torch.zeros_like(clip)
    if by > 0:
        moved[by:] = clip[:-by]
    else:
        moved[:by] = clip[-by:]
    return moved
