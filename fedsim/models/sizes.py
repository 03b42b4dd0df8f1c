"""The widths and depths of the model configs that a search under a limit goes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Sizes = Mapping[str, Sequence[Any]]  # values of a setting, by its name

# Constructors' own settings, from a microcontroller's size to some times the paper's.
SIZES: Mapping[str, Sizes] = {
    "bcresnet": {"tau": (1.0, 1.5, 2.0, 3.0, 6.0, 8.0)},
    "bcresnet_asc": {"tau": (1.0, 1.5, 2.0, 3.0, 6.0, 8.0)},
    "char_lstm": {"hidden": (32, 64, 128, 256, 512), "layers": (1, 2)},
    "convnet": {"channels": ([8, 16], [12, 24], [16, 32], [32, 64], [8, 16, 32], [16, 32, 64], [32, 64, 128])},
    "ds_cnn": {"width": (16, 32, 64, 96, 128, 192), "depth": (2, 4, 6)},
    "femnist_cnn": {"hidden": (64, 128, 256, 512, 1024, 2048)},
    "matchboxnet": {"blocks": (3, 6), "repeats": (1, 2), "width": (32, 64, 112)},
    "mlp": {"hidden": ([], [32], [64], [128], [256], [64, 64], [128, 128], [256, 256])},
    "nb201": {"channels": (8, 16, 24, 32), "cells": (1, 2, 3, 5)},
    "resnet8": {"depth": (8, 14, 20, 26, 32), "width": (8, 16, 24, 32, 48, 64)},
    "small_cnn": {"width": (4, 8, 16, 24, 32, 48, 64), "hidden": (16, 32, 64, 128)},
    "speech_resnet": {"depth": (8, 15, 26), "width": (19, 45)},
    "vgg": {"width": (4, 8, 16, 24, 32), "hidden": (64, 128, 256, 512)},
}
