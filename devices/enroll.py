"""Measures this host with the zoo and makes a device profile of it.

Reference networks are run forward at two batch sizes, as training steps, and in int8 where the backend has it; the
structured predictor is fitted to the medians and judged on networks that it never saw. May import: torch, numpy, yaml
and this package. Bandwidth cannot be measured from inside and is given by the caller or assumed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from scipy.stats import spearmanr
from torch import nn

from devices.compression.kernels import int8_network
from devices.errors import DeviceError
from devices.structured import StructuredPredictor, choose_references
from devices.trace import KINDS, trace
from devices.zoo import HELD_OUT, ZOO

BATCHES = (1, 8)
TRAIN_BATCH = 8
REFERENCES = 20
NOISY = 0.15  # interquartile range over median beyond which a measurement is repeated
SAMPLE_S = 0.002  # shorter runs are repeated within one sample
Watch = Callable[[str, int, int], None]  # what, done, of


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: median of the samples, and how far the middle half of them spreads, relative to it."""

    ms: float
    spread: float

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY


@dataclass
class Enrolment:
    """What the measurement of a host gave.

    Attributes:
        forward, train, int8: timings by (network, batch).
        coefficients, int8_coefficients: of the structured predictor, [29]; int8 is empty without a backend for it.
        sigma: leave-one-out relative error on the references.
        train_ratio: seconds of a training step over seconds of a forward pass, by layer kind.
        held_out: (network, batch, precision, predicted ms, measured ms).
        savings: (pruned network, batch, predicted, measured): share of the time of the dense one that pruning saves.
        gmacs_per_s: median rate over the references at batch 1.
    """

    threads: int
    load: float
    forward: dict[tuple[str, int], Timing] = field(default_factory=dict)
    train: dict[tuple[str, int], Timing] = field(default_factory=dict)
    int8: dict[tuple[str, int], Timing] = field(default_factory=dict)
    coefficients: list[float] = field(default_factory=list)
    int8_coefficients: list[float] = field(default_factory=list)
    sigma: float = 0.0
    train_ratio: dict[str, float] = field(default_factory=dict)
    held_out: list[tuple[str, int, str, float, float]] = field(default_factory=list)
    savings: list[tuple[str, int, float, float]] = field(default_factory=list)
    gmacs_per_s: float = 0.0

    def error(self, precision: str = "fp32") -> float:
        """Mean relative error on the held-out networks; 0 when there are none."""
        errors = [abs(p - m) / m for _, _, what, p, m in self.held_out if what == precision]
        return statistics.fmean(errors) if errors else 0.0

    def savings_met(self, within: float = 0.2) -> tuple[int, int]:
        """How many predicted savings have the sign of the measured one, and how many are so close to it, relatively."""
        signs = sum(predicted * measured > 0 for *_, predicted, measured in self.savings)
        return signs, sum(abs(p - m) <= within * abs(m) for *_, p, m in self.savings)

    def rank(self, precision: str = "fp32") -> float:
        """Spearman correlation of predicted and measured over the held-out networks."""
        pairs = [(p, m) for _, _, what, p, m in self.held_out if what == precision]
        return float(spearmanr(*zip(*pairs, strict=True)).statistic) if pairs else 0.0


def enroll(repeats: int = 30, threads: int = 1, watch: Watch | None = None) -> Enrolment:
    """Measures this host; about two minutes on an idle one.

    Args:
        repeats: samples per run; runs take turns, so that drift of the host spreads over all.
        threads: torch threads, as clients will use them.
        watch: called with (what is measured, done, of) for progress.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _enroll(repeats, threads, watch or (lambda what, done, of: None))
    finally:
        torch.set_num_threads(before)


def references(tables: Mapping[str, Any], count: int = REFERENCES) -> list[tuple[str, int]]:
    """The (network, batch) pairs to measure: D-optimal over every layer kind, never a held-out network."""
    pairs = [(name, batch) for name in ZOO if name not in HELD_OUT for batch in BATCHES]
    features = np.stack([tables[name].features(batch) for name, batch in pairs])
    return [pairs[i] for i in choose_references(features, np.arange(len(pairs)), count)]


def _enroll(repeats: int, threads: int, watch: Watch) -> Enrolment:
    tables = {name: trace(network.build(), network.example(1)) for name, network in ZOO.items()}
    result = Enrolment(threads, os.getloadavg()[0])
    chosen = references(tables)
    judged = [(name, batch) for name in HELD_OUT for batch in BATCHES]
    dense = [(_dense(name), batch) for name, batch in judged if _dense(name)]
    forward = dict.fromkeys([*chosen, *judged, *dense])
    result.forward = measure({key: _forward(*key) for key in forward}, repeats, "forward", watch, threads)
    steps = {(name, TRAIN_BATCH): _step(name, TRAIN_BATCH) for name in dict.fromkeys(name for name, _ in chosen)}
    result.train = measure(steps, max(5, repeats // 3), "training step", watch, threads)
    quantised = {key: run for key in [*chosen, *judged] if (run := _quantised(*key)) is not None}
    result.int8 = measure(quantised, repeats, "int8", watch, threads)

    predictor = _fit(tables, {key: result.forward[key] for key in chosen})
    result.coefficients, result.sigma = predictor.coefficients.tolist(), float(predictor.sigma)
    result.train_ratio = _train_ratio(tables, result)
    rates = [tables[name].macs / t.ms / 1e6 for (name, batch), t in result.forward.items() if batch == 1]
    result.gmacs_per_s = statistics.median(rates)
    for name, batch in judged:
        predicted = float(predictor.predict(tables[name].features(batch)[None])[0])
        result.held_out.append((name, batch, "fp32", predicted, result.forward[name, batch].ms))
        if _dense(name):
            whole = float(predictor.predict(tables[_dense(name)].features(batch)[None])[0])
            measured = result.forward[name, batch].ms / result.forward[_dense(name), batch].ms
            result.savings.append((name, batch, 1 - predicted / whole, 1 - measured))
    if result.int8:
        int8 = _fit(tables, {key: result.int8[key] for key in chosen if key in result.int8})
        result.int8_coefficients = int8.coefficients.tolist()
        for name, batch in judged:
            if (name, batch) in result.int8:
                predicted = float(int8.predict(tables[name].features(batch)[None])[0])
                result.held_out.append((name, batch, "int8", predicted, result.int8[name, batch].ms))
    return result


def _dense(name: str) -> str:
    """The network that a pruned one was; empty for others."""
    return name.partition("-keep")[0] if ZOO[name].family == "pruned" else ""


def _fit(tables: Mapping[str, Any], timings: Mapping[tuple[str, int], Timing]) -> StructuredPredictor:
    features = np.stack([tables[name].features(batch) for name, batch in timings])
    return StructuredPredictor.fit(features, np.array([t.ms for t in timings.values()]))


def _train_ratio(tables: Mapping[str, Any], result: Enrolment) -> dict[str, float]:
    """Step over forward by kind: non-negative least squares on relative errors, drawn towards the usual 3."""
    coefficients = np.array(result.coefficients)
    rows, drawn = [], 0.3
    for (name, batch), timing in result.train.items():
        by_kind = (tables[name].features(batch) * coefficients)[:-1].reshape(len(KINDS), 4).sum(1)
        rows.append((by_kind + coefficients[-1] / len(KINDS)) / timing.ms)
    a = np.vstack([*rows, drawn * np.eye(len(KINDS))])
    b = np.concatenate([np.ones(len(rows)), np.full(len(KINDS), 3 * drawn)])
    return {kind: round(float(r), 3) for kind, r in zip(KINDS, nnls(a, b)[0], strict=True)}


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(
    runs: Mapping[tuple[str, int], Callable[[], None]], repeats: int, what: str, watch: Watch, threads: int = 1
) -> dict[tuple[str, int], Timing]:
    """Times every run: warm-up, samples in turns, and up to two more rounds for those that came out noisy.

    With one thread it is that thread's own CPU time: what else the host does then lengthens nothing but the wait.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    inner = {key: _warm_up(run, clock) for key, run in runs.items()}
    timings: dict[tuple[str, int], Timing] = {}
    left: Sequence[tuple[str, int]] = list(runs)
    for attempt in range(3):
        samples: dict[tuple[str, int], list[float]] = {key: [] for key in left}
        for number in range(repeats):
            for key in left:
                started = clock()
                for _ in range(inner[key]):
                    runs[key]()
                samples[key].append((clock() - started) * 1e3 / inner[key])
            watch(f"{what}, attempt {attempt + 1}", number + 1, repeats)
        for key, times in samples.items():
            timing = _timing(times)
            if key not in timings or timing.spread < timings[key].spread:
                timings[key] = timing
        left = [key for key in left if timings[key].noisy]
        if not left:
            break
    return timings


def _timing(samples: Sequence[float]) -> Timing:
    low, middle, high = np.percentile(samples, [25, 50, 75])
    return Timing(float(middle), float((high - low) / middle))


def _warm_up(run: Callable[[], None], clock: Callable[[], float]) -> int:
    """Runs until the caches are warm; returns how often to run within one sample."""
    for _ in range(3):
        run()
    started = clock()
    run()
    return max(1, round(SAMPLE_S / max(1e-6, clock() - started)))


def _forward(name: str, batch: int) -> Callable[[], None]:
    network = ZOO[name]
    return _inference(network.build(), network.example(batch))


def _inference(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(x)

    return run


def _step(name: str, batch: int) -> Callable[[], None]:
    network = ZOO[name]
    model, x = network.build().train(), network.example(batch)
    optimiser = torch.optim.SGD(model.parameters(), 1e-4)

    def run() -> None:
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()

    return run


def _quantised(name: str, batch: int) -> Callable[[], None] | None:
    """The network on int8 kernels; None where torch cannot."""
    network = ZOO[name]
    x = network.example(batch)
    try:
        run = _inference(int8_network(network.build(), x, network.tokens), x)
        run()
    except (DeviceError, RuntimeError, NotImplementedError, AttributeError):
        return None
    return run


# --- the profile ---------------------------------------------------------------------------------------------------


def profile_tree(
    name: str, result: Enrolment, date: str, network: Mapping[str, float], watts: Mapping[str, float]
) -> dict[str, Any]:
    """The profile of the measured host as YAML will hold it; what was not measured is marked `assumed`.

    Args:
        name: of the device.
        result: of the measurement.
        date: of the measurement, for its source.
        network: down_mbps, up_mbps, rtt_ms.
        watts: compute_w, rx_w, tx_w, idle_w.
    """
    source = f"fedsim devices enroll, {date}, {result.threads} thread(s), load {result.load:.1f}"

    def measured(value: Any) -> dict[str, Any]:
        return {"value": value, "provenance": "measured", "source": source}

    def assumed(value: Any, why: str) -> dict[str, Any]:
        return {"value": value, "provenance": "assumed", "source": why}

    ram_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    given = "given to fedsim devices enroll, or its default"
    return {
        "name": name,
        "kind": "host",
        "compute": {
            "rate_gmacs_per_s": measured(round(result.gmacs_per_s, 3)),
            "jitter_sigma": measured(round(statistics.median(t.spread for t in result.forward.values()), 3)),
        },
        "memory": {
            "ram_mb": measured(ram_mb),
            "usable_fraction": assumed(0.5, "what a host leaves to a training job"),
            "runtime_mb": assumed(300, "Python and torch"),
        },
        "network": {
            **{k: assumed(v, given) for k, v in network.items()},
            "jitter_sigma": assumed(0.2, "no figure at hand"),
        },
        "power": {key: assumed(value, given) for key, value in watts.items()},
        "latency": {
            "coefficients_ms": measured([float(f"{c:.6g}") for c in result.coefficients]),
            "int8_coefficients_ms": measured([float(f"{c:.6g}") for c in result.int8_coefficients]),
            "sigma": measured(round(result.sigma, 4)),
            "train_ratio": {kind: measured(ratio) for kind, ratio in result.train_ratio.items()},
        },
    }
