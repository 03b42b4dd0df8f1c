"""Building blocks of the search spaces' networks: convolutions with a norm of one's choice, and argument checks.

BatchNorm is what the papers have; its parameters are counted and its statistics mix up federated clients. GroupNorm has
the same number of parameters and no statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Literal

from torch import nn

from devices.errors import DeviceError

Norm = Literal["batch", "group"]
MOST_GROUPS = 8  # of a GroupNorm


def normaliser(norm: Norm, channels: int) -> nn.Module:
    """Makes the norm layer; a GroupNorm has at most 8 groups, of two or more channels where there are two."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    # A group of one channel and one pixel is constant, which would stop all learning where the image has become 1x1.
    groups = max(g for g in range(1, MOST_GROUPS + 1) if channels % g == 0 and (g == 1 or channels // g > 1))
    return nn.GroupNorm(groups, channels)


def conv_norm(
    inputs: int,
    outputs: int,
    norm: Norm,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: nn.Module | None = None,
) -> nn.Sequential:
    """Makes a convolution without bias, norm and, if given, activation; sizes are divided by the stride, rounded up."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    after = [activation] if activation is not None else []
    return nn.Sequential(conv, normaliser(norm, outputs), *after)


def image_shape(network: str, input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """Returns channels, height and width.

    Args:
        network: what the error calls the network.
        input_shape: of one example as the network is fed.
        smallest: least height and width that the network can take.

    Raises:
        DeviceError: if these are no images, or too small ones.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise DeviceError(
            f"network {network} needs images [channels, height, width] of at least {smallest}x{smallest}, got examples "
            f"of shape {list(input_shape)}"
        )
    channels, height, width = input_shape
    return channels, height, width


def choices(network: str, key: str, values: Iterable[int], count: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """Checks integers against the allowed ones and returns them as plain integers.

    Args:
        network: what the error calls the network.
        key: what the error calls the values.
        values: to check; numpy's integers too.
        count: how many there must be.
        allowed: of each.

    Raises:
        DeviceError: unless there are `count` of them and each is allowed.
    """
    given = [] if isinstance(values, str) or not isinstance(values, Iterable) else list(values)
    if len(given) != count:
        raise DeviceError(f"{key} of network {network} must be {count} numbers of {list(allowed)}, got {values!r}")
    for place, value in enumerate(given):
        if not _whole(value) or value not in allowed:
            raise DeviceError(f"{key}[{place}] of network {network} must be one of {list(allowed)}, got {value!r}")
    return tuple(int(value) for value in given)


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's integers too: rows of the tables
