"""What an image of a task is given as: responses of a small convolutional network with random weights, never trained.

A trained network would know classes that are to be held out, and have to be shipped; this one follows from a seed. Its
filters tell textures, contrast and colours apart, and know no objects (MetaD2A takes a ResNet-18 of ImageNet).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from devices.cost import ModelCost
from fedsim.meta.tasks import SIDE, Task
from fedsim.seeding import generator
from fedsim.workloads.front_end import features_cost

FEATURES = 128
PER_CLASS = 20  # images that stand for a class
IMAGES_FOR_QUERY = 100  # of a client, at most
FILTERS = ((3, 32, 5), (32, 32, 3))  # channels in and out, pixels a side; of each layer means and deviations are taken


def image_features(x: Tensor) -> Tensor:
    """Returns [n, 128] float32 from images [n, 3, height, width]: means and deviations of 64 random responses."""
    found = []
    for number, (inputs, outputs, side) in enumerate(FILTERS):
        weights = generator(0, "task features", number).standard_normal((outputs, inputs, side, side))
        x = F.conv2d(x, torch.from_numpy(weights).float() * (2 / (inputs * side * side)) ** 0.5, padding=side // 2)
        x = F.relu(x)
        found += [x.mean((2, 3)), x.std((2, 3))]
        x = F.avg_pool2d(x, 2)
    return torch.cat(found, 1)


def task_features(task: Task) -> Tensor:
    """Returns the features of all images that a task trains on, as many of each class, [classes, images, 128]."""
    order = torch.argsort(task.train_y, stable=True)
    return image_features(task.train_x[order]).reshape(task.num_classes, -1, FEATURES)


def client_features(x: Tensor) -> Tensor:
    """Returns the features [n, 128] of a client's images [n, channels, height, width], made as small as those of tasks.

    Each colour is scaled first. Grey images get three equal colours; of more than three channels the first three
    count.
    """
    small = F.interpolate(x.float(), size=SIDE, mode="area")
    return scaled_features(small[:, :3] if small.shape[1] >= 3 else small[:, :1].expand(-1, 3, -1, -1))


def client_features_cost(shape: Sequence[int]) -> ModelCost:
    """Returns what a device pays for `client_features` of one image of some shape."""
    return features_cost("features", client_features, torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))


def scaled_features(x: Tensor) -> Tensor:
    """Returns the features [n, 128] of images [n, 3, height, width], each colour of which is scaled over all."""
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True) + 1e-6
    return image_features((x - mean) / std)
