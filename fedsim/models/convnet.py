"""A few strided or pooled convolutions and a linear head: the smallest network that learns small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, MinLen
from torch import nn

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.shapes import DropoutRate, HeadedNetwork, Size, image_shape


@checked("model", ConfigError)
class ConvNet(HeadedNetwork):
    """3x3 convolutions (padding 1), each of stride 2 and with ReLU; a linear head on what is left of the image.

    The head sees [batch, channels[-1] * height * width / 4^len(channels)]; with `pool`, [batch, channels[-1]].

    Args:
        input_shape: channels, height, width; at least 4x4.
        num_classes: size of the output.
        channels: of each convolution.
        dropout: probability of dropping a feature before the head.
        groups: of a GroupNorm between each convolution and its ReLU; 0: none, else a divisor of all channels.
        batch_norm: a BatchNorm there instead.
        pool: convolutions of stride 1, with a maximum over 2x2 behind all but the last and an average over the image
            behind that one; slower, and better at small images.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: Size,
        channels: Annotated[Sequence[Size], MinLen(1)] = (12, 24),
        dropout: DropoutRate = 0.0,
        groups: Annotated[int, Ge(0)] = 0,
        batch_norm: bool = False,
        pool: bool = False,
    ):
        super().__init__()
        before, height, width = image_shape("convnet", input_shape, smallest=4)
        if groups and any(c % groups for c in channels):
            raise ConfigError(f"model.groups must divide model.channels={list(channels)}, got {groups}")
        if groups and batch_norm:
            raise ConfigError(f"model.batch_norm takes the place of model.groups, got {groups} groups")
        layers: list[nn.Module] = []
        for number, after in enumerate(channels, 1):
            norm = [nn.GroupNorm(groups, after)] if groups else [nn.BatchNorm2d(after)] if batch_norm else []
            layers += [nn.Conv2d(before, after, 3, stride=1 if pool else 2, padding=1), *norm, nn.ReLU()]
            if pool and number < len(channels):
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            before, height, width = after, -(-height // 2), -(-width // 2)
        if pool:
            layers.append(nn.AdaptiveAvgPool2d(1))
            height = width = 1
        self.body = nn.Sequential(*layers, nn.Flatten(), *([nn.Dropout(dropout)] if dropout else []))
        self.head = nn.Linear(before * height * width, num_classes)
