"""A made-up space of networks on which HELP trains in seconds."""

from __future__ import annotations

import numpy as np
import pytest

from devices.latency.help.training import HelpSettings
from devices.latency.spaces import Space, SpaceSplit

SETTINGS = HelpSettings(
    episodes=8, devices=2, support=10, query=40, validate_every=4, validation_draws=1, learning_rate=1e-3
)


@pytest.fixture(scope="module")
def tiny() -> Space:
    """NAS-Bench-201 networks whose latency is the sum of their operations' costs, which differ by device.

    A hundred of them are to train with; a and b are the source devices, c is there to validate.
    """
    ops = np.random.default_rng(0).integers(0, 5, (1100, 6)).astype(np.uint8)
    costs = np.array([[0.2, 0.3, 2.0, 5.0, 1.0], [0.1, 0.2, 1.0, 3.0, 0.7], [0.3, 0.3, 3.0, 7.0, 2.0]])
    split = SpaceSplit(100, ("a", "b"), ("c",), (), {})
    return Space("nb201", ("a", "b", "c"), 1 + costs[:, ops].sum(-1), ops, np.arange(10), split)
