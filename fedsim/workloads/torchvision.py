"""CIFAR-10, CIFAR-100 and MNIST from their official files, read by torchvision.

torchvision checks the files against their published MD5 before it unpickles CIFAR's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from devices.errors import unknown
from fedsim.errors import ConfigError
from fedsim.workloads.arrays import Arrays, ArrayWorkload
from fedsim.workloads.base import ModelFactory
from fedsim.workloads.official import Official
from fedsim.workloads.partition import Partition

CLASSES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST"}  # as torchvision calls them
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "mnist": "MNIST/raw"}


class Torchvision(ArrayWorkload):
    """An official image set: CIFAR [3, 32, 32] or MNIST [1, 28, 28].

    Args:
        dataset: cifar10, cifar100 or mnist.
        root: folder with the official files; None looks in $FEDSIM_DATA, then ./data.
        download: fetch the files when they are not there.
        name, model, partition, num_clients, seed, input_range, client_test_fraction, default_clients: see
            `ArrayWorkload`.

    Raises:
        ConfigError: if the data set is not known.
        DataError: if the files are not there or broken.
    """

    def __init__(
        self,
        dataset: str,
        model: ModelFactory,
        partition: Partition,
        num_clients: int | None,
        seed: int,
        name: str = "",
        root: str | None = None,
        download: bool = False,
        input_range: Literal["unit", "standard"] = "unit",
        client_test_fraction: float = 0.1,
        default_clients: int = 100,
    ):
        if dataset not in CLASSES:
            raise ConfigError(unknown("workload.dataset", dataset, CLASSES))
        train, test, classes = _read(dataset, root, download)
        super().__init__(
            name or dataset,
            train,
            test,
            classes,
            "image",
            model=model,
            partition=partition,
            num_clients=num_clients,
            seed=seed,
            input_range=input_range,
            client_test_fraction=client_test_fraction,
            default_clients=default_clients,
        )

    @staticmethod
    def locate(settings: Mapping[str, Any]) -> tuple[str, bool, str]:
        """Kind, whether the data are here, and where or how to get them."""
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
