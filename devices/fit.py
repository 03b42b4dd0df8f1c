"""Answers whether a network fits on a device: time, energy and memory of its passes, and what would make it fit.

Memory is what a run reserves (`devices.meter`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from devices.cost import ModelCost
from devices.held import Moments
from devices.latency.predictions import Prediction, predict
from devices.meter import inference_memory_bytes, peak_memory_bytes
from devices.profile import DeviceProfile
from devices.units import short_size

LARGEST_BATCH = 512  # of the batches that are shown where a user names none
FLOAT_BYTES = 4  # of a weight in training, which is one byte of an int8 network
# Flash of microcontrollers, which profiles do not have: the last letters of these part numbers say 2 MB (recalled).
FLASH_BYTES = {"STM32H7A3": 2 * 2**20, "STM32L4R5": 2 * 2**20, "STM32U575": 2 * 2**20}


@dataclass(frozen=True)
class StepMemory:
    """The fullest moment of a training step, in bytes.

    Attributes:
        weights: parameters.
        gradients: gradients at that moment, and buffers of the network.
        optimizer: momentum.
        activations: activations, the batch, and all else that grows with it.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def to_dict(self) -> dict[str, int]:
        """Returns plain JSON types."""
        return {**vars(self), "total": self.total}


@dataclass(frozen=True)
class Row:
    """Time and memory of one batch size on a device.

    Attributes:
        memory: of a step; None where the device cannot train.
        inference_bytes: memory of an inference on the batch.
        fits: whether a step fits into the memory for training (an inference, where the device cannot train).
    """

    batch: int
    prediction: Prediction
    memory: StepMemory | None
    inference_bytes: int
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        passes = {key: value for key, value in self.prediction.to_dict().items() if key in ("forward", "step")}
        memory = self.memory.to_dict() if self.memory else None
        return {
            "batch": self.batch,
            "fits": self.fits,
            **passes,
            "step_bytes": memory,
            "inference_bytes": self.inference_bytes,
        }


@dataclass(frozen=True)
class Integers:
    """An int8 network on a microcontroller, in bytes; flash is None where it is not known."""

    weights: int
    activations: int
    sram: int
    flash: int | None

    @property
    def fits(self) -> bool:
        return self.activations <= self.sram and (self.flash is None or self.weights <= self.flash)


@dataclass(frozen=True)
class Fit:
    """The answer for a network on a device.

    Attributes:
        rows: one for each batch size.
        largest_batch: whose step fits; 0 where not even one example does, None where the device cannot train.
        needs_bytes: memory of a step with one example, or of an inference where the device cannot train.
        advice: what would make it fit, one sentence each; empty where it does.
        integers: the int8 network on a microcontroller; None for other devices.
    """

    device: DeviceProfile
    rows: tuple[Row, ...]
    largest_batch: int | None
    needs_bytes: int
    advice: tuple[str, ...] = ()
    integers: Integers | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return {
            "device": self.device.name,
            "kind": self.device.kind,
            "memory_bytes": self.device.memory_bytes,
            "can_train": self.largest_batch is not None,
            "largest_batch": self.largest_batch,
            "needs_bytes": self.needs_bytes,
            "advice": list(self.advice),
            "int8": {**vars(self.integers), "fits": self.integers.fits} if self.integers else None,
            "batches": [row.to_dict() for row in self.rows],
        }


def fit(
    network: ModelCost,
    device: DeviceProfile,
    batches: Sequence[int] = (),
    momentum: bool = False,
    others: Iterable[DeviceProfile] = (),
) -> Fit:
    """Answers what it takes to run and to train a network on a device.

    Args:
        network: with its layers and with what its passes hold (`devices.reserved.with_memory`).
        device: to run on.
        batches: sizes to answer for; powers of two up to the largest that fits when left out.
        momentum: the optimizer keeps one tensor more for each parameter.
        others: devices among which the advice names one with enough memory.

    Raises:
        DeviceError: as `devices.latency.predictions.predict`.
    """
    if predict(network, 1, device).step is None:
        return _without_training(network, device)
    held = 1.0 if momentum else 0.0
    largest = largest_batch(network, held, device.memory_bytes)
    rows = []
    for batch in batches or powers_of_two(min(largest, LARGEST_BATCH)):
        memory = step_memory(network, batch, held)
        fits = memory.total <= device.memory_bytes
        rows.append(Row(batch, predict(network, batch, device), memory, inference_memory_bytes(network, batch), fits))
    needs = step_memory(network, 1, held).total
    advice = () if largest else tuple(_advice(network, device, momentum, needs, others))
    return Fit(device, tuple(rows), largest, needs, advice)


def step_memory(network: ModelCost, batch: int, momentum: float) -> StepMemory:
    """Returns the parts of what a run of plain SGD reserves for a step; their total is the same to the byte.

    Args:
        network: see `fit`.
        batch: examples of the step.
        momentum: tensors of the optimizer for each parameter.
    """
    weights = network.parameter_bytes
    in_passes, in_update = peak_memory_bytes(network, batch, momentum), round((2 + momentum) * weights)
    total, optimizer = max(in_passes, in_update), round(momentum * weights)
    moments = network.step_bytes or ((2 * weights, network.activation_bytes),)
    fixed = max(moments, key=lambda moment: moment[0] + batch * moment[1])[0]
    gradients = weights if in_update >= in_passes else min(max(fixed - weights, 0), total - weights - optimizer)
    return StepMemory(weights, gradients, optimizer, total - weights - optimizer - gradients)


def largest_batch(network: ModelCost, momentum: float, memory_bytes: int) -> int:
    """Returns the largest batch whose step fits into so much memory; 0 if none does."""
    left = memory_bytes - round(momentum * network.parameter_bytes)
    if round((2 + momentum) * network.parameter_bytes) > memory_bytes:
        return 0
    found = min(((left - fixed) // each if each > 0 else math.inf) for fixed, each in _moments(network))
    return max(0, int(found)) if math.isfinite(found) else 0


def powers_of_two(largest: int) -> list[int]:
    """Returns 1, 2, 4 and so on up to `largest`."""
    return [2**n for n in range(max(0, largest).bit_length())]


def width_that_fits(network: ModelCost, momentum: float, memory_bytes: int) -> float:
    """Estimates how wide every layer may be so that a step with one example fits, as a factor below 1.

    Weights grow with the square of the width, activations with the width itself: fixed x w^2 + each x w = memory.
    """
    found, state = 1.0, momentum * network.parameter_bytes
    update = (2 * network.parameter_bytes, 0)
    for fixed, each in (update, *_moments(network)):
        squared = fixed + state
        if squared + each > memory_bytes:
            found = min(found, (math.sqrt(each**2 + 4 * squared * memory_bytes) - each) / (2 * squared))
    return found


def integer_bytes(network: ModelCost) -> tuple[int, int]:
    """Returns the bytes of the weights, and of the most activations at a time, of one example in int8.

    Each element takes a byte. Activations are those that torch holds, which runs one operation after the other: a
    runtime that works in place needs less.
    """
    weights = network.parameter_bytes // FLOAT_BYTES
    held = inference_memory_bytes(network, 1) - network.parameter_bytes
    return weights, -(-max(held, 0) // FLOAT_BYTES)


def _without_training(network: ModelCost, device: DeviceProfile) -> Fit:
    """Answers for a microcontroller: one example at a time, in integers."""
    weights, activations = integer_bytes(network)
    integers = Integers(weights, activations, device.memory_bytes, FLASH_BYTES.get(device.soc))
    row = Row(1, predict(network, 1, device), None, activations, integers.fits)
    advice = []
    if activations > integers.sram:
        advice.append(
            f"activations are {_times(activations / integers.sram, 'the SRAM')}: smaller images or fewer channels"
        )
    if integers.flash is not None and weights > integers.flash:
        factor = math.sqrt(integers.flash / weights)
        advice.append(f"weights are {_times(weights / integers.flash, 'the flash')}: {_narrower(factor)}")
    return Fit(device, (row,), None, activations, tuple(advice), integers)


def _advice(
    network: ModelCost, device: DeviceProfile, momentum: bool, needs: int, others: Iterable[DeviceProfile]
) -> list[str]:
    held = 1.0 if momentum else 0.0
    there = f"the {short_size(device.memory_bytes)} there are"
    found = [f"one example needs {short_size(needs)}, {_times(needs / device.memory_bytes, there)}"]
    if momentum and largest_batch(network, 0.0, device.memory_bytes):
        found.append(f"without momentum it fits, with batches up to {largest_batch(network, 0.0, device.memory_bytes)}")
    found.append(_narrower(width_that_fits(network, held, device.memory_bytes)))
    enough = [other for other in others if other.kind != "mcu" and other.memory_bytes >= needs]
    enough.sort(key=lambda other: (other.kind != device.kind, other.memory_bytes, other.name))
    if enough:
        found.append(f"{enough[0].name} ({enough[0].kind}) has {short_size(enough[0].memory_bytes)}")
    return found


def _times(factor: float, of: str) -> str:
    said = _two_digits(factor)
    return f"slightly more than {of}" if said == "1.0" else f"{said} times {of}"


def _narrower(factor: float) -> str:
    if factor < 0.005:
        return "no narrower network fits"
    said = _two_digits(factor)
    wide = "a slightly narrower network" if said == "1.0" else f"a network about {said} times as wide"
    return f"{wide} would fit"


def _two_digits(factor: float) -> str:
    rounded = float(f"{factor:.2g}")
    return f"{rounded:.0f}" if rounded >= 10 else f"{rounded:#.2g}"


def _moments(network: ModelCost) -> Moments:
    return network.step_bytes or ((2 * network.parameter_bytes, network.activation_bytes),)
