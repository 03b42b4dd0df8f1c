"""What a front-end, such as a spectrogram, costs the device that computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from devices.cost import ModelCost
from devices.meter import inference_bytes
from devices.trace import trace
from fedsim.errors import ConfigError, in_words

NAME = "front-end"


class _AsNetwork(nn.Module):
    """Features as a module, so that they are traced as a network is; what they hold of torch's counts as weights."""

    def __init__(self, features: Callable[[Tensor], Tensor]):
        super().__init__()
        self.features = features
        self.parts = nn.ModuleList(part for part in vars(features).values() if isinstance(part, nn.Module))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def front_end_cost(features: Callable[[Tensor], Tensor], samples: int) -> ModelCost:
    """Counts what the features of one clip cost, as `features_cost` does.

    A real Fourier transform of N points takes 5/2 N log2 N operations, half of a complex one; a product with a mel
    matrix is a matrix product. The forward pass is all there is: nothing in a front-end is trained.

    Args:
        features: of sound [n, samples].
        samples: of a clip.

    Raises:
        ConfigError: if the features cannot be traced.
    """
    try:
        return features_cost(NAME, features, torch.zeros(2, samples))
    except Exception as error:
        name = type(features).__name__
        raise ConfigError(f"workload.features {name} cannot be priced on devices: {in_words(error)}") from error


def features_cost(name: str, features: Callable[[Tensor], Tensor], two: Tensor) -> ModelCost:
    """Counts what features of one example cost: multiply-adds, elements, calls and memory.

    Args:
        name: of the result.
        features: of examples [n, ...].
        two: two examples.
    """
    network = _AsNetwork(features).eval()
    table = trace(network, two[:1])
    held = inference_bytes(network, lambda model, batch: model(batch["x"]), {"x": two})
    weights = sum(t.numel() * t.element_size() for t in network.buffers())
    return replace(
        ModelCost(name, 2.0 * table.macs, 0.0, weights, 0, calls=round(sum(row[3] for row in table.rows))),
        layers=table.rows,
        inference_bytes=held,
    )
