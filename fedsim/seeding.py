"""One seed in, independent named streams out.

Every random draw of a run comes from `generator(seed, purpose, ...)`: the draws of one purpose, round or client never
shift those of another.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from devices.draws import digest

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on every name: equal names, equal seed, on every machine."""
    return int.from_bytes(digest(8, int(seed), *names), "big") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A numpy generator for one purpose, e.g. `generator(seed, "jitter", round, client_id)`."""
    return np.random.default_rng(derive(seed, *names))


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """A torch generator (on the CPU) for one purpose."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))


def seed_torch(device: torch.device, seed: int) -> None:
    """Seeds torch's own generators of the CPU and of `device`, from which own layers and `F.dropout` draw.

    As torch.manual_seed, without looking through the kinds of device that are not used: a hundredth of the time.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed_all(seed)


@contextmanager
def seeded_globals(seed: int, *names: str | int) -> Iterator[None]:
    """Seeds Python's and numpy's global generators inside the block and restores them after it.

    Stock Flower strategies sample with the global `random`, and draw noise from numpy's; this is the only place where
    global generators are touched.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(derive(seed, *names))
    np.random.seed(derive(seed, *names) % 2**32)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
