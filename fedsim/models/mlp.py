"""Multi-layer perceptron for anything that is fed as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from devices.errors import unknown
from fedsim.errors import ConfigError
from fedsim.models.shapes import positive

NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class MLP(nn.Module):
    """Flattens its input; hidden layers with ReLU; a linear head.

    Args:
        input_shape: of one example, any number of dimensions.
        num_classes: size of the output.
        hidden: width of each hidden layer; empty gives a linear model.
        norm: of each hidden layer, before its ReLU: "batch", "layer" or None.
        dropout: probability of dropping a hidden unit; 0 adds no layer.
    """

    takes_tokens = False

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: Sequence[int] = (64,),
        norm: str | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if not isinstance(hidden, Sequence) or isinstance(hidden, str):
            raise ConfigError(f"model.hidden of model mlp must be a list of widths, e.g. [64], got {hidden!r}")
        if norm is not None and norm not in NORMS:
            raise ConfigError(unknown("value for model.norm of model mlp", norm, [*NORMS, "null"]))
        positive("mlp", num_classes=num_classes, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        if not 0 <= dropout < 1:
            raise ConfigError(f"model.dropout of model mlp must be in [0, 1), got {dropout}")
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(len(hidden)):
            normalise = [NORMS[norm](widths[i + 1])] if norm is not None else []
            layers += [nn.Linear(widths[i], widths[i + 1]), *normalise, nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees: [batch, hidden[-1]] from x [batch, *input_shape]."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [batch, classes] of x [batch, *input_shape]."""
        return self.head(self.features(x))
