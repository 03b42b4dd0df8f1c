"""What a network does, told by its answers to one fixed batch of Gaussian noise of several kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from devices.draws import stream

IMAGES = 8  # of each kind
WHOLE = 10**6  # a grain that no image is larger than
MIDDLE = 3 / 16  # deviation of a spot in the middle, as a share of the side
LEAST = 1e-3  # spread of answers below which no differences are told


@dataclass(frozen=True)
class Noise:
    """One kind of noise.

    Attributes:
        grain: pixels of one colour, downwards and across.
        in_colour: each channel has noise of its own.
        mean, deviation: of each image.
        where: the noise is strong.
    """

    grain: tuple[int, int]
    in_colour: bool = False
    mean: float = 0.0
    deviation: float = 1.0
    where: Literal["everywhere", "middle", "edge"] = "everywhere"

    def images(self, shape: Sequence[int], draw: np.random.Generator) -> Tensor:
        """Draws images, [8, channels, height, width] float32."""
        channels, height, width = shape
        down, across = self.grain
        size = (IMAGES, channels if self.in_colour else 1, -(-height // down), -(-width // across))
        x = torch.from_numpy(draw.standard_normal(size))
        x = x.repeat_interleave(min(down, height), 2).repeat_interleave(min(across, width), 3)[..., :height, :width]
        if self.where != "everywhere":
            rows, columns = ((torch.arange(n) - (n - 1) / 2) / (MIDDLE * n) for n in (height, width))
            spot = torch.exp(-(rows[:, None].square() + columns.square()) / 2)
            x = x * (spot if self.where == "middle" else 1 - spot)
        x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
        return (self.mean + self.deviation * x).expand(-1, channels, -1, -1).float()


KINDS = (
    *(Noise((grain, grain), in_colour) for grain in (1, 2, 4, 8) for in_colour in (True, False)),
    Noise((1, WHOLE)),
    Noise((WHOLE, 1)),
    Noise((2, 2), where="middle"),
    Noise((2, 2), where="edge"),
    Noise((4, 4), mean=1.0, deviation=0.5),
    Noise((4, 4), mean=-1.0, deviation=0.5),
    Noise((2, 2), in_colour=True, deviation=0.3),
    Noise((2, 2), in_colour=True, deviation=2.0),
)
PROBES = len(KINDS) * IMAGES
FUNCTIONAL = 2 * len(KINDS)


def probe_batch(shape: Sequence[int]) -> Tensor:
    """Returns the noise, [128, channels, height, width] float32, the same on every machine."""
    draw = stream(0, "tans probe")
    return torch.cat([kind.images(shape, draw) for kind in KINDS])


@torch.no_grad()
def probe_answers(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Returns the outputs of a network for the probe, [128, classes]; the network is left in evaluation mode."""
    answers: Tensor = model.eval()(probe_batch(shape))
    return answers


def functional_embedding(answers: Tensor) -> Tensor:
    """Returns how strongly a network answers each kind of noise, [32], in whatever order its classes are.

    Of each kind these are the spread of the outputs over the classes, a mean over its images, and the spread over the
    images, a mean over the classes, as logarithms.
    """
    kinds = (answers - answers.mean(1, keepdim=True)).unflatten(0, (len(KINDS), IMAGES))
    over_classes, over_images = kinds.std(2, correction=0).mean(1), kinds.std(1, correction=0).mean(1)
    return torch.log(torch.cat([over_classes, over_images]) + LEAST)
