"""No figure hangs on the unit of the data or on how far from zero they lie: nothing absolute, nothing that cancels."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import array_workload
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies

from clients.app import serve
from clients.trainers.rehearsal.ocs import scores
from clients.trainers.rehearsal.selection import farthest, herd, seeding
from clients.trainers.rehearsal.spaces import Products
from devices.compression.two_paths import step_of
from fedsim.engines.local import LocalEngine
from fedsim.exchanges.averages import exposures
from fedsim.grid.exchange import Exchange
from fedsim.grid.server_half import PLAIN_MEANS
from fedsim.messages.records import ARRAYS, METRICS, NUM_EXAMPLES, from_array, record_of, tensors_of
from fedsim.models.mlp import MLP
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import config_dir, options
from fedsim.workloads.arrays import Arrays, ArrayWorkload
from fedsim.workloads.partition import Iid

FLOWER = "flwr.serverapp.strategy"
UNITS = [2.0**-100, 2.0**-30, 1.0, 2.0**30, 2.0**60]  # powers of two: a product is exact in floats
SHAPES = {"tabular": (200, 3), "image": (40, 4, 4, 3), "audio": (60, 16)}


def fed(kind: str, x: np.ndarray, **settings: object) -> ArrayWorkload:
    part = Arrays(x.astype(np.float32), np.arange(len(x)) % 2)
    settings = {"input_range": "standard", "client_test_fraction": 0.0, **settings}
    return array_workload("w", part, part, ["a", "b"], kind, MLP, Iid(), num_clients=1, seed=0, **settings)  # type: ignore


def standardised(kind: str, x: np.ndarray) -> torch.Tensor:
    workload = fed(kind, x)
    return workload.test.gather(torch.arange(len(x)))["x"]


# Data


@pytest.mark.parametrize("offset", [0, 1000, 10_000_000])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", SHAPES)
def test_standard_inputs_are_the_same_in_every_unit_and_around_every_value(kind: str, unit: float, offset: int):
    whole = np.random.default_rng(0).integers(-50, 50, SHAPES[kind]).astype(np.float64)
    expected = standardised(kind, whole)
    around = standardised(kind, (whole + offset) * unit)  # whole numbers up to 2^24 are exact in float32
    assert float(expected.std()) == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(around, expected, rtol=1e-5, atol=1e-6)


def test_a_constant_is_fed_as_its_difference_and_is_no_feature():
    rng = np.random.default_rng(1)
    constants = np.float32(10 ** rng.uniform(5, 7, 400) * rng.choice([-1, 1], 400))
    train, test = np.tile(constants, (3000, 1)), np.tile(constants, (2, 1))
    test[1] += 1
    parts = (Arrays(x, np.zeros(len(x), int)) for x in (train, test))
    workload = array_workload("w", *parts, ["a"], "tabular", MLP, Iid(), 1, 0, input_range="standard")
    x = workload.test.gather(torch.arange(2))["x"]
    assert x[0].abs().max() == 0
    np.testing.assert_array_equal(x[1], test[1] - constants)


def test_one_feature_in_small_units_among_others_stays():
    x = np.random.default_rng(2).normal(size=(500, 3)) * [1, 1e-9, 1e-30]
    torch.testing.assert_close(standardised("tabular", x).std(0, correction=0), torch.ones(3), rtol=1e-5, atol=0)


def test_statistics_of_many_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    """A million numbers and more come in pieces, whose own means differ: here a slope from 0 to 1e6."""
    x = np.linspace(0, 1e6, 3 * 2**20, dtype=np.float32)[:, None]
    prepare = fed("tabular", x).prepare
    assert prepare.mean is not None
    assert prepare.std is not None
    assert float(prepare.mean) == pytest.approx(x.mean(dtype=np.float64), rel=1e-12)
    assert float(prepare.std) == pytest.approx(x.std(dtype=np.float64), rel=1e-9)


@pytest.mark.parametrize("unit, offset", [(1.0, 0), (1.0, 10_000), (2.0**-60, 0), (2.0**60, 1000)])
def test_what_averages_show_is_the_same_in_every_unit_and_around_every_value(unit: float, offset: int):
    whole = np.random.default_rng(3).integers(-9, 10, (60, 6)).astype(np.float64)
    sizes: list[int | None] = [1, 4, None]  # means of four whole numbers are exact
    expected = [e.nearest for e in exposures(fed("tabular", whole, input_range="unit"), sizes, 1, 0)]
    seen = exposures(fed("tabular", (whole + offset) * unit, input_range="unit"), sizes, 1, 0)
    assert [e.nearest for e in seen] == pytest.approx(expected, rel=1e-3)
    assert expected[0] == 0 < expected[1]


# Replies

REPLIES = ["workload=blobs", "num_clients=11", "cohort=11", "fleet=uniform", "engine.device=cpu", "model.hidden=[64]"]
STEP, FAR = 2.0**-12, 2048.0  # float32 knows whole steps between 2048 and 4096


def stock() -> list[str]:
    """Classes of Flower that look at single replies: those of the configs, and all of Krum's family."""
    trees = (yaml.safe_load((config_dir() / "strategy" / f"{name}.yaml").read_text()) for name in options("strategy"))
    targets = {tree.get("_target_", "") for tree in trees} | {f"{FLOWER}.{name}" for name in ("MultiKrum", "Bulyan")}
    return sorted(
        t for t in targets if t.startswith(FLOWER) and getattr(strategies, t.split(".")[-1]) not in PLAIN_MEANS
    )


def changes(target: str, around: float) -> np.ndarray:
    """What a round changes, [weights], where all weights are `around`, and replies 0.01 to 0.04 from each other."""
    given = [f"strategy._target_={target}"]
    for name, option in ((f"{FLOWER}.QFedAvg", "qfedavg"), (f"{FLOWER}.FedTrimmedAvg", "fedtrimmedavg")):
        given = [f"strategy={option}"] if target == name else given
    if target.endswith(("Krum", "Bulyan")):
        given.append("+strategy.num_malicious_nodes=1")
    federation = Federation(build_world(json.dumps(compose([*REPLIES, *given]))), LocalEngine(serve))
    shapes = {name: t.shape for name, t in tensors_of(federation.arrays).items()}
    federation.arrays = record_of({name: torch.full(shape, around) for name, shape in shapes.items()})
    rng, replies = np.random.default_rng(4), []
    for place, message in enumerate(federation.instructions(1)):
        spread = 0.01 * (1 + place % 3) / STEP
        steps = {name: around + STEP * np.rint(rng.normal(0, spread, shape)) for name, shape in shapes.items()}
        weights = record_of({name: torch.from_numpy(values).float() for name, values in steps.items()})
        metrics = MetricRecord({NUM_EXAMPLES: 10, "train_loss": 1.0})
        replies.append(Message(RecordDict({ARRAYS: weights, METRICS: metrics}), reply_to=message))
    federation.grid.exchange = lambda _: Exchange(replies)  # type: ignore[method-assign, assignment]
    federation.train(1)
    return np.concatenate([from_array(array).ravel() - around for array in federation.arrays.values()])


@pytest.mark.parametrize("target", stock())
def test_what_a_round_changes_does_not_hang_on_how_large_the_weights_are(target: str):
    near = changes(target, 0.125)
    assert np.abs(near).max() > 0.005
    np.testing.assert_allclose(changes(target, FAR), near, rtol=0, atol=STEP)


# Choices


@pytest.mark.parametrize("unit", [2.0**-80, 2.0**-20, 2.0**60])
@pytest.mark.parametrize(
    "rule",
    [farthest, herd, lambda p, n: seeding(p, n, torch.Generator().manual_seed(0))],
    ids=["farthest", "herd", "++"],
)
def test_examples_are_chosen_alike_in_every_unit(rule, unit: float):
    points = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    assert rule(points * unit, 10).tolist() == rule(points, 10).tolist()


@pytest.mark.parametrize("unit", [2.0**-40, 2.0**-10, 2.0**20])
def test_scores_of_a_coreset_are_cosines_however_small_gradients_are(unit: float):
    gradients = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * unit
    past = gradients[:3].sum(0)
    own = gradients @ gradients.T
    similarity, _, affinity = scores(Products(own, gradients @ past, past.norm()), tau=1.0)
    cosine = torch.nn.functional.cosine_similarity
    for found, other in ((similarity, gradients.mean(0)), (affinity, past)):
        torch.testing.assert_close(found, cosine(gradients / unit, other[None] / unit), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", [2.0**-60, 2.0**60])
def test_steps_of_a_quantised_weight_are_the_same_share_of_it_in_every_unit(unit: float):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    mask = torch.ones(4, 6, dtype=torch.bool)
    torch.testing.assert_close(step_of(weight * unit, mask, 8) / unit, step_of(weight, mask, 8))
    assert float(step_of(torch.zeros(2, 3), mask[:2, :3], 8).min()) > 0
