"""Small networks of every layer kind, which devices are measured with and predictors are judged on.

A name says family and size: "resnet-16" is the family at width 16, "resnet-16-keep0.5" the same with the inner channels
of each block pruned to a half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

IMAGE, SEQUENCE, TOKENS = (3, 32, 32), (40,), 64


@dataclass(frozen=True)
class ZooNetwork:
    """One network of the zoo.

    Attributes:
        build: makes the module in evaluation mode, with its own fixed weights.
        tokens: whether it takes token ids [batch, 40] instead of images [batch, 3, 32, 32].
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    tokens: bool = False

    def example(self, batch: int) -> Tensor:
        """Returns an input of the right shape; its values do not matter."""
        if self.tokens:
            return torch.arange(batch * SEQUENCE[0]).reshape(batch, *SEQUENCE) % TOKENS
        return torch.linspace(-1, 1, batch * 3072).reshape(batch, *IMAGE)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, inputs: int, inner: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(_conv(inputs, inner, 3, stride), _conv(inner, outputs))
        self.skip = nn.Identity() if inputs == outputs and stride == 1 else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        inner = inputs * expansion
        depthwise = _conv(inner, inner, 3, stride, inner)
        self.body = nn.Sequential(_conv(inputs, inner, 1), depthwise, _conv(inner, outputs, 1))
        self.add = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.add else y


class _Sequence(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(TOKENS, 16), nn.LSTM(16, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embed(x))[0])
        return logits


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def _cnn(width: int) -> nn.Module:
    blocks = [_conv(3, width, 5), nn.MaxPool2d(2), _conv(width, 2 * width, 5), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(2 * width * 64, 128), nn.ReLU(), nn.Linear(128, 10))


def _resnet(width: int, keep: float = 1.0) -> nn.Module:
    layers: list[nn.Module] = [_conv(3, width)]
    channels = width
    for stage in range(3):
        outputs = width * 2**stage
        inner = max(1, round(keep * outputs))
        layers += [_Residual(channels, inner, outputs, 1 if stage == 0 else 2), _Residual(outputs, inner, outputs, 1)]
        channels = outputs
    return nn.Sequential(*layers, *_head(channels))


def _mobilenet(width: float) -> nn.Module:
    channels, layers = round(16 * width), [_conv(3, round(16 * width))]
    for outputs, stride in ((16, 1), (24, 2), (24, 1), (48, 2), (48, 1), (96, 2)):
        layers.append(_Inverted(channels, round(outputs * width), 4, stride))  # type: ignore[arg-type]
        channels = round(outputs * width)
    return nn.Sequential(*layers, *_head(channels))


def _mlp(hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


def _plain(width: int) -> nn.Module:
    """Builds convolutions of both kernel sizes and average pools, as in NAS-Bench-201 cells."""
    first = [_conv(3, width), _conv(width, width, 1), nn.AvgPool2d(3, 1, 1), _conv(width, width)]
    second = [_conv(width, 2 * width, 3, 2), _conv(2 * width, 2 * width, 1), nn.AvgPool2d(3, 1, 1)]
    return nn.Sequential(*first, *second, _conv(2 * width, 2 * width), *_head(2 * width))


def _fixed(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make().eval()

    return build


def _zoo() -> dict[str, ZooNetwork]:
    rows: list[tuple[str, str, Callable[[], nn.Module], bool]] = []
    for width in (4, 8, 12, 16, 24, 32):
        rows.append((f"cnn-{width}", "cnn", partial(_cnn, width), False))
        rows.append((f"resnet-{width}", "resnet", partial(_resnet, width), False))
        rows.append((f"plain-{width}", "plain", partial(_plain, width), False))
    for width in (16, 32):
        for keep in (0.3, 0.5, 0.7):
            rows.append((f"resnet-{width}-keep{keep}", "pruned", partial(_resnet, width, keep), False))
    for share in (0.5, 0.75, 1.0, 1.5, 2.0):
        rows.append((f"mobilenet-{share}", "mobilenet", partial(_mobilenet, share), False))
    for hidden in (32, 64, 128, 192, 256):
        rows.append((f"lstm-{hidden}", "lstm", partial(_Sequence, hidden), True))
        rows.append((f"mlp-{hidden * 2}", "mlp", partial(_mlp, hidden * 2), False))
    return {name: ZooNetwork(name, family, _fixed(make), tokens) for name, family, make, tokens in rows}


ZOO = _zoo()
# Unseen widths and pruned variants of families that are measured at other widths; never a reference.
_WIDTHS = ("cnn-12", "resnet-24", "plain-12", "mobilenet-0.75", "lstm-192", "mlp-256")
HELD_OUT = (*_WIDTHS, *(name for name, network in ZOO.items() if network.family == "pruned"))
