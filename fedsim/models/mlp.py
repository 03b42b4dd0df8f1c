"""Multi-layer perceptron for anything that is fed as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import nn

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.shapes import DropoutRate, HeadedNetwork, Size

NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


@checked("model", ConfigError)
class MLP(HeadedNetwork):
    """Flattens its input; hidden layers with ReLU; a linear head.

    Args:
        input_shape: of one example, any number of dimensions.
        num_classes: size of the output.
        hidden: width of each hidden layer; empty gives a linear model.
        norm: of each hidden layer, before its ReLU: "batch", "layer" or None.
        dropout: probability of dropping a hidden unit; 0 adds no layer.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: Size,
        hidden: Sequence[Size] = (64,),
        norm: Literal["batch", "layer"] | None = None,
        dropout: DropoutRate = 0.0,
    ):
        super().__init__()
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(len(hidden)):
            normalise = [NORMS[norm](widths[i + 1])] if norm is not None else []
            layers += [nn.Linear(widths[i], widths[i + 1]), *normalise, nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)
