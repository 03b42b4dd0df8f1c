"""FBNet for 32x32 images: the 9^22 networks of inverted bottlenecks whose latencies HELP has, as modules.

An architecture is 22 ids of `OPERATIONS`, one per layer: kernel 3 or 5, expansion 1, 3 or 6, or 1 with pointwise
convolutions in two groups; the last id skips the layer.

Source: Wu et al., "FBNet: Hardware-Aware Efficient ConvNet Design via Differentiable Neural Architecture Search", CVPR
2019, table 1 and figure 3; strides, head and skips of the CIFAR variant as in the code of Li et al., "HW-NAS-Bench:
Hardware-Aware Neural Architecture Search Benchmark", ICLR 2021. That HELP measured the same is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from devices.bounds import checked
from devices.nas.blocks import Norm, choices, conv_norm, image_shape


class Operation(NamedTuple):
    """One kind of layer; the groups are those of its pointwise convolutions."""

    kernel: int
    expansion: int
    groups: int


OPERATIONS = {
    "k3_e1": Operation(3, 1, 1),
    "k3_e1_g2": Operation(3, 1, 2),
    "k3_e3": Operation(3, 3, 1),
    "k3_e6": Operation(3, 6, 1),
    "k5_e1": Operation(5, 1, 1),
    "k5_e1_g2": Operation(5, 1, 2),
    "k5_e3": Operation(5, 3, 1),
    "k5_e6": Operation(5, 6, 1),
    "skip": None,
}
KINDS = tuple(OPERATIONS.values())
STEM = 16
# Channels, layers, stride of the first layer.
STAGES = ((16, 1, 1), (24, 4, 1), (32, 4, 2), (64, 4, 2), (112, 4, 1), (184, 4, 2), (352, 1, 1))
LAYERS = sum(layers for _, layers, _ in STAGES)
HEAD = 1504


@checked("model")
class FBNet(nn.Module):
    """A 3x3 convolution, 22 layers in seven stages, 1x1 convolution, global average pool, linear head.

    Args:
        ops: 22 ids 0..8, in the order of `OPERATIONS`.
        input_shape: channels, height, width; at least 8x8.
        num_classes: size of the output.
        norm: "batch" as in the paper, or "group", which federated clients can train; the parameters are as many.

    Raises:
        DeviceError: for an architecture, input or option that does not fit.
    Source: Wu et al., CVPR 2019; see the module for the CIFAR variant.
    """

    takes_tokens = False

    def __init__(
        self,
        ops: Sequence[int],
        input_shape: Sequence[int] = (3, 32, 32),
        num_classes: Annotated[int, Ge(1)] = 100,
        norm: Norm = "group",
    ):
        super().__init__()
        colours, _, _ = image_shape("fbnet", input_shape, smallest=8)
        self.ops = choices("fbnet", "ops", ops, LAYERS, range(len(KINDS)))
        self.encoding = "fbnet:" + "".join(map(str, self.ops))  # how latency tables name it
        blocks: list[nn.Module] = []
        before, kinds = STEM, iter(self.ops)
        for after, layers, first_stride in STAGES:
            for i in range(layers):
                blocks.append(layer(next(kinds), before, after, 1 if i else first_stride, norm))
                before = after
        self.stem = conv_norm(colours, STEM, norm, kernel=3, activation=nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_norm(before, HEAD, norm, activation=nn.ReLU())
        self.head = nn.Linear(HEAD, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees: [batch, 1504] from x [batch, channels, height, width]."""
        return F.adaptive_avg_pool2d(self.last(self.blocks(self.stem(x))), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, classes] of x [batch, channels, height, width]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def layer(op: int, before: int, after: int, stride: int, norm: Norm) -> nn.Module:
    """Makes the layer of an id; a skip that changes the shape is a 1x1 convolution with norm and ReLU."""
    kind = KINDS[op]
    if kind is not None:
        return Bottleneck(kind, before, after, stride, norm)
    if stride == 1 and before == after:
        return nn.Identity()
    return conv_norm(before, after, norm, stride=stride, activation=nn.ReLU())


class Bottleneck(nn.Module):
    """Pointwise, depthwise, pointwise; with groups, their channels are shuffled before the depthwise convolution."""

    def __init__(self, kind: Operation, before: int, after: int, stride: int, norm: Norm):
        super().__init__()
        middle, (kernel, _, groups) = before * kind.expansion, kind
        self.expand = conv_norm(before, middle, norm, groups=groups, activation=nn.ReLU())
        self.shuffle = nn.ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.depthwise = conv_norm(middle, middle, norm, kernel, stride, groups=middle, activation=nn.ReLU())
        self.project = conv_norm(middle, after, norm, groups=groups)
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, after, ceil(height / stride), ceil(width / stride)] from x [batch, before, height, width]."""
        y: Tensor = self.project(self.depthwise(self.shuffle(self.expand(x))))
        return x + y if self.residual else y
