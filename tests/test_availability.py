"""When clients are online."""

import json
import math
import re

import numpy as np
import pytest

from devices.availability import Always, Bernoulli, Diurnal, Trace
from devices.errors import DeviceError

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


def test_always_is_online_for_ever():
    always = Always(num_clients=2, seed=0)
    assert (always.online(1, 1e9), always.online_until(1, 1e9)) == (True, math.inf)


def test_window_of_a_day_wraps_around_midnight():
    """Opens at 20 h for 8 h: online 20 h to 28 h = 4 h of the next day; spread 0 gives every client the same hour."""
    night = Diurnal(num_clients=1, seed=0, hours=8, start_hour=20, spread_hours=0)
    hours = [0, 3.9, 4, 12, 19.9, 20, 24, 27.9, 28]
    assert [night.online(0, h * HOUR_S) for h in hours] == [True, True, False, False, False, True, True, True, False]
    assert night.online_until(0, 1 * HOUR_S) == 4 * HOUR_S
    assert night.online_until(0, 21 * HOUR_S) == 28 * HOUR_S
    assert night.online_until(0, 12 * HOUR_S) == 12 * HOUR_S
    assert night.online_until(0, 10 * DAY_S + 23 * HOUR_S) == 10 * DAY_S + 28 * HOUR_S


def test_window_of_a_whole_day_never_closes():
    assert Diurnal(num_clients=1, seed=0, hours=24).online_until(0, 5e5) == math.inf


def test_two_thirds_of_the_clients_are_online_with_windows_of_16_hours_at_any_time():
    """Sampling error of 4000 clients is sqrt(2/9 / 4000) = 0.0075; four times that is allowed."""
    diurnal = Diurnal(num_clients=4000, seed=3, hours=16)
    for now_s in (0.0, 1e5, 7.7e6):
        assert np.mean([diurnal.online(c, now_s) for c in range(4000)]) == pytest.approx(2 / 3, abs=0.03)


def test_opening_hours_stay_within_their_spread():
    opens_h = Diurnal(num_clients=1000, seed=3, start_hour=6, spread_hours=2).opens_s / HOUR_S
    assert 6 <= opens_h.min() < 6.1
    assert 7.9 < opens_h.max() <= 8


@pytest.mark.parametrize("build", [lambda n: Diurnal(n, 5, hours=3), lambda n: Bernoulli(n, 5, p=0.7, slot_s=60)])
def test_client_is_online_until_the_end_of_its_spell_and_offline_there(build):
    availability = build(20)
    for client in range(20):
        for now_s in np.linspace(0, 3 * DAY_S, 50).tolist():
            end_s = availability.online_until(client, now_s)
            assert availability.online(client, now_s) == (end_s > now_s)
            assert not availability.online(client, end_s)
            assert end_s == now_s or availability.online(client, math.nextafter(end_s, 0))


def test_bernoulli_is_constant_within_a_slot_and_online_with_its_probability():
    """20,000 draws of p = 0.8: standard error sqrt(.16 / 20000) = 0.0028."""
    bernoulli = Bernoulli(num_clients=200, seed=1, p=0.8, slot_s=600)
    drawn = [[bernoulli.online(c, 600.0 * s) for s in range(100)] for c in range(200)]
    assert np.mean(drawn) == pytest.approx(0.8, abs=0.012)
    assert [bernoulli.online(7, 600.0 * s + 599) for s in range(100)] == drawn[7]


def test_bernoulli_limits_are_never_and_always():
    assert Bernoulli(1, 0, p=0).online_until(0, 30.0) == 30.0
    assert Bernoulli(1, 0, p=1).online_until(0, 30.0) == math.inf


def test_bernoulli_looks_ten_thousand_slots_ahead_at_most():
    assert Bernoulli(1, 0, p=math.nextafter(1, 0), slot_s=2).online_until(0, 7.0) == (3 + 10_000) * 2


def test_a_rhythm_is_a_day_or_the_length_of_a_trace(tmp_path):
    long = {"1": {"active": [0], "inactive": [5], "finish_time": 200_000}}
    built = [Always(1, 0), Bernoulli(1, 0), Diurnal(1, 0, hours=24), Diurnal(1, 0)]
    assert [availability.rhythm_s for availability in built] == [None, None, None, DAY_S]
    assert [Trace(1, 0, trace(tmp_path, tree)).rhythm_s for tree in (TWO, long)] == [100, DAY_S]


def test_draws_follow_the_seed_and_the_client_but_not_the_number_of_clients():
    def pattern(num_clients: int, seed: int, client: int) -> list[bool]:
        bernoulli = Bernoulli(num_clients, seed, p=0.5)
        return [bernoulli.online(client, 600.0 * slot) for slot in range(64)]

    assert pattern(10, 1, 3) == pattern(1000, 1, 3)
    assert pattern(10, 1, 3) != pattern(10, 2, 3)
    assert pattern(10, 1, 3) != pattern(10, 1, 4)
    assert np.array_equal(Diurnal(10, 1).opens_s, Diurnal(1000, 1).opens_s[:10])


def trace(tmp_path, tree: object) -> str:
    path = tmp_path / "trace.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return str(path)


TWO = {
    "1": {"duration": 60, "active": [10, 50], "inactive": [20, 60], "finish_time": 100, "model": "SM-G930"},
    "2": {"active": [0, 90], "inactive": [5, 100], "finish_time": 100},
}


def test_trace_is_online_in_its_spells_and_repeats(tmp_path):
    """Client 0 is online in [10, 20] and [50, 60] of every 100 s, both ends included."""
    availability = Trace(2, 0, trace(tmp_path, TWO))
    times = [0, 9.9, 10, 20, 20.1, 50, 60, 99, 109.9, 110, 120, 155]
    online = [False, False, True, True, False, True, True, False, False, True, True, True]
    assert [availability.online(0, t) for t in times] == online
    assert availability.online_until(0, 12.0) == 20
    assert availability.online_until(0, 355.0) == 360
    assert availability.online_until(0, 30.0) == 30


def test_spell_at_the_end_of_a_trace_runs_into_the_next_cycle(tmp_path):
    """Client 1 is online in [90, 100] and [0, 5]: from 95 s on it stays until 105 s."""
    availability = Trace(2, 0, trace(tmp_path, TWO))
    assert (availability.online_until(1, 95.0), availability.online_until(1, 103.0)) == (105, 105)
    assert not availability.online(1, 106.0)


def test_clients_beyond_the_trace_start_again_at_its_first_entry(tmp_path):
    availability = Trace(5, 0, trace(tmp_path, TWO))
    assert [availability.online(client, 15.0) for client in range(5)] == [True, False, True, False, True]


def test_touching_spells_are_one_and_a_full_cycle_never_ends(tmp_path):
    tree = {"a": {"active": [0, 40], "inactive": [40, 130], "finish_time": 100}}
    assert Trace(1, 0, trace(tmp_path, tree)).online_until(0, 30.0) == math.inf


def test_client_without_a_spell_is_never_online(tmp_path):
    tree = {"a": {"active": [], "inactive": [], "finish_time": 100}, **TWO}
    availability = Trace(2, 0, trace(tmp_path, tree))
    assert (availability.online(0, 15.0), availability.online(1, 15.0)) == (False, True)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ("{", "a trace must be a JSON text file: "),
        ("[" * 100_000, "a trace must be a JSON text file: "),
        ("[1]", "a trace must be a map from client to its spells, got '[1]'"),
        ({}, "a trace must be a map from client to its spells, got '{}'"),
        ({"7": 3}, "client '7' must be a map with active, inactive and finish_time, got '3'"),
        ({"7": {"activ": []}}, "client '7' has an unknown key 'activ'; did you mean 'active'?"),
        ({"7": {"active": []}}, "client '7' has no key 'inactive'"),
        ({"7": {**TWO["1"], "finish_time": 0}}, "client '7': finish_time must be a number in [1, 1e+10], got 0"),
        ({"7": {**TWO["1"], "finish_time": True}}, "client '7': finish_time must be a number in [1, 1e+10], got True"),
        ({"7": {**TWO["1"], "active": 5}}, "client '7': active must be a list of seconds, got '5'"),
        ({"7": {**TWO["1"], "active": [5]}}, "client '7': active and inactive must be equally long, got 1 and 2"),
        ({"7": {**TWO["1"], "active": [30, 50]}}, "client '7': inactive[0] must be a number in [30, 1e+10], got 20"),
        ({"7": {**TWO["1"], "active": [10, 15]}}, "client '7': active[1] must be a number in [20, 1e+10], got 15"),
        ({"7": {**TWO["1"], "active": ["x", 50]}}, "client '7': active[0] must be a number in [0, 1e+10], got 'x'"),
        ('{"7": {"active": [NaN], "inactive": [1], "finish_time": 9}}', "client '7': active[0] must be a number in "),
    ],
)
def test_wrong_trace_is_refused_with_its_file_and_client(tmp_path, tree: object, sentence: str):
    path = trace(tmp_path, tree)
    with pytest.raises(DeviceError, match=re.escape(f"{path}: {sentence}")):
        Trace(1, 0, path)


def test_missing_trace_is_named():
    with pytest.raises(DeviceError, match=r"^nowhere\.json: there is no such trace file$"):
        Trace(1, 0, "nowhere.json")


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Bernoulli(1, 0, p=1.5), "fleet.availability.p must be in [0, 1], got 1.5"),
        (lambda: Bernoulli(1, 0, slot_s=0), "fleet.availability.slot_s must be in [0.001, 1e+10], got 0"),
        (lambda: Diurnal(1, 0, hours=0), "fleet.availability.hours must be in (0, 24], got 0"),
        (lambda: Diurnal(1, 0, hours="8"), "fleet.availability.hours must be a finite number in (0, 24], got '8'"),
        (
            lambda: Diurnal(1, 0, spread_hours=math.nan),
            "fleet.availability.spread_hours must be a finite number in [0, 24], got nan",
        ),
    ],
)
def test_wrong_setting_is_refused_with_its_interval(build, sentence: str):
    with pytest.raises(DeviceError, match=f"^{re.escape(sentence)}$"):
        build()
