"""What an image of a task is given as: responses of a small convolutional network with random weights, never trained.

A trained network would know classes that are to be held out, and have to be shipped; this one follows from a seed. Its
filters tell textures, contrast and colours apart, and know no objects (MetaD2A takes a ResNet-18 of ImageNet).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.meta.tasks import Task
from fedsim.seeding import generator

FEATURES = 128
PER_CLASS = 20  # images that stand for a class
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
