"""`fedsim devices` as a user calls it: tables, JSON, pictures, and one sentence for what is wrong."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import Ended

from devices.latency.spaces import DEVICE_SETS, SPLITS
from devices.nas.tables import network_features
from devices.profile import SHIPPED, profile_names

EVALUATE = ["evaluate", "--data", "x.npz", "--space"]


@pytest.fixture
def devices(tmp_path: Path, monkeypatch, fedsim: Callable[..., Ended]) -> Callable[..., Ended]:
    """Calls `fedsim devices ARGS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return partial(fedsim, "devices")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latency table whose devices cost exactly what a draw of coefficients per operation says."""
    rng = np.random.default_rng(0)
    split = SPLITS["nb201"]
    names = [*split.source, *split.valid, *split.unseen]
    ops = rng.integers(0, 5, (1900, 6)).astype(np.uint8)
    counts = network_features("nb201", ops, "counts")
    latency = rng.uniform(0.5, 2.0, (len(names), counts.shape[1])) @ counts.T
    path = tmp_path_factory.mktemp("table") / "table.npz"
    np.savez(path, devices=np.array(names), latency_ms=latency, arch_ops=ops, hw_embed_idx=np.arange(10))
    return path


@pytest.fixture(scope="module")
def harder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of FBNet, with the devices of the harder sets."""
    rng = np.random.default_rng(0)
    names = sorted({device for split in DEVICE_SETS.values() for device in (*split.source, *split.unseen)})
    ops = rng.integers(0, 9, (5000, 22)).astype(np.uint8)
    layers = network_features("fbnet", ops, "layers")
    latency = rng.uniform(0.5, 2.0, (len(names), layers.shape[1])) @ (layers / layers.max(axis=0).clip(min=1)).T
    path = tmp_path_factory.mktemp("harder") / "table.npz"
    np.savez(path, devices=np.array(names), latency_ms=latency, arch_ops=ops, hw_embed_idx=np.arange(10))
    return path


def test_planted_latencies_are_found_from_ten_networks(devices, table):
    ended = devices("evaluate", "--space", "nb201", "--data", str(table), "--seeds", "1", "--json")
    result = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert set(result["devices"]) == set(SPLITS["nb201"].unseen)
    for scores in [*result["devices"].values(), result["mean"]]:
        assert set(scores) == {"spearman", "kendall", "mape"}
        assert scores["spearman"] > 0.99
    assert "titan_rtx_256" in devices("evaluate", "--space", "nb201", "--data", str(table), "--seeds", "1").out


def test_comparison_makes_a_table_and_a_picture(devices, table, tmp_path):
    arguments = ["--predictors", "structured,macs", "--measurements", "5,10", "--seeds", "1", "--picture", "c.png"]
    ended = devices("compare", "--space", "nb201", "--data", str(table), *arguments)
    assert ended.code == 0
    assert "structured" in ended.out
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_training_of_help_writes_weights_that_can_be_judged(devices, table, tmp_path):
    data = ["--space", "nb201", "--data", str(table)]
    assert devices("train-help", *data, "--out", "w.safetensors", "--episodes", "2").code == 0
    judge = ["--predictor", "help", "--weights", "w.safetensors", "--measurements", "20", "--references", "random"]
    ended = devices("evaluate", *data, *judge, "--seeds", "1", "--json")
    assert np.isfinite(json.loads(ended.out)["mean"]["mape"])


def test_harder_set_is_trained_and_judged_apart_from_the_usual_one(devices, harder):
    """The weights of one set are refused on a set with other devices: here F2 judges a device that F1 learns from."""
    data = ["--space", "fbnet", "--data", str(harder)]
    assert devices("train-help", *data, "--devices", "F1", "--out", "w.safetensors", "--episodes", "2").code == 0
    for predictor in (["structured", "--prior"], ["help", "--weights", "w.safetensors"]):
        judge = ["--predictor", *predictor, "--measurements", "20", "--seeds", "1", "--devices"]
        result = json.loads(devices("evaluate", *data, *judge, "F1", "--json").out)
        assert set(result) == {"devices", "mean"}
        assert set(result["devices"]) == set(DEVICE_SETS["F1"].unseen)
        assert all(set(scores) == {"spearman", "kendall", "mape"} for scores in result["devices"].values())
    ended = devices("evaluate", *data, *judge, "F2")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "trained with device 'titan_rtx_1', which is to be judged" in ended.err


def test_devices_are_listed_shown_and_priced(devices, tmp_path):
    assert "raspberry_pi_4" in devices("list").out
    assert devices("show", "pixel3", "--picture", "p.png").code == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    ended = devices("predict", "--model", "lenet5", "--input-shape", "1,28,28", "--batch", "4", "--json")
    rows = json.loads(ended.out)["devices"]
    assert all(row["forward_ms"] > 0 for row in rows)
    assert all((row["step_ms"] is None) == (row["kind"] == "mcu") for row in rows)
    assert "resnet-16" in devices("predict", "--model", "resnet-16", "--device", "pixel3").out


@pytest.mark.parametrize("arguments", [["list"], ["predict", "--model", "resnet-16", "--batch", "32"]])
def test_tables_of_all_devices_fit_into_80_columns(arguments: list[str], devices, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = devices(*arguments).out.splitlines()
    assert max(map(len, lines)) <= 80
    cells = [line.split()[1] for line in lines if line.startswith("│")]
    assert set(profile_names()) <= set(cells)  # no name is cut or folded
    assert cells.index("phone") < cells.index("galaxy_a50") < cells.index("pixel3") < cells.index("raspberry_pi_4")


def test_prediction_says_what_it_does_not_know(devices):
    """LeNet-5 on a GPU is launches; nobody trained on a Pixel 3; the Pi 4 trained with 16 examples a step."""
    some = ["--device", "rtx_2080ti", "--device", "pixel3", "--device", "raspberry_pi_4", "--device", "nucleo_h7a3zi"]
    lenet = ["predict", "--model", "lenet5", "--input-shape", "1,28,28", "--batch", "20", *some]
    out = " ".join(devices(*lenet).out.split())
    assert "small nets are overhead: rtx_2080ti" in out
    assert "carried from other devices by peak and bandwidth: pixel3" in out
    assert "extrapolated step: batch 20 is outside of the references' 16 to 16: raspberry_pi_4" in out
    assert "cannot train" in out
    rows = json.loads(devices(*lenet, "--json").out)["devices"]
    pi = next(row for row in rows if row["device"] == "raspberry_pi_4")
    assert pi["step"]["remarks"] == ["batch 20 is outside of the references' 16 to 16"]
    assert pi["step"]["error"] > 0
    assert rows[0]["device"] == "pixel3"
    kinds = json.loads(devices(*lenet[:-8], "--kind", "mcu", "--json").out)["devices"]
    assert {row["kind"] for row in kinds} == {"mcu"}


def test_figures_are_shown_with_their_sources(devices):
    out = " ".join(devices("show", "raspberry_pi_4").out.split())
    assert "compute.peak_gmacs_per_s │ 28.8 │ derived: 4 x 1.8 GHz" in out
    assert "link wired" in out
    assert "step: embedded_vision" in out
    assert "int8" in devices("show", "nucleo_h7a3zi").out


def test_fit_answers_for_a_phone_a_board_and_a_microcontroller(devices):
    lenet = ["fit", "--model", "lenet5", "--input-shape", "1,28,28"]
    some = ["--device", "raspberry_pi_4", "--device", "nucleo_h7a3zi", "--batch", "1,8"]
    out = " ".join(devices(*lenet, *some).out.split())
    assert "raspberry_pi_4: trains with batches up to" in out
    assert "int8, inference only, fits: weights 61.7 kB of 2.1 MB flash" in out
    board, mcu = json.loads(devices(*lenet, *some, "--json").out)["devices"]
    assert [row["batch"] for row in board["batches"]] == [1, 8]
    parts = board["batches"][1]["step_bytes"]
    assert parts["total"] == sum(parts[key] for key in ("weights", "gradients", "optimizer", "activations"))
    assert (mcu["can_train"], mcu["int8"]["fits"]) == (False, True)


@pytest.mark.parametrize(
    "model, shape", [("bcresnet_asc", "1,256,64"), ("ds_cnn", "1,10,49"), ("matchboxnet", "1,64,101")]
)
def test_fit_answers_for_networks_that_hear(devices, model: str, shape: str):
    """A Cortex-M7 of 1.4 MB runs the small ones; what a board needs for a step grows with the batch."""
    some = ["--model", model, "--input-shape", shape, "--device", "raspberry_pi_4", "--device", "nucleo_h7a3zi"]
    board, mcu = json.loads(devices("fit", *some, "--batch", "1,8", "--json").out)["devices"]
    first, last = (row["step_bytes"]["total"] for row in board["batches"])
    assert first < last < 8 * first
    assert (mcu["can_train"], mcu["int8"]["fits"]) == (False, True)


def test_own_file_is_priced_and_what_does_not_fit_gets_advice(devices, tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\n\ndef big():\n    return nn.Linear(30_000, 10_000)\n")
    own = ["--model", "net.py:big", "--input-shape", "30000"]
    assert "net.py:big" in devices("predict", *own, "--device", "pixel3").out
    out = " ".join(devices("fit", *own, "--device", "pixel3", "--momentum").out.split())
    assert "cannot train net.py:big, not even with one example a step" in out
    assert "times as wide would fit" in out
    assert "galaxy_note10 (phone)" not in out  # three times 1.2 GB are more than any phone has


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "--kind", "phones"], ["unknown kind 'phones'", "did you mean 'phone'"]),
        (["fit", "--model", "lenet5", "--device", "pixel3", "--batch", "0"], ["--batch takes whole numbers"]),
        (["show", "pixl3"], ["unknown device 'pixl3'", "did you mean 'pixel3'"]),
        (["predict", "--model", "lenet55"], ["unknown model 'lenet55'", "did you mean 'lenet5'"]),
        (["predict", "--model", "lenet5", "--input-shape", "1,a"], ["--input-shape takes whole numbers", "'a'"]),
        (["predict", "--model", "lenet5", "--input-shape", "1,8,8"], ["lenet5", "images"]),
        (["evaluate", "--space", "nb202", "--data", "x.npz"], ["unknown space 'nb202'", "did you mean 'nb201'"]),
        (["evaluate", "--space", "nb201", "--data", "x.npz"], ["x.npz"]),
        (["evaluate", "--space", "nb201"], ["--data"]),
        (
            [*EVALUATE, "fbnet", "--devices", "f2"],
            ["unknown set of devices 'f2'", "did you mean 'F2'", "F3, F4, FA"],
        ),
        ([*EVALUATE, "nb201", "--devices", "F1"], ["the set of devices F1 is for space fbnet"]),
        (["enroll", "--name", "here", "--out", "."], ["--out", ".yaml"]),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], words: list[str], devices):
    ended = devices(*arguments)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert all(word in ended.err for word in words), ended.err


def test_a_table_with_nan_names_the_network_and_the_device(devices, table, tmp_path):
    arrays = dict(np.load(table))
    arrays["latency_ms"][2, 7] = np.nan
    np.savez(tmp_path / "bad.npz", **arrays)
    ended = devices("evaluate", "--space", "nb201", "--data", "bad.npz")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "network 7 on 1080ti_256 is nan" in ended.err


def test_links_are_listed_in_eighty_columns(devices, monkeypatch):
    """mobile: 345 mW at 3.75 MB/s and 13.03 mW per Mbit/s are .092 + .104 J/MB; the tail is 1.06 W for 11.6 s."""
    monkeypatch.setenv("COLUMNS", "80")
    ended = devices("links")
    (mobile,) = [line for line in ended.out.splitlines() if " mobile " in line]
    assert mobile.replace("│", "").split() == ["mobile", "30.0", "9.4", "40", "0.20", "1.13", "12.30"]
    assert (ended.code, max(map(len, ended.out.splitlines())) <= 80) == (0, True)


def test_population_is_counted_from_a_list(devices, tmp_path):
    columns = "phone,soc,ram_gb,year,android,cpu_int8_score,cpu_float_score,fp32_score,fp16_score,int8_score,ai_score"
    rows = ["A,Snapdragon 845,4,2018,9,1,2100,1,1,1,1", "B,Snapdragon 20,1,2016,6,1,200,1,1,1,1"]
    (tmp_path / "phones_ai_benchmark.csv").write_text("\n".join([columns, *rows]))
    ended = devices("population", "--data", str(tmp_path), "--out", "p.yaml")
    assert "1 of 2 phones of 2016 to 2019 have the SoC of a shipped device: 50%" in ended.out
    assert "pixel3: {phones: 0.33, tier: " in (tmp_path / "p.yaml").read_text()
    assert devices("population", "--data", "elsewhere").code == 2


def test_a_missing_figure_is_asked_for_at_every_door(devices, fedsim, tmp_path):
    tree = yaml.safe_load((SHIPPED / "raspberry_pi_zero_w.yaml").read_text())
    del tree["compute"]["jitter_sigma"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    doors = [
        devices("show", "mine.yaml"),
        devices("fit", "--model", "lenet5", "--input-shape", "1,28,28", "--device", "mine.yaml"),
        devices("predict", "--model", "lenet5", "--input-shape", "1,28,28", "--device", "mine.yaml"),
        fedsim("run", "fleet.devices={mine.yaml: 1}"),
    ]
    for ended in doors:
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert "mine.yaml: key 'compute.jitter_sigma' is missing" in ended.err
