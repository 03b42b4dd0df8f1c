"""How predictors do under HELP's protocol: on a made-up table, and on the real ones where they are at hand."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from devices.errors import DeviceError
from devices.latency.evaluate import compare, comparison_picture, evaluate
from devices.latency.few_shot import FEATURES, Trial, trials_of
from devices.latency.help.training import HelpSettings, first_weights
from devices.latency.spaces import DEVICE_SETS, SPLITS, Space, device_split, load_space
from devices.nas.tables import connected, network_features

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
    return Space("nb201", tuple(PRICES), exact * noise, ops, np.arange(1900, 1910), SPLITS["nb201"])


@pytest.fixture(scope="module")
def table():
    """Reads a real table: `table("nb201")`."""
    if "FEDSIM_NAS" not in os.environ:
        pytest.skip("FEDSIM_NAS names no folder with latency tables")
    return lambda name: load_space(name, Path(os.environ["FEDSIM_NAS"]) / f"help_{name}.npz")


def test_sum_of_operations_is_learned_from_ten_networks(space: Space):
    result = evaluate(space, Trial("structured", 10, "chosen", 2), devices=["near", "far"])
    assert list(result["devices"]) == ["near", "far"]
    assert all(scores["spearman"] > 0.99 and scores["mape"] < 0.03 for scores in result["devices"].values())
    for metric in ("spearman", "kendall", "mape"):
        values = [scores[metric] for scores in result["devices"].values()]
        assert result["mean"][metric] == pytest.approx(np.mean(values))


def test_macs_alone_miss_a_device_where_pools_are_slow(space: Space):
    scores = evaluate(space, Trial("macs", 10, "random"), devices=["near", "far"])["devices"]
    assert scores["near"]["spearman"] > 0.8 > scores["far"]["spearman"]
    assert evaluate(space, Trial("flops", 10, "random"), devices=["near", "far"])["devices"] == scores


def test_same_seeds_give_the_same_result(space: Space):
    results = [evaluate(space, Trial("structured", 6, "random", 2), devices=["near"]) for _ in range(2)]
    assert results[0] == results[1]


def test_prior_is_the_mixture_of_source_devices_that_explains_the_measurements(space: Space):
    """The device judged is 2 near + 3 far, of which five random measurements alone say little: .85."""
    blend = 2 * space.latency("near") + 3 * space.latency("far")
    devices, latency = ("blend", *space.devices), np.vstack([blend, space.latency_ms])
    blended = replace(space, devices=devices, latency_ms=latency)
    trial = Trial("structured", 5, "random", seeds=4)
    alone = evaluate(blended, trial, devices=["blend"])["mean"]
    helped = evaluate(blended, replace(trial, source=list(PRICES)), devices=["blend"])["mean"]
    assert helped["spearman"] > 0.98 > alone["spearman"]
    assert helped["mape"] < 0.5 * alone["mape"]


def test_help_measures_its_references_and_adapts_to_them_too(space: Space):
    """Its ten count among the twenty; 800 networks are judged, and none of the measured ones."""
    seen = []

    def perfect(table: Space, device: str, measured: np.ndarray, seed: int, weights: object) -> np.ndarray:
        seen.append((device, len(set(measured)), seed, weights))
        assert set(measured[:10]) == set(table.references)
        assert not set(measured) & set(table.judged(device))
        return table.latency(device)[table.judged(device)]

    for way in ("chosen", "random"):
        result = evaluate(space, Trial("help", 20, way, 2, weights="w"), ["near"], perfect)
        assert result["mean"] == {"spearman": 1.0, "kendall": 1.0, "mape": 0.0}
    evaluate(space, Trial("help", 10, "random", weights="w"), ["near"], perfect)
    assert seen == [("near", 20, 0, "w"), ("near", 20, 1, "w")] * 2 + [("near", 10, 0, "w")]
    with pytest.raises(DeviceError, match="help needs 10 measurements"):
        Trial("help", 9, "random")


def test_help_is_not_judged_on_a_device_that_its_weights_know(space: Space):
    """Weights say what they were trained with; those that do not, the authors', know the usual source devices."""
    weights = first_weights("nb201", HelpSettings())
    trial = Trial("help", 20, "random", weights=weights)
    with pytest.raises(DeviceError, match="trained with device 'near', which is to be judged"):
        evaluate(space, replace(trial, weights=replace(weights, devices=("near", "gpu"))), ["near"])
    renamed = replace(space, devices=("near", "gold_6240", "gpu"))
    with pytest.raises(DeviceError, match="trained with device 'gold_6240'"):
        evaluate(renamed, trial, ["near", "gold_6240"])
    with pytest.raises(DeviceError, match="weights"):
        evaluate(space, replace(trial, weights=None), ["near"])


def test_prediction_without_order_scores_zero_and_nan_is_refused(space: Space):
    def constant(*_: object) -> np.ndarray:
        return np.ones(800)

    def broken(*_: object) -> np.ndarray:
        return np.full(800, np.nan)

    trial = Trial("help", 20, "random")
    assert evaluate(space, trial, ["near"], constant)["mean"]["spearman"] == 0
    with pytest.raises(DeviceError, match="800 finite latencies"):
        evaluate(space, trial, ["near"], broken)


def test_chosen_references_look_at_no_latency_and_are_connected(space: Space):
    """With every latency replaced by noise, the same networks are measured."""
    measured: list[list[int]] = []

    def spy(table: Space, device: str, support: np.ndarray, *_: object) -> np.ndarray:
        measured.append(support.tolist())
        return np.ones(800)

    noise = np.random.default_rng(1).uniform(1, 2, space.latency_ms.shape)
    for table in (space, Space("nb201", space.devices, noise, space.ops, space.references, space.split)):
        evaluate(table, Trial("help", 20, "chosen"), ["near", "far"], spy)
    assert measured[0] == measured[1] == measured[2] == measured[3]
    assert connected("nb201", space.ops[measured[0][10:]]).all()  # behind HELP's own ten


def test_wrong_arguments_are_refused(space: Space):
    for arguments, text in (
        (("structure", 5, "random", 1), "predictor 'structure'; did you mean 'structured'"),
        (("macs", 5, "choosen", 1), "references 'choosen'; did you mean 'chosen'"),
        (("macs", 0, "random", 1), "1 measurements and 1 seed or more, got 0 and 1"),
        (("macs", 721, "random", 1), "721 networks cannot be measured, the pool of near has 720"),
        (("macs", 201, "chosen", 1), "cannot choose 201 references"),
    ):
        with pytest.raises(DeviceError, match=text):
            evaluate(space, Trial(*arguments), devices=["near"])
    with pytest.raises(DeviceError, match="'near' cannot be both source and judged"):
        evaluate(space, Trial("structured", 5, "random", source=["near"]), devices=["near"])
    with pytest.raises(DeviceError, match="unknown device"):
        evaluate(space, Trial("structured", 5, "random"))


def test_comparison_is_a_table_and_a_picture(space: Space, tmp_path: Path):
    lines: list[str] = []
    ways, budgets = ("chosen", "random"), (5, 10)
    trials = trials_of(["structured", "macs"], budgets, ways)
    rows = compare(space, trials, devices=["near", "far"], progress=lines.append)
    assert len(rows) == 2 * 2 * 2 * 3
    assert len(lines) == 2 * 2 * 2 * 2
    assert lines[0].startswith("nb201 structured 5 chosen near: Spearman ")
    first = {key: rows[0][key] for key in ("space", "predictor", "measurements", "references", "device", "published")}
    assert list(first.values()) == ["nb201", "structured", 5, "chosen", "near", None]
    comparison_picture(rows, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    with pytest.raises(DeviceError, match="nothing to draw"):
        comparison_picture([], tmp_path / "none.png")


def test_help_is_tried_with_as_many_measurements_as_it_needs():
    tried = [(trial.predictor, trial.measurements) for trial in trials_of(["macs", "help"], [5, 10], ["random"])]
    assert tried == [("macs", 5), ("macs", 10), ("help", 10)]


@pytest.mark.data
def test_structured_orders_networks_of_ofa(table):
    """On the one device that HELP judges there; its other cards are of the same make."""
    assert evaluate(table("ofa"), Trial("structured", 20))["mean"]["spearman"] > 0.9


def test_device_sets_never_judge_what_they_learn_from():
    for split in (*DEVICE_SETS.values(), *SPLITS.values()):
        assert split.source
        assert not {*split.source, *split.valid} & set(split.unseen)


def test_set_of_devices_is_found_by_name():
    assert device_split("fbnet", "F3") is DEVICE_SETS["F3"]
    assert device_split("nb201") is SPLITS["nb201"]
    for space, name, text in (
        ("fbnet", "f3", "unknown set of devices 'f3'; did you mean 'F3'"),
        ("fbnet", "F44", "did you mean 'F4'"),
        ("nb201", "F1", "the set of devices F1 is for space fbnet, got space nb201"),
        ("nb202", None, "unknown space 'nb202'"),
    ):
        with pytest.raises(DeviceError, match=text):
            device_split(space, name)


@pytest.mark.data
@pytest.mark.parametrize(("name", "measurements", "robust", "seeds", "spearman"), FIGURES)
def test_random_references_give_the_figures_of_the_sheet(
    table, name: str, measurements: int, robust: bool, seeds: int, spearman: float
):
    space = table(name)
    result = evaluate(space, Trial("structured", measurements, "random", seeds, features="layers", robust=robust))
    assert result["mean"]["spearman"] == pytest.approx(spearman, abs=0.01)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "measurements", "least"),
    [("nb201", 5, 0.945), ("nb201", 10, 0.950), ("nb201", 20, 0.952), ("fbnet", 10, 0.958), ("fbnet", 20, 0.968)],
)
def test_chosen_references_beat_what_help_published(table, name: str, measurements: int, least: float):
    result = evaluate(table(name), Trial("structured", measurements, "chosen", 10))
    assert result["mean"]["spearman"] >= least
    for device, published in SPLITS[name].published.items():
        assert result["devices"][device]["spearman"] >= published


@pytest.mark.data
def test_device_sets_are_in_the_table(table):
    for split in DEVICE_SETS.values():
        assert {*split.source, *split.unseen} <= set(table("fbnet").devices)


@pytest.mark.data
def test_measured_references_confirm_the_features(table):
    """For FBNet at ten networks the left-out error of positions is well below that of mere counts."""
    from devices.latency.structured import StructuredPredictor, choose_references

    space, errors = table("fbnet"), {}
    for features in ("counts", "layers"):
        phi = network_features("fbnet", space.ops, features)
        picks = choose_references(phi, np.arange(200), 10)
        fits = [StructuredPredictor.fit(phi[picks], space.latency(d)[picks]) for d in space.split.source]
        errors[features] = np.mean([fit.sigma for fit in fits])
    assert errors["layers"] < 0.5 * errors["counts"]
    assert FEATURES["fbnet"] == "layers"
