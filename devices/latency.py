"""Latency models that know the network: the structured cost model, fitted per device, and HELP for its own space.

Both price the layer table that comes with the work, so pruned and narrowed networks cost what their true shapes cost.
May import: numpy, yaml, torch (where a network is traced) and this package.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from devices.cost import LatencyModel, NetworkCost, Passes, Work
from devices.errors import DeviceError
from devices.profile import DeviceProfile, LatencyFacts
from devices.trace import KINDS, LayerTable, trace

USUAL_RATIO = 3.0  # a training step over a forward pass, where no ratio was measured (FedScale's rule)


class StructuredLatency(LatencyModel):
    """Non-negative costs per layer kind: MACs, activations, weights, calls; plus a constant per pass.

    The coefficients come from a device's own measurements. A layer kind that none of its references has is priced at
    the device's rate on the others and their cost per call: a stated assumption, not a measurement.
    """

    def compute_s(self, work: Work, device: DeviceProfile) -> float:
        """Seconds of the passes: a backward pass is the step's time less the forward's, by layer kind.

        Raises:
            DeviceError: for a device without latencies, or a network that was not traced.
        """
        coefficients, ratios = device_coefficients(device)
        total_ms = 0.0
        for p in work.passes:
            by_kind = kind_ms(p.network, p.batch, coefficients)
            total_ms += p.forwards * by_kind.sum() + _backwards(p) * (by_kind * (ratios - 1)).sum()
        return float(total_ms) / 1e3 / device.speed


def _backwards(passes: Passes) -> float:
    """Backward passes, in those of the whole network: with frozen layers they take the share of its FLOPs they have."""
    return passes.backwards * passes.network.backward_share


def step_ms(network: NetworkCost, batch: int, device: DeviceProfile) -> tuple[float, float]:
    """Milliseconds of a forward pass and of a whole training step (forward, backward, update) on a device."""
    coefficients, ratios = device_coefficients(device)
    by_kind = kind_ms(network, batch, coefficients) / device.speed
    return float(by_kind.sum()), float((by_kind * ratios).sum())


def int8_ms(network: NetworkCost, batch: int, device: DeviceProfile) -> float | None:
    """Milliseconds of a forward pass on integer kernels; None for a device that was not measured with them."""
    if device.latency is None or not device.latency.int8_coefficients_ms:
        return None
    fitted = np.array(device.latency.int8_coefficients_ms)
    coefficients = np.concatenate([fitted, [0.0, 0.0, 0.0]])
    return float(kind_ms(network, batch, coefficients).sum()) / device.speed


def kind_ms(network: NetworkCost, batch: int, coefficients: np.ndarray) -> np.ndarray:
    """Milliseconds of one forward pass by layer kind and, last, the constant, [8]."""
    return (features(network, batch) * coefficients).reshape(-1, 4).sum(1)


def features(network: NetworkCost, batch: int) -> np.ndarray:
    """The network's sums for a batch, [32]: seven kinds by four columns, and a constant in a row of its own."""
    if network.layers is None:
        raise DeviceError(f"network {network.name!r} was not traced, so only latency=flops can price it")
    return _features(network.layers, batch)


@lru_cache(maxsize=256)
def _features(layers: tuple[tuple[float, ...], ...], batch: int) -> np.ndarray:
    table = np.array(layers) * [batch, batch, 1, 1]
    return np.concatenate([table.ravel(), [1.0, 0.0, 0.0, 0.0]])


def device_coefficients(device: DeviceProfile) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds per feature, [32], and the ratio of a training step to a forward pass by kind and constant, [8].

    Raises:
        DeviceError: for a device whose profile has no latencies.
    """
    if device.latency is None:
        raise DeviceError(
            f"device {device.name!r} has no measured latencies; add them to its profile or take latency=flops"
        )
    return _coefficients(device.latency)


@lru_cache(maxsize=1024)
def _coefficients(facts: LatencyFacts) -> tuple[np.ndarray, np.ndarray]:
    fitted = np.array(facts.coefficients_ms) if facts.coefficients_ms else _fit(facts)
    table = _with_unmeasured(fitted[:-1].reshape(len(KINDS), 4))
    given = dict(facts.train_ratio)
    ratios = np.array([given.get(kind, USUAL_RATIO) for kind in KINDS] + [USUAL_RATIO])
    return np.concatenate([table.ravel(), [fitted[-1], 0.0, 0.0, 0.0]]), ratios


def _fit(facts: LatencyFacts) -> np.ndarray:
    from devices.structured import StructuredPredictor

    latency_ms = np.array([ms for *_, ms in facts.references])
    sums = reference_features(facts)
    # A column that is the same for all references of a space and batch (the classifier) would only tell the spaces
    # apart, and its coefficient would say nothing of the layers it stands for.
    groups: dict[tuple[str, int], list[int]] = {}
    for row, (space, _, batch, _) in enumerate(facts.references):
        groups.setdefault((space, batch), []).append(row)
    varies = np.any([np.ptp(sums[rows], axis=0) > 0 for rows in groups.values()], axis=0)
    varies[-1] = True
    return np.asarray(StructuredPredictor.fit(sums * varies, latency_ms).coefficients)


def reference_features(facts: LatencyFacts) -> np.ndarray:
    """The layer sums of a device's reference networks at the batch they were measured with, [references, 29]."""
    rows = []
    for space, network, batch, _ in facts.references:
        table = np.array(_shipped_tables().get(space, {}).get(network) or traced_reference(space, network).rows)
        rows.append(np.append((table * [batch, batch, 1, 1]).ravel(), 1.0))
    return np.stack(rows)


@lru_cache(maxsize=1)
def _shipped_tables() -> dict[str, dict[str, list[list[float]]]]:
    """Layer tables of the shipped profiles' networks: tracing all of them anew would take seconds at every start."""
    tables: dict[str, dict[str, list[list[float]]]] = yaml.safe_load(
        (Path(__file__).parent / "references.yaml").read_text()
    )
    return tables


def traced_reference(space: str, network: str) -> LayerTable:
    """The layer table of a reference network, by building and tracing it."""
    import torch

    from devices.nas.fbnet import FBNet
    from devices.nas.nb201 import NB201Network

    build = {"nb201": NB201Network, "fbnet": FBNet}[space]
    return trace(build(_ids(network), norm="batch"), torch.zeros(1, 3, 32, 32))


def _with_unmeasured(table: np.ndarray) -> np.ndarray:
    """Prices kinds without any coefficient like the mean of the measured ones, by MACs and by call."""
    measured = table.any(axis=1)
    filled = table.copy()
    if measured.any():
        used = table[measured]
        for column in (0, 3):
            positive = used[:, column][used[:, column] > 0]
            filled[~measured, column] = positive.mean() if len(positive) else 0.0
    return filled


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
        from devices.help_weights import load_weights

        self.space, self.seed = space, seed
        self.weights = load_weights(weights, space)
        self._known: dict[tuple[LatencyFacts, str], float] = {}

    def compute_s(self, work: Work, device: DeviceProfile) -> float:
        """Seconds of the passes.

        Raises:
            DeviceError: for a network outside the space, or a device without measurements of the space.
        """
        total_ms = 0.0
        for p in work.passes:
            ms = p.batch * self.forward_ms(p.network, device)
            total_ms += ms * (p.forwards + (USUAL_RATIO - 1) * _backwards(p))
        return total_ms / 1e3 / device.speed

    def forward_ms(self, network: NetworkCost, device: DeviceProfile) -> float:
        """Milliseconds of one forward pass on the device's model."""
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
            from devices.help import HelpPredictor

            support = np.array([_ids(r[1]) for r in measured])
            measured_ms = np.array([r[3] for r in measured])
            fitted = HelpPredictor.fit(self.weights, np.array(facts.embedding_ms), support, measured_ms, self.seed)
            self._known[facts, word] = max(0.0, float(fitted.predict(np.array([_ids(word)]))[0]))
        return self._known[facts, word]


def _ids(word: str) -> list[int]:
    return [int(character) for character in word]
