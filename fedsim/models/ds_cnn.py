"""DS-CNN: depthwise separable convolutions for keyword spotting on microcontrollers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.shapes import HeadedNetwork, Size, image_shape


@checked("model", ConfigError)
class DSCNN(HeadedNetwork):
    """A 10x4 convolution of stride 2, depthwise separable 3x3 ones, average, linear head; each with norm and ReLU.

    Args:
        input_shape: 1, coefficients, frames; 1, 10, 49 in the paper (`workload/features=mfcc`).
        num_classes: size of the output.
        width: channels of every layer; 64 in DS-CNN-S.
        depth: separable convolutions; 4 in DS-CNN-S.
    Source: recalled: Zhang et al., "Hello Edge: Keyword Spotting on Microcontrollers", 2017, the small one (S): 23,180
        parameters for 12 classes, counted here. Differs: coefficients come first, so that the first kernel is turned,
        and its padding is the same at both ends.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: Size, width: Size = 64, depth: Size = 4):
        super().__init__()
        channels, _, _ = image_shape("ds_cnn", input_shape, smallest=2)
        layers = _normed(nn.Conv2d(channels, width, (4, 10), stride=2, padding=(1, 5), bias=False))
        for _ in range(depth):
            layers += _normed(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False))
            layers += _normed(nn.Conv2d(width, width, 1, bias=False))
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, num_classes)


def _normed(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]
