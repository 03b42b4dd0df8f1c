"""HELP: predicts latencies of a search space's networks on a new device from about twenty measured ones.

A device is described by its latencies on ten reference networks. From them a small network draws gates for the head of
the predictor, whose weights then take two gradient steps, with learned step sizes, on the measured support networks.
`help_predictions` does it for the tables of `devices.latency.spaces`, `HelpPredictor` for any measurements;
`devices.latency.help.training` makes the weights.

Source: Lee et al., "HELP: Hardware-Adaptive Efficient Latency Prediction for NAS via Meta-Learning", NeurIPS 2021,
written anew after the authors' code (github.com/HayeonLee/HELP). Differs: the references, which are measured anyway,
belong to the support (the authors adapt to ten others only); the scale of the labels comes from measured networks
(theirs from the extremes of the whole pool, which a new device does not have); predictions are the mean of all draws;
milliseconds come from a least-squares line through the support but for the references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from devices.draws import stream
from devices.errors import DeviceError
from devices.latency.help.encodings import encode, graph_adjacency
from devices.latency.help.weights import GATES, HEAD, REFERENCES, WIDTH, HelpWeights, Params, load_weights
from devices.latency.spaces import Space

Z_SCALING = 0.01
STEPS = 2  # of the inner loop
DRAWS = 10  # of the gates, averaged when predicting
LABEL_LOW, LABEL_SPAN = 0.05, 0.9


def hardware_embedding(reference_ms: np.ndarray) -> Tensor:
    """Describes a device by ten numbers from 0 (its fastest reference) to 1 (its slowest), [10] float32.

    Raises:
        DeviceError: unless there are ten finite positive latencies, not all equal.
    """
    ms = _latencies("reference latencies", reference_ms)
    if ms.shape != (REFERENCES,) or ms.max() == ms.min():
        raise DeviceError(f"HELP needs the latencies of its {REFERENCES} references, not all equal, got {ms.tolist()}")
    return torch.tensor((ms - ms.min()) / (ms.max() - ms.min()), dtype=torch.float32)


def labels(ms: np.ndarray, low_ms: float, high_ms: float) -> Tensor:
    """Scales latencies as the predictor learns them: 0.05 at `low_ms`, 0.95 at `high_ms`; float32."""
    scaled = (np.asarray(ms, float) - low_ms) / (high_ms - low_ms)
    return torch.tensor(LABEL_LOW + LABEL_SPAN * scaled, dtype=torch.float32)


def predict(params: Params, x: Tensor, h: Tensor) -> Tensor:
    """Predicts labels of equally many networks on several devices at once, each with its own weights.

    Args:
        params: the predictor's, each with a leading axis [devices, ...].
        x: encoded networks, [devices, networks, 9, 8] or [devices, networks, 132 or 145].
        h: hardware embeddings, [devices, 10].

    Returns:
        [devices, networks].
    """
    network = _graph_features(params, x) if "gc1.weight" in params else _vector_features(params, x)
    device = F.relu(_linear(params, "fc_hw2", F.relu(_linear(params, "fc_hw1", h.unsqueeze(1)))))  # [devices, 1, 100]
    joint = torch.cat([network, device.expand(-1, network.shape[1], -1)], dim=-1)
    joint = F.relu(_linear(params, "fc4", F.relu(_linear(params, "fc3", joint))))
    return _linear(params, "fc5", joint).squeeze(-1)


def _linear(params: Params, layer: str, x: Tensor) -> Tensor:
    return torch.baddbmm(params[f"{layer}.bias"].unsqueeze(1), x, params[f"{layer}.weight"].mT)


def _vector_features(params: Params, x: Tensor) -> Tensor:
    return F.relu(_linear(params, "fc2", F.relu(_linear(params, "fc1", x))))


def _graph_features(params: Params, x: Tensor) -> Tensor:
    """Applies four graph convolutions relu(A X W + b) and returns the global node's row, [devices, networks, 100].

    Nodes come before networks, so that the sum over neighbours is one product for all networks of a device.
    """
    devices, networks, nodes, _ = x.shape
    adjacency = graph_adjacency().to(x.dtype).expand(devices, nodes, nodes)
    x = x.transpose(1, 2)
    for layer in ("gc1", "gc2", "gc3", "gc4"):
        if layer == "gc4":
            adjacency = adjacency[:, -1:]  # only the global node is read
        x = (adjacency @ x.reshape(devices, nodes, -1)).reshape(devices, -1, x.shape[-1])
        x = F.relu(torch.baddbmm(params[f"{layer}.bias"].unsqueeze(1), x, params[f"{layer}.weight"]))
        x = x.reshape(devices, -1, networks, WIDTH)
    return x.squeeze(1)


def gate_posterior(modulator: Params, h: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and standard deviation of the gates for devices h [devices, 10]; each [devices, 603]."""
    hidden = F.relu(F.linear(h, modulator["z_encoder.0.weight"], modulator["z_encoder.0.bias"]))
    mean, spread = F.linear(hidden, modulator["z_encoder.2.weight"], modulator["z_encoder.2.bias"]).chunk(2, dim=-1)
    return mean, F.softplus(spread)


def gate_divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """Returns the KL divergence of the gates' normal distribution from N(0, 1), summed over gates, [devices]."""
    return (0.5 * (mean.square() + deviation.square() - 1) - deviation.log()).sum(-1)


def modulate(model: Params, z: Tensor) -> Params:
    """Applies gates z [devices, 603] to the predictor's weights: a copy per device, [devices, ...] each.

    An input feature of a head layer is scaled by 1 + 0.01 z, its bias shifted by 0.01 z; the other layers stay.
    """
    params = {name: tensor.expand(len(z), *tensor.shape) for name, tensor in model.items()}
    gates = Z_SCALING * z[:, : len(HEAD) * 2 * WIDTH].reshape(len(z), len(HEAD), 2 * WIDTH)
    shifts = Z_SCALING * z[:, len(HEAD) * 2 * WIDTH :]
    for i, layer in enumerate(HEAD):
        params[f"{layer}.weight"] = params[f"{layer}.weight"] * (1 + gates[:, i : i + 1])
        params[f"{layer}.bias"] = params[f"{layer}.bias"] + shifts[:, i : i + 1]
    return params


def adapt(
    params: Params, rates: Params, x: Tensor, y: Tensor, h: Tensor, steps: int = STEPS, train: bool = False
) -> Params:
    """Takes gradient steps on the support of each device, with learned rates: the inner loop of Meta-SGD.

    Args:
        params: modulated weights, [devices, ...] each.
        rates: step size per number, without the leading axis.
        x: encoded support networks, [devices, support, ...].
        y: their labels, [devices, support].
        h: hardware embeddings, [devices, 10].
        steps: how many.
        train: whether the gradients' graph is kept, so that the result has gradients for weights and rates.
    """
    for _ in range(steps):
        if not train:
            params = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
        with torch.enable_grad():
            # Devices do not share these copies, so that one sum gives every device its own gradient.
            loss = (predict(params, x, h) - y).square().mean(-1).sum()
            slopes = torch.autograd.grad(loss, list(params.values()), create_graph=train)
            params = {n: p - rates[n] * s for (n, p), s in zip(params.items(), slopes, strict=True)}
    return params if train else {name: tensor.detach() for name, tensor in params.items()}


@dataclass(frozen=True)
class HelpPredictor:
    """HELP adapted to one device.

    Attributes:
        space: search space.
        params: adapted weights, one copy per draw of the gates, [draws, ...] each.
        embedding: of the device, [10].
        slope_ms, offset_ms: label to milliseconds, fitted on the support.
    """

    space: str
    params: Params
    embedding: Tensor
    slope_ms: float
    offset_ms: float

    @classmethod
    def fit(
        cls,
        weights: HelpWeights,
        reference_ms: np.ndarray,
        support: np.ndarray,
        support_ms: np.ndarray,
        seed: int,
        draws: int = DRAWS,
        known_labels: np.ndarray | None = None,
        typical: np.ndarray | None = None,
    ) -> HelpPredictor:
        """Adapts to a device of which only these latencies are known.

        Args:
            weights: meta-trained on the networks' search space.
            reference_ms: milliseconds of the space's ten reference networks, in their order, [10].
            support: measured networks as `encode` takes them, [n, numbers]; references should be among them.
            support_ms: their milliseconds, [n], at least two.
            seed: of the draws of the gates.
            draws: how many adapted copies are averaged.
            known_labels: of the support on the source devices (`source_labels`), for a better scale of its labels, [n].
            typical: the part of the support that the line to milliseconds is fitted on, [n] bool; none for all of it.
                The references span the space to its ends, where the predictor is off by more than elsewhere.

        Raises:
            DeviceError: for a network outside the space or latencies that are not positive numbers.
        """
        x, ms, h = (
            encode(weights.space, support),
            _latencies("support latencies", support_ms),
            hardware_embedding(reference_ms),
        )
        if ms.shape != (len(x),) or len(ms) < 2:
            raise DeviceError(
                f"HELP needs a latency for each of two or more support networks, got {ms.shape} for {len(x)}"
            )
        low, high = label_range(ms, np.asarray(reference_ms, float), known_labels)
        noise = torch.from_numpy(stream(seed, "help", "gates").standard_normal((draws, GATES))).float()
        with torch.no_grad():
            mean, deviation = gate_posterior(weights.modulator, h.expand(draws, -1))
            params = modulate(weights.model, mean + deviation * noise)
        y = labels(ms, low, high)
        params = adapt(params, weights.rates, _repeat(x, draws), y.expand(draws, -1), h.expand(draws, -1))
        raw = cls(weights.space, params, h, (high - low) / LABEL_SPAN, low - LABEL_LOW * (high - low) / LABEL_SPAN)
        kept = np.full(len(ms), True) if typical is None or np.sum(typical) < 2 else typical
        line = rising_line(raw.labels(support)[kept], ms[kept]) or (raw.slope_ms, raw.offset_ms)
        return cls(weights.space, params, h, *line)

    def labels(self, networks: np.ndarray) -> np.ndarray:
        """Returns the predictor's own output, mean over the draws, [n]: right in order, without a unit."""
        x, draws = encode(self.space, networks), len(self.params["fc5.bias"])
        with torch.no_grad():
            return predict(self.params, _repeat(x, draws), self.embedding.expand(draws, -1)).mean(0).double().numpy()

    def predict(self, networks: np.ndarray) -> np.ndarray:
        """Predicts milliseconds of networks as `encode` takes them, [n]."""
        return self.offset_ms + self.slope_ms * self.labels(networks)


def label_range(
    support_ms: np.ndarray, reference_ms: np.ndarray, known_labels: np.ndarray | None = None
) -> tuple[float, float]:
    """Estimates the milliseconds that become labels 0.05 and 0.95: the pool's extremes, from measured networks only.

    When the networks' labels on the source devices are known, a least-squares line from milliseconds to label tells
    it: the less the device has in common with the sources, the flatter. Else their extremes do: of n numbers drawn
    evenly from an interval, they lie on average one (n-1)th of their distance within it. Of equal latencies, which say
    nothing, the ends of the references stand in.

    Args:
        support_ms: latencies of the networks to adapt to, [n].
        reference_ms: latencies of the references on the same device, [10].
        known_labels: see `source_labels`, of the support, [n].
    """
    line = None if known_labels is None else rising_line(support_ms, known_labels)
    if line is not None:
        slope, offset = line
        return (LABEL_LOW - offset) / slope, (LABEL_LOW + LABEL_SPAN - offset) / slope
    low, high = float(support_ms.min()), float(support_ms.max())
    if high == low:
        return float(reference_ms.min()), float(reference_ms.max())
    margin = (high - low) / (len(support_ms) - 1)
    return low - margin, high + margin


def source_labels(space: Space, devices: Sequence[str] | None = None) -> np.ndarray:
    """Returns labels of every network, mean over devices of a table, [networks]; outside 0.05..0.95 beyond the pool.

    Args:
        space: table of measured latencies.
        devices: names; None for the source devices of its split.
    """
    found = [_pool_labels(space, device) for device in devices or space.split.source]
    return np.asarray(np.mean(found, axis=0))


def _pool_labels(space: Space, device: str) -> np.ndarray:
    ms, pool = space.latency(device), space.latency(device)[space.pool(device)]
    return labels(ms, pool.min(), pool.max()).double().numpy()


def _repeat(x: Tensor, devices: int) -> Tensor:
    return x.expand(devices, *x.shape)


def _latencies(what: str, ms: np.ndarray) -> np.ndarray:
    ms = np.asarray(ms, float)
    if not np.all(np.isfinite(ms) & (ms > 0)):
        raise DeviceError(f"{what} must be positive milliseconds, got {ms.tolist()}")
    return ms


def rising_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """Returns slope and offset of the least-squares line from x to y; None if it does not rise."""
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ (y - y.mean())) / spread if spread > 0 else 0.0
    return (slope, float(y.mean() - slope * x.mean())) if slope > 0 else None


def help_predictions(
    space: Space, device: str, measured: np.ndarray, seed: int, weights: HelpWeights | str | Path
) -> np.ndarray:
    """Predicts with HELP the milliseconds of the networks that a device of a table is judged with.

    Args:
        space: table of measured latencies.
        device: one of its devices. Of its latencies only those of the references and of `measured` are looked at; of
            the source devices', also those of the pool, for the scale of the labels.
        measured: indices of the networks to adapt to, [n] int; the references should be among them.
        seed: of the draws of the gates.
        weights: meta-trained for this space, or their file (`load_weights`).

    Returns:
        One latency per network of `space.judged(device)`, in its order, float64.

    Raises:
        DeviceError: for an unknown device, wrong weights, or too few or wrong support networks.
    """
    if not isinstance(weights, HelpWeights):
        weights = load_weights(weights, space.name)
    if weights.space != space.name:
        raise DeviceError(f"HELP weights of space {weights.space} cannot predict networks of space {space.name}")
    measured, ms = np.asarray(measured), space.latency(device)
    indices = measured.ndim == 1 and np.issubdtype(measured.dtype, np.integer)
    if not indices or not np.all((measured >= 0) & (measured < len(ms))):
        raise DeviceError(f"measured must be indices of networks in 0..{len(ms) - 1}, got {measured.tolist()}")
    fitted = HelpPredictor.fit(
        weights,
        ms[space.references],
        space.ops[measured],
        ms[measured],
        seed,
        known_labels=source_labels(space)[measured],
        typical=~np.isin(measured, space.references),
    )
    return fitted.predict(space.ops[space.judged(device)])
