"""`fedsim devices search` and `evaluate-search` as a user calls them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import Ended

from devices.latency.spaces import SPLITS
from devices.nas.help_searches import TABLE_4
from devices.nas.nb201 import to_string
from devices.nas.tables import network_features
from fedsim.models.sizes import SIZES

SEARCH = ["search", "--space", "nb201", "--data", "t.npz", "--device", "pixel2", "--limit-ms"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table of all networks whose latencies sum their operations, accuracies, and candidates."""
    rng = np.random.default_rng(0)
    split = SPLITS["nb201"]
    names = [*split.source, *split.valid, *split.unseen]
    ops = rng.permutation(np.stack(np.meshgrid(*[np.arange(5)] * 6, indexing="ij"), -1).reshape(-1, 6)).astype(np.uint8)
    counts = network_features("nb201", ops, "counts")
    latency = rng.uniform(0.5, 2.0, (len(names), counts.shape[1])) @ counts.T
    folder = tmp_path_factory.mktemp("made")
    candidates = {"metad2a_idx": np.arange(500), "metad2a_acc_cifar100": rng.uniform(60, 74, 500)}
    embedding = np.arange(10)
    np.savez(
        folder / "t.npz",
        devices=np.array(names),
        latency_ms=latency,
        arch_ops=ops,
        hw_embed_idx=embedding,
        **candidates,
    )
    np.savez(folder / "accuracy.npz", cifar10_test=rng.uniform(80, 94, len(ops)))
    rows = [f"{number},{score}" for number, score in ((3, 0.5), (4, 0.75), (to_string(ops[5].tolist()), 0.25))]
    (folder / "scores.csv").write_text("\n".join(["network,score", *rows]))
    return folder


@pytest.fixture
def devices(made: Path, monkeypatch, fedsim: Callable[..., Ended]) -> Callable[..., Ended]:
    """Calls `fedsim devices ARGS` in the folder of the table."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("COLUMNS", "80")
    return partial(fedsim, "devices")


def test_search_finds_the_best_score_within_the_limit(devices, made):
    """The planted latencies are found exactly, so that what is selected is the best there is."""
    accuracy = ["--score", "accuracy.npz", "--dataset", "cifar10", "--picture", "s.png"]
    ended = devices(*SEARCH, "6", *accuracy, "--margin", "0", "--json")
    found = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert found["chosen"]["score"] == found["best_with_true_latencies"]["score"]
    assert found["chosen"]["true_ms"] == found["measured_ms"] <= 6
    assert found["measurements"] == {"predictor": 10, "verification": 1}
    assert found["candidates"] == 15_625 - 341  # those in which nothing reaches the output
    assert (made / "s.png").read_bytes()[:4] == b"\x89PNG"
    shown = devices(*SEARCH, "6", *accuracy[:4])
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    assert "accuracy on cifar10 after training, %" in " ".join(shown.out.split())
    assert "10 networks measured to predict" in " ".join(shown.out.split())


def test_scores_of_a_file_are_the_candidates_and_without_one_it_is_macs(devices):
    found = json.loads(devices(*SEARCH, "100", "--score", "scores.csv", "--json").out)
    assert (found["candidates"], found["chosen"]["score"]) == (3, 0.75)
    found = json.loads(devices(*SEARCH, "100", "--json").out)
    assert found["score"] == "million multiply-adds, as there is no --score"
    assert found["chosen"]["network"] == to_string([3] * 6)


def test_families_are_searched_by_the_prices_of_a_profile(devices):
    ask = ["search", "--space", "convnet,mlp", "--device", "raspberry_pi_4", "--limit-ms", "2", "--json"]
    found = json.loads(devices(*ask).out)
    assert found["chosen"]["predicted_ms"] * (1 + found["margin"]) <= 2
    assert found["margin"] == found["error"] > 0
    assert found["chosen"]["use"].startswith(("model=convnet", "model=mlp"))
    assert (found["measured_ms"], found["measurements"]["verification"]) == (None, 0)
    ask[2] = "mlp"
    inferred, steps = (json.loads(devices(*ask, *more).out) for more in ([], ["--phase", "train_step", "--batch", "4"]))
    assert steps["eligible"] < inferred["eligible"]


def test_selected_network_is_timed_on_this_host(devices):
    """No host takes a microsecond for it, which is what a fabulous device would be predicted to take."""
    ask = ["search", "--space", "mlp", "--device", "h100", "--on-this-host", "--limit-ms"]
    found = json.loads(devices(*ask, "1e6", "--json").out)
    assert found["checks"][0]["measured_ms"] == found["measured_ms"] > 0
    ended = devices(*ask, "0.001", "--margin", "-0.9999")
    assert ended.code == 2
    assert "broke the limit when measured; mlp hidden=" in ended.err


def test_the_published_searches_are_judged(devices):
    ask = ["evaluate-search", "--data", "t.npz", "--predictors", "structured,flops", "--seeds", "1"]
    result = json.loads(devices(*ask, "--json").out)
    assert len(result["searches"]) == len(TABLE_4) * 2 * 2 * 2  # predictors, measurements, margins
    for one in result["searches"]:
        assert one["reached"]["ms"] is None or one["reached"]["ms"] <= one["cell"]["limit_ms"]
    exact = [row for row in result["summary"] if row["predictor"] == "structured" and not row["own_margin"]]
    assert {row["cells_met"] for row in exact} == {sum(r["met_by_rule"] for r in result["cells"])}
    lines = devices(*ask).out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "published HELP" in "\n".join(lines)


@pytest.mark.parametrize("config", SIZES)
def test_sizes_are_settings_that_build(config: str):
    from fedsim.cli.devices.own_model import named_model
    from fedsim.cli.devices.pools import family_names

    sound = {"bcresnet": (1, 40, 20), "bcresnet_asc": (1, 32, 20), "ds_cnn": (1, 10, 20), "matchboxnet": (1, 64, 20)}
    shape = sound.get(config, (1, 20, 20) if config == "speech_resnet" else (3, 8, 8))
    tokens = 10 if config == "char_lstm" else None
    all_sizes = family_names([config])
    networks = [
        named_model(name, None if tokens else shape, 4, tokens, sizes=own)
        for name, own in (all_sizes[0], all_sizes[-1])
    ]
    counts = [sum(p.numel() for p in network.module.parameters()) for network in networks]
    assert counts[0] < counts[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*SEARCH, "0"], ["--limit-ms must be a number above 0, got 0"]),
        ([*SEARCH, "0.1"], ["none of 15284 networks is within 0.1 ms", "the least is predicted for |"]),
        ([*SEARCH, "5", "--margin", "-1"], ["--margin must be a number above -1"]),
        ([*SEARCH, "5", "--predictor", "structurd"], ["unknown predictor 'structurd'", "did you mean 'structured'"]),
        ([*SEARCH, "5", "--predictor", "help"], ["help predicts with meta-trained weights only"]),
        ([*SEARCH, "5", "--score", "accuracy.npz"], ["cifar10, cifar100, imagenet16", "--dataset"]),
        ([*SEARCH, "5", "--score", "accuracy.npz", "--dataset", "cifar1"], ["unknown data set", "did you mean"]),
        ([*SEARCH, "5", "--dataset", "cifar10"], ["--dataset chooses among the accuracies of an npz"]),
        ([*SEARCH, "5", "--score", "bad.csv"], ["bad.csv, line 2: network 'x' is not in the space"]),
        ([*SEARCH, "5", "--score", "twice.csv"], ["twice.csv, line 3: network '1' is scored twice"]),
        ([*SEARCH, "5", "--score", "nan.csv"], ["nan.csv, line 2: score must be a number, got 'nan'"]),
        ([*SEARCH, "5", "--score", "columns.csv"], ["columns.csv: lacks the column 'score'"]),
        ([*SEARCH, "5", "--phase", "train_step"], ["--phase is for model configs"]),
        ([*SEARCH[:5], "--device", "pixl2", "--limit-ms", "5"], ["unknown device 'pixl2'", "did you mean 'pixel2'"]),
        (["search", "--space", "nb201", "--device", "pixel2", "--limit-ms", "5"], ["needs --data"]),
        (["search", "--space", "resnet9", "--device", "pixel2", "--limit-ms", "5"], ["did you mean 'resnet8'"]),
        (["search", "--space", "vgg", "--device", "pixl2", "--limit-ms", "5"], ["did you mean 'pixel2'"]),
        (["evaluate-search", "--data", "accuracy.npz"], ["has no array 'devices'"]),
        (["evaluate-search", "--data", "t.npz", "--predictors", "help", "--measurements", "5"], ["too few for help"]),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], words: list[str], devices, made):
    for name, text in {
        "bad": "network,score\nx,1",
        "twice": "network,score\n1,1\n1,2",
        "nan": "network,score\n1,nan",
        "columns": "network\n1",
    }.items():
        (made / f"{name}.csv").write_text(text + "\n")
    ended = devices(*arguments)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert all(word in ended.err for word in words), ended.err
