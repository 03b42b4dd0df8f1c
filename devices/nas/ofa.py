"""Once-for-All with MobileNetV3 (width 1.0): the subnets whose latencies HELP has, as modules with their own weights.

A subnet is 20 kernel sizes (3, 5, 7) and 20 expansion ratios (3, 4, 6), four per stage, and five depths (2, 3, 4); the
blocks of a stage behind its depth are left out. The resolution (128..224, by 4) is the input's.

Source: Cai et al., "Once-for-All: Train One Network and Specialize it for Efficient Deployment", ICLR 2020; widths,
strides, activations and squeeze-and-excitation were read in the authors' code (github.com/mit-han-lab/once-for-all).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from devices.bounds import checked
from devices.errors import DeviceError
from devices.nas.blocks import Norm, choices, conv_norm, image_shape

KERNELS, EXPANSIONS, DEPTHS = (3, 5, 7), (3, 4, 6), (2, 3, 4)
DEEPEST = max(DEPTHS)
SMALLEST, LARGEST = 128, 224  # resolutions
STEM, EXPANDED, LAST = 16, 960, 1280
# Channels, stride of the first block, squeeze-and-excitation, activation.
STAGES = (
    (24, 2, False, nn.ReLU),
    (40, 2, True, nn.ReLU),
    (80, 2, False, nn.Hardswish),
    (112, 1, True, nn.Hardswish),
    (160, 2, True, nn.Hardswish),
)
BLOCKS = DEEPEST * len(STAGES)
SQUEEZE = 4  # channels per channel inside a squeeze-and-excitation
DIVISOR = 8  # and these are a multiple of 8


@checked("model")
class OFANetwork(nn.Module):
    """A 3x3 convolution, a fixed block, five stages of inverted bottlenecks, two 1x1 convolutions, linear head.

    Args:
        ks: kernel size of each of the 20 blocks; only those within the depth matter.
        e: expansion ratio of each block, likewise.
        d: blocks of each of the five stages.
        input_shape: channels, height, width; at least 32x32.
        num_classes: size of the output.
        norm: "batch" as in the paper, or "group", which federated clients can train; the parameters are as many.

    Raises:
        DeviceError: for a subnet, input or option that does not fit.
    Source: Cai et al., ICLR 2020. Differs: weights of its own, not cut out of the large network, and no dropout before
        the head (0.1 there).
    """

    takes_tokens = False

    def __init__(
        self,
        ks: Sequence[int],
        e: Sequence[int],
        d: Sequence[int],
        input_shape: Sequence[int] = (3, 224, 224),
        num_classes: Annotated[int, Ge(1)] = 1000,
        norm: Norm = "group",
    ):
        super().__init__()
        colours, _, _ = image_shape("ofa", input_shape, smallest=32)
        depths = choices("ofa", "d", d, len(STAGES), DEPTHS)
        # HELP writes zeros for the blocks that are left out.
        kernels = choices("ofa", "ks", ks, BLOCKS, (0, *KERNELS))
        expansions = choices("ofa", "e", e, BLOCKS, (0, *EXPANSIONS))
        before, blocks = STEM, [Bottleneck(STEM, STEM, STEM, 3, 1, False, nn.ReLU, norm)]
        for stage, (after, first_stride, squeezed, activation) in enumerate(STAGES):
            for i in range(depths[stage]):
                kernel, ratio = kernels[stage * DEEPEST + i], expansions[stage * DEEPEST + i]
                if not kernel or not ratio:
                    block = f"block {stage * DEEPEST + i} of network ofa"
                    raise DeviceError(
                        f"{block} is within depth {depths[stage]} and needs a kernel size and a ratio, got 0"
                    )
                stride = 1 if i else first_stride
                blocks.append(Bottleneck(before, before * ratio, after, kernel, stride, squeezed, activation, norm))
                before = after
        self.stem = conv_norm(colours, STEM, norm, kernel=3, stride=2, activation=nn.Hardswish())
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_norm(before, EXPANDED, norm, activation=nn.Hardswish())
        self.mix = nn.Sequential(nn.Conv2d(EXPANDED, LAST, 1, bias=False), nn.Hardswish())
        self.head = nn.Linear(LAST, num_classes)

    @classmethod
    def from_encoding(cls, numbers: Sequence[int], num_classes: int = 1000, norm: Norm = "batch") -> OFANetwork:
        """Builds a network for square images from a row of HELP's table: ks, e, d and resolution, 46 numbers.

        Raises:
            DeviceError: for a row that is not in the space.
        """
        if len(numbers) != 2 * BLOCKS + len(STAGES) + 1:
            raise DeviceError(
                f"a network ofa is 20 kernel sizes, 20 ratios, 5 depths, 1 resolution, got {len(numbers)}"
            )
        ks, e, d = numbers[:BLOCKS], numbers[BLOCKS : 2 * BLOCKS], numbers[2 * BLOCKS : -1]
        return cls(ks, e, d, (3, int(numbers[-1]), int(numbers[-1])), num_classes, norm)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees: [batch, 1280] from x [batch, channels, height, width]."""
        mixed: Tensor = self.mix(F.adaptive_avg_pool2d(self.last(self.blocks(self.stem(x))), 1))
        return mixed.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, classes] of x [batch, channels, height, width]."""
        logits: Tensor = self.head(self.features(x))
        return logits


class Bottleneck(nn.Module):
    """Pointwise (where it widens), depthwise, squeeze-and-excitation (where the stage has it), pointwise."""

    def __init__(
        self,
        before: int,
        middle: int,
        after: int,
        kernel: int,
        stride: int,
        squeezed: bool,
        activation: type[nn.Module],
        norm: Norm,
    ):
        super().__init__()
        parts: list[nn.Module] = [] if middle == before else [conv_norm(before, middle, norm, activation=activation())]
        parts.append(conv_norm(middle, middle, norm, kernel, stride, groups=middle, activation=activation()))
        if squeezed:
            parts.append(SqueezeExcite(middle))
        parts.append(conv_norm(middle, after, norm))
        self.body = nn.Sequential(*parts)
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, after, ceil(height / stride), ceil(width / stride)] from x [batch, before, height, width]."""
        y: Tensor = self.body(x)
        return x + y if self.residual else y


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in [0, 1] that two pointwise convolutions make of the channels' means.

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, as in Howard et al., "Searching for MobileNetV3",
        ICCV 2019.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = divisible(channels // SQUEEZE)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, channels, height, width], the shape of x."""
        gate: Tensor = self.gate(x)
        return x * gate


def divisible(channels: int) -> int:
    """Returns the nearest multiple of 8 that is at least 8 and nine tenths of `channels`."""
    near = max(DIVISOR, (channels + DIVISOR // 2) // DIVISOR * DIVISOR)
    return near + DIVISOR if near < 0.9 * channels else near
