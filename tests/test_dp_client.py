"""Clipping at the clients, equal to Flower's own mods, and the epsilon that noisy rounds spend."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import every_way
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from test_methods import federate

from clients.app import serve
from clients.clipping import clipped
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.grid.server_half import is_plain_mean
from fedsim.messages.records import from_array, record_of, tensors_of
from fedsim.report import text
from fedsim.report.files import read_summary
from fedsim.report.page import write_page
from fedsim.runs import writer
from strategies.accounting import epsilon_of

FIXED, ADAPTIVE = "method=dp_client_fedavg", "method=dp_client_adaptive"
SILENT = "strategy.noise_multiplier=0"


def weights(draw: int, scale: float) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(draw)
    return {"a": scale * torch.randn(3, 4, generator=made), "b": scale * torch.randn(5, generator=made)}


def length(new: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((new[n].double() - old[n].double()).square().sum()) for n in old))


@pytest.mark.parametrize("scale", [0.01, 3.0], ids=["shorter", "longer"])
@pytest.mark.parametrize("mod, told", [(fixedclipping_mod, False), (adaptiveclipping_mod, True)])
def test_a_client_clips_as_flowers_mod_does(mod, told: bool, scale: float):
    start, change = weights(1, 1.0), weights(2, scale)
    trained = {name: t + change[name] for name, t in start.items()}
    sent = {"arrays": record_of(start), "config": ConfigRecord({"clipping_norm": 1.5})}
    asked = Message(RecordDict(sent), 1, "train")

    def app(message, context):
        content = {"arrays": record_of(trained), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    reply = mod(asked, None, app)
    (theirs,) = reply.content.array_records.values()
    assert isinstance(theirs, ArrayRecord)
    ours, was_longer = clipped(trained, start, 1.5)
    for name, t in tensors_of(theirs).items():
        torch.testing.assert_close(ours[name], t, rtol=0, atol=1e-6)
    assert was_longer == (scale > 1)
    if told:
        assert reply.content["metrics"]["norm_bit"] == was_longer


def test_a_clipped_change_is_as_long_as_the_norm_and_points_where_it_did():
    start, trained = weights(1, 1.0), weights(2, 3.0)
    near, was_longer = clipped(trained, start, 0.5)
    assert was_longer
    assert length(near, start) == pytest.approx(0.5, rel=1e-6)
    ratio = 0.5 / length(trained, start)
    torch.testing.assert_close(near["b"] - start["b"], ratio * (trained["b"] - start["b"]), rtol=1e-5, atol=1e-7)
    assert clipped(trained, start, 1e9)[0] is trained
    assert clipped(start, start, 0.5) == (start, False)


@pytest.mark.parametrize("most", ["10", "0.05"])
@pytest.mark.parametrize("kind", ["fedavg", "adaptive"])
def test_clients_that_clip_make_the_weights_of_a_server_that_clips(kind: str, most: str):
    """Clients of unequal sizes count the same; noise is that of the seed and the round, as at the server."""
    given = ("workload.size_alpha=1.0", f"strategy.clipping_norm={most}", "strategy.noise_multiplier=0.3")
    server, clients = (federate(f"method=dp_{at}{kind}", *given) for at in ("", "client_"))
    for name, array in server.federation.arrays.items():
        made = from_array(clients.federation.arrays[name])
        np.testing.assert_allclose(made, from_array(array), rtol=1e-5, atol=1e-5)
    for one, other in zip(server.reports[1:], clients.reports[1:], strict=True):
        for key in ("clipping_norm", "clipped_rate", "epsilon"):
            assert one.metrics[key] == pytest.approx(other.metrics[key])
    assert is_plain_mean(clients.federation.strategy)


def test_the_mean_goes_by_those_who_answered():
    """Of 4 asked, 2 are needed: without noise each moves the weights by half of what it changed."""
    given = (FIXED, SILENT, "cohort=2", "over_selection=2", "fleet=phones", "rounds=1")
    ours = federate(*given, "strategy.clipping_norm=1e9").federation.arrays
    theirs = federate("strategy=fedavg", *given[2:]).federation.arrays  # clients of equal sizes
    for name, array in theirs.items():
        np.testing.assert_allclose(from_array(ours[name]), from_array(array), rtol=0, atol=1e-6)


def test_clipping_costs_its_multiply_adds_a_byte_for_the_norm_and_the_received_weights():
    """The network has 53 weights: 2 x 53 FLOPs for the norm, as many again where it scales, 212 bytes in memory."""
    plain = federate("method=fedavg", "rounds=1")
    for method, most, flops, bit in ((FIXED, "1e9", 106, 0), (FIXED, "1e-3", 212, 0), (ADAPTIVE, "1e-3", 212, 1)):
        made = federate(method, f"strategy.clipping_norm={most}", "rounds=1")
        for one, other in zip(made.clients, plain.clients, strict=True):
            assert one.work.flops - other.work.flops == flops
            assert one.work.up_bytes - other.work.up_bytes == bit
            assert one.work.down_bytes == other.work.down_bytes
            assert one.work.peak_memory_bytes - other.work.peak_memory_bytes == 212


def test_clients_that_clip_make_the_same_in_every_way(settings, tmp_path: Path):
    given = ("strategy.clipping_norm=0.05", "strategy.noise_multiplier=0.2", "workload.size_alpha=1.0", "rounds=3")
    runs = every_way(settings(FIXED, *given), tmp_path)
    assert all(rounds == runs["one"] for rounds in runs.values())
    assert runs["one"][-1]["metrics"]["clipped_rate"] > 0


@pytest.mark.parametrize(
    "overrides",
    [["uplink=topk"], ["uplink=int8", "uplink.error_feedback=false"]],
)
def test_an_uplink_that_may_lengthen_a_clipped_update_is_refused(overrides: list[str]):
    with pytest.raises(ConfigError, match=r"may make an update longer than clients have clipped it"):
        federate(FIXED, *overrides)
    federate(FIXED, "uplink=topk", "uplink.error_feedback=false", "rounds=1")  # it can only get shorter


@pytest.mark.parametrize("server", ["dp_client_fedavg", "dp_fedavg", "qfedavg"])
def test_noise_is_not_put_around_noise(server: str):
    with pytest.raises(ConfigError, match="takes more of the clients than a mean"):
        federate("strategy=dp_fedavg", f"strategy@strategy.server={server}")


@pytest.mark.parametrize("rule", ["by_size", "power_of_choice", "oort"])
def test_rules_that_choose_by_data_are_refused(rule: str):
    with pytest.raises(ConfigError, match=f"participants={rule} shows their data by whom it takes"):
        federate("method=dp_fedavg", f"participants={rule}")
    with pytest.raises(ConfigError, match=f"^uplink=secagg hides .* participants={rule} shows their data"):
        federate("uplink=secagg", f"participants={rule}")


# --- epsilon ---------------------------------------------------------------------------------------------------------


def by_hand(releases: int, z: float, delta: float) -> float:
    """The Renyi divergence of order a of T Gaussians is a T / (2 z^2); the bound's minimum over a > 1."""

    def bound(log_order: float) -> float:
        a = 1 + math.exp(log_order)
        return a * releases / (2 * z**2) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)

    return float(minimize_scalar(bound, bounds=(-5, 10), method="bounded").fun)


@pytest.mark.parametrize("releases, z, delta", [(1, 1.0, 1e-5), (100, 4.0, 1e-3)])
def test_epsilon_is_the_renyi_bound_of_gaussian_noise(releases: int, z: float, delta: float):
    """It lies above the exact epsilon, at which T Gaussians of z are one of mu = sqrt(T) / z (Balle and Wang, 2018)."""
    found, mu = epsilon_of(releases, z, delta), math.sqrt(releases) / z
    assert found == pytest.approx(by_hand(releases, z, delta), rel=1e-4)
    exact = norm.cdf(mu / 2 - found / mu) - math.exp(found) * norm.cdf(-mu / 2 - found / mu)
    assert delta / 100 < exact < delta


def test_epsilon_of_known_cases():
    """For z = 1, delta = 1e-5, at order 5.5: 2.75 + ln(4.5 / 5.5) - (ln 1e-5 + ln 5.5) / 4.5 = 4.729, and no less."""
    assert epsilon_of(1, 1.0, 1e-5) == pytest.approx(4.729, abs=0.002)
    assert epsilon_of(0, 1.0, 1e-5) == 0.0


def test_dp_accounting_says_the_same():
    accounting = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    for releases, z, delta in ((1, 1.0, 1e-5), (100, 4.0, 1e-3), (30, 0.7, 1e-2)):
        theirs = accounting.rdp.RdpAccountant().compose(accounting.GaussianDpEvent(z), releases).get_epsilon(delta)
        assert epsilon_of(releases, z, delta) <= theirs * (1 + 1e-5)
        assert epsilon_of(releases, z, delta) == pytest.approx(theirs, rel=0.005)


@pytest.mark.parametrize("method", ["method=dp_fedavg", "method=dp_adaptive", FIXED, ADAPTIVE])
def test_a_run_says_the_epsilon_of_all_its_rounds(settings, tmp_path: Path, method: str):
    """Of the adaptive norm, weights and count together: 1 / z^2 = 1 / z_weights^2 + 1 / (2 sigma)^2, so z counts."""
    given = ("cohort=6", "strategy.noise_multiplier=0.5", "strategy.delta=1e-3", "rounds=3")
    writer.run(settings(method, *given), LocalEngine(serve), tmp_path / "run")
    summary = read_summary(tmp_path / "run")
    assert summary["privacy"] == {"epsilon": epsilon_of(3, 0.5, 1e-3), "delta": 1e-3}
    assert any(line.startswith("privacy: epsilon ") for line in text.closing_lines(summary, tmp_path / "run"))
    page = write_page(tmp_path / "run").read_text()
    assert "for a client in every round" in page
    for drawn in ("epsilon", "clipped rate, %", "clipping norm"):
        assert f">{drawn}</text>" in page


def test_rounds_without_a_reply_or_noise_spend_nothing():
    """By default delta is 1 / 7^1.1 by default; windows of a second a day: nobody answers."""
    away = ("fleet.availability._target_=devices.availability.Diurnal", "+fleet.availability.hours=0.0003")
    assert "epsilon" not in federate("method=dp_fedavg", *away).reports[-1].metrics
    assert "epsilon" not in federate("method=dp_fedavg", SILENT, "rounds=1").reports[-1].metrics
    metrics = federate("method=dp_fedavg", "rounds=1").reports[-1].metrics
    assert metrics["delta"] == pytest.approx(7**-1.1)
