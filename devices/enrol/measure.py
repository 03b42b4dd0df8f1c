"""Measures this host with the zoo and makes a device profile of it.

Networks are run forward and as training steps at two batch sizes, and in int8 where the backend has it; prices inside
the host's physical bounds (`devices.latency.calibrate`) are fitted and judged on networks that they never saw, and on
whole families that are left out in turn. The network's bandwidth cannot be measured from inside and is given by the
caller or assumed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from devices.compression.kernels import int8_network
from devices.enrol.host import OF_PEAK, HostFigures, measure_host
from devices.enrol.zoo import HELD_OUT, ZOO
from devices.errors import DeviceError
from devices.latency.calibrate import Backend, Calibration, at_least, prices_of
from devices.latency.columns import Phase, Physics, counts
from devices.latency.limits import NEWEST_YEAR
from devices.latency.models import MAX_FRAMEWORK_THREADS
from devices.latency.prices import Prices
from devices.latency.prior import Facts, Prior, Sample, shipped_prior
from devices.trace import LayerTable, trace

BATCHES = (1, 8)
REFERENCES = tuple((name, batch) for name in ZOO if name not in HELD_OUT for batch in BATCHES)
JUDGED = tuple((name, batch) for name in HELD_OUT for batch in BATCHES)
UNSEEN_FAMILIES = ("mobilenet", "lstm", "resnet")  # each is left out of a fit of its own and predicted by it
QUICK_PERCENTILE = 10  # percentile of the samples that counts: what the host takes when nothing else disturbs it
MAX_DOUBT = 0.1  # distance of the quick quarter from it, relatively, beyond which a measurement is repeated
QUARTILES = 1.349  # standard deviations of a normal distribution between its quartiles
SAMPLE_S = 0.002  # shorter runs are repeated within one sample
INT8_GAIN = 4.0  # integer multiply-adds over those in fp32 at the peak
INT8_SPREAD = 2.0  # the prior is of fp32, so it is taken so many times as wide for int8
USUAL_CLOCK_GHZ = 2.0
Key = tuple[str, int]  # network, batch
Watch = Callable[[str, int, int], None]  # what, done, of


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run.

    Attributes:
        ms: the tenth percentile of the samples.
        spread: how far the middle half of them spreads, over the median.
        doubt: how far the quick quarter is from `ms`, over it.
    """

    ms: float
    spread: float
    doubt: float = 0.0

    @property
    def noisy(self) -> bool:
        return self.doubt > MAX_DOUBT


@dataclass
class Enrolment:
    """The measurements of a host, and the prices fitted to them.

    Attributes:
        host: its peak, bandwidth and clock.
        load: average load of the system before the measurement.
        forward, train, int8: timings by (network, batch).
        prices: by the section of a profile: forward, step, int8; no int8 without a backend for it.
        calibrations: what the fits reach on the references, by the same names.
        held_out: (network, batch, fp32 or step or int8, predicted ms, measured ms).
        unseen: (family, fp32 or step, mean relative error on all its networks when the fit has none of them).
        savings: (pruned network, batch, predicted, measured): share of the time of the dense one that pruning saves.
        gmacs_per_s: median rate over the networks at batch 1.
    """

    host: HostFigures
    load: float
    forward: dict[Key, Timing] = field(default_factory=dict)
    train: dict[Key, Timing] = field(default_factory=dict)
    int8: dict[Key, Timing] = field(default_factory=dict)
    prices: dict[str, Prices] = field(default_factory=dict)
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    held_out: list[tuple[str, int, str, float, float]] = field(default_factory=list)
    unseen: list[tuple[str, str, float]] = field(default_factory=list)
    savings: list[tuple[str, int, float, float]] = field(default_factory=list)
    gmacs_per_s: float = 0.0

    @property
    def peak_macs_per_s(self) -> float:
        """The host's peak, or the rate of the fastest network where a disturbed measurement came out below it."""
        return max([self.host.macs_per_s, *(_tables()[n].macs * b / t.ms * 1e3 for (n, b), t in self.forward.items())])

    @property
    def sigma(self) -> float:
        """The relative error on left-out references, of forward passes."""
        return self.calibrations["forward"].left_out_error or 0.0

    def error(self, what: str = "fp32") -> float:
        """Returns the mean relative error on the held-out networks; 0 when there are none."""
        errors = [abs(p - m) / m for _, _, precision, p, m in self.held_out if precision == what]
        return statistics.fmean(errors) if errors else 0.0

    def savings_met(self, within: float = 0.2) -> tuple[int, int]:
        """Counts the savings predicted with the right sign, and those `within` this share of the measured one."""
        signs = sum(predicted * measured > 0 for *_, predicted, measured in self.savings)
        return signs, sum(abs(p - m) <= within * abs(m) for *_, p, m in self.savings)

    def rank(self, what: str = "fp32") -> float:
        """Returns the Spearman correlation of predicted and measured times over the held-out networks."""
        pairs = [(p, m) for _, _, precision, p, m in self.held_out if precision == what]
        return float(spearmanr(*zip(*pairs, strict=True)).statistic) if pairs else 0.0


def enroll(repeats: int = 30, threads: int = 1, watch: Watch | None = None) -> Enrolment:
    """Measures this host; about three minutes on an idle one.

    Args:
        repeats: samples per run; runs take turns, so that drift of the host spreads over all.
        threads: torch threads, as clients will use them.
        watch: called with (what is measured, done, of) for progress.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return judged(_measured(repeats, threads, watch or (lambda what, done, of: None)))
    finally:
        torch.set_num_threads(before)


def _measured(repeats: int, threads: int, watch: Watch) -> Enrolment:
    watch("peak and bandwidth", 0, 1)
    result = Enrolment(measure_host(threads), os.getloadavg()[0])
    keys = (*REFERENCES, *JUDGED)
    result.forward = measure({key: _forward(*key) for key in keys}, repeats, "forward", watch, threads)
    result.train = measure({key: _step(*key) for key in keys}, max(5, repeats // 3), "training step", watch, threads)
    quantised = {key: run for key in keys if (run := _quantised(*key)) is not None}
    result.int8 = measure(quantised, repeats, "int8", watch, threads)
    result.host = result.host.best(measure_host(threads))
    return result


def judged(result: Enrolment) -> Enrolment:
    """Fits prices to the timings of a host and judges them; fills in what a measurement lacks."""
    for section, timings in (("forward", result.forward), ("step", result.train), ("int8", result.int8)):
        references = [key for key in REFERENCES if key in timings]
        if references:
            floor = result.prices["forward"] if section == "step" else None
            result.prices[section], result.calibrations[section] = _fit(result, section, references, floor)
    tables, prices = _tables(), result.prices
    for section, what, timings in (
        ("forward", "fp32", result.forward), ("step", "step", result.train), ("int8", "int8", result.int8)
    ):  # fmt: skip
        for name, batch in (key for key in JUDGED if key in timings):
            predicted = prices[section].ms(tables[name].rows, batch)
            result.held_out.append((name, batch, what, predicted, timings[name, batch].ms))
    for name, batch in JUDGED:
        if _dense(name):
            ms = [prices["forward"].ms(tables[n].rows, batch) for n in (name, _dense(name))]
            measured = result.forward[name, batch].ms / result.forward[_dense(name), batch].ms
            result.savings.append((name, batch, 1 - ms[0] / ms[1], 1 - measured))
    for family in UNSEEN_FAMILIES:
        result.unseen += _unseen(result, family)
    rates = [tables[name].macs / t.ms / 1e6 for (name, batch), t in result.forward.items() if batch == 1]
    result.gmacs_per_s = statistics.median(rates)
    return result


def _dense(name: str) -> str:
    """Returns the network that a pruned one was; empty for others."""
    return name.partition("-keep")[0] if ZOO[name].family == "pruned" else ""


def _members(family: str) -> list[str]:
    """Returns the networks of a family, pruned ones with the family that they were of."""
    return [name for name in ZOO if family in (ZOO[name].family, ZOO[_dense(name) or name].family)]


def _unseen(result: Enrolment, family: str) -> list[tuple[str, str, float]]:
    """Returns the errors on a family of prices that were fitted to the others."""
    members, found = _members(family), []
    own = [(name, batch) for name in members for batch in BATCHES if (name, batch) in result.forward]
    others = [key for key in REFERENCES if key[0] not in members]
    if not own:
        return []
    forward = _fit(result, "forward", others)[0]
    step = _fit(result, "step", others, forward)[0]
    for what, prices, timings in (("fp32", forward, result.forward), ("step", step, result.train)):
        errors = [abs(prices.ms(_tables()[n].rows, b) / timings[n, b].ms - 1) for n, b in own]
        found.append((family, what, statistics.fmean(errors)))
    return found


# --- fitting -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _tables() -> Mapping[str, LayerTable]:
    return {name: trace(network.build(), network.example(1)) for name, network in ZOO.items()}


def _physics(result: Enrolment, section: str) -> tuple[Physics, Facts]:
    """Returns what is known of the host for a section of its profile."""
    host = result.host
    clock = host.clock_ghz or USUAL_CLOCK_GHZ
    isa = "x86" if host.isa == "none" else host.isa  # as `devices.latency.limits.physics_of` takes a host
    fp32 = Physics(result.peak_macs_per_s, host.bytes_per_s, isa, host.threads, clock, winograd=False)
    facts = Facts(min(host.threads, MAX_FRAMEWORK_THREADS), isa=isa, year=NEWEST_YEAR)
    if section == "int8":
        return replace(fp32, macs_per_s=INT8_GAIN * fp32.macs_per_s, element_bytes=1), facts
    return fp32, facts


def _prior(section: str) -> Prior:
    prior = shipped_prior("cpu_train_step" if section == "step" else "cpu_forward")
    return replace(prior, covariance=INT8_SPREAD**2 * prior.covariance) if section == "int8" else prior


def _fit(
    result: Enrolment, section: str, keys: Sequence[Key], forward: Prices | None = None
) -> tuple[Prices, Calibration]:
    """Fits prices of one section to the timings of some networks; a step never costs less than `forward`."""
    timings = {"forward": result.forward, "step": result.train, "int8": result.int8}[section]
    phase: Phase = "train_step" if section == "step" else "forward"
    fused = section == "int8"  # torch's workflow folds norms and rectifiers into the layers before them
    physics, facts = _physics(result, section)
    sample = Sample(
        "host",
        tuple(name for name, _ in keys),
        np.stack([counts(_tables()[name].rows, batch, fused) for name, batch in keys]),
        np.array([timings[key].ms for key in keys]),
        physics,
        facts,
        phase,
    )
    batches = [batch for _, batch in keys]
    backend = Backend("pytorch", fused, "int8" if section == "int8" else "fp32")
    made, found = prices_of(sample, _prior(section), backend, batches)
    made = replace(made, threads=result.host.threads)
    return made if forward is None else at_least(made, forward), found


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(
    runs: Mapping[Key, Callable[[], None]], repeats: int, what: str, watch: Watch, threads: int = 1
) -> dict[Key, Timing]:
    """Times every run: warm-up, samples in turns, and up to two more rounds for those that came out noisy.

    With one thread it is that thread's own CPU time: what else the host does then lengthens the wait, and by the
    caches that it takes the slower samples. Each sample begins with a run that is not timed, since the run before it
    was another network's.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    inner = {key: _warm_up(run, clock) for key, run in runs.items()}
    samples: dict[Key, list[float]] = {key: [] for key in runs}
    timings: dict[Key, Timing] = {}
    left: Sequence[Key] = list(runs)
    for attempt in range(3):
        for number in range(repeats):
            for key in left:
                runs[key]()
                started = clock()
                for _ in range(inner[key]):
                    runs[key]()
                samples[key].append((clock() - started) * 1e3 / inner[key])
            watch(f"{what}, attempt {attempt + 1}", number + 1, repeats)
        timings |= {key: _timing(samples[key]) for key in left}
        left = [key for key in left if timings[key].noisy]
        if not left:
            break
    return timings


def network_ms(model: nn.Module, x: torch.Tensor, is_step: bool, repeats: int) -> float:
    """Times a network of the user's as those of the zoo are, on one thread, and returns milliseconds.

    Args:
        model: in evaluation mode; its weights change if steps are timed.
        x: a batch.
        is_step: whether a training step is timed, else a forward pass.
        repeats: samples.
    """
    before, key = torch.get_num_threads(), ("network", len(x))
    torch.set_num_threads(1)
    try:
        run = _training(model, x) if is_step else _inference(model, x)
        return measure({key: run}, repeats, "timing", lambda what, done, of: None)[key].ms
    finally:
        torch.set_num_threads(before)


def _timing(samples: Sequence[float]) -> Timing:
    quick, low, middle, high = np.percentile(samples, [QUICK_PERCENTILE, 25, 50, 75])
    return Timing(float(quick), float((high - low) / middle), float(low / quick - 1))


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
    return _training(network.build(), network.example(batch))


def _training(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    optimiser = torch.optim.SGD(model.train().parameters(), 1e-4)

    def run() -> None:
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()

    return run


def _quantised(name: str, batch: int) -> Callable[[], None] | None:
    """Returns a run of the network on int8 kernels; None where torch cannot."""
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
    """Returns the profile of the measured host as YAML will hold it, with `assumed` where nothing was measured.

    Args:
        name: of the device.
        result: of the measurement.
        date: of the measurement, for its source.
        network: down_mbps, up_mbps, rtt_ms.
        watts: compute_w, rx_w, tx_w, idle_w.
    """
    host = result.host
    source = f"fedsim devices enroll, {date}, {host.threads} thread(s), load {result.load:.1f}"

    def measured(value: Any, how: str = "") -> dict[str, Any]:
        return {"value": value, "provenance": "measured", "source": f"{source}{how}"}

    def assumed(value: Any, why: str) -> dict[str, Any]:
        return {"value": value, "provenance": "assumed", "source": why}

    def priced(section: str) -> dict[str, Any]:
        prices, found = result.prices[section], result.calibrations[section]
        how = f"{prices.rows} rows; median error on them {found.own_error:.1%}, left out {found.left_out_error:.1%}"
        return {**prices.to_dict(), "provenance": "measured", "source": f"{source}: {how}"}

    ram_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    given = "given to fedsim devices enroll, or its default"
    compute = {
        "rate_gmacs_per_s": measured(round(result.gmacs_per_s, 3), ": median of the zoo at batch 1"),
        "jitter_sigma": measured(round(statistics.median(t.spread for t in result.forward.values()) / QUARTILES, 3)),
        "threads": measured(host.threads),
    }
    if host.clock_ghz is not None:
        compute["clock_ghz"] = measured(host.clock_ghz, ": as the system names it")
    best = f": the fastest product of matrices times {OF_PEAK}, or the fastest network"
    compute["peak_gmacs_per_s"] = measured(round(result.peak_macs_per_s / 1e9, 3), best)
    compute["memory_gb_per_s"] = measured(round(host.bytes_per_s / 1e9, 3), ": fastest copy or read of large arrays")
    sections = {"inference": "forward", "forward": "forward", "step": "step", "int8": "int8"}
    return {
        "name": name,
        "kind": "host",
        **({"isa": host.isa} if host.isa != "none" else {}),
        "compute": compute,
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
            **{key: priced(section) for key, section in sections.items() if section in result.prices},
            "sigma": measured(round(result.sigma, 4)),
        },
    }
