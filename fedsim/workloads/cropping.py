"""Augmentation of training images: how they are moved and mirrored anew in every round."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from devices.bounds import Checked
from fedsim.errors import ConfigError
from fedsim.workloads.augmenting import Probability


class CropAndFlip(Checked, group="workload.augment", error=ConfigError):
    """Random crops of the padded image, and random mirror images, as is usual for CIFAR.

    Every draw is the client's and the round's own. An image is changed once a round, as sounds are: all local epochs of
    a round see the same crop. Held-out examples, the means that FedMix shares, and the others' examples of an oracle
    stay as they are. Pixels are copied, so it takes no multiply-adds and is priced at nothing.

    Args:
        padding: black pixels on each side, from which a part of the image's own size is cut; 0 never crops.
        flip: probability that an image is mirrored, left to right.
    """

    changes = "images"

    def __init__(self, padding: Annotated[int, Ge(0)] = 4, flip: Probability = 0.5):
        self.padding, self.flip = padding, flip

    @property
    def acts(self) -> bool:
        """Returns whether it changes anything."""
        return self.padding > 0 or self.flip > 0

    def check_sides(self, height: int, width: int) -> None:
        """Raises ConfigError where a crop could miss the image."""
        if self.padding >= min(height, width):
            raise ConfigError(
                f"workload.augment.padding must be less than the {min(height, width)} pixels of an image's shorter "
                f"side, got {self.padding}"
            )

    def images(self, x: Tensor, black: Tensor, draw: torch.Generator) -> Tensor:
        """Returns changed copies of images.

        Args:
            x: as the network is fed, [n, channels, height, width].
            black: what it is fed for a black pixel, [1, channels, 1, 1].
            draw: of the client and the round.
        """
        count, _, height, width = x.shape
        down, right = torch.randint(2 * self.padding + 1, (2, count, 1), generator=draw)
        mirrored = torch.rand(count, 1, generator=draw) < self.flip
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        columns = torch.where(mirrored, columns.flip(1), columns)
        padded = black.to(x).expand(-1, -1, height + 2 * self.padding, width + 2 * self.padding).repeat(count, 1, 1, 1)
        padded[:, :, self.padding : self.padding + height, self.padding : self.padding + width] = x
        places = (torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :])
        each, rows, columns = (place.to(x.device) for place in places)
        return padded[each, :, rows, columns].permute(0, 3, 1, 2)
