"""A small pooled network for comparisons on a CPU: a tenth of the time of a step of VGG, a third of LeNet-5."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from devices.bounds import checked
from fedsim.errors import ConfigError
from fedsim.models.shapes import HeadedNetwork, Size, image_shape


@checked("model", ConfigError)
class SmallCNN(HeadedNetwork):
    """conv3x3 width, stride 2 - pool - conv3x3 2 width - pool - hidden - classes, ReLU; 38,634 parameters for CIFAR-10.

    Our own, for runs by the hundred; no published figure belongs to it.

    Args:
        input_shape: channels, height, width; at least 8x8.
        num_classes: size of the output.
        width: channels of the first layer.
        hidden: units of the hidden layer.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: Size, width: Size = 16, hidden: Size = 64):
        super().__init__()
        channels, height, width_px = image_shape("small_cnn", input_shape, smallest=8)
        pixels = ((height + 1) // 2 // 4) * ((width_px + 1) // 2 // 4)
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * pixels, hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, num_classes)
