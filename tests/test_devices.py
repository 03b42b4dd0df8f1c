"""Device profiles and their files: what is shipped, and what is wrong with a file of one's own."""

import copy
import math
import pickle
import re

import pytest
import yaml

from devices.errors import DeviceError
from devices.links import link_names
from devices.profile import KINDS, ORDERED, PROVENANCES, SHIPPED, load_profile, parse_profile, profile_names
from devices.profile_file import FIGURES, Reader


def test_shipped_device_is_converted_to_bytes_and_seconds():
    """Pixel 3: 5.2 GMAC/s; 4096 MiB * .25 - 150 MiB; the link mobile: 30 and 9.37 Mbit/s, 40 ms."""
    phone = load_profile("pixel3")
    assert (phone.kind, phone.flops_per_s, phone.memory_bytes) == ("phone", 10.4e9, (1024 - 150) * 2**20)
    assert (phone.down_bytes_per_s, phone.up_bytes_per_s) == pytest.approx((3.75e6, 1.17125e6))
    assert (phone.rtt_s, phone.failures_per_min) == (0.04, 0.0)
    assert pickle.loads(pickle.dumps(phone)) == phone


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_device_loads_and_says_where_each_number_is_from(name: str):
    profile = load_profile(name)
    assert (profile.name, profile.kind in KINDS) == (name, True)
    tree = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    for section in ("compute", "memory", "network", "power", "reliability"):
        for key, entry in tree[section].items():
            if key == "link":
                assert entry in link_names()
                continue
            assert entry["provenance"] in PROVENANCES
            assert entry["source"]
    for priced in tree.get("latency", {}).values():
        assert priced["provenance"] in PROVENANCES
        assert priced["source"]


def test_the_catalogue_is_what_is_shipped():
    """65 and more devices of every kind; the eighteen of fedsim 0.1 among them."""
    names = set(profile_names())
    catalogue = yaml.safe_load((SHIPPED.parent / "catalogue.yaml").read_text())
    assert names == {*catalogue["devices"], "reference"}
    assert len(names) >= 65
    assert {load_profile(name).kind for name in names} == set(KINDS)
    old = "essential_ph1 eyeriss fpga_zc706 galaxy_a50 galaxy_s7 gtx_1080ti pixel2 pixel3 raspberry_pi_3b_plus "
    old += "raspberry_pi_4 raspberry_pi_zero_2w reference rtx_2080ti titan_rtx xeon_gold_6226 xeon_gold_6240 "
    old += "xeon_silver_4114 xeon_silver_4210r"
    assert set(old.split()) <= names


def edited(tmp_path, key: str, value: object) -> str:
    """Writes the reference device with one key set, or dropped when `value` is `...`, and returns the path."""
    tree = copy.deepcopy(yaml.safe_load((SHIPPED / "reference.yaml").read_text()))
    *parents, last = key.split(".")
    place = tree
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


RATE = "compute.rate_gmacs_per_s"
BOUNDS = "a number from 0.000001 to 10000000 (1e9 multiply-adds per s on small networks, in effect)"
NUMBER = f"key '{RATE}.value' must be {BOUNDS}, got"


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (f"{RATE}.value", 0, f"{NUMBER} 0"),
        (f"{RATE}.value", -2.5, f"{NUMBER} -2.5"),
        (f"{RATE}.value", math.inf, f"{NUMBER} inf"),
        (f"{RATE}.value", math.nan, f"{NUMBER} nan"),
        (f"{RATE}.value", 10**400, f"{NUMBER} 1000"),
        (f"{RATE}.value", True, f"{NUMBER} True"),
        (f"{RATE}.value", None, f"{NUMBER} None"),
        (f"{RATE}.value", "fast", f"{NUMBER} 'fast'"),
        (f"{RATE}.value", "1e9", f"{NUMBER} '1e9' (YAML reads this as text; write 1000000000.000000)"),
        (f"{RATE}.value", ..., f"key '{RATE}.value' is missing; write it as {{value: ..., provenance: measured|"),
        (f"{RATE}.provenance", "guessed", f"unknown {RATE}.provenance 'guessed' (allowed: assumed, dataset,"),
        (f"{RATE}.source", "", f"key '{RATE}.source' must say where the value is from, got ''"),
        (f"{RATE}.unit", "x", f"unknown key '{RATE}.unit'"),
        (RATE, "fast", f"key '{RATE}' must be {BOUNDS}, or {{value: ..., provenance: measured|dataset|datasheet|"),
        (RATE, [5.0], f"key '{RATE}' must be {BOUNDS}, or {{value: ..., provenance: measured|dataset|datasheet|"),
        (RATE, 2e7, f"key '{RATE}' must be {BOUNDS}, got 20000000.0"),
        (RATE, ..., f"key '{RATE}' is missing; write a number, or {{value: ..., provenance: measured|dataset|"),
        ("compute.rate_gmac_per_s", 1, f"unknown key 'compute.rate_gmac_per_s'; did you mean '{RATE}'?"),
        ("compute", 3, "key 'compute' must be a map with rate_gmacs_per_s, jitter_sigma, got 3"),
        ("power", ..., "key 'power' is missing"),
        ("powr", {}, "unknown key 'powr'; did you mean 'power'?"),
        ("kind", "phon", "unknown kind 'phon'; did you mean 'phone'?"),
        (
            "compute.threads",
            2.5,
            "key 'compute.threads' must be a whole number from 1 to 4096 (threads that compute), got",
        ),
        ("power.tail_s", 61, "key 'power.tail_s' must be a number from 0 to 60 (s that the radio stays awake after"),
        ("isa", "ARM", "unknown isa 'ARM' (allowed: arm, gpu, mcu, none, x86)"),
        ("soc", 2711, "key 'soc' must be text, got 2711"),
        ("kind", ["phone"], "unknown kind \"['phone']\""),
        ("name", 5, "key 'name' must be text, got 5"),
        (
            "memory.usable_fraction.value",
            1.5,
            "key 'memory.usable_fraction.value' must be a number from 0.001 to 1 (share of it",
        ),
        ("memory.runtime_mb.value", 4096, "memory.runtime_mb (4096) must be below memory.ram_mb (4096) times memory."),
        (
            "network.rtt_ms.value",
            -1,
            "key 'network.rtt_ms.value' must be a number from 0 to 10000 (ms of a round trip to the server), got -1",
        ),
    ],
)
def test_wrong_device_file_is_refused_with_its_name_and_key(tmp_path, key: str, value: object, sentence: str):
    path = edited(tmp_path, key, value)
    with pytest.raises(DeviceError, match=re.escape(sentence)) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_everything_that_is_wrong_in_a_file_is_told_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    tree = yaml.safe_load((SHIPPED / "reference.yaml").read_text())
    tree["kind"], tree["power"]["compute_w"]["value"], tree["network"]["up_mbps"] = "fone", 5000, "slow"
    tree["compute"]["treads"] = tree["compute"].pop("rate_gmacs_per_s")
    tree["latency"] = {"scaled": {"device": "pixell4", "factor": 2}}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(DeviceError) as caught:
        load_profile(path)
    first, *others = str(caught.value).splitlines()
    assert first == f"{path}: 6 problems:"
    assert [other.split()[0] for other in others] == ["1.", "2.", "3.", "4.", "5.", "6."]
    text = str(caught.value)
    assert "unknown kind 'fone'; did you mean 'phone'?" in text
    assert "unknown key 'compute.treads'; did you mean 'compute.threads'?" in text
    assert "key 'compute.rate_gmacs_per_s' is missing" in text
    assert "key 'network.up_mbps' must be a number from 0.001 to 100000 (Mbit/s from the device), or {value" in text
    assert "key 'power.compute_w.value' must be a number from 0 to 2000 (W of the whole device while training)" in text
    assert "unknown device 'pixell4'; did you mean 'pixel4'?" in text


def test_figures_that_contradict_each_other_are_told_at_once(tmp_path):
    """The control device does 5 GMAC/s at a peak of 40, and draws more at work than waiting."""
    path, tree = tmp_path / "mine.yaml", yaml.safe_load((SHIPPED / "reference.yaml").read_text())
    tree["compute"]["rate_gmacs_per_s"] = 41
    tree["power"] |= {"idle_w": 30, "compute_w": 20, "base_w": 25}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(DeviceError) as caught:
        load_profile(path)
    for low, high, why in ORDERED:
        assert f"key {low!r} must be at most {high} (" in str(caught.value)
        assert why in str(caught.value)


@pytest.mark.parametrize(("section", "key"), [(section, key) for section in FIGURES for key in FIGURES[section]])
def test_bounds_of_a_figure_are_allowed_and_what_is_beyond_is_not(section: str, key: str):
    figure = FIGURES[section][key]
    beyond = [figure.low - 1 if figure.low else -1e-9, math.nextafter(figure.high, math.inf), math.inf, math.nan]
    for value in (figure.low, figure.high, *beyond):
        reader = Reader("mine.yaml")
        reader.section(section, {key: value}, {key: figure})
        assert bool(reader.problems) == (value not in (figure.low, figure.high))


def test_devices_at_both_ends_of_the_market_are_within_the_bounds(tmp_path):
    """A microcontroller with 2 KB at 16 MHz on a slow radio, and a server card of 1,000 W with 192 GB on 100 Gbit/s."""
    small = {"rate": 5e-5, "ram": 0.002, "mbps": 0.005, "rtt": 5000, "watts": 0.02}
    large = {"rate": 1.2e6, "ram": 196_608, "mbps": 100_000, "rtt": 0.01, "watts": 1000}
    for of in (small, large):
        (tmp_path / "mine.yaml").write_text(
            f"""
            name: mine
            kind: mcu
            compute: {{rate_gmacs_per_s: {of["rate"]:f}, jitter_sigma: 0}}
            memory: {{ram_mb: {of["ram"]}, usable_fraction: 0.9, runtime_mb: 0}}
            network: {{down_mbps: {of["mbps"]}, up_mbps: {of["mbps"]}, rtt_ms: {of["rtt"]}, jitter_sigma: 0.5}}
            power: {{compute_w: {of["watts"]}, rx_w: {of["watts"]}, tx_w: {of["watts"]}, idle_w: 0.00001}}
            """
        )
        assert load_profile(tmp_path / "mine.yaml").compute_watts == of["watts"]


def test_plain_numbers_are_assumed_and_so_are_defaults(tmp_path):
    profile = load_profile(edited(tmp_path, RATE, 5))
    assert profile.flops_per_s == 10e9
    assert RATE in profile.assumed
    assert {"compute.threads", "network.setup_round_trips", "power.tail_s"} < set(profile.assumed)
    assert not {"power.base_w", "power.pj_per_mac"} & set(profile.assumed)
    known = edited(tmp_path, RATE, {"value": 5, "provenance": "recalled", "source": "a page"})
    assert RATE not in load_profile(known).assumed


OLD = """name: reference
kind: host
compute:
  rate_gmacs_per_s: {value: 5.0, provenance: assumed, source: "x"}
  jitter_sigma: {value: 0, provenance: assumed, source: "x"}
memory:
  ram_mb: {value: 4096, provenance: assumed, source: "x"}
  usable_fraction: {value: 1.0, provenance: assumed, source: "x"}
  runtime_mb: {value: 0, provenance: assumed, source: "x"}
network:
  down_mbps: {value: 80, provenance: assumed, source: "x"}
  up_mbps: {value: 40, provenance: assumed, source: "x"}
  rtt_ms: {value: 20, provenance: assumed, source: "x"}
  jitter_sigma: {value: 0, provenance: assumed, source: "x"}
power:
  compute_w: {value: 10, provenance: assumed, source: "x"}
  rx_w: {value: 2, provenance: assumed, source: "x"}
  tx_w: {value: 2, provenance: assumed, source: "x"}
  idle_w: {value: 1, provenance: assumed, source: "x"}
reliability:
  failures_per_min: {value: 0, provenance: assumed, source: "x"}
latency:
  scaled:
    device: pixel3
    factor: {value: 1.04, provenance: assumed, source: "x"}
"""


def test_profile_of_the_old_schema_costs_what_it_did():
    """One round trip per transfer, no joules for bytes, no tail, one thread."""
    old = parse_profile(yaml.safe_load(OLD), "old.yaml")
    assert (old.setup_round_trips, old.threads, old.isa, old.soc) == (1, 1, "none", "")
    assert (old.rx_joules_per_byte, old.tx_joules_per_byte, old.tail_watts, old.tail_s) == (0, 0, 0, 0)
    assert (old.peak_macs_per_s, old.memory_bytes_per_s, old.base_watts) == (None, None, None)


@pytest.mark.parametrize(
    ("key", "value", "field", "in_si"),
    [
        ("compute.threads", 4, "threads", 4),
        ("compute.peak_gmacs_per_s", 24, "peak_macs_per_s", 24e9),
        ("compute.memory_gb_per_s", 12.8, "memory_bytes_per_s", 12.8e9),
        ("network.setup_round_trips", 3, "setup_round_trips", 3),
        ("network.spread_sigma", 0.54, "spread_sigma", 0.54),
        ("power.rx_mw_per_mbps", 13, "rx_joules_per_byte", 13e-3 / 125_000),  # W for 1 Mbit/s, which is 125,000 bytes/s
        ("power.tx_mw_per_mbps", 82, "tx_joules_per_byte", 82e-3 / 125_000),
        ("power.tail_w", 1.06, "tail_watts", 1.06),
        ("power.tail_s", 11.6, "tail_s", 11.6),
        ("power.base_w", 9, "base_watts", 9),
        ("power.pj_per_mac", 3, "joules_per_mac", 3e-12),
        ("power.pj_per_byte", 40, "joules_per_byte", 40e-12),
        ("soc", "BCM2711", "soc", "BCM2711"),
        ("isa", "arm", "isa", "arm"),
        ("kind", "desktop_gpu", "kind", "gpu"),
        ("kind", "mcu", "kind", "mcu"),
    ],
)
def test_key_of_a_file_ends_in_its_field(tmp_path, key: str, value: object, field: str, in_si: object):
    found = getattr(load_profile(edited(tmp_path, key, value)), field)
    assert found == (pytest.approx(in_si) if isinstance(in_si, float) else in_si)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"name: [", "is not valid YAML: while parsing"),
        (b"name: 2001-99-99", "is not valid YAML: month must be in 1..12"),
        (b"[" * 5000, "is not valid YAML: "),
        (b"\xff\xfe\xff", "cannot be read as a text file: "),
        (b"", "the file must be a map with name, kind, compute, memory, network, power, got None"),
        (b"- 1", "the file must be a map with name, kind, compute, memory, network, power, got [1]"),
        (b"name: !!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a constructor"),
    ],
)
def test_file_that_is_no_device_is_refused_in_one_sentence(tmp_path, text: bytes, sentence: str):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(DeviceError, match=f"^{re.escape(str(path))}:? {re.escape(sentence)}") as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


def test_reliability_may_be_left_out(tmp_path):
    assert load_profile(edited(tmp_path, "reliability", ...)).failures_per_min == 0


def test_missing_file_is_named():
    with pytest.raises(DeviceError, match=r"^nowhere/mine\.yaml: there is no such device file$"):
        load_profile("nowhere/mine.yaml")


def test_folder_is_no_device_file(tmp_path):
    (tmp_path / "mine.yaml").mkdir()
    with pytest.raises(DeviceError, match="is a folder, and must be a file"):
        load_profile(tmp_path / "mine.yaml")


def test_wrong_device_name_gets_the_nearest_and_how_to_give_a_file():
    with pytest.raises(DeviceError, match=r"unknown device 'pixel_3x'; did you mean 'pixel_3a'\?.*ending in \.yaml"):
        load_profile("pixel_3x")


def keys_of(tree: dict[str, object], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Lists every key of a tree with its parents."""
    inner = [keys_of(value, (*at, key)) for key, value in tree.items() if isinstance(value, dict)]
    return [*((*at, key) for key in tree), *(key for keys in inner for key in keys)]


def problem_of(tree: dict[str, object]) -> str:
    """Returns what is wrong with a profile; empty where nothing is."""
    try:
        parse_profile(tree, "mine.yaml")
    except DeviceError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["raspberry_pi_zero_w", "raspberry_pi_4", "reference", "nucleo_l4r5zi"])
def test_each_key_that_is_left_out_has_a_default_or_is_asked_for_by_its_name(name: str):
    """With a link and without one, which stands for figures of the network and the radio only."""
    shipped = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    keys = [path for path in keys_of(shipped) if path[0] != "variants"]
    for *parents, last in keys:
        tree = copy.deepcopy(shipped)
        place = tree
        for parent in parents:
            place = place[parent]
        del place[last]
        problem = problem_of(tree)
        if last == "link":  # in place of a link, each of its figures
            assert all(f"'network.{figure}' is missing" in problem for figure in ("down_mbps", "up_mbps", "rtt_ms"))
        elif len(parents) == 1 and last in FIGURES.get(parents[0], {}):
            assert bool(problem) == FIGURES[parents[0]][last].required
        if problem and last != "link":
            assert "\n" not in problem
            assert last in problem
