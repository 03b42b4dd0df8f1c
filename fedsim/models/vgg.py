"""A small VGG without normalisation layers, for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.shapes import DropoutRate, HeadedNetwork, Size, image_shape


@checked("model", ConfigError)
class VGG(HeadedNetwork):
    """Three pairs of 3x3 convolutions, each followed by a pool, then two hidden layers.

    With width 32: 32 - 64 - pool - 128 - 128 - pool - drop - 256 - 256 - pool - drop - 512 - 512 - drop - classes.

    Args:
        input_shape: channels, height, width; at least 8x8.
        num_classes: size of the output.
        width: channels of the first convolution; the others are 2, 4, 4, 8 and 8 times as wide.
        hidden: units of both hidden layers.
        dropout: rate in [0, 1).
    Source: the "modified VGG" of Yoon et al., "FedMix", ICLR 2021, in the layout of Flower's baseline (dropout 0.1).
        Differs: weights start as in He et al. 2015; with torch's default the loss stayed at 2.30 for 400 steps
        on CIFAR-10.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: Size,
        width: Size = 32,
        hidden: Size = 512,
        dropout: DropoutRate = 0.0,
    ):
        super().__init__()
        channels, height, wide = image_shape("vgg", input_shape, smallest=8)
        self.body = nn.Sequential(
            *_pair(channels, width, 2 * width),
            *_pair(2 * width, 4 * width, 4 * width),
            *_drop(dropout),
            *_pair(4 * width, 8 * width, 8 * width),
            *_drop(dropout),
            nn.Flatten(),
            nn.Linear(8 * width * (height // 8) * (wide // 8), hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            *_drop(dropout),
        )
        self.head = nn.Linear(hidden, num_classes)
        for layer in self.modules():  # torch's own initialisation lets the signal die out in a net this deep
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)


def _pair(channels: int, first: int, second: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.MaxPool2d(2),  # before the ReLU: the same numbers, gradients included, for a quarter of the work
        nn.ReLU(),
    ]


def _drop(rate: float) -> list[nn.Module]:
    return [nn.Dropout(rate)] if rate else []
