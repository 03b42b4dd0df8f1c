"""Predicts what one pass of a network takes on a device, and says how far that is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from devices.cost import ModelCost, Passes, Work
from devices.errors import DeviceError
from devices.latency.models import StructuredLatency, device_prices, pass_ms
from devices.latency.prices import Prices
from devices.profile import DeviceProfile

MOSTLY_CALLS = 0.5  # share of calls above which a time says more about the runtime than about the network
IN_WORDS = {
    "rows": "measured",
    "few rows": "measured on few networks",
    "one row": "scaled to one measurement",
    "threads": "measured with another number of threads",
    "datasheet": "computed from the datasheet",
    "carried": "estimated from other devices by peak speed",
    "assumed": "assumed as a multiple of the forward pass",
    "scaled": "scaled from another device",
}


@dataclass(frozen=True)
class Pass:
    """One forward pass, or one training step.

    Attributes:
        ms: milliseconds.
        joules: energy of the device during the pass.
        error: relative error to expect; None where nobody knows it.
        calls_share: share of the time that is overhead of calls.
        remarks: why this is an extrapolation; empty where measured networks surround it.
        basis: one of `devices.latency.prices.BASES`.
    """

    ms: float
    joules: float
    error: float | None
    calls_share: float
    remarks: tuple[str, ...]
    runtime: str
    threads: int
    precision: str
    basis: str

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return {**vars(self), "remarks": list(self.remarks)}


@dataclass(frozen=True)
class Prediction:
    """A forward pass and a training step on a device; no step where it cannot train."""

    device: DeviceProfile
    batch: int
    forward: Pass
    step: Pass | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        step = self.step.to_dict() if self.step else None
        return {"device": self.device.name, "kind": self.device.kind, "forward": self.forward.to_dict(), "step": step}


def predict(network: ModelCost, batch: int, device: DeviceProfile) -> Prediction:
    """Predicts time and energy of a forward pass in the inference runtime and of a step in the training runtime.

    Raises:
        DeviceError: for a network that was not traced, or a device that nothing is known of.
    """
    if network.layers is None:
        raise DeviceError(f"network {network.name!r} was not traced, so only latency=flops can price it")
    prices = device_prices(device)
    forward = _passed(prices.inference, network, Passes(network, batch, 1), device, "inference")
    step = _passed(prices.step, network, Passes(network, batch, 1, 1), device, "step") if prices.step else None
    return Prediction(device, batch, forward, step)


def _passed(prices: Prices, network: ModelCost, passes: Passes, device: DeviceProfile, what: str) -> Pass:
    layers = network.layers
    assert layers is not None
    ms = pass_ms(prices, network, passes.batch, device, what)
    remarks = prices.remarks(layers, passes.batch)
    if ms > prices.ms(layers, passes.batch) / device.speed:
        remarks.append("its prices are above the peak or bandwidth of the device, which count instead")
    return Pass(
        ms=ms,
        joules=StructuredLatency().compute_joules(Work((passes,)), device, ms / 1e3),
        error=prices.error,
        calls_share=prices.calls_share(layers, passes.batch),
        remarks=tuple(remarks),
        runtime=prices.runtime,
        threads=prices.threads,
        precision=prices.precision,
        basis=prices.basis,
    )
