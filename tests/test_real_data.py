"""One short federation on each of the real data sets that users meet first; needs the bundles in FEDSIM_DATA.

The gates are far below what several seeds reach (see each test), so that they fail for a broken program only.
"""

import json
from pathlib import Path

import pytest

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.runs.writer import run
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose

pytestmark = [pytest.mark.data, pytest.mark.usefixtures("data_folder")]


def federate(out: Path, *overrides: str) -> tuple[dict, dict]:
    """Runs it; returns (metrics of the untrained model, summary)."""
    settings = compose([*overrides, "engine.device=cpu"])
    summary = run(settings, LocalEngine(serve), out)
    first = json.loads((out / "rounds.jsonl").read_text().splitlines()[0])
    return first["metrics"], summary


def test_mnist_by_writer_learns_digits_of_unseen_writers(tmp_path):
    """Every client is one writer; no writer is in both splits. Seeds 1-3 reach 0.87, 0.90, 0.92."""
    overrides = ["workload=mnist_writers", "rounds=30", "trainer.local_epochs=1", "evaluate_every=30"]
    untrained, summary = federate(tmp_path / "run", *overrides)
    assert untrained["accuracy"] < 0.2
    assert summary["final"]["accuracy"] > 0.7
    assert summary["outcomes"]["completed"] > 100


@pytest.mark.slow
def test_cifar10_with_label_skew_is_learned(tmp_path):
    """The 20,000-image subset, Dirichlet(1) over 20 clients. Seeds 1-3 reach 0.336, 0.325, 0.338; chance is 0.1."""
    overrides = ["workload=bundle", "workload.path=cifar10", "workload.input_range=standard", "model=lenet5"]
    overrides += ["partition=dirichlet", "partition.alpha=1", "num_clients=20", "rounds=6", "cohort=5"]
    overrides += ["trainer.local_epochs=1", "trainer.lr=0.05", "fleet=desktops", "evaluate_every=6"]
    _, summary = federate(tmp_path / "run", *overrides)
    assert summary["final"]["accuracy"] > 0.25


@pytest.mark.slow
def test_shakespeare_by_role_learns_more_than_letter_frequencies(tmp_path):
    """Every client is one speaking role. Seeds 1-2 reach 0.42; always guessing a space gives 0.163."""
    overrides = ["experiment=shakespeare_roles"]
    _, summary = federate(tmp_path / "run", *overrides)
    assert summary["final"]["accuracy"] > 0.3
    world = build_world(json.dumps(compose(overrides)))
    assert world.workload.num_clients > 100


@pytest.mark.parametrize("method", ["naivemix", "fedmix"])
def test_averages_of_lines_are_mixed_behind_the_embedding(tmp_path, method: str):
    """Twelve roles share mean frequencies of the 80 characters of their lines, and a small network learns with them."""
    overrides = ["experiment=shakespeare_roles", f"method={method}", "num_clients=12", "cohort=4", "rounds=2"]
    overrides += ["evaluate_every=2", "model.hidden=32", "trainer.local_steps=4", "trainer.lr=1"]
    untrained, summary = federate(tmp_path / "run", *overrides, "fleet=uniform")
    assert summary["final"]["loss"] < untrained["loss"] - 0.2  # 4.2 to 3.6
    metrics = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[-1])["metrics"]
    assert metrics["pool_pairs"] == 12
    assert ("taylor" in metrics) == (method == "fedmix")


@pytest.mark.slow
def test_keywords_are_learned_from_spectrograms(tmp_path):
    """3,659 clips of 12 classes, judged on other speakers. Seeds 1-3 reach 0.232, 0.191, 0.249; chance is 0.09."""
    overrides = ["workload=kws", "workload.input_range=standard", "partition=iid", "num_clients=4", "cohort=4"]
    overrides += ["model=speech_resnet", "model.width=19", "trainer.lr=0.02", "trainer.momentum=0.9"]
    overrides += ["trainer.batch_size=16", "trainer.local_epochs=1", "rounds=3", "evaluate_every=3", "fleet=uniform"]
    untrained, summary = federate(tmp_path / "run", *overrides)
    assert untrained["accuracy"] < 0.12
    assert summary["final"]["accuracy"] > 0.14
    speakers = build_world(json.dumps(compose(["workload=kws", "partition.min_examples=10"]))).workload
    assert speakers.num_clients > 100
