"""What nets of a zoo cost on a device: each architecture is traced and priced once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from devices.enrol.picture import traced_cost
from devices.latency.predictions import predict
from devices.nas.search import Limit
from devices.profile import DeviceProfile
from fedsim.meta.zoo import Net


@dataclass(frozen=True, eq=False)
class NetPrices:
    """Predicted costs of some nets, [n] each.

    Attributes:
        ms: of a forward pass of one example.
        step_joules: of a training step; NaN on a device that cannot train.
        macs: multiply-adds of an example.
        error: relative error to expect of `ms`; None where nobody knows it.
    """

    ms: np.ndarray
    step_joules: np.ndarray
    macs: np.ndarray
    error: float | None

    def limit(self, most_ms: float | None, margin: float | None) -> Limit:
        """Returns the limit on milliseconds.

        Args:
            most_ms: the limit; None: so that half of the nets are within it.
            margin: relative error to allow for; None: the one to expect, 0 where nobody knows it.
        """
        used = margin if margin is not None else self.error or 0.0
        most = float(np.median(self.ms)) * (1 + used) if most_ms is None else most_ms
        return Limit("ms", self.ms, most, used)


def price_nets(
    nets: Sequence[Net],
    device: DeviceProfile,
    shape: Sequence[int],
    num_classes: int,
    batch: int,
    progress: Callable[[], None] | None = None,
) -> NetPrices:
    """Predicts what nets cost on a device.

    Args:
        nets: of a zoo.
        device: that they would run on.
        shape: of an image.
        num_classes: of the head.
        batch: examples of a training step.
        progress: called after each net.

    Raises:
        DeviceError: for a device that nothing is known of.
    """
    priced: dict[str, tuple[float, float, float, float | None]] = {}
    for net in nets:
        key = net.architecture.overrides
        if key not in priced:
            model = net.architecture.build(shape, num_classes)
            cost = traced_cost(str(net.architecture), model, torch.zeros(1, *shape))
            forward, step = predict(cost, 1, device).forward, predict(cost, batch, device).step
            joules = step.joules if step is not None else float("nan")
            priced[key] = (forward.ms, joules, cost.forward_flops / 2, forward.error)
        if progress is not None:
            progress()
    found = [priced[net.architecture.overrides] for net in nets]
    known = [error for *_, error in found if error is not None]
    ms, step_joules, macs = (np.array([own[column] for own in found]) for column in range(3))
    return NetPrices(ms, step_joules, macs, max(known) if len(known) == len(found) else None)
