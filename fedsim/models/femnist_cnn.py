"""The two-convolution network of the FedAvg paper, the usual one for (FE)MNIST."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.shapes import HeadedNetwork, Size, image_shape


@checked("model", ConfigError)
class FemnistCNN(HeadedNetwork):
    """conv5x5 32 - pool - conv5x5 64 - pool - hidden - classes; 1,663,370 parameters for MNIST with 512 hidden units.

    Args:
        input_shape: channels, height, width; at least 4x4.
        num_classes: size of the output.
        hidden: units of the hidden layer: 512 in McMahan et al., 2048 in LEAF (Caldas et al. 2018).
    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        section 3.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: Size, hidden: Size = 512):
        super().__init__()
        channels, height, width = image_shape("femnist_cnn", input_shape, smallest=4)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.MaxPool2d(2),  # before the ReLU: the same numbers, gradients included, for a quarter of the work
            nn.ReLU(),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, num_classes)
