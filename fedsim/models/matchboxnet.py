"""MatchboxNet: one-dimensional separable convolutions over time for keyword spotting."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.shapes import DropoutRate, HeadedNetwork, Size, image_shape


@checked("model", ConfigError)
class MatchboxNet(HeadedNetwork):
    """MatchboxNet-BxRxC: a convolution, B residual blocks of R separable ones, two convolutions, average, linear head.

    Args:
        input_shape: 1, coefficients, frames; 1, 64, 101 for a second (`workload/features=mfcc_64`).
        num_classes: size of the output. The published 77k, 93k and 140k are those of 30 classes.
        blocks: B, whose kernels are 13, 15, 17, ... frames wide.
        repeats: R, separable convolutions in a block.
        width: C, channels of a block; twice as many before and behind them.
        dropout: rate behind every ReLU.
    Source: Majumdar and Ginsburg, "MatchboxNet: 1D Time-Channel Separable Convolutional Neural Network Architecture for
        Speech Commands Recognition", Interspeech 2020; the layout of 3x1x64 from NVIDIA NeMo's
        `matchboxnet_3x1x64_v1.yaml`, those of 3x2x64 and 6x2x64 recalled.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: Size,
        blocks: Size = 3,
        repeats: Size = 1,
        width: Size = 64,
        dropout: DropoutRate = 0.0,
    ):
        super().__init__()
        channels, height, _ = image_shape("matchboxnet", input_shape, smallest=1)
        layers = [*_separable(channels * height, 2 * width, 11), nn.ReLU(), nn.Dropout(dropout)]
        for number in range(blocks):
            before = width if number else 2 * width
            layers.append(TimeBlock(before, width, 13 + 2 * number, repeats, dropout))
        layers += [*_separable(width, 2 * width, 29, dilation=2), nn.ReLU(), nn.Dropout(dropout)]
        layers += [*_pointwise(2 * width, 2 * width), nn.ReLU(), nn.Dropout(dropout)]
        self.body = nn.Sequential(nn.Flatten(1, 2), *layers, nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.head = nn.Linear(2 * width, num_classes)


class TimeBlock(nn.Module):
    """y = relu(separable convolutions of x + norm(1x1 convolution of x))."""

    def __init__(self, before: int, width: int, kernel: int, repeats: int, dropout: float):
        super().__init__()
        layers = _separable(before, width, kernel)
        for _ in range(repeats - 1):
            layers += [nn.ReLU(), nn.Dropout(dropout), *_separable(width, width, kernel)]
        self.over_time, self.shortcut = nn.Sequential(*layers), nn.Sequential(*_pointwise(before, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, width, frames] from x [batch, before, frames]."""
        y: Tensor = self.dropout(F.relu(self.over_time(x) + self.shortcut(x)))
        return y


def _separable(before: int, width: int, kernel: int, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv1d(before, before, kernel, 1, padding, dilation, groups=before, bias=False)
    return [depthwise, *_pointwise(before, width)]


def _pointwise(before: int, width: int) -> list[nn.Module]:
    return [nn.Conv1d(before, width, 1, bias=False), nn.BatchNorm1d(width)]
