"""CIFAR-10, CIFAR-100 and MNIST from their official files, read by torchvision.

torchvision checks the files against their published MD5 before it unpickles CIFAR's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from fedsim.workloads.arrays import Arrays, ArrayWorkload, DataSet
from fedsim.workloads.official import Official

CLASSES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST"}  # as torchvision calls them
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "mnist": "MNIST/raw"}


class Torchvision(ArrayWorkload):
    """An official image set: CIFAR [3, 32, 32] or MNIST [1, 28, 28].

    Args:
        dataset: cifar10, cifar100 or mnist.
        root: folder with the official files; None looks in $FEDSIM_DATA, then ./data.
        download: fetch the files when they are not there.
        name: of the workload; that of the data set when empty.
        arrays: arguments of ArrayWorkload.

    Raises:
        ConfigError: if the data set is not known.
        DataError: if the files are not there or broken.
    """

    def __init__(
        self,
        dataset: Literal["cifar10", "cifar100", "mnist"],
        name: str = "",
        root: str | None = None,
        download: bool = False,
        **arrays: Any,
    ):
        self.dataset, self.root, self.download = dataset, root, download
        super().__init__(name=name or dataset, **arrays)

    def read(self) -> DataSet:
        train, test, classes = _read(self.dataset, self.root, self.download)
        return DataSet(train, test, classes, "image", self.name)

    @staticmethod
    def locate(settings: Mapping[str, Any]) -> tuple[str, bool, str]:
        """Returns the kind, whether the data are here, and where or how to get them."""
        here, where = _official(str(settings["dataset"])).found(settings.get("root"))
        return "image", here, where


def _official(dataset: str) -> Official:
    return Official(dataset, FOLDERS[dataset], dataset, f"workload=bundle workload.path={dataset}")


def _read(dataset: str, given: str | None, download: bool) -> tuple[Arrays, Arrays, list[str]]:
    import torchvision

    make, files = getattr(torchvision.datasets, CLASSES[dataset]), _official(dataset)
    root = files.root(given)
    sets = files.read(
        lambda: [make(root=str(root), train=train, download=download) for train in (True, False)], root, download
    )
    train, test = (Arrays(np.asarray(part.data), np.asarray(part.targets)) for part in sets)
    return train, test, [str(name) for name in sets[0].classes]
