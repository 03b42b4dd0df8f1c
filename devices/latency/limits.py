"""Limits that no unit of a device can beat: its work at the datasheet's peak and bandwidth.

A client's unit may be faster than its model and a round faster than usual, but nothing computes above its peak.
"""

from __future__ import annotations

from functools import lru_cache

from devices.cost import Work
from devices.latency.columns import FOLDABLE, Phase, Physics, counts
from devices.latency.prices import Prices
from devices.latency.prior import IN_ORDER, Facts, recalled
from devices.profile import DeviceProfile

NEWEST_YEAR = 2024.0  # of the runtime that prices a device without measurements
# Multiply-adds over those in fp32 that the units of a processor, or the tensor cores of a card, do at most. A processor
# in int8 has dot products of four, and matrix extensions twice that; a microcontroller's peak is one in int8 already.
OF_PROCESSORS = {"fp32": 1.0, "fp16": 2.0, "bf16": 4.0, "int8": 8.0}
OF_CARDS = {"fp32": 1.0, "tf32": 8.0, "fp16": 16.0, "bf16": 16.0, "int8": 32.0}


def physics_of(device: DeviceProfile) -> tuple[Physics, Facts] | None:
    """Returns what the datasheet part of a profile says; None without a peak."""
    if device.peak_macs_per_s is None:
        return None
    isa = device.isa
    if isa == "none":
        isa = {"gpu": "gpu", "mcu": "mcu"}.get(
            device.kind, "arm" if device.kind in ("phone", "sbc", "embedded") else "x86"
        )
    usual = recalled()["usual_bandwidth"]
    kind = {"server_cpu": "server", "host": "desktop", "accelerator": "embedded"}.get(device.kind, device.kind)
    moved = device.memory_bytes_per_s or 1e9 * usual.get(kind, usual["embedded"])
    physics = Physics(device.peak_macs_per_s, moved, isa, device.threads, device.clock_ghz)
    return physics, Facts(device.threads, False, device.core in IN_ORDER, isa, NEWEST_YEAR)


def peak_in(device: DeviceProfile, precision: str) -> float | None:
    """Returns the multiply-adds per second at the peak in a precision; None without a peak in fp32.

    A precision that is not known here is taken as the fastest: nothing is held to a peak that it may not have.
    """
    if device.peak_macs_per_s is None:
        return None
    known = OF_CARDS if _is_card(device) else OF_PROCESSORS
    return device.peak_macs_per_s * (1.0 if device.kind == "mcu" else known.get(precision, max(known.values())))


def least_ms(
    layers: tuple[tuple[float, ...], ...], batch: int, device: DeviceProfile, what: str, prices: Prices
) -> float:
    """Returns the milliseconds below which no pass can be: multiply-adds at the peak, or bytes at the bandwidth.

    Args:
        layers: a layer table, [10, 4].
        batch: examples.
        device: whose peak and bandwidth count; one without a peak has no limit, and 0 comes back.
        what: inference, forward (of the training runtime) or step.
        prices: of the pass: a precision has a peak of its own, and a runtime that folds layers does not pay for them.

    Source: the bounds of `columns.Physics`. Winograd saves three of four multiply-adds of a 3x3 convolution in
    inference and on cards, and none in a step.
    """
    known, peak = physics_of(device), peak_in(device, prices.precision)
    if known is None or peak is None:
        return 0.0
    folded = not any(prices.cells[FOLDABLE])
    winograd = what == "inference" or known[0].isa == "gpu"
    element = {"fp16": 2, "bf16": 2, "int8": 1}.get(prices.precision, 4)
    phase: Phase = "train_step" if what == "step" else "forward"
    physics = Physics(peak, known[0].bytes_per_s, known[0].isa, element_bytes=element, winograd=winograd)
    return _least_ms(layers, batch, physics, phase, folded)


@lru_cache(maxsize=4096)
def _least_ms(layers: tuple[tuple[float, ...], ...], batch: int, physics: Physics, phase: Phase, folded: bool) -> float:
    return float(physics.least_ms(counts(layers, batch, folded), phase))


def least_work_s(work: Work, device: DeviceProfile, forward: Prices, step: Prices | None) -> float:
    """Returns the seconds below which the passes of some work cannot be; untraced networks count nothing."""
    total_ms = 0.0
    for p in work.passes:
        if p.network.layers is None:
            continue
        forward_ms = least_ms(p.network.layers, p.batch, device, "forward", forward)
        total_ms += p.forwards * forward_ms
        if p.backwards and step is not None:
            step_ms = least_ms(p.network.layers, p.batch, device, "step", step)
            total_ms += p.backwards * p.network.backward_share * max(0.0, step_ms - forward_ms)
    return total_ms / 1e3


def _is_card(device: DeviceProfile) -> bool:
    return device.isa == "gpu" or (device.isa == "none" and device.kind == "gpu")
