"""Latency models that look at the network: the structured cost model, fitted per device, and HELP for its own space.

The structured model prices the layer table that comes with the work, so that pruned and narrowed networks cost what
their true shapes cost; HELP prices networks of its search space by their encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from devices.cost import LatencyModel, ModelCost, Passes, Work
from devices.errors import DeviceError
from devices.latency.calibrate import Backend, at_least, datasheet_prices
from devices.latency.columns import MAC_KINDS, MAC_ROWS, TABLE_KINDS, WINOGRAD_GAIN, Phase, Physics, from_0_1
from devices.latency.limits import least_ms, least_work_s, physics_of
from devices.latency.prices import MEASURED_BASES, Prices
from devices.latency.prior import Facts, shipped_prior
from devices.profile import DeviceProfile, LatencyFacts, Units
from devices.reading import read_yaml
from devices.trace import COLUMNS, KINDS, LayerTable, trace

USUAL_RATIO = 3.0  # of a training step to a forward pass, where a device has no figure (FedScale's rule)
INT8_BITS = 8  # for which runtimes have kernels
MAX_FILLED_SHARE = 0.5  # of a reference's time, for kinds that the references do not tell apart
USUAL_BYTES_PER_S = 10e9  # of an unknown memory, for weights of layers that no reference has
MAX_FRAMEWORK_THREADS = 8  # of the training rows; the cost of calls with more threads is not extrapolated


@dataclass(frozen=True)
class DevicePrices:
    """The prices of a device's passes.

    Attributes:
        inference: of a deployed network, in the device's inference runtime.
        forward: of a forward pass in the training runtime: evaluation, teachers, side passes.
        step: of a whole training step; None for a device that cannot train.
    """

    inference: Prices
    forward: Prices
    step: Prices | None


class StructuredLatency(LatencyModel):
    """Non-negative prices of multiply-adds, activations, weights and calls by layer kind, inside physical bounds.

    A device's own measurements come first; what they do not tell comes from a prior over many devices, in units of the
    device's peak and bandwidth. Training steps have prices of their own.
    """

    def compute_s(self, work: Work, device: DeviceProfile) -> float:
        """Returns the seconds of the passes in the training runtime; a backward pass is the step less the forward pass.

        Raises:
            DeviceError: for a device without latencies or a peak, a network that was not traced, or training on a
                device that cannot train.
        """
        prices, total_ms = device_prices(device), 0.0
        for p in work.passes:
            layers, backwards = _layers(p.network), _backwards(p)
            forward_ms = prices.forward.ms(layers, p.batch)
            total_ms += p.forwards * forward_ms
            if backwards:
                total_ms += backwards * max(0.0, _step(prices, device).ms(layers, p.batch) - forward_ms)
        return max(float(total_ms) / 1e3 / device.speed, least_work_s(work, device, prices.forward, prices.step))

    def least_s(self, work: Work, device: DeviceProfile) -> float:
        """Returns the seconds of the passes at the device's peak and bandwidth."""
        prices = device_prices(device)
        return least_work_s(work, device, prices.forward, prices.step)

    def inference_ms(self, network: ModelCost, device: DeviceProfile) -> float:
        """Returns the milliseconds of one forward pass of one example in the device's inference runtime."""
        return pass_ms(device_prices(device).inference, network, 1, device, "inference")

    def compute_joules(self, work: Work, device: DeviceProfile, compute_s: float) -> float:
        """Returns watts times seconds; on a card with an energy model, base watts times seconds plus its work.

        A board draws its limit at most. Where the work would take more, the seconds are the better known of the two:
        the joules of a multiply-add were carried from another card, or the unit is one that needs less for each.
        """
        limit = compute_s * device.compute_watts
        if device.base_watts is None:
            return limit
        joules = device.base_watts * compute_s
        for p in work.passes:
            macs, moved = macs_and_bytes(_layers(p.network), p.batch)
            times = p.forwards + (USUAL_RATIO - 1) * _backwards(p)
            joules += times * (device.joules_per_mac * macs + device.joules_per_byte * moved)
        return min(joules, limit)

    def seconds(self, works: Sequence[Work], units: Units) -> tuple[np.ndarray, np.ndarray]:
        """Returns `compute_s` and `least_s` of each client, with each pass of a network on a model priced once."""
        priced: dict[tuple[int, int, int, bool], tuple[float, float, float, float]] = {}
        sums_ms = []
        for work, model in zip(works, units.model.tolist(), strict=True):
            total_ms = floor_ms = 0.0
            for p in work.passes:
                key = model, id(p.network), p.batch, p.backwards > 0
                if key not in priced:
                    priced[key] = _pass_prices(p, units.models[model])
                forward_ms, backward_ms, forward_floor_ms, backward_floor_ms = priced[key]
                total_ms += p.forwards * forward_ms
                floor_ms += p.forwards * forward_floor_ms
                if p.backwards:
                    total_ms += _backwards(p) * backward_ms
                    floor_ms += _backwards(p) * backward_floor_ms
            sums_ms.append((total_ms, floor_ms))
        usual_s, least_s = np.array(sums_ms).reshape(-1, 2).T / 1e3
        return np.maximum(usual_s / (units.column(lambda device: device.speed) * units.speed), least_s), least_s

    def joules(self, works: Sequence[Work], units: Units, compute_s: np.ndarray) -> np.ndarray:
        """Returns `compute_joules` of each client, which does not depend on the speed of a unit."""
        found: np.ndarray = compute_s * units.column(lambda device: device.compute_watts)
        for number in np.flatnonzero(units.column(lambda device: device.base_watts is not None)).tolist():
            own = units.models[units.model[number]]
            found[number] = self.compute_joules(works[number], own, float(compute_s[number]))
        return found


def _pass_prices(p: Passes, device: DeviceProfile) -> tuple[float, float, float, float]:
    """Returns milliseconds of a forward and a backward pass on a device's usual unit, and the least of each."""
    prices, layers = device_prices(device), _layers(p.network)
    forward_ms = prices.forward.ms(layers, p.batch)
    forward_floor_ms = least_ms(layers, p.batch, device, "forward", prices.forward)
    if not p.backwards:
        return forward_ms, 0.0, forward_floor_ms, 0.0
    step = _step(prices, device)
    backward_ms = max(0.0, step.ms(layers, p.batch) - forward_ms)
    backward_floor_ms = max(0.0, least_ms(layers, p.batch, device, "step", step) - forward_floor_ms)
    return forward_ms, backward_ms, forward_floor_ms, backward_floor_ms


def _backwards(passes: Passes) -> float:
    """Returns backward passes of the whole network: frozen layers take off their share of its FLOPs."""
    return passes.backwards * passes.network.backward_share


def _layers(network: ModelCost) -> tuple[tuple[float, ...], ...]:
    if network.layers is None:
        raise DeviceError(f"network {network.name!r} was not traced, so only latency=flops can price it")
    return network.layers


def _step(prices: DevicePrices, device: DeviceProfile) -> Prices:
    if prices.step is None:
        only = f"runs networks in {prices.inference.precision} only and cannot train"
        raise DeviceError(f"device {device.name!r} ({device.kind}) {only}; take another device")
    return prices.step


def step_ms(network: ModelCost, batch: int, device: DeviceProfile) -> tuple[float, float]:
    """Returns the milliseconds of a forward pass (inference runtime) and of a whole training step on a device.

    Raises:
        DeviceError: as `StructuredLatency.compute_s`.
    """
    prices = device_prices(device)
    forward_ms = pass_ms(prices.inference, network, batch, device, "inference")
    return forward_ms, pass_ms(_step(prices, device), network, batch, device, "step")


def pass_ms(prices: Prices, network: ModelCost, batch: int, device: DeviceProfile, what: str) -> float:
    """Returns the milliseconds of one pass on this unit of a device: never below what its datasheet allows.

    Args:
        prices: of the pass.
        network: that was traced.
        batch: examples.
        device: the unit.
        what: inference, forward (of the training runtime) or step.
    """
    layers = _layers(network)
    return max(prices.ms(layers, batch) / device.speed, least_ms(layers, batch, device, what, prices))


def int8_ms(network: ModelCost, batch: int, device: DeviceProfile) -> float | None:
    """Returns the milliseconds of a forward pass on integer kernels; None where the device was not measured so.

    By prices of its own where they were fitted, else by the ratio of int8 networks to the same ones in floating point,
    which is above 1 on some devices.
    """
    if device.latency is None:
        return None
    if device.latency.int8 is not None:
        return device.latency.int8.ms(_layers(network), batch) / device.speed
    if device.latency.int8_over_float is None:
        return None
    prices = device_prices(device).inference
    return device.latency.int8_over_float * pass_ms(prices, network, batch, device, "inference")


def deployed_ms(latency: LatencyModel, network: ModelCost, device: DeviceProfile, bits: int) -> float:
    """Returns the milliseconds of one inference of a network whose weights and activations have so many bits.

    Only 8 bits have kernels of their own, and only where they were measured does time change with them.
    """
    ms = latency.inference_ms(network, device)
    if bits != INT8_BITS or network.layers is None:
        return ms
    own = int8_ms(network, 1, device)
    return ms if own is None else ms * own / pass_ms(device_prices(device).inference, network, 1, device, "inference")


@lru_cache(maxsize=4096)
def macs_and_bytes(layers: tuple[tuple[float, ...], ...], batch: int) -> tuple[float, float]:
    """Returns a pass's multiply-adds, and the bytes of activations and weights that it reads and writes, in fp32."""
    table = np.array(layers)
    macs = batch * table[MAC_ROWS, 0].sum()
    return float(macs), float(4 * (batch * table[:, 1].sum() + table[:, 2].sum()))


def device_prices(device: DeviceProfile) -> DevicePrices:
    """Returns what a device costs: its own prices where it has them, else those of the prior at its peak.

    Raises:
        DeviceError: for a device whose profile has neither latencies nor a peak.
    """
    facts, physical = device.latency, physics_of(device)
    return _device_prices(device.name, device.kind, facts, physical)


@lru_cache(maxsize=1024)
def _device_prices(
    name: str, kind: str, facts: LatencyFacts | None, physical: tuple[Physics, Facts] | None
) -> DevicePrices:
    if kind == "mcu":
        if facts is None or facts.inference is None:
            raise DeviceError(f"device {name!r} has no measured latencies; a microcontroller cannot be priced without")
        return DevicePrices(facts.inference, facts.inference, None)
    known = None if facts is None else facts.inference
    old = None
    if known is None and facts is not None and (facts.coefficients_ms or facts.references):
        old = _of_0_1(facts)
        known = old[0]
    if physical is None:
        if known is None:
            raise DeviceError(
                f"device {name!r} has no measured latencies and no peak (compute.peak_gmacs_per_s); "
                "add one of them to its profile or take latency=flops"
            )
        return _prefer_own(facts, DevicePrices(known, known, old[1] if old else _assumed(known, USUAL_RATIO)))
    inference = known or from_datasheet("inference", physical)
    if old is not None and not (facts and (facts.forward or facts.step)):
        return DevicePrices(inference, inference, old[1])
    return _prefer_own(
        facts, DevicePrices(inference, from_datasheet("forward", physical), from_datasheet("train_step", physical))
    )


def _prefer_own(facts: LatencyFacts | None, made: DevicePrices) -> DevicePrices:
    """Puts a device's own prices before general ones, so that a step never takes less than its forward pass.

    Measured prices win over others: a step that was not measured costs at least as much as a measured forward pass; a
    forward pass that was not measured costs at most as much as a measured one, or as a step, which holds one in any
    runtime.
    """
    forward = (facts.forward if facts else None) or made.forward
    step = (facts.step if facts else None) or made.step
    if step is None:
        return DevicePrices(made.inference, forward, None)
    if step.basis not in MEASURED_BASES:
        floor = at_least(forward, made.inference) if step.basis == "carried" else forward
        return DevicePrices(made.inference, forward, at_least(step, floor))
    if forward.basis not in MEASURED_BASES:
        forward = replace(forward, most=step)
    else:
        step = at_least(step, forward)
    unmeasured = made.inference.basis not in MEASURED_BASES
    held = forward if forward.basis in MEASURED_BASES else step
    return DevicePrices(replace(made.inference, most=held) if unmeasured else made.inference, forward, step)


def from_datasheet(what: str, physical: tuple[Physics, Facts]) -> Prices:
    """Returns prices of a device without rows; `what` is inference, forward (of the training runtime) or train_step."""
    physics, facts = physical
    card = physics.isa == "gpu"
    if what == "inference" and not card:
        return datasheet_prices(shipped_prior("mobile"), physics, facts, "forward", Backend("ncnn", fused=True))
    family = f"{'gpu' if card else 'cpu'}_{'train_step' if what == 'train_step' else 'forward'}"
    backend = Backend("pytorch_cuda" if card else "pytorch", fused=False)
    own = replace(physics, winograd=card)
    single = replace(facts, half_precision=False, threads=min(facts.threads, MAX_FRAMEWORK_THREADS))
    phase: Phase = "train_step" if what == "train_step" else "forward"
    basis = "datasheet" if card else "carried"
    return datasheet_prices(shipped_prior(family), own, single, phase, backend, basis)


# --- profiles of fedsim 0.1, estimators, and devices that only HELP's tables know -------------------------------------


def _of_0_1(facts: LatencyFacts) -> tuple[Prices, Prices]:
    """Prices a pass and a step from coefficients of 0.1, or fitted to references of search spaces, without bounds."""
    if facts.coefficients_ms:
        rows = np.array(facts.coefficients_ms[:-1]).reshape(-1, 4)
        table = np.array(from_0_1(rows.tolist(), as_prices=True))
        constant = facts.coefficients_ms[-1]
        networks = 0
    else:
        table, constant = fit_references(facts)
        networks = len(facts.references)
    forward = Prices.of_cells(
        table, constant_ms=float(constant), error=facts.sigma, networks=networks, rows=networks, batches=(1, 256)
    )
    given = dict(facts.train_ratio)
    old = {"conv3x3": "conv", "grouped": "depthwise", "foldable": "elementwise"}
    ratios = np.array([given.get(kind, given.get(old.get(kind, kind), USUAL_RATIO)) for kind in TABLE_KINDS])
    step = replace(
        Prices.of_cells(table * ratios[:, None], constant_ms=USUAL_RATIO * float(constant)),
        basis="rows" if given else "assumed",
    )
    return forward, step


def _assumed(prices: Prices, ratio: float) -> Prices:
    return replace(prices.scaled(ratio), basis="assumed", error=None)


def fit_references(facts: LatencyFacts) -> tuple[np.ndarray, float]:
    """Fits prices [10, 4] in milliseconds and a constant for a device without a datasheet, e.g. a user's board.

    A column that is the same for all references of a space and batch would only tell the spaces apart, and is left
    out. Kinds that no reference has are priced like the multiply-adds of the others, with weights at 10 GB/s; layers
    that were measured as free stay free.
    """
    from devices.latency.structured import StructuredPredictor

    latency_ms = np.array([ms for *_, ms in facts.references])
    sums = reference_features(facts)
    groups: dict[tuple[str, int], list[int]] = {}
    for row, (space, _, batch, _) in enumerate(facts.references):
        groups.setdefault((space, batch), []).append(row)
    varies = np.any([np.ptp(sums[rows], axis=0) > 0 for rows in groups.values()], axis=0)
    varies[-1] = True
    fitted = np.asarray(StructuredPredictor.fit(sums * varies, latency_ms).coefficients)
    shape = (len(KINDS), len(COLUMNS))
    table, amounts = fitted[:-1].reshape(shape), sums[:, :-1].reshape(-1, *shape)
    measured = varies[:-1].reshape(shape).any(axis=1)
    dense = [i for i, kind in enumerate(KINDS) if kind in MAC_KINDS]
    known = [i for i in dense if measured[i]]
    macs = amounts[:, known, 0].sum()
    per_mac = float((table[known] * amounts[:, known].sum(axis=0)).sum() / macs) if known and macs else 0.0
    filled = np.zeros(shape)
    filled[[i for i in dense if not measured[i]]] = per_mac, 0.0, 4e3 / USUAL_BYTES_PER_S, 0.0
    # A filled-in price must not count twice: the references' own classifiers are in their times already.
    spent = (amounts * filled).sum(axis=(1, 2))
    if spent.any():
        filled *= min(1.0, float((MAX_FILLED_SHARE * latency_ms[spent > 0] / spent[spent > 0]).min()))
        spent = (amounts * filled).sum(axis=(1, 2))
        fitted = np.asarray(StructuredPredictor.fit(sums * varies, latency_ms - spent).coefficients)
    return fitted[:-1].reshape(shape) + filled, float(fitted[-1])


def reference_features(facts: LatencyFacts) -> np.ndarray:
    """Returns layer sums of a device's references at the batch they were measured with, [references, 41]."""
    rows = []
    for space, network, batch, _ in facts.references:
        table = reference_table(space, network)
        rows.append(np.append((table * [batch, batch, 1, 1]).ravel(), 1.0))
    return np.stack(rows)


def reference_table(space: str, network: str) -> np.ndarray:
    """Returns the layer table of a reference network, [10, 4]."""
    return np.array(_shipped_tables().get(space, {}).get(network) or traced_reference(space, network).rows)


@lru_cache(maxsize=1)
def _shipped_tables() -> dict[str, dict[str, list[list[float]]]]:
    """Reads the layer tables of the shipped profiles' networks: tracing them would take seconds at every start."""
    tables: dict[str, dict[str, list[list[float]]]] = read_yaml(Path(__file__).parent.parent / "references.yaml")
    return tables


def traced_reference(space: str, network: str) -> LayerTable:
    """Builds and traces a reference network and returns its layer table."""
    import torch

    from devices.nas.fbnet import FBNet
    from devices.nas.nb201 import NB201Network

    build = {"nb201": NB201Network, "fbnet": FBNet}[space]
    return trace(build(_ids(network), norm="batch"), torch.zeros(1, 3, 32, 32))


class HelpLatency(LatencyModel):
    """HELP: the meta-learned predictor, for networks of the search space that its weights are for.

    It predicts one forward pass at the batch that was measured, so a batch costs its size times that, a training step
    three times a forward pass; the structured model knows better.

    Args:
        weights: file of meta-trained weights, npz or safetensors.
        space: what the weights are for; profiles carry HELP's references of "nb201".
        seed: of the draws of HELP's gates.
    """

    def __init__(self, weights: str, space: str = "nb201", seed: int = 0):
        from devices.latency.help.weights import load_weights

        self.space, self.seed = space, seed
        self.weights = load_weights(weights, space)
        self._known: dict[tuple[LatencyFacts, str], float] = {}

    def compute_s(self, work: Work, device: DeviceProfile) -> float:
        """Returns the seconds of the passes.

        Raises:
            DeviceError: for a network outside the space, or a device without measurements of the space.
        """
        total_ms = 0.0
        for p in work.passes:
            ms = p.batch * self.forward_ms(p.network, device)
            total_ms += ms * (p.forwards + (USUAL_RATIO - 1) * _backwards(p))
        return max(total_ms / 1e3 / device.speed, self.least_s(work, device))

    def least_s(self, work: Work, device: DeviceProfile) -> float:
        """Returns seconds at the peak; HELP's tables do not say which of their runtimes saved by Winograd."""
        return super().least_s(work, device) / WINOGRAD_GAIN

    def forward_ms(self, network: ModelCost, device: DeviceProfile) -> float:
        """Returns the milliseconds of one forward pass on the device's model."""
        space, _, word = (network.encoding or "").partition(":")
        if space != self.space:
            what = f"network {network.name!r} is " + (f"of space {space}" if space else "of no search space")
            raise DeviceError(
                f"{what}, and latency=help can price networks of {self.space} only; take latency=structured"
            )
        facts = device.latency
        measured = [] if facts is None else [r for r in facts.references if r[0] == space and r[2] == 1]
        if facts is None or len(measured) < 2 or not facts.embedding_ms:
            raise DeviceError(f"device {device.name!r} has no measurements of {space} that HELP could adapt to")
        if (facts, word) not in self._known:
            from devices.latency.help.predictor import HelpPredictor

            support = np.array([_ids(r[1]) for r in measured])
            measured_ms = np.array([r[3] for r in measured])
            fitted = HelpPredictor.fit(self.weights, np.array(facts.embedding_ms), support, measured_ms, self.seed)
            self._known[facts, word] = max(0.0, float(fitted.predict(np.array([_ids(word)]))[0]))
        return self._known[facts, word]


def _ids(word: str) -> list[int]:
    return [int(character) for character in word]
