"""The first residual networks for keyword spotting (res8, res15, res26 and their narrow forms)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.shapes import HeadedNetwork, Size, image_shape


@checked("model", ConfigError)
class SpeechResNet(HeadedNetwork):
    """A 3x3 convolution, pairs of them with a shortcut around each pair, average, linear head.

    Args:
        input_shape: 1, frequencies, frames.
        num_classes: size of the output.
        depth: 8, 15 or 26 in the paper: 6, 13 or 24 convolutions behind the first one.
        width: channels of every layer; 45, or 19 in the narrow forms.
    Source: Tang and Lin, "Deep Residual Learning for Small-Footprint Keyword Spotting", ICASSP 2018, and its official
        code. Differs: spectrograms come frequency first here, so that the kernels of the pooling are turned too.
    """

    # convolutions behind the first, pooling behind it over (frequency, time), whether they are dilated
    depths = {8: (6, (3, 4), False), 15: (13, None, True), 26: (24, (2, 2), False)}

    def __init__(self, input_shape: Sequence[int], num_classes: Size, depth: Literal[8, 15, 26] = 8, width: Size = 45):
        super().__init__()
        channels, _, _ = image_shape("speech_resnet", input_shape, smallest=4)
        count, self.pool, dilated = self.depths[depth]
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        spread = [2 ** (i // 3) if dilated else 1 for i in range(count)]
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d, bias=False) for d in spread)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for _ in range(count))
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees: [batch, width] from x [batch, 1, frequencies, frames]."""
        x = F.relu(self.stem(x))
        if self.pool:
            x = F.avg_pool2d(x, self.pool)
        shortcut = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(conv(x))
            if i % 2:
                x = shortcut = x + shortcut
            x = norm(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
