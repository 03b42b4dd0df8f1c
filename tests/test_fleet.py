"""Which client owns which device."""

import math
import pickle
import re
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf

import configs
from devices.availability import DAY_S, Bernoulli, Diurnal
from devices.cost import FlopsLatency, Jitter
from devices.errors import DeviceError
from devices.fleet import Fleet
from devices.profile import SHIPPED, load_profile

FLEETS = sorted((Path(configs.__file__).parent / "fleet").glob("*.yaml"))
PHONES = {"galaxy_s7": 1, "pixel3": 3}


def build(config: Path, num_clients: int = 50, seed: int = 1, **changes: object) -> Fleet:
    return hydra.utils.instantiate(OmegaConf.load(config), num_clients=num_clients, seed=seed, **changes)


@pytest.mark.parametrize("config", FLEETS, ids=lambda path: path.stem)
def test_every_shipped_fleet_is_built_from_its_configuration(config: Path):
    fleet = build(config)
    assert (fleet.name, len(fleet)) == (config.stem, 50)
    assert sum(count for _, count, _ in fleet.summary()) == 50
    assert 20 < sum(fleet.online(client, 0.0) for client in range(50)) <= 50
    assert pickle.loads(pickle.dumps(fleet))[7] == fleet[7]


def test_availability_is_overridden_key_by_key():
    phones = next(path for path in FLEETS if path.stem == "phones")
    daily = {"_target_": "devices.availability.Diurnal", "hours": 16}
    assert build(phones).online_until(3, 0.0) == math.inf
    assert 0 < build(phones, availability=daily).online_until(0, 0.0) <= DAY_S


@pytest.mark.parametrize(
    ("fleet", "first"),
    [
        ("desktops", ["xeon_gold_6240", "xeon_silver_4210r", "xeon_gold_6240", "xeon_silver_4210r", "gtx_1080ti"]),
        ("help_phones", ["galaxy_a50", "galaxy_a50", "galaxy_a50", "galaxy_a50", "essential_ph1"]),
        ("mixed", ["pixel2", "galaxy_a50", "essential_ph1", "pixel2", "raspberry_pi_zero_2w"]),
    ],
)
def test_fleet_of_before_is_drawn_as_before(fleet: str, first: list[str]):
    """The five phones were `fleet=phones` of 0.1; results of old seeds hang on these draws."""
    drawn = build(next(path for path in FLEETS if path.stem == fleet))
    assert [drawn.device_name(client) for client in range(len(first))] == first


def test_uniform_fleet_is_the_reference_device_without_any_chance():
    fleet = build(next(path for path in FLEETS if path.stem == "uniform"))
    assert all(profile == load_profile("reference") for profile in fleet)
    assert (fleet.jitter(3, 1), fleet.crash_s(3, 1), fleet.online_until(3, 0)) == (Jitter(), math.inf, math.inf)


def test_flops_latency_is_built_from_its_configuration():
    path = Path(configs.__file__).parent / "latency" / "flops.yaml"
    assert isinstance(hydra.utils.instantiate(OmegaConf.load(path)), FlopsLatency)


def test_larger_fleet_starts_with_the_same_clients():
    small, large = (Fleet("f", PHONES, n, seed=4) for n in (10, 1000))
    assert [small[client] for client in range(10)] == [large[client] for client in range(10)]


def test_other_seed_is_another_fleet():
    one, other = (Fleet("f", PHONES, 10, seed) for seed in (1, 2))
    assert [one[client] for client in range(10)] != [other[client] for client in range(10)]


def test_shares_are_normalised_and_met():
    """Of 20,000 clients 3/4 own the second device; standard error sqrt(3/16 / 20000) = 0.003."""
    (s7, s7_clients, s7_share), (pixel, pixel_clients, share) = Fleet("f", PHONES, 20_000, seed=0).summary()
    assert (s7, pixel, s7_clients + pixel_clients) == ("galaxy_s7", "pixel3", 20_000)
    assert (share, s7_share) == (pixel_clients / 20_000, pytest.approx(1 - share))
    assert share == pytest.approx(0.75, abs=0.015)


def test_client_has_its_own_speed_and_one_bandwidth_factor_for_both_ways():
    fleet, phone = Fleet("f", {"pixel3": 1}, 20_000, seed=0), load_profile("pixel3")
    client = fleet[5]
    assert client.flops_per_s == phone.flops_per_s * fleet.speed[5]
    assert client.down_bytes_per_s / phone.down_bytes_per_s == client.up_bytes_per_s / phone.up_bytes_per_s != 1
    assert (np.log(fleet.speed).std(), np.log(fleet.bandwidth).std()) == pytest.approx((0.15, 0.6), rel=0.03)
    assert np.corrcoef(np.log(fleet.speed), np.log(fleet.bandwidth))[0, 1] == pytest.approx(0, abs=0.03)


def test_name_and_kind_are_those_of_the_device():
    fleet = Fleet("f", {"raspberry_pi_4": 1}, 3, seed=0)
    assert (fleet.device_name(2), fleet.kind(2), fleet[2].name) == ("raspberry_pi_4", "sbc", "raspberry_pi_4")


def test_million_clients_take_ten_bytes_each():
    """int16 device, float32 speed and bandwidth: 2 + 4 + 4 bytes; diurnal adds a float32."""
    fleet = Fleet("f", PHONES, 1_000_000, seed=1, availability=Diurnal)
    assert sum(array.nbytes for array in (fleet.device, fleet.speed, fleet.bandwidth)) == 10_000_000
    assert fleet.availability.opens_s.nbytes == 4_000_000
    assert fleet[999_999].kind == "phone"


def test_jitter_follows_client_and_round_alone():
    fleet = Fleet("f", PHONES, 10, seed=1)
    first = fleet.jitter(3, 5)
    assert fleet.jitter(3, 6) != first != fleet.jitter(4, 5)
    assert Fleet("f", PHONES, 99, seed=1).jitter(np.int64(3), 5) == first
    assert Fleet("f", PHONES, 10, seed=2).jitter(3, 5) != first


def test_jitter_is_lognormal_with_the_sigmas_of_the_device():
    """Sigma .15 on computing and .2 on transfers, from the file; 4000 draws give them within 5 %."""
    fleet = Fleet("f", {"pixel3": 1}, 1, seed=1)
    draws = [fleet.jitter(0, round) for round in range(4000)]
    logs = np.log([(j.compute, j.down, j.up) for j in draws])  # [rounds, 3]
    assert logs.std(0) == pytest.approx([0.15, 0.2, 0.2], rel=0.05)
    assert logs.mean(0) == pytest.approx([0, 0, 0], abs=0.015)
    assert np.corrcoef(logs.T) == pytest.approx(np.eye(3), abs=0.06)


def test_crashes_come_once_in_the_minutes_of_the_rate(tmp_path):
    """Two failures a minute: 30 s on average, standard error 30 / sqrt(4000) = 0.5 s."""
    text = (SHIPPED / "pixel3.yaml").read_text()
    path = tmp_path / "fragile.yaml"
    path.write_text(text.replace("failures_per_min: {value: 0", "failures_per_min: {value: 2"))
    fleet = Fleet("f", {str(path): 1}, 1, seed=1)
    crashes = [fleet.crash_s(0, round) for round in range(4000)]
    assert np.mean(crashes) == pytest.approx(30, abs=2)
    assert crashes[7] == fleet.crash_s(0, 7)


def test_fleet_asks_its_availability():
    fleet = Fleet("f", PHONES, 10, seed=1, availability=lambda **kw: Bernoulli(**kw, p=0))
    assert (fleet.online(3, 5.0), fleet.online_until(3, 5.0)) == (False, 5.0)


@pytest.mark.parametrize("ask", ["__getitem__", "kind", "device_name"])
@pytest.mark.parametrize("client", [-1, 10])
def test_client_out_of_range_is_named(ask: str, client: int):
    with pytest.raises(IndexError, match=re.escape(f"client_id must be in 0..9 (fleet 'f'), got {client}")):
        getattr(Fleet("f", PHONES, 10, seed=1), ask)(client)


def test_paused_work_goes_on_where_rounding_puts_a_spell_before_its_start():
    """Slot 43 of 0.1 s begins at 4.3 s, which lies in slot 42 by a division: (43 * 0.1) // 0.1 is 42."""
    fleet = Fleet("f", PHONES, 50, seed=1, availability=partial(Bernoulli, p=0.5, slot_s=0.1))
    for client in filter(lambda one: fleet.online(one, 0.0), range(50)):
        end_s = fleet.end_of_work(client, 0.0, 5.0)
        worked_s = 0.1 * sum(fleet.online(client, (slot + 0.5) * 0.1) for slot in range(round(end_s / 0.1)))
        assert worked_s == pytest.approx(5.0, abs=0.11)


def test_an_availability_that_is_wrong_about_itself_is_named():
    class Lying(Bernoulli):
        def online_from(self, client_id: int, now_s: float) -> float:
            return now_s

    fleet = Fleet("f", PHONES, 50, seed=1, availability=partial(Lying, p=0.5, slot_s=0.1))
    client = next(filter(lambda one: fleet.online(one, 0.0), range(50)))
    with pytest.raises(DeviceError, match=rf"Lying.online_from says .* s for client {client}, which is offline then"):
        fleet.end_of_work(client, 0.0, 5.0)


def test_online_of_a_client_out_of_range_is_refused():
    with pytest.raises(IndexError, match=r"client_id must be in 0\.\.9"):
        Fleet("f", PHONES, 10, seed=1).online(10, 0.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"devices": {"pixell3": 1}}, "unknown device 'pixell3'; did you mean 'pixel3'?"),
        ({"devices": {}}, "fleet.devices must have at least 1 entry, got {}"),
        ({"devices": {"pixel3": 0}}, "fleet.devices.pixel3 must be greater than 0, got 0"),
        ({"devices": {"pixel3": True}}, "fleet.devices.pixel3 must be a finite number greater than 0, got true"),
        ({"devices": {"pixel3": math.nan}}, "fleet.devices.pixel3 must be a finite number greater than 0, got nan"),
        ({"devices": {"pixel3": "1"}}, "fleet.devices.pixel3 must be a finite number greater than 0, got '1'"),
        (
            {"devices": {"pixel3": 1, str(SHIPPED / "pixel3.yaml"): 1}},
            "fleet 'f': two devices are named 'pixel3'; change 'name' in",
        ),
        ({"num_clients": 0}, "fleet.num_clients must be at least 1, got 0"),
        ({"num_clients": 2.0}, "fleet.num_clients must be a whole number of at least 1, got 2.0"),
        ({"speed_sigma": -0.1}, "fleet.speed_sigma must be in [0, 3], got -0.1"),
        ({"network_sigma": math.inf}, "fleet.network_sigma must be a finite number in [0, 3] or null, got inf"),
    ],
)
def test_wrong_fleet_is_refused_with_what_is_allowed(changes: dict[str, object], sentence: str):
    with pytest.raises(DeviceError, match=re.escape(sentence)):
        Fleet(**{"name": "f", "devices": PHONES, "num_clients": 10, "seed": 1, **changes})
