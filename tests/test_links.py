"""Named links: what a device gets from one, by its profile or by the fleet."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml

from devices.cost import FlopsLatency, Work
from devices.errors import DeviceError
from devices.fleet import Fleet
from devices.links import FILE, link_names, load_link
from devices.profile import SHIPPED, load_profile
from devices.profile_file import NETWORK, PROVENANCES


def written(tmp_path, network: dict, power: dict) -> str:
    """A phone with 0.3 W idle, and these network and power figures."""
    tree = yaml.safe_load((SHIPPED / "pixel3.yaml").read_text()) | {"network": network}
    tree["power"] = {"compute_w": 3.0, "idle_w": 0.3, **power}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.parametrize("name", link_names())
def test_every_figure_of_a_link_says_where_it_is_from(name: str):
    tree = yaml.safe_load(FILE.read_text())[name]
    figures = {**tree, **tree.get("radio", {})}
    for key in ("about", "radio"):
        figures.pop(key, None)
    assert set(NETWORK) <= set(figures)
    for entry in figures.values():
        assert entry["provenance"] in PROVENANCES
        assert entry["source"]
    assert (load_link(name).name, bool(load_link(name).about)) == (name, True)


def test_mobile_is_the_median_whose_mean_was_measured():
    """exp(-.6 ** 2 / 2) = .8353 of 35.96 and 11.22 Mbit/s; a Mbit/s is 125,000 bytes/s."""
    link, share = load_link("mobile"), math.exp(-(0.6**2) / 2)
    assert link.down_bytes_per_s == pytest.approx(125_000 * 35.96 * share, rel=2e-3)
    assert link.up_bytes_per_s == pytest.approx(125_000 * 11.22 * share, rel=2e-3)
    assert (link.rtt_s, link.setup_round_trips, link.tail_watts, link.tail_s) == (0.04, 3, 1.06, 11.6)


@pytest.mark.parametrize("name", link_names())
def test_radio_of_a_link_draws_watts_that_a_radio_can_draw(name: str):
    """Base and slope at the link's median rate: at most 6 W, of millimetre waves; nothing on a cable."""
    link = load_link(name)
    watts = (
        link.rx_base_watts + link.rx_joules_per_byte * link.down_bytes_per_s,
        link.tx_base_watts + link.tx_joules_per_byte * link.up_bytes_per_s,
    )
    if name in ("wired", "ethernet"):
        assert (*watts, link.tail_s) == (0, 0, 0)
    else:
        assert all(0.5 < w < 6 for w in watts)


def test_profile_gets_network_and_radio_from_its_link(tmp_path):
    """A radio with 345 and 556 mW beside 0.3 W; 13.03 mW per Mbit/s are 13.03 * 8e-9 J per byte."""
    phone, link = load_profile(written(tmp_path, {"link": "mobile"}, {})), load_link("mobile")
    assert (phone.down_bytes_per_s, phone.up_bytes_per_s) == (link.down_bytes_per_s, link.up_bytes_per_s)
    assert (phone.rx_watts, phone.tx_watts) == pytest.approx((0.645, 0.856))
    assert phone.rx_joules_per_byte == pytest.approx(13.03 * 8e-9)
    assert (phone.tail_watts, phone.tail_s, phone.setup_round_trips) == (1.06, 11.6, 3)
    assert (phone.link, phone.spread_sigma) == ("mobile", 0.54)
    assert "network.jitter_sigma" in phone.assumed
    assert not {"network.down_mbps", "network.setup_round_trips", "power.tail_s", "power.rx_w"} & set(phone.assumed)


def test_figures_of_the_profile_win_over_its_link(tmp_path):
    phone = load_profile(written(tmp_path, {"link": "mobile", "up_mbps": 80, "spread_sigma": 0}, {"tail_s": 5}))
    assert (phone.up_bytes_per_s, phone.spread_sigma, phone.tail_s) == (10e6, 0, 5)
    assert (phone.rtt_s, phone.tail_watts) == (0.04, 1.06)
    assert {"network.up_mbps", "power.tail_s"} < set(phone.assumed)


def test_watts_of_the_profile_hold_at_every_rate(tmp_path):
    """rx_w is the whole draw, so the link's slope of that direction would count it twice; the other way keeps it."""
    phone = load_profile(written(tmp_path, {"link": "mobile"}, {"rx_w": 1.2}))
    assert (phone.rx_watts, phone.rx_joules_per_byte) == (1.2, 0)
    assert phone.tx_joules_per_byte == load_link("mobile").tx_joules_per_byte
    both = load_profile(written(tmp_path, {"link": "mobile"}, {"rx_w": 1.2, "rx_mw_per_mbps": 10}))
    assert both.rx_joules_per_byte == pytest.approx(8e-8)


def test_ten_megabytes_on_lte_by_hand(tmp_path):
    """0.12 s set-up and 80 Mbit at 30 Mbit/s: 2.787 s at 0.645 W and 80 Mbit at 13.03 mJ; then tails of 2 * 11.6 s."""
    phone = replace(load_profile(written(tmp_path, {"link": "mobile"}, {})), flops_per_s=1.0)
    cost = FlopsLatency().cost(Work(down_bytes=10_000_000), phone)
    assert cost.down_s == pytest.approx(0.12 + 80 / 30)
    assert cost.down_joules == pytest.approx(0.645 * (0.12 + 80 / 30) + 80 * 13.03e-3)
    assert cost.tail_joules == pytest.approx(11.6 * 1.06)  # nothing was computed, so the first tail ends at once


def test_wrong_link_is_told_with_the_nearest_and_nothing_else(tmp_path):
    path = written(tmp_path, {"link": "mobil"}, {})
    sentence = f"{path}: key 'network.link': unknown link 'mobil'; did you mean 'mobile'? (allowed: 5g_low_us, "
    with pytest.raises(DeviceError, match=re.escape(sentence)):
        load_profile(path)


# --- of a fleet --------------------------------------------------------------------------------------------------


def test_link_of_a_fleet_is_for_its_phones():
    """Phones get network and radio of the link beside their own idle watts; boards keep their line at home."""
    fleet = Fleet("f", {"pixel3": 1, "raspberry_pi_4": 1}, 20, 1, network_sigma=0, link="5g_mmwave_us")
    phone, board = fleet.profiles
    link, before = load_link("5g_mmwave_us"), load_profile("pixel3")
    assert board == load_profile("raspberry_pi_4")
    assert (phone.down_bytes_per_s, phone.tail_watts, phone.link) == (link.down_bytes_per_s, 1.53, "5g_mmwave_us")
    assert phone.rx_watts == before.idle_watts + link.rx_base_watts
    assert (phone.compute_watts, phone.flops_per_s) == (before.compute_watts, before.flops_per_s)
    assert "network.jitter_sigma" in phone.assumed
    assert not {"network.down_mbps", "power.rx_w", "power.tail_s"} & set(phone.assumed)
    assert {fleet[client].link for client in range(20)} == {board.link, "5g_mmwave_us"}


def test_spread_of_a_link_is_that_of_its_clients():
    """Sigma .54 on `mobile` and 0.6 on the old profile of a board; a number is for all, whatever their link."""
    devices = {"pixel3": 1, "raspberry_pi_4": 1}
    fleet = Fleet("f", devices, 20_000, 1, network_sigma=None, link="mobile")
    logs = np.log(fleet.bandwidth)
    spread = [logs[fleet.device == device].std() for device in (0, 1)]
    assert spread == pytest.approx([0.54, fleet.profiles[1].spread_sigma], rel=0.03)
    same = Fleet("f", devices, 20_000, 1, network_sigma=0.3, link="mobile")
    assert np.log(same.bandwidth).std() == pytest.approx(0.3, rel=0.03)


def test_link_in_a_fleet_without_phones_is_a_mistake():
    with pytest.raises(DeviceError, match="fleet 'f': link is for phones and there are none; leave out link='mobile'"):
        Fleet("f", {"raspberry_pi_4": 1}, 3, 1, link="mobile")
    with pytest.raises(DeviceError, match="unknown link 'lte'"):
        Fleet("f", {"pixel3": 1}, 3, 1, link="lte")
