"""What the networks of this package have in common: bounds of their sizes, the shape of images, the linear head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Interval
from torch import Tensor, nn

from fedsim.errors import ConfigError

Size = Annotated[int, Ge(1)]
DropoutRate = Annotated[float, Interval(ge=0, lt=1)]


class HeadedNetwork(nn.Module):
    """A network that ends in a linear head; what comes before it is in `body`, or in a `features` of its own.

    Attributes:
        takes_tokens: it is fed with token ids, not with numbers.
    """

    takes_tokens = False
    body: nn.Module
    head: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """Returns what the head sees: [batch, features] of x [batch, *input_shape]."""
        found: Tensor = self.body(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [batch, classes] of x [batch, *input_shape]; of a sequence [batch, steps, classes]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def image_shape(model: str, input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """Returns channels, height and width of the images that a network is built for.

    Args:
        model: what the error calls the network.
        input_shape: of one example as the network is fed.
        smallest: least height and width that the network can take.

    Raises:
        ConfigError: if these are no images, or too small ones.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        others = (
            "mlp or, for text, char_lstm; sound becomes images (spectrograms) with workload=kws workload.path=BUNDLE"
        )
        raise ConfigError(
            f"model {model} needs images [channels, height, width] of at least {smallest}x{smallest}, got examples of "
            f"shape {list(input_shape)}; try model={'mlp' if len(input_shape) != 1 else others}"
        )
    channels, height, width = input_shape
    return channels, height, width
