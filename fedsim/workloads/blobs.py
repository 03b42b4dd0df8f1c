"""Gaussian class blobs, made on demand: tests and benchmarks with any number of clients and no data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, MinLen

from fedsim.errors import ConfigError
from fedsim.seeding import generator
from fedsim.workloads.arrays import TestFraction, held_out
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
        size_alpha: a client's share of all examples ~ Dirichlet(size_alpha) over the clients, but for their sum, as
            each is drawn by itself: `examples_per_client` in the mean, and 2 at least; None: all have as many.

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
        num_classes: Annotated[int, Ge(1)] = 10,
        input_shape: Annotated[Sequence[Annotated[int, Ge(1)]], MinLen(1)] = (16,),
        examples_per_client: Annotated[int, Ge(1)] = 32,
        test_examples: Annotated[int, Ge(1)] = 1000,
        separation: Annotated[float, Ge(0)] = 4.0,
        alpha: Annotated[float, Gt(0)] | None = None,
        size_alpha: Annotated[float, Gt(0)] | None = None,
        client_test_fraction: TestFraction = 0.1,
        default_clients: Annotated[int, Ge(1)] = 100,
    ):
        super().__init__(model, seed)
        num_clients = default_clients if num_clients is None else num_clients
        if isinstance(num_clients, bool) or not isinstance(num_clients, int) or num_clients < 1:
            wanted = "a whole number of at least 1 for workload blobs"
            raise ConfigError(f"num_clients must be {wanted}, got {num_clients!r}")
        _check_memory(math.prod(input_shape), num_classes, examples_per_client, test_examples)
        self.name, self.num_clients, self.num_classes = name, num_clients, num_classes
        self.input_shape = tuple(input_shape)
        self.classes = [str(label) for label in range(num_classes)]
        self.kind = "image" if len(self.input_shape) == 3 else "tabular"
        self.examples_per_client, self.alpha, self.size_alpha = examples_per_client, alpha, size_alpha
        self.client_test_fraction = client_test_fraction
        centres = self._directions(generator(seed, "blobs", "centres"))
        self._centres = (separation * centres / np.linalg.norm(centres, axis=1, keepdims=True)).astype(np.float32)
        rng = generator(seed, "blobs", "test")
        self.test = self._draw(rng.integers(num_classes, size=test_examples), rng)

    def client_data(self, client_id: int) -> ClientData:
        """Returns the examples of one client, drawn anew and equal at every call.

        Raises:
            IndexError: if there is no such client.
        """
        self.check_client(client_id)
        rng = generator(self.seed, "blobs", "client", client_id)
        mix = None if self.alpha is None else rng.dirichlet(np.full(self.num_classes, self.alpha))
        size = self.examples_per_client
        if self.size_alpha is not None:
            share = generator(self.seed, "blobs", "size", client_id).gamma(self.size_alpha) / self.size_alpha
            size = max(2, round(size * share))
        drawn = self._draw(rng.choice(self.num_classes, size, p=mix), rng).tensors
        held = held_out(size, self.client_test_fraction)
        return ClientData(
            Examples({key: t[held:] for key, t in drawn.items()}), Examples({key: t[:held] for key, t in drawn.items()})
        )

    def root_examples(self, count: int) -> Examples:
        """Returns fresh examples of equally likely classes."""
        check_fits(f"strategy.root_examples={count}", 12.0 * count * self._centres.shape[1])
        rng = generator(self.seed, "blobs", "root")
        return self._draw(rng.integers(self.num_classes, size=count), rng)

    def _directions(self, rng: np.random.Generator) -> np.ndarray:
        """Draws the direction of each class, [classes, features]; images get patches that convolutions see."""
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
        """Returns the kind, whether the data are here, and where or how to get them."""
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
