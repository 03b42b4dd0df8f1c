"""How predictors do under HELP's protocol: on a made-up table, and on the real ones where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest

from devices.errors import DeviceError
from devices.evaluate import DEVICE_SETS, FEATURES, compare, comparison_picture, evaluate
from devices.nas.tables import connected, network_features
from devices.spaces import SPLITS, Space, load_space

# Milliseconds of each operation: none, skip, 1x1 and 3x3 convolution, pool.
PRICES = {"near": (0, 0.1, 0.7, 2.0, 0.5), "far": (0, 1.0, 1.1, 1.3, 3.0), "gpu": (0, 0.5, 0.6, 0.7, 0.6)}
# Means of devices.md 3a (plain, ten seeds) and 3c (robust, five seeds): space, measured, robust, seeds, Spearman.
FIGURES = [("nb201", 10, False, 10, 0.909), ("nb201", 20, False, 10, 0.934), ("fbnet", 10, False, 10, 0.952)]
FIGURES += [("fbnet", 20, False, 10, 0.969), ("nb201", 10, True, 5, 0.919), ("nb201", 20, True, 5, 0.951)]
FIGURES += [("fbnet", 10, True, 5, 0.945), ("fbnet", 20, True, 5, 0.970)]


@pytest.fixture(scope="module")
def space() -> Space:
    """Two thousand random NAS-Bench-201 networks on three devices that are sums of their operations, with 1 % noise."""
    rng = np.random.default_rng(0)
    ops = rng.integers(0, 5, (2000, 6)).astype(np.uint8)
    exact = np.array([3 + np.array(prices)[ops].sum(axis=1) for prices in PRICES.values()])
    noise = rng.normal(1, 0.01, exact.shape)
    return Space("nb201", tuple(PRICES), exact * noise, ops, np.arange(1900, 1910))


@pytest.fixture(scope="module")
def table():
    """Reads a real table: `table("nb201")`."""
    if "FEDSIM_NAS" not in os.environ:
        pytest.skip("FEDSIM_NAS names no folder with latency tables")
    return lambda name: load_space(name, Path(os.environ["FEDSIM_NAS"]) / f"help_{name}.npz")


def test_sum_of_operations_is_learned_from_ten_networks(space: Space):
    result = evaluate(space, "structured", 10, "chosen", 2, devices=["near", "far"])
    assert list(result["devices"]) == ["near", "far"]
    assert all(scores["spearman"] > 0.99 and scores["mape"] < 0.03 for scores in result["devices"].values())
    for metric in ("spearman", "kendall", "mape"):
        values = [scores[metric] for scores in result["devices"].values()]
        assert result["mean"][metric] == pytest.approx(np.mean(values))


def test_macs_alone_miss_a_device_where_pools_are_slow(space: Space):
    scores = evaluate(space, "macs", 10, "random", 1, devices=["near", "far"])["devices"]
    assert scores["near"]["spearman"] > 0.8 > scores["far"]["spearman"]
    assert evaluate(space, "flops", 10, "random", 1, devices=["near", "far"])["devices"] == scores


def test_same_seeds_give_the_same_result(space: Space):
    results = [evaluate(space, "structured", 6, "random", 2, devices=["near"]) for _ in range(2)]
    assert results[0] == results[1]


def test_prior_from_source_devices_is_taken(space: Space):
    result = evaluate(space, "structured", 4, "random", 2, devices=["near"], source=["gpu"])
    assert result != evaluate(space, "structured", 4, "random", 2, devices=["near"])


def test_help_gets_what_is_left_of_the_measurements(space: Space):
    """Ten go to its references; 800 networks are judged; none of the measured ones is judged or a reference."""
    seen = []

    def perfect(table: Space, device: str, support: np.ndarray, seed: int, weights: object) -> np.ndarray:
        seen.append((device, len(support), seed, weights))
        assert not set(support) & (set(table.judged(device)) | set(table.references))
        return table.latency(device)[table.judged(device)]

    for way in ("chosen", "random"):
        result = evaluate(space, "help", 20, way, 2, ["near"], weights="w", help_predictions=perfect)
        assert result["mean"] == {"spearman": 1.0, "kendall": 1.0, "mape": 0.0}
    assert seen == [("near", 10, 0, "w"), ("near", 10, 1, "w")] * 2
    with pytest.raises(DeviceError, match="help needs 10 measurements"):
        evaluate(space, "help", 9, "random", 1, ["near"], help_predictions=perfect)


def test_prediction_without_order_scores_zero_and_nan_is_refused(space: Space):
    def constant(*_: object) -> np.ndarray:
        return np.ones(800)

    def broken(*_: object) -> np.ndarray:
        return np.full(800, np.nan)

    assert evaluate(space, "help", 20, "random", 1, ["near"], help_predictions=constant)["mean"]["spearman"] == 0
    with pytest.raises(DeviceError, match="800 finite latencies"):
        evaluate(space, "help", 20, "random", 1, ["near"], help_predictions=broken)


def test_chosen_references_look_at_no_latency_and_are_connected(space: Space):
    """With every latency replaced by noise, the same networks are measured."""
    measured: list[list[int]] = []

    def spy(table: Space, device: str, support: np.ndarray, *_: object) -> np.ndarray:
        measured.append(support.tolist())
        return np.ones(800)

    noise = np.random.default_rng(1).uniform(1, 2, space.latency_ms.shape)
    for table in (space, Space("nb201", space.devices, noise, space.ops, space.references)):
        evaluate(table, "help", 20, "chosen", 1, ["near", "far"], help_predictions=spy)
    assert measured[0] == measured[1] == measured[2] == measured[3]
    assert connected("nb201", space.ops[measured[0]]).all()


def test_wrong_arguments_are_refused(space: Space):
    for arguments, text in (
        (("structure", 5, "random", 1), "predictor 'structure'; did you mean 'structured'"),
        (("macs", 5, "choosen", 1), "references 'choosen'; did you mean 'chosen'"),
        (("macs", 0, "random", 1), "1 measurements and 1 seed or more, got 0 and 1"),
        (("macs", 721, "random", 1), "721 networks cannot be measured, the pool of near has 720"),
        (("macs", 201, "chosen", 1), "cannot choose 201 references"),
    ):
        with pytest.raises(DeviceError, match=text):
            evaluate(space, *arguments, devices=["near"])
    with pytest.raises(DeviceError, match="'near' cannot be both source and judged"):
        evaluate(space, "structured", 5, "random", 1, devices=["near"], source=["near"])
    with pytest.raises(DeviceError, match="unknown device"):
        evaluate(space, "structured", 5, "random", 1)


def test_comparison_is_a_table_and_a_picture(space: Space, tmp_path: Path):
    lines: list[str] = []
    ways, budgets = ("chosen", "random"), (5, 10)
    rows = compare(space, ["structured", "macs"], budgets, ways, 1, devices=["near", "far"], progress=lines.append)
    assert len(rows) == 2 * 2 * 2 * 3
    assert len(lines) == 2 * 2 * 2 * 2
    assert lines[0].startswith("nb201 structured 5 chosen near: Spearman ")
    first = {key: rows[0][key] for key in ("space", "predictor", "measurements", "references", "device", "published")}
    assert list(first.values()) == ["nb201", "structured", 5, "chosen", "near", None]
    comparison_picture(rows, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    with pytest.raises(DeviceError, match="nothing to draw"):
        comparison_picture([], tmp_path / "none.png")


def test_device_sets_never_judge_their_sources():
    for devices in (*DEVICE_SETS.values(), *SPLITS.values()):
        assert not set(devices.source) & set(devices.unseen)


@pytest.mark.data
@pytest.mark.parametrize(("name", "measurements", "robust", "seeds", "spearman"), FIGURES)
def test_random_references_give_the_figures_of_the_sheet(
    table, name: str, measurements: int, robust: bool, seeds: int, spearman: float
):
    space = table(name)
    result = evaluate(space, "structured", measurements, "random", seeds, features="layers", robust=robust)
    assert result["mean"]["spearman"] == pytest.approx(spearman, abs=0.01)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "measurements", "least"),
    [("nb201", 5, 0.945), ("nb201", 10, 0.950), ("nb201", 20, 0.952), ("fbnet", 10, 0.958), ("fbnet", 20, 0.968)],
)
def test_chosen_references_beat_what_help_published(table, name: str, measurements: int, least: float):
    result = evaluate(table(name), "structured", measurements, "chosen", 10)
    assert result["mean"]["spearman"] >= least
    for device, published in SPLITS[name].published.items():
        assert result["devices"][device]["spearman"] >= published


@pytest.mark.data
def test_device_sets_are_in_the_table(table):
    assert {d for devices in DEVICE_SETS.values() for d in (*devices.source, *devices.unseen)} <= set(
        table("fbnet").devices
    )


@pytest.mark.data
def test_measured_references_confirm_the_features(table):
    """For FBNet at ten networks the left-out error of positions is well below that of mere counts."""
    from devices.structured import choose_references, left_out_error

    space, errors = table("fbnet"), {}
    for features in ("counts", "layers"):
        phi = network_features("fbnet", space.ops, features)
        picks = choose_references(phi, np.arange(200), 10)
        errors[features] = np.mean([left_out_error(phi[picks], space.latency(d)[picks]) for d in space.split.source])
    assert errors["layers"] < 0.5 * errors["counts"]
    assert FEATURES["fbnet"] == "layers"
