"""BC-ResNet-ASC: acoustic scenes with 8 thousand to 315 thousand parameters; its technical report calls it -Mod."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Gt
from torch import Tensor, nn
from torch.nn import functional as F

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.bcresnet import BroadcastedBlock, check_bands
from fedsim.models.frequency_norms import NormIn, Positive, Share, chain, frequency_norm, mixed_styles
from fedsim.models.shapes import DropoutRate, HeadedNetwork, Size, image_shape

BLOCKS, POOLS = (2, 2, 2, 3), (True, True, False, False)  # of each stage


@checked("model", ConfigError)
class BCResNetASC(HeadedNetwork):
    """BC-ResNet with a small receptive field: no dilation, pools for strides, no wide tail, ResNorm between stages.

    One network under two names: BC-ResNet-Mod in the report (arXiv 2206.13909), BC-ResNet-ASC in the paper that
    follows it. Without its norms by frequency (`norm_in=none`) it has the same parameters.

    Args:
        input_shape: 1, frequencies, frames. Halved three times, the frequencies must stay multiples of `bands`; 256 in
            the paper.
        num_classes: size of the output.
        tau: the paper's multiplier of 10 channels (8 there); 10 tau must be whole.
        bands: frequency bands that are normalised apart.
        dropout: rate at which a block drops whole channels.
        norm_in, norm_weight, mixstyle, mixstyle_alpha: as of `BCResNet`.
    Source: Kim et al., "Domain Generalization on Efficient Acoustic Scene Classification using Residual
        Normalization", 2021 (arXiv 2111.06531). Blocks and bands are those that give the published 315k parameters;
        where pools and norms stand is recalled, and as in a public reimplementation. Differs: the last 1x1
        convolution, before the average, is written as a linear layer behind it, which gives the same for less work.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: Size,
        tau: Annotated[float, Gt(0)] = 1.0,
        bands: Size = 4,
        dropout: DropoutRate = 0.1,
        norm_in: NormIn = "resnorm",
        norm_weight: Share | None = None,
        mixstyle: Share = 0.0,
        mixstyle_alpha: Positive = 0.3,
    ):
        super().__init__()
        channels, height, _ = image_shape("bcresnet_asc", input_shape, smallest=7)
        base = round(10 * tau)
        if abs(10 * tau - base) > 1e-6 or not base:
            raise ConfigError(f"model.tau must be a multiple of 1/10, got {tau!r}")
        rows = [-(-height // 2), -(-height // 2) // 2, -(-height // 2) // 4]
        check_bands("bcresnet_asc", height, rows, bands)
        self.stem = chain(
            *mixed_styles(mixstyle, mixstyle_alpha),
            *frequency_norm(norm_in, norm_weight),
            nn.Conv2d(channels, 2 * base, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(2 * base),
            nn.ReLU(),
        )
        layers: list[nn.Module] = []
        before = 2 * base
        for width, count, pools in zip((base, base * 3 // 2, 2 * base, base * 5 // 2), BLOCKS, POOLS, strict=True):
            for _ in range(count):
                layers.append(BroadcastedBlock(before, width, stride=1, dilation=1, bands=bands, dropout=dropout))
                before = width
            layers += [*frequency_norm(norm_in, norm_weight), *([nn.MaxPool2d(2)] if pools else [])]
        self.blocks = chain(*layers)
        self.head = nn.Linear(before, num_classes, bias=False)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees: [batch, 25 tau] from x [batch, 1, frequencies, frames]."""
        return F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1)
