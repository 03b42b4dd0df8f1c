"""CIFAR-10, CIFAR-100 and MNIST from their official files, read by torchvision.

torchvision checks the files against their published MD5 before it unpickles CIFAR's. May import: torchvision (lazily),
`fedsim.data`, `devices.errors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from devices.errors import unknown
from fedsim.data.arrays import Arrays, ArrayWorkload
from fedsim.data.bundle import bundle_names, data_roots
from fedsim.errors import ConfigError, DataError
from fedsim.partition import Partition
from fedsim.workload import ModelFactory


class Official(NamedTuple):
    """How torchvision calls a data set and in which folder of the root its files lie."""

    class_name: str
    folder: str


OFFICIAL = {
    "cifar10": Official("CIFAR10", "cifar-10-batches-py"),
    "cifar100": Official("CIFAR100", "cifar-100-python"),
    "mnist": Official("MNIST", "MNIST/raw"),
}


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
        if dataset not in OFFICIAL:
            raise ConfigError(unknown("workload.dataset", dataset, OFFICIAL))
        train, test, classes = _read(dataset, _find_root(dataset, root), download)
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
        dataset = str(settings["dataset"])
        root = _find_root(dataset, settings.get("root"))
        if (root / OFFICIAL[dataset].folder).is_dir():
            return "image", True, str(root / OFFICIAL[dataset].folder)
        return "image", False, _how_to_get(dataset, root)


def _find_root(dataset: str, root: str | None) -> Path:
    roots = [Path(root).expanduser()] if root else data_roots()
    return next((r for r in roots if (r / OFFICIAL[dataset].folder).is_dir()), roots[0])


def _how_to_get(dataset: str, root: Path) -> str:
    bundle = f", or use the bundle: workload=bundle workload.path={dataset}" if dataset in bundle_names() else ""
    return f"set workload.download=true or put the official files into {root / OFFICIAL[dataset].folder}{bundle}"


def _read(dataset: str, root: Path, download: bool) -> tuple[Arrays, Arrays, list[str]]:
    import torchvision

    make = getattr(torchvision.datasets, OFFICIAL[dataset].class_name)
    try:
        sets = [make(root=str(root), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:  # absent, broken, or the download failed
        if download:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{dataset} could not be downloaded into {root}: {reason}") from None
        raise DataError(f"{dataset} is not here or broken: {_how_to_get(dataset, root)}") from None
    train, test = (Arrays(np.asarray(part.data), np.asarray(part.targets)) for part in sets)
    return train, test, [str(name) for name in sets[0].classes]
