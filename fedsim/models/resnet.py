"""The CIFAR ResNets (8, 14, 20, ...) with group normalisation, which does not mix up clients as batch statistics do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.shapes import HeadedNetwork, Size, image_shape


@checked("model", ConfigError)
class ResNet(HeadedNetwork):
    """A 3x3 convolution, three stages of basic blocks (width, 2 and 4 times that), global average pool, linear head.

    Args:
        input_shape: channels, height, width; at least 4x4.
        num_classes: size of the output.
        depth: 6n + 2 for n blocks per stage: 8, 14, 20, ...
        width: channels of the first stage.
        groups: of every normalisation; must divide width.
    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2; GroupNorm in place of
        BatchNorm after Hsieh et al., "The Non-IID Data Quagmire of Decentralized Machine Learning", ICML 2020. Differs:
        shortcuts that change shape are 1x1 convolutions, not padded identities.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: Size,
        depth: Annotated[int, Ge(8), Le(2000)] = 8,
        width: Size = 16,
        groups: Size = 8,
    ):
        super().__init__()
        channels, _, _ = image_shape("resnet", input_shape, smallest=4)
        if depth % 6 != 2:
            raise ConfigError(f"model.depth must be 8, 14, 20, ... (6n + 2), got {depth}")
        if width % groups:
            raise ConfigError(f"model.groups must divide model.width={width}, got {groups}")
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, width)
        blocks, before = [], width
        for stage in range(3):
            for i in range((depth - 2) // 6):
                after = width * 2**stage
                blocks.append(BasicBlock(before, after, stride=2 if stage and not i else 1, groups=groups))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees: [batch, 4 * width] from x [batch, channels, height, width]."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, before: int, after: int, stride: int, groups: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.GroupNorm(groups, after))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, after, height / stride, width / stride] from x [batch, before, height, width]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))
