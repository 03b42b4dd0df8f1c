"""The networks of a zoo: some widths and depths of three model configs, each of which takes images of any size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from devices.nas.nb201 import EDGES, OPERATIONS, NB201Network, operation_ids
from devices.nas.tables import nb201_connected
from fedsim.errors import DataError
from fedsim.models.convnet import ConvNet
from fedsim.models.resnet import ResNet

CELL = "ops"  # the setting of nb201 that is drawn and not listed
Maker = Callable[..., nn.Module]

# By the name of its config: the class, and the values that its settings are drawn from.
FAMILIES: Mapping[str, tuple[Maker, Mapping[str, Sequence[Any]]]] = {
    "resnet8": (ResNet, {"depth": (8, 14), "width": (4, 8, 16), "groups": (4,)}),
    "convnet": (
        ConvNet,
        {
            "channels": ([8, 16], [16, 32], [32, 64], [8, 16, 32], [16, 32, 64]),
            "groups": (4,),
            "pool": (True,),
        },
    ),
    "nb201": (NB201Network, {"channels": (4, 8, 12), "cells": (1,)}),
}
TOPOLOGY = len(FAMILIES) + 5 + len(EDGES) * len(OPERATIONS)  # numbers of an architecture


@dataclass(frozen=True)
class Architecture:
    """A model config and its settings."""

    family: str
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuses what no zoo of this version has: its settings may stand in a file of somebody else."""
        _, known = FAMILIES.get(self.family, (None, {}))
        given = dict(self.settings)
        if self.family == "nb201":
            operation_ids(given.pop(CELL, ()))
        if not known or set(given) != set(known) or any(given[key] not in known[key] for key in known):
            raise DataError(f"a zoo has no network {self.family} of {dict(self.settings)}")

    def build(self, input_shape: Sequence[int], num_classes: int, seed: int = 0) -> nn.Module:
        """Makes the network, with first weights that follow from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return FAMILIES[self.family][0](input_shape=tuple(input_shape), num_classes=num_classes, **self.settings)

    @property
    def overrides(self) -> str:
        """Returns the settings of a run that has this model."""
        own = (f"'model.{key}={_value(value)}'" for key, value in self.settings.items())
        return " ".join([f"model={self.family}", *own])

    def __str__(self) -> str:
        alike = {key for key, values in FAMILIES[self.family][1].items() if len(values) == 1}
        own = (f"{key}={_value(value)}" for key, value in self.settings.items() if key not in alike)
        return " ".join([self.family, *own])

    def topology(self, num_classes: int, parameters: int, macs: int) -> Tensor:
        """Returns family, width, depth, outputs, size and cell as numbers about one in size, [38]."""
        kinds = [float(self.family == name) for name in FAMILIES]
        channels = self.settings.get("channels", self.settings.get("width"))
        width = channels[0] if isinstance(channels, list) else channels
        depth = len(channels) if isinstance(channels, list) else self.settings.get("depth", 8)
        shape = [math.log2(width) / 4, math.log2(depth) / 3, math.log2(num_classes) / 3]
        sizes = [math.log10(parameters) / 4, math.log10(macs) / 6]
        cell = np.zeros((len(EDGES), len(OPERATIONS)))
        if CELL in self.settings:
            cell[np.arange(len(EDGES)), self.settings[CELL]] = 1
        return torch.tensor([*kinds, *shape, *sizes, *cell.flatten().tolist()])


def draw_architecture(family: str, draw: np.random.Generator) -> Architecture:
    """Draws settings of a family; a cell in which nothing leads from input to output is drawn again."""
    _, values = FAMILIES[family]
    listed = list(itertools.product(*values.values()))
    settings = dict(zip(values, listed[int(draw.integers(len(listed)))], strict=True))
    while family == "nb201" and CELL not in settings:
        ops = draw.integers(len(OPERATIONS), size=len(EDGES))
        if nb201_connected(ops[None])[0]:
            settings[CELL] = ops.tolist()
    return Architecture(family, settings)


def _value(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value).lower()
