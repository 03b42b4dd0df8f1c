"""Gaussian class blobs, made on demand: tests and benchmarks with any number of clients and no data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedsim.errors import ConfigError
from fedsim.seeding import generator
from fedsim.workloads.arrays import check_fraction, held_out
from fedsim.workloads.base import ClientData, Examples, ModelFactory
from fedsim.workloads.classification import ClassificationWorkload
from fedsim.workloads.host_memory import check_fits
from fedsim.workloads.partition import Partition

PATCHES = 4  # an image's centre is a grid of 4 x 4 grey values


class Blobs(ClassificationWorkload):
    """Each class is a Gaussian of standard deviation 1 around its own centre.

    A client's examples are drawn when they are asked for, from (seed, client id) alone, so a million clients cost
    nothing. The test split is drawn by itself, with equally likely classes.

    Args:
        model, num_clients, seed, name, client_test_fraction, default_clients: see `ArrayWorkload`.
        partition: ignored; every client makes its own examples.
        num_classes: how many blobs.
        input_shape: of one example, e.g. (16,) or, image-shaped, (1, 28, 28).
        examples_per_client: of which `client_test_fraction` are held out.
        test_examples: size of the test split.
        separation: distance of the centres from the origin, in standard deviations; 0 cannot be learnt.
        alpha: class mix of a client ~ Dirichlet(alpha), small is skewed; None: all classes equally likely.

    Raises:
        ConfigError: if a setting is wrong.
    """

    kind = "tabular"

    def __init__(
        self,
        model: ModelFactory,
        num_clients: int | None,
        seed: int,
        partition: Partition | None = None,
        name: str = "blobs",
        num_classes: int = 10,
        input_shape: Sequence[int] = (16,),
        examples_per_client: int = 32,
        test_examples: int = 1000,
        separation: float = 4.0,
        alpha: float | None = None,
        client_test_fraction: float = 0.1,
        default_clients: int = 100,
    ):
        super().__init__(model, seed)
        num_clients = default_clients if num_clients is None else num_clients
        if not isinstance(input_shape, Sequence) or isinstance(input_shape, str) or not input_shape:
            raise ConfigError(f"workload.input_shape must be a list of sizes, e.g. [1, 28, 28], got {input_shape!r}")
        counts = {
            "num_clients": num_clients,
            "workload.num_classes": num_classes,
            "workload.examples_per_client": examples_per_client,
            "workload.test_examples": test_examples,
            **{f"workload.input_shape[{i}]": size for i, size in enumerate(input_shape)},
        }
        for key, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{key} must be a whole number of at least 1 for workload blobs, got {value!r}")
        if not isinstance(separation, int | float) or not 0 <= separation < math.inf:
            raise ConfigError(f"workload.separation must be a finite number of at least 0, got {separation!r}")
        if alpha is not None and (not isinstance(alpha, int | float) or not 0 < alpha < math.inf):
            raise ConfigError(f"workload.alpha must be null or a finite number above 0, got {alpha!r}")
        check_fraction(client_test_fraction)
        _check_memory(math.prod(input_shape), num_classes, examples_per_client, test_examples)
        self.name, self.num_clients, self.num_classes = name, num_clients, num_classes
        self.input_shape = tuple(input_shape)
        self.classes = [str(label) for label in range(num_classes)]
        self.kind = "image" if len(self.input_shape) == 3 else "tabular"
        self.examples_per_client, self.alpha = examples_per_client, alpha
        self.client_test_fraction = client_test_fraction
        centres = self._directions(generator(seed, "blobs", "centres"))
        self._centres = (separation * centres / np.linalg.norm(centres, axis=1, keepdims=True)).astype(np.float32)
        rng = generator(seed, "blobs", "test")
        self.test = self._draw(rng.integers(num_classes, size=test_examples), rng)

    def client_data(self, client_id: int) -> ClientData:
        """The examples of one client, drawn anew and equal at every call.

        Raises:
            IndexError: if there is no such client.
        """
        self.check_client(client_id)
        rng = generator(self.seed, "blobs", "client", client_id)
        mix = None if self.alpha is None else rng.dirichlet(np.full(self.num_classes, self.alpha))
        drawn = self._draw(rng.choice(self.num_classes, self.examples_per_client, p=mix), rng).tensors
        held = held_out(self.examples_per_client, self.client_test_fraction)
        return ClientData(
            Examples({key: t[held:] for key, t in drawn.items()}), Examples({key: t[:held] for key, t in drawn.items()})
        )

    def _directions(self, rng: np.random.Generator) -> np.ndarray:
        """Where each class lies from the origin, [classes, features]; for images in patches that convolutions see."""
        if self.kind != "image":
            return rng.standard_normal((self.num_classes, math.prod(self.input_shape)))
        channels, height, width = self.input_shape
        coarse = rng.standard_normal((self.num_classes, channels, PATCHES, PATCHES))
        rows, columns = (np.arange(size) * PATCHES // size for size in (height, width))
        return coarse[:, :, rows[:, None], columns].reshape(self.num_classes, -1)

    def _draw(self, y: np.ndarray, rng: np.random.Generator) -> Examples:
        noise = rng.standard_normal((len(y), self._centres.shape[1]), dtype=np.float32)
        x = (self._centres[y] + noise).reshape(len(y), *self.input_shape)
        return Examples({"x": torch.from_numpy(x), "y": torch.from_numpy(y.astype(np.int64))})

    @staticmethod
    def locate(settings: Mapping[str, Any]) -> tuple[str, bool, str]:
        """Kind, whether the data are here, and where or how to get them."""
        return "tabular", True, "made on demand"


def _check_memory(features: int, num_classes: int, examples_per_client: int, test_examples: int) -> None:
    """Refuses more than this host can hold: centres in float64 and float32, examples in float32 with their noise.

    Raises:
        ConfigError: naming the setting.
    """
    for key, rows in (
        ("num_classes", 2 * num_classes),
        ("examples_per_client", examples_per_client),
        ("test_examples", test_examples),
    ):
        check_fits(f"workload.{key}={rows // 2 if key == 'num_classes' else rows}", 12.0 * rows * features)
