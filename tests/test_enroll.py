"""The measurement of a host: what is timed and how, what is fitted and judged, and the profile that comes of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from devices.cost import ModelCost
from devices.enrol import measure as enroll
from devices.enrol.host import HostFigures, _clock_ghz, _isa, measure_host
from devices.enrol.measure import Enrolment, Timing
from devices.enrol.zoo import HELD_OUT, ZOO
from devices.latency.models import device_prices, int8_ms, step_ms
from devices.latency.prices import Prices
from devices.profile import DeviceProfile, load_profile
from devices.trace import trace

HOST = HostFigures(1, 50e9, 20e9, 2.5, "x86")
NETWORK = {"down_mbps": 80.0, "up_mbps": 40.0, "rtt_ms": 20.0}
WATTS = {"compute_w": 30.0, "rx_w": 10.0, "tx_w": 10.0, "idle_w": 7.0}


def planted() -> dict[str, Prices]:
    """A host of 50 GMAC/s: 25 in reach; 1 ns an element, 0.3 ns a weight, 20 us a call; a step three times that."""
    cells = np.tile([4e-8, 1e-6, 3e-7, 0.02], (10, 1))
    forward = Prices.of_cells(cells)
    return {"forward": forward, "step": forward.scaled(3), "int8": forward.scaled(0.5)}


def cost(name: str) -> ModelCost:
    return ModelCost(name, 0, 0, 0, 0, layers=trace(ZOO[name].build(), ZOO[name].example(1)).rows)


@pytest.fixture(scope="module")
def result() -> Enrolment:
    """A host whose networks take exactly what the planted prices say."""
    keys = (*enroll.REFERENCES, *enroll.JUDGED)
    ms = {
        section: {(n, b): Timing(prices.ms(enroll._tables()[n].rows, b), 0.05) for n, b in keys}
        for section, prices in planted().items()
    }
    return enroll.judged(Enrolment(HOST, 0.5, forward=ms["forward"], train=ms["step"], int8=ms["int8"]))


@pytest.fixture
def profile(result: Enrolment, tmp_path: Path) -> DeviceProfile:
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(enroll.profile_tree("here", result, "today", NETWORK, WATTS)))
    return load_profile(path)


# --- measuring -----------------------------------------------------------------------------------------------------


def test_references_are_never_held_out_and_span_every_kind():
    names = {name for name, _ in enroll.REFERENCES}
    assert names == set(ZOO) - set(HELD_OUT)
    assert {batch for _, batch in enroll.REFERENCES} == set(enroll.BATCHES)
    tables = [np.array(trace(ZOO[name].build(), ZOO[name].example(1)).rows) for name in sorted(names)]
    used = sum(tables).any(axis=1)
    assert used.sum() == len(used) - 1  # no network of the zoo has grouped convolutions


def test_noisy_measurements_are_repeated_and_all_samples_count(monkeypatch):
    """Two rounds of ten: 1 to 10 ms (its tenth is 1.9, its quarter 3.25), then 1 ms always, which is the tenth."""
    clock, calls = {"now": 0.0}, {"number": 0}

    def run() -> None:
        calls["number"] += 1
        number = calls["number"] - 5  # three to warm up, one that is timed for the length of a sample, one more
        sample, timed = divmod(number, 2)
        clock["now"] += 0.003 if number < 0 or not timed else (1e-3 * (sample + 1) if sample < 10 else 1e-3)

    monkeypatch.setattr(enroll.time, "thread_time", lambda: clock["now"])
    watched: list[str] = []
    timing = enroll.measure({("net", 1): run}, 10, "test", lambda what, done, of: watched.append(what))["net", 1]
    assert sorted(set(watched)) == ["test, attempt 1", "test, attempt 2"]
    assert timing.ms == pytest.approx(1.0)
    assert not timing.noisy


def test_each_sample_begins_with_a_run_that_is_not_timed(monkeypatch):
    """Every other run takes 6 ms instead of 2, as after another network: it is never timed."""
    clock, calls = {"now": 0.0}, {"number": 0}

    def run() -> None:
        calls["number"] += 1
        clock["now"] += 0.002 if calls["number"] % 2 == 0 else 0.006

    monkeypatch.setattr(enroll.time, "thread_time", lambda: clock["now"])
    timing = enroll.measure({("net", 1): run}, 5, "test", lambda what, done, of: None)["net", 1]
    assert timing.ms == pytest.approx(2.0)


def test_one_thread_is_timed_by_its_own_work_and_several_by_the_wall(monkeypatch):
    """Each call takes 2 ms of its thread and 6 ms on the wall, since others use the host too."""
    calls = {"number": 0}

    def run() -> None:
        calls["number"] += 1

    monkeypatch.setattr(enroll.time, "thread_time", lambda: 0.002 * calls["number"])
    monkeypatch.setattr(enroll.time, "perf_counter", lambda: 0.006 * calls["number"])
    found = [enroll.measure({("net", 1): run}, 3, "test", lambda what, done, of: None, n)["net", 1].ms for n in (1, 2)]
    assert found == [pytest.approx(2.0), pytest.approx(6.0)]


def test_a_host_names_its_instruction_set_and_its_clock(monkeypatch):
    assert [_isa(name) for name in ("x86_64", "AMD64", "aarch64", "armv7l", "riscv64")] == [
        *("x86", "x86", "arm", "arm", "none")
    ]
    import psutil

    frequency = type("Frequency", (), {"current": 2100.0, "max": 3700.0})
    monkeypatch.setattr(psutil, "cpu_freq", lambda: frequency)
    assert _clock_ghz() == 3.7
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    assert _clock_ghz() is None


# --- fitting and judging -------------------------------------------------------------------------------------------


def test_planted_prices_are_found_for_networks_that_were_not_measured(result):
    """Steps scale the calls of recurrent layers too, beyond what the prior thinks likely: they are allowed more."""
    assert {name for name, *_ in result.held_out} == set(HELD_OUT)
    assert result.error() < 0.05
    assert result.error("int8") < 0.15
    assert result.error("step") < 0.10
    assert result.rank() > 0.98
    assert 0 < result.sigma < 0.15


def test_whole_families_are_predicted_by_prices_that_never_saw_them(result, monkeypatch):
    assert {(family, what) for family, what, _ in result.unseen} == {
        (family, what) for family in enroll.UNSEEN_FAMILIES for what in ("fp32", "step")
    }
    assert set(enroll._members("resnet")) >= {"resnet-4", "resnet-24", "resnet-16-keep0.5", "resnet-32-keep0.7"}
    seen: list[str] = []
    fit = enroll._fit

    def watched(result, section, keys, forward=None):
        seen.extend(name for name, _ in keys)
        return fit(result, section, keys, forward)

    monkeypatch.setattr(enroll, "_fit", watched)
    enroll._unseen(result, "mobilenet")
    assert seen
    assert not [name for name in seen if name.startswith("mobilenet")]


def test_the_peak_is_never_below_the_fastest_network(result):
    """A disturbed product of matrices says 1 GMAC/s; resnet-32 at batch 8 does more."""
    fastest = max(enroll._tables()[n].macs * b / t.ms for (n, b), t in result.forward.items()) * 1e3
    assert replace(result, host=replace(HOST, macs_per_s=1e9)).peak_macs_per_s == pytest.approx(fastest)
    assert result.peak_macs_per_s == 50e9


def test_predictions_grow_with_the_batch_and_stay_below_the_peak(profile):
    """Batch 64 takes 8 to 64 times batch 1 for networks of 30 million multiply-adds and more."""
    prices = device_prices(profile)
    for name, network in ZOO.items():
        rows, macs = enroll._tables()[name].rows, enroll._tables()[name].macs
        for batch in (1, 8, 64, 256):
            assert batch * macs / prices.forward.ms(rows, batch) <= 50e6 * 1.01
            assert 3 * batch * macs / prices.step.ms(rows, batch) <= 50e6 * 1.01
        if macs >= 30e6 and not network.tokens:
            assert 8 <= prices.forward.ms(rows, 64) / prices.forward.ms(rows, 1) <= 64


def test_savings_that_have_the_sign_and_nearly_the_size_are_counted():
    savings = [("a", 1, 0.5, 0.45), ("b", 1, 0.5, 0.4), ("c", 1, 0.1, -0.1), ("d", 1, 0.4, 0.5)]
    assert Enrolment(HOST, 0.0, savings=savings).savings_met() == (3, 2)  # 0.05 of 0.09, 0.1 of 0.08, 0.1 of 0.1


def test_savings_are_those_of_pruned_networks_against_their_dense_ones(result):
    pruned = {name for name, network in ZOO.items() if network.family == "pruned"}
    assert {(name, batch) for name, batch, *_ in result.savings} == {(n, b) for n in pruned for b in enroll.BATCHES}
    for name, batch, _, measured in result.savings:
        whole = result.forward[name.partition("-keep")[0], batch].ms
        assert measured == pytest.approx(1 - result.forward[name, batch].ms / whole)


# --- the profile ---------------------------------------------------------------------------------------------------


def test_the_profile_says_what_was_measured(profile, result):
    assert (profile.name, profile.kind, profile.isa, profile.threads) == ("here", "host", "x86", 1)
    assert (profile.peak_macs_per_s, profile.memory_bytes_per_s, profile.clock_ghz) == (50e9, 20e9, 2.5)
    assert not [key for key in profile.assumed if key.startswith("compute.")]
    latency = profile.latency
    assert latency is not None
    assert latency.inference == latency.forward
    for prices in (latency.inference, latency.step, latency.int8):
        assert (prices.runtime, prices.basis, prices.networks, prices.batches) == ("pytorch", "rows", 27, (1, 8))
    assert latency.int8.precision == "int8"


def test_the_profile_predicts_what_the_host_took(profile, result):
    one = cost("resnet-32")
    forward, step = step_ms(one, 8, profile)
    assert forward == pytest.approx(result.forward["resnet-32", 8].ms, rel=0.1)
    assert step == pytest.approx(result.train["resnet-32", 8].ms, rel=0.15)
    assert int8_ms(one, 8, profile) == pytest.approx(result.int8["resnet-32", 8].ms, rel=0.2)


def test_a_host_is_measured_and_its_profile_prices(monkeypatch, tmp_path):
    """With few samples of few networks: the figures are rough, the profile is whole."""
    names = ("mlp-64", "mlp-128", "cnn-4", "cnn-8", "resnet-8", "resnet-16", "mobilenet-0.5", "lstm-32")
    monkeypatch.setattr(enroll, "REFERENCES", tuple((name, batch) for name in names for batch in enroll.BATCHES))
    monkeypatch.setattr(enroll, "JUDGED", (("mlp-256", 1), ("resnet-16-keep0.5", 8)))
    result = enroll.enroll(repeats=3)
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(enroll.profile_tree("here", result, "today", NETWORK, WATTS)))
    profile = load_profile(path)
    assert set(result.train) == set(result.forward) == {*enroll.REFERENCES, *enroll.JUDGED}
    assert [saving[:2] for saving in result.savings] == [("resnet-16-keep0.5", 8)]
    forward, step = step_ms(cost("resnet-24"), 8, profile)
    assert 0 < forward < step
    assert profile.peak_macs_per_s == pytest.approx(result.peak_macs_per_s, rel=1e-3)


def test_a_peak_is_measured_by_products_and_a_bandwidth_by_arrays(monkeypatch):
    """Each run takes a millisecond: 64**3 multiply-adds times 1.1, and two times 1 MB."""
    from devices.enrol import host

    calls = {"number": 0}

    def tick() -> float:
        calls["number"] += 1
        return 0.001 * calls["number"]

    monkeypatch.setattr(host, "PRODUCT_SIZES", (64,))
    monkeypatch.setattr(host, "ARRAY_MB", (1,))
    monkeypatch.setattr(host.time, "thread_time", tick)
    found = measure_host(1)
    assert found.macs_per_s == pytest.approx(1.1 * 64**3 * 1e3)
    assert found.bytes_per_s == pytest.approx(2 * 2**20 * 1e3)


# --- a profile that fedsim 0.1 enrolled ----------------------------------------------------------------------------


OLD = """
name: old-host
kind: host
compute:
  rate_gmacs_per_s: {value: 7.5, provenance: measured, source: "fedsim devices enroll, 2025-06-01, 1 thread(s)"}
  jitter_sigma: {value: 0.05, provenance: measured, source: "fedsim devices enroll, 2025-06-01, 1 thread(s)"}
memory:
  ram_mb: {value: 16000, provenance: measured, source: "fedsim devices enroll, 2025-06-01, 1 thread(s)"}
  usable_fraction: {value: 0.5, provenance: assumed, source: what a host leaves to a training job}
  runtime_mb: {value: 300, provenance: assumed, source: Python and torch}
network: {down_mbps: 85.73, up_mbps: 45.74, rtt_ms: 21.0, jitter_sigma: 0.2}
power: {compute_w: 30.0, rx_w: 10.0, tx_w: 10.0, idle_w: 7.5}
latency:
  coefficients_ms:
    value: [3.1e-08, 1.2e-06, 4.0e-07, 0.011, 4.5e-08, 9.0e-07, 3.0e-07, 0.009, 1.5e-07, 8.0e-07, 0, 0.012,
      0, 2.5e-06, 0, 0.006, 0, 7.0e-07, 1.0e-07, 0.004, 6.0e-08, 0, 2.2e-07, 0.003,
      5.0e-08, 1.0e-06, 2.0e-08, 0.0015, 0.02]
    provenance: measured
    source: "fedsim devices enroll, 2025-06-01, 1 thread(s)"
  int8_coefficients_ms: {value: [], provenance: measured, source: "fedsim devices enroll, 2025-06-01"}
  sigma: {value: 0.11, provenance: measured, source: "fedsim devices enroll, 2025-06-01"}
  train_ratio:
    conv: {value: 3.4, provenance: measured, source: "fedsim devices enroll, 2025-06-01"}
    pointwise: {value: 3.1, provenance: measured, source: "fedsim devices enroll, 2025-06-01"}
    depthwise: {value: 4.2, provenance: measured, source: "fedsim devices enroll, 2025-06-01"}
    pool: {value: 2.6, provenance: measured, source: "fedsim devices enroll, 2025-06-01"}
    elementwise: {value: 2.9, provenance: measured, source: "fedsim devices enroll, 2025-06-01"}
    fc: {value: 3.8, provenance: measured, source: "fedsim devices enroll, 2025-06-01"}
    recurrent: {value: 3.0, provenance: measured, source: "fedsim devices enroll, 2025-06-01"}
"""
OLD_KINDS = ("conv", "pointwise", "depthwise", "pool", "elementwise", "fc", "recurrent")
OLD_OF = {"conv3x3": "conv", "grouped": "depthwise", "foldable": "elementwise"}


@pytest.mark.parametrize("name", ["mobilenet-1.0", "resnet-16", "lstm-64"])
def test_a_profile_that_0_1_enrolled_predicts_the_sum_of_its_coefficients(name: str, tmp_path):
    """Sum over kinds of (macs b, activations b, weights, calls) . (four coefficients), plus 0.02; a step by kind."""
    (tmp_path / "old.yaml").write_text(OLD)
    profile = load_profile(tmp_path / "old.yaml")
    latency = yaml.safe_load(OLD)["latency"]
    values = [float(x) for x in latency["coefficients_ms"]["value"]]
    by_kind = {kind: np.array(values[4 * i : 4 * i + 4]) for i, kind in enumerate(OLD_KINDS)}
    ratios = {kind: entry["value"] for kind, entry in latency["train_ratio"].items()}
    batch, table = 8, trace(ZOO[name].build(), ZOO[name].example(1)).to_dict()
    forward, step = 0.02, 3 * 0.02
    for kind, row in table.items():
        old = OLD_OF.get(kind, kind)
        ms = float(np.array(row) * [batch, batch, 1, 1] @ by_kind[old])
        forward, step = forward + ms, step + ratios[old] * ms
    assert step_ms(cost(name), batch, profile) == pytest.approx((forward, step))
    assert int8_ms(cost(name), batch, profile) is None
