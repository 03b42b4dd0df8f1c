"""What every model of this package asks of the shape it is built for."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.errors import ConfigError


def image_shape(model: str, input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """Returns channels, height and width.

    Args:
        model: what the error calls the model.
        input_shape: of one example as the network is fed.
        smallest: least height and width that the network can take.

    Raises:
        ConfigError: if these are no images, or too small ones.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise ConfigError(
            f"model {model} needs images [channels, height, width] of at least {smallest}x{smallest}, got examples of "
            f"shape {list(input_shape)}; try model={'mlp' if len(input_shape) != 1 else 'mlp or, for text, char_lstm'}"
        )
    channels, height, width = input_shape
    return channels, height, width


def positive(model: str, **sizes: int) -> None:
    """Raises ConfigError for the first size that is no whole number of at least 1."""
    for key, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"model.{key} of model {model} must be a whole number of at least 1, got {size!r}")


def dropout_rate(model: str, dropout: float) -> float:
    """Raises ConfigError unless the rate is in [0, 1)."""
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout of model {model} must be in [0, 1), got {dropout!r}")
    return dropout
