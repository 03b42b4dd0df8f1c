"""`fedsim devices new`: the file that it writes is a device of one's own."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import yaml
from conftest import Ended

from devices.errors import DeviceError
from devices.profile import load_profile, profile_names
from devices.profile_file import FIGURES
from fedsim.cli.devices.new import commented_profile


@pytest.fixture
def new(tmp_path: Path, monkeypatch, fedsim: Callable[..., Ended]) -> Callable[..., tuple[int, str]]:
    """Calls `fedsim devices new ARGS` in an empty folder; its code, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        code, out, err = fedsim("devices", "new", *arguments)
        return code, out + err

    return call


@pytest.mark.parametrize("like", profile_names())
def test_copy_of_a_shipped_device_equals_it_but_for_the_name(tmp_path: Path, like: str):
    path = tmp_path / "mine.yaml"
    path.write_text(commented_profile("mine", like))
    mine, shipped = load_profile(path), load_profile(like)
    assert replace(mine, latency=None) == replace(shipped, name="mine", latency=None)
    assert mine.latency == (shipped.latency and shipped.latency.scaled(1.0))  # equal prices, which nobody measured here


@pytest.mark.parametrize(("figure", "column"), [("peak_gmacs_per_s", 0), ("memory_gb_per_s", 1), ("clock_ghz", 3)])
def test_prices_of_a_copy_follow_its_figures(tmp_path: Path, figure: str, column: int):
    """Half the peak doubles what multiply-adds take, half the bandwidth what bytes take, half the clock what calls."""
    tree = yaml.safe_load(commented_profile("mine", "raspberry_pi_4"))
    compute = tree["compute"]
    compute["rate_gmacs_per_s"] = compute["rate_gmacs_per_s"]["value"] / 2  # below the peak
    compute[figure] = (compute[figure]["value"] if isinstance(compute[figure], dict) else compute[figure]) / 2
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    slow, own = load_profile(path).latency, load_profile("raspberry_pi_4").latency
    factors = [
        2.0 if place == column or (figure == "memory_gb_per_s" and place in (1, 2)) else 1.0 for place in range(4)
    ]
    for phase in ("inference", "forward", "step"):
        np.testing.assert_allclose(getattr(slow, phase).matrix, getattr(own, phase).matrix * factors)
        assert (getattr(slow, phase).basis, getattr(slow, phase).error) == ("scaled", None)


def test_a_profile_that_scales_itself_is_refused(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    tree = yaml.safe_load(commented_profile("mine", "pixel3"))
    path.write_text(yaml.safe_dump({**tree, "latency": {"scaled": {"device": str(path)}}}))
    with pytest.raises(DeviceError, match=r"scaled\.device .* leads back to itself"):
        load_profile(path)


def test_copy_has_every_key_with_its_meaning_and_its_source():
    """Those that the device leaves out stand behind a '# '; latencies are the other device's, scaled."""
    text = commented_profile("mine", "raspberry_pi_4")
    for figures in FIGURES.values():
        for key, figure in figures.items():
            assert f"{key}: " in text
            assert f"  # {figure.meaning}\n" in text
    assert "Pi Dramble benchmark table, as repeated by other pages, idle" in text
    assert text.endswith("\n  scaled: {device: raspberry_pi_4}\n")


def test_figures_that_were_left_out_may_be_taken_in(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    text = commented_profile("mine", "raspberry_pi_4")
    for key, default in (("tail_s", "0"), ("base_w", "..."), ("setup_round_trips", "1")):
        text = text.replace(f"# {key}: {default}", f"{key}: 3")
    path.write_text(text.replace("  link: wired", "  link: wifi"))
    mine = load_profile(path)
    assert (mine.tail_s, mine.base_watts, mine.setup_round_trips, mine.link) == (3, 3, 3, "wifi")


def test_device_on_a_link_is_copied_with_it(tmp_path: Path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    tree = yaml.safe_load(commented_profile("first", "pixel3"))
    tree |= {"network": {"link": "mobile", "rtt_ms": 50}, "power": {"compute_w": 3, "idle_w": 0.3}, "soc": "yes"}
    del tree["reliability"], tree["latency"]
    first.write_text(yaml.safe_dump(tree))
    second.write_text(commented_profile("second", str(first)))
    assert load_profile(second) == replace(load_profile(first), name="second")


def test_command_writes_the_file_once_and_says_how_to_use_it(new):
    code, said = new("my_board", "--like", "raspberry_pi_4")
    assert code == 0
    assert f"'fleet.devices={{{Path('my_board.yaml').resolve()}: 1}}'" in said
    Path("my_board.yaml").write_text("mine")
    code, said = new("my_board", "--like", "pixel3")
    assert (code, said) == (2, "fedsim: my_board.yaml is there already; name another profile with --out or remove it\n")
    assert Path("my_board.yaml").read_text() == "mine"


def test_command_that_it_prints_runs_on_the_new_device(new, fedsim):
    _, said = new("my_board", "--like", "raspberry_pi_4", "--out", "board.yaml")
    name, *use = shlex.split(said.split("use it: ")[1])
    assert name == "fedsim"
    assert not fedsim(*use, "workload=blobs", "rounds=1", "evaluate_every=1", "out=run").code
    rows = pandas.concat(pandas.read_parquet(path) for path in Path("run/clients").iterdir())
    assert set(rows["device"]) == {"my_board"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["nb", "--like", "raspberry_pi_4@1t"],
            "--like must be a device, got '1t' of raspberry_pi_4, a way to run it",
        ),
        (["my_board", "--like", "raspberry_pi"], "unknown device 'raspberry_pi'; did you mean 'raspberry_pi_"),
        (["../board", "--like", "pixel3"], "NAME must be letters, digits, '_', '-' and '.', and no shipped device"),
        (["pixel3", "--like", "pixel3"], "no shipped device, got 'pixel3'"),
        (["board", "--like", "pixel3", "--out", "board.txt"], "--out must end in .yaml or .yml, got 'board.txt'"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(new, arguments: list[str], sentence: str):
    code, said = new(*arguments)
    assert (code, sentence in said, said.count("\n")) == (2, True, 1)
    assert list(Path().iterdir()) == []
