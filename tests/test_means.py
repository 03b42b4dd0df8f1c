"""What the clients of a round report becomes one number: each metric by the weighting that is stated for it."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import honest
from test_methods import methods_of_each_kind

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.grid.exchange import ClientReport
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import options
from fedsim.workloads.metrics import AVERAGED, BY_CLIENTS, BY_EXAMPLES, averaged_by

SIZES = (8, 30, 12, 25)  # training examples of each user; of the test split (3, 20, 1, 9)
JUDGED = (3, 20, 1, 9)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run whose clients differ in their examples and in their devices."""
    folder, rng = tmp_path_factory.mktemp("data") / "unequal", np.random.default_rng(0)
    folder.mkdir()
    for part, sizes in (("train", SIZES), ("test", JUDGED)):
        owners = np.repeat(np.arange(len(sizes)), sizes)
        x, y = rng.normal(size=(len(owners), 6)).astype(np.float32), np.arange(len(owners)) % 4
        np.savez(folder / f"{part}.npz", x=x, y=y, client=owners)
    (folder / "meta.json").write_text(json.dumps({"classes": list("abcd"), "kind": "tabular"}))
    return [
        *("workload=bundle", f"workload.path={folder}", "partition=natural", "model=mlp", "model.hidden=[16]"),
        *(
            "fleet=uniform",
            "fleet.devices={pixel3: 1, raspberry_pi_4: 1}",
            "rounds=2",
            "cohort=4",
            "evaluate_clients=4",
        ),
        *("trainer.batch_size=4", "trainer.local_epochs=1", "engine.device=cpu", "seed=3"),
    ]


def by_hand(clients: Sequence[ClientReport], phase: str) -> dict[str, float]:
    """Means over the accepted clients, worked out again."""
    rows = [c for c in clients if c.phase == phase and c.outcome == "completed" and c.num_examples]
    found = {}
    for name in {name for row in rows for name in row.metrics}:
        having = [row for row in rows if name in row.metrics]
        weights = [row.num_examples if averaged_by(name) == BY_EXAMPLES else 1 for row in having]
        found[name] = float(np.average([row.metrics[name] for row in having], weights=weights))
    return found


def check(overrides: Sequence[str], lost: str = "") -> set[str]:
    """Compares a run's means with those by hand; the names of its metrics. Some clients are lost by that outcome."""
    federation = Federation(build_world(json.dumps(compose([*honest(overrides), *overrides]))), LocalEngine(serve))
    seen = set()
    for report, clients in federation.rounds():
        trained, judged = by_hand(clients, "train"), by_hand(clients, "evaluate")
        expected = trained | {f"client_{name}": value for name, value in judged.items()}
        assert {name: report.metrics.get(name) for name in expected} == pytest.approx(expected, rel=1e-9)
        seen |= trained.keys() | judged.keys()
        if report.round and lost:
            assert {c.outcome for c in clients if c.phase == "train"} == {"completed", lost}
    assert len({c.num_examples for c in clients if c.phase == "evaluate"}) == len(JUDGED)
    return seen


def is_stated(name: str) -> bool:
    return any(name == key or name.startswith(f"{key}_") for key in AVERAGED)


@pytest.mark.parametrize("method", methods_of_each_kind())
def test_the_means_of_every_method_are_those_that_are_stated(method: str, unequal: list[str]):
    needs = ["model.norm=layer"] if method == "fedbn" else []
    names = check([*unequal, f"method={method}", *needs])
    assert {"train_loss", "latency_ms", "accuracy"} <= names
    assert [name for name in sorted(names) if not is_stated(name)] == []


@pytest.mark.parametrize("compression", options("compression"))
def test_the_means_of_every_compression_are_those_that_are_stated(compression: str, unequal: list[str]):
    names = check([*unequal, f"compression={compression}"])
    assert compression == "none" or {"keep_ratio", "wire_bytes", "latency_ms_on_pixel3"} <= names
    assert [name for name in sorted(names) if not is_stated(name)] == []


def test_only_accepted_replies_are_in_a_mean(unequal: list[str]):
    check([*unequal, "over_selection=2.0", "cohort=2"], lost="late")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("accuracy_at_0.5", BY_EXAMPLES),
        ("train_loss", BY_EXAMPLES),
        ("latency_ms_on_pixel3", BY_CLIENTS),
        ("latency_ms_at_0.3", BY_CLIENTS),
        ("wire_bytes", BY_CLIENTS),
        ("flops_dense", BY_CLIENTS),
        ("lossy", BY_EXAMPLES),  # nobody's: as Flower does
        ("keep_ratios", BY_EXAMPLES),
    ],
)
def test_a_name_stands_for_what_goes_on_behind_it_with_an_underscore(name: str, expected: str):
    assert averaged_by(name) == expected


def test_devices_count_alike_in_a_latency_and_examples_in_an_accuracy(unequal: list[str]):
    federation = Federation(build_world(json.dumps(compose([*unequal, "rounds=1"]))), LocalEngine(serve))
    *_, (report, clients) = federation.rounds()
    rows = [c for c in clients if c.phase == "evaluate"]
    assert report.metrics["client_latency_ms"] == pytest.approx(sum(c.metrics["latency_ms"] for c in rows) / 4)
    right = sum(c.metrics["accuracy"] * n for c, n in zip(rows, JUDGED, strict=True)) / sum(JUDGED)
    assert report.metrics["client_accuracy"] == pytest.approx(right)
