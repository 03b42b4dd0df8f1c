"""BC-ResNet: keyword spotting with 9 thousand to 321 thousand parameters.

Spectrograms are [batch, 1, frequencies, frames]; pairs of kernels and strides are (frequency, time). Its norms are over
the batch, as published: clients' statistics are averaged with their weights (`method=fedbn` keeps them at home).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Gt
from torch import Tensor, nn
from torch.nn import functional as F

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.frequency_norms import NormIn, Positive, Share, chain, frequency_norm, mixed_styles
from fedsim.models.shapes import DropoutRate, HeadedNetwork, Size, image_shape

STAGES = ((2, 1, 1), (2, 2, 2), (4, 2, 4), (4, 1, 8))  # blocks, frequency stride of the first one, dilation in time


@checked("model", ConfigError)
class BCResNet(HeadedNetwork):
    """A 5x5 convolution, twelve broadcasted residual blocks in four stages, a depthwise 5x5 one, average, linear head.

    Args:
        input_shape: 1, frequencies, frames. The frequencies, halved three times, must stay multiples of `bands`: 40.
        num_classes: size of the output.
        tau: the paper's multiplier of 8 channels (1, 1.5, 2, 3, 6 or 8 there); 8 tau must be whole.
        bands: frequency bands that are normalised apart.
        dropout: rate at which a block drops whole channels.
        norm_in: norm by frequency of the input and behind each stage: none, resnorm, rfn or ifn.
        norm_weight: lambda of it; None is 0.1 for resnorm and 0.5 for rfn.
        mixstyle: share of training batches whose styles are mixed (`FreqMixStyle`); 0 is none.
        mixstyle_alpha: how far; see there.
    Source: Kim et al., "Broadcasted Residual Learning for Efficient Keyword Spotting", Interspeech 2021, table 1 and
        its official code. Differs: the last 1x1 convolution, behind the average, is written as a linear layer.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: Size,
        tau: Annotated[float, Gt(0)] = 1.0,
        bands: Size = 5,
        dropout: DropoutRate = 0.1,
        norm_in: NormIn = "none",
        norm_weight: Share | None = None,
        mixstyle: Share = 0.0,
        mixstyle_alpha: Positive = 0.3,
    ):
        super().__init__()
        channels, height, _ = image_shape("bcresnet", input_shape, smallest=5)
        if 8 * tau != int(8 * tau):
            raise ConfigError(f"model.tau must be a multiple of 1/8, got {tau!r}")
        rows = [-(-height // 2), -(-height // 4), -(-height // 8)]
        check_bands("bcresnet", height, rows, bands, fewest=5)
        base = int(8 * tau)
        widths = [base, base * 3 // 2, 2 * base, base * 5 // 2]
        self.stem = chain(
            *mixed_styles(mixstyle, mixstyle_alpha),
            *frequency_norm(norm_in, norm_weight),
            nn.Conv2d(channels, 2 * base, 5, stride=(2, 1), padding=2, bias=False),
            nn.BatchNorm2d(2 * base),
            nn.ReLU(),
        )
        blocks: list[nn.Module] = []
        before = 2 * base
        for width, (count, stride, dilation) in zip(widths, STAGES, strict=True):
            for i in range(count):
                blocks.append(BroadcastedBlock(before, width, 1 if i else stride, dilation, bands, dropout))
                before = width
            blocks += frequency_norm(norm_in, norm_weight)
        self.blocks = chain(*blocks)
        self.tail = nn.Sequential(
            nn.Conv2d(before, before, 5, padding=(0, 2), groups=before, bias=False),
            nn.Conv2d(before, 4 * base, 1, bias=False),
            nn.BatchNorm2d(4 * base),
            nn.ReLU(),
        )
        self.head = nn.Linear(4 * base, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees: [batch, 32 tau] from x [batch, 1, frequencies, frames]."""
        return F.adaptive_avg_pool2d(self.tail(self.blocks(self.stem(x))), 1).flatten(1)


def check_bands(model: str, height: int, rows: Sequence[int], bands: int, fewest: int = 1) -> None:
    """Refuses frequencies whose bands cannot be normalised apart.

    Args:
        model: what the error calls the network, which halves the frequencies three times.
        height: frequencies of the input.
        rows: what is left of them where norms stand, falling.
        bands: must divide each of these.
        fewest: rows that must be left in the end.

    Raises:
        ConfigError: with what would fit.
    """
    for left in rows:
        if left % bands:
            common = math.gcd(*rows)
            instead = f", or model.bands={common}" if common > 1 and rows[-1] >= fewest else ""
            raise ConfigError(
                f"model {model} normalises model.bands={bands} bands apart, and {height} frequencies leave {left} "
                f"rows in between, which they do not divide; {8 * bands} frequencies fit{instead}"
            )
    if rows[-1] < fewest:
        raise ConfigError(
            f"model {model} needs {fewest} rows behind its stages, and {height} frequencies leave {rows[-1]}"
        )


class BroadcastedBlock(nn.Module):
    """y = relu(h + g + x): h of all frequencies, g of their mean and broadcast over them, x where the width stays.

    h = norm(depthwise convolution over frequency), g = a depthwise separable convolution over time.
    """

    def __init__(self, before: int, width: int, stride: int, dilation: int, bands: int, dropout: float):
        super().__init__()
        self.transition = before != width
        self.widen: nn.Module = nn.Identity()
        if self.transition:
            self.widen = nn.Sequential(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.over_frequency = nn.Sequential(
            nn.Conv2d(width, width, (3, 1), (stride, 1), (1, 0), groups=width, bias=False),
            SubSpectralNorm(width, bands),
        )
        self.over_time = nn.Sequential(
            nn.Conv2d(width, width, (1, 3), 1, (0, dilation), (1, dilation), groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.Dropout2d(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, width, frequencies / stride, frames] from x [batch, before, frequencies, frames]."""
        h = self.over_frequency(self.widen(x))
        y = h + self.over_time(h.mean(2, keepdim=True))
        return F.relu(y if self.transition else y + x)


class SubSpectralNorm(nn.Module):
    """Batch normalisation of each frequency band by itself; channel c in band k has index c * bands + k.

    Source: Chang et al., "SubSpectral Normalization for Neural Audio Data Processing", ICASSP 2021.
    """

    def __init__(self, channels: int, bands: int):
        super().__init__()
        self.bands, self.norm = bands, nn.BatchNorm2d(channels * bands)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape of x [batch, channels, frequencies, frames]; `bands` must divide the frequencies."""
        # No number of channels is written down: pruning leaves fewer.
        normed: Tensor = self.norm(x.reshape(x.shape[0], -1, x.shape[2] // self.bands, x.shape[3]))
        return normed.reshape(x.shape)
