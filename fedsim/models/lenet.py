"""LeNet-5 with ReLU and max-pooling, as federated papers use it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.shapes import HeadedNetwork, Size, image_shape


@checked("model", ConfigError)
class LeNet5(HeadedNetwork):
    """conv5x5 6 (padding 2) - pool - conv5x5 16 - pool - 120 - 84 - classes; 61,706 parameters for MNIST.

    Args:
        input_shape: channels, height, width; at least 12x12.
        num_classes: size of the output.
    Source: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998, which has 32x32 inputs, tanh
        units and trained sub-sampling; here 28x28 is padded in the first layer.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: Size):
        super().__init__()
        channels, height, width = image_shape("lenet5", input_shape, smallest=12)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2),
            nn.MaxPool2d(2),  # before the ReLU: the same numbers, gradients included, for a quarter of the work
            nn.ReLU(),
            nn.Conv2d(6, 16, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2), 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
        )
        self.head = nn.Linear(84, num_classes)
