"""Which phones people had: the shipped table, how it is counted from a list, and the words it gives to settings."""

from pathlib import Path

import pytest
import yaml

import configs
from devices.compression.plan import CompressionPlan
from devices.errors import DeviceError
from devices.population import (
    FILE,
    TIERS,
    Phone,
    from_list,
    groups_of,
    population,
    read_list,
    shipped_socs,
    soc_named,
    tier_of,
)
from devices.profile import load_profile
from strategies.widths import WidthStrategy

LIST = """\
phone,soc,ram_gb,year,android,cpu_int8_score,cpu_float_score,fp32_score,fp16_score,int8_score,ai_score
A,Snapdragon 855 Plus,8,2019,10,1,3000,1,1,1,1
A,Snapdragon 855 Plus,8,2019,9,1,3400,1,1,1,1
A,Exynos 9820 Octa,8,2019,9,1,2700,1,1,1,1
B,Snapdragon 400,1,2015,5,1,200,1,1,1,1
"""


def test_phones_fleet_is_the_population():
    path = Path(configs.__file__).parent / "fleet" / "phones.yaml"
    text = path.read_text()
    assert population().as_fleet() in text
    assert yaml.safe_load(text)["devices"] == {name: share.phones for name, share in population().devices.items()}


def test_share_of_the_list_that_is_covered_is_what_the_configuration_says():
    shipped = population()
    print(f"{shipped.covered} of {shipped.listed}, {shipped.coverage:.1%}; by third {shipped.covered_by_third}")
    assert (shipped.covered, shipped.listed, f"{shipped.coverage:.0%}") == (139, 254, "55%")
    assert shipped.phones("dataset") == pytest.approx(shipped.covered, abs=0.05)  # parts are rounded to 0.01
    assert shipped.phones("assumed") / shipped.phones() < 0.1
    text = (Path(configs.__file__).parent / "fleet" / "phones.yaml").read_text()
    assert all(f"{100 * part:.0f} %" in text for part in (shipped.coverage, *shipped.covered_by_third))


def test_every_device_of_the_population_is_a_shipped_phone_with_that_soc():
    named = {name: share.soc for name, share in population().devices.items()}
    assert named.items() <= shipped_socs().items()
    assert population().as_yaml() == FILE.read_text()


def test_tiers_are_thirds_as_near_as_whole_socs_allow():
    """The largest SoC (Snapdragon 855) is 22 % of the fleet, so that a third may be missed by about half of that."""
    assert [population().of_tier(tier) for tier in TIERS] == pytest.approx([1 / 3] * 3, abs=0.11)
    scores = {tier: [s.score for s in population().devices.values() if s.tier == tier and s.score] for tier in TIERS}
    assert max(scores["low"]) < min(scores["mid"])
    assert max(scores["mid"]) < min(scores["high"])


def test_model_counts_once_for_each_soc_within_the_years(tmp_path: Path):
    """Two rows of A with one SoC are one phone with the median score; B is too old."""
    (tmp_path / "phones_ai_benchmark.csv").write_text(LIST)
    assert read_list(tmp_path) == [Phone("A", "Snapdragon 855+", 3200), Phone("A", "Exynos 9820", 2700)]
    with pytest.raises(DeviceError, match=r"phones_ai_benchmark\.csv is not there; --data is the folder"):
        read_list(tmp_path / "elsewhere")


def test_devices_with_one_soc_share_its_phones():
    """Of 3 phones with x two devices get 1.5 each; of the fastest third of six, nothing is covered."""
    phones = [Phone(str(score), soc, score) for score, soc in zip(range(1, 7), "xxxyzz", strict=True)]
    made = from_list(phones, {"one": "x", "two": "x", "three": "y"})
    assert {name: share.phones for name, share in made.devices.items()} == {"one": 1.5, "two": 1.5, "three": 1}
    assert (made.listed, made.covered, made.covered_by_third) == (6, 4, [1, 1, 0])
    assert [share.tier for share in made.devices.values()] == ["low", "low", "high"]
    with pytest.raises(DeviceError, match="none of 6 phones has the SoC of a shipped device"):
        from_list(phones, {"one": "a"})


@pytest.mark.parametrize(
    ("listed", "ours"),
    [
        ("HiSilicon Kirin 990 5G", "Kirin 990"),
        ("Hisilicon Kirin 710", "Kirin 710"),
        ("Exynos 9611", "Exynos 9610"),
        ("Snapdragon 855 Plus", "Snapdragon 855+"),
        ("Snapdragon S4 Plus", "Snapdragon S4 Plus"),
        ("Snapdragon 730G", "Snapdragon 730G"),
    ],
)
def test_soc_of_the_list_gets_the_name_that_profiles_use(listed: str, ours: str):
    assert soc_named(listed) == ours


def test_device_is_called_by_name_tier_and_kind():
    assert groups_of(load_profile("pixel3")) == ("pixel3", "mid", "phone")
    assert groups_of(load_profile("raspberry_pi_4")) == ("raspberry_pi_4", "sbc")
    assert (tier_of("redmi_6_pro"), tier_of("oneplus_7t"), tier_of("galaxy_s7")) == ("low", "high", None)


def test_tier_of_a_setting_comes_after_a_name_and_before_a_kind():
    tiers = {"phone": {"keep": 0.5}, "low": {"keep": 0.25}, "pixel2": {"keep": 0.75}}
    plan = CompressionPlan(tiers=tiers)
    keeps = {name: plan.recipe(load_profile(name)).keep for name in ("pixel2", "mi_max_3", "pixel3", "raspberry_pi_4")}
    assert keeps == {"pixel2": 0.75, "mi_max_3": 0.25, "pixel3": 0.5, "raspberry_pi_4": 1}
    assert WidthStrategy([1.0, 0.5], tiers={"low": 0.5}).tiers == {"low": 0.5}
    with pytest.raises(DeviceError, match=r"in compression\.tiers 'lov'; did you mean 'low'"):
        CompressionPlan(tiers={"lov": {"keep": 0.5}})
