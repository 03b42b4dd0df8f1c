"""Robust aggregation against re-implementations of a few lines in numpy, and in runs that are attacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import every_way
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, Strategy

from fedsim.errors import ConfigError, RunError
from fedsim.messages.records import ARRAYS, from_array, record_of
from fedsim.messages.updates import ClientUpdate
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from strategies import stock
from strategies.fltrust import FLTrust
from strategies.robust import Bulyan, MultiKrum, NormClipping, RobustStrategy

RNG = np.random.default_rng(3)
ROUNDS = [RNG.normal(size=(n, 6)) * RNG.uniform(0.5, 3, size=(n, 1)) + RNG.normal(size=6) for n in (7, 11, 12)]


def krum_order(x: np.ndarray, f: int) -> np.ndarray:
    scores = [np.sort(((x - one) ** 2).sum(1))[1 : max(2, len(x) - f - 1)].sum() for one in x]
    return np.argsort(scores, kind="stable")


def bulyan(x: np.ndarray, f: int) -> np.ndarray:
    left, chosen = list(range(len(x))), []
    while len(chosen) < len(x) - 2 * f:
        chosen.append(left.pop(krum_order(x[left], f)[0] if len(left) > 1 else 0))
    picked, found = x[chosen], []
    for column in picked.T:
        nearest = sorted(column, key=lambda v, m=np.median(column): abs(v - m))
        found.append(np.mean(nearest[: len(x) - 4 * f]))
    return np.array(found)


def trimmed(x: np.ndarray, cut: int) -> np.ndarray:
    return np.sort(x, 0)[cut : len(x) - cut].mean(0)


def ours(strategy: RobustStrategy, x: np.ndarray, examples: Any = 1) -> np.ndarray:
    """What a round makes of weights that begin at 1, by changes x; two tensors."""
    strategy.weights = {"a": torch.ones(2, 2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    updates = [
        ClientUpdate(i, int(n), {"b": torch.from_numpy(row[4:]) + 1, "a": torch.from_numpy(row[:4]).view(2, 2) + 1})
        for i, (row, n) in enumerate(zip(x, np.broadcast_to(examples, len(x)), strict=True))
    ]
    new = strategy.combine(1, updates)
    return np.concatenate([new["a"].numpy().ravel(), new["b"].numpy()]) - 1


def flowers(strategy: Strategy, x: np.ndarray) -> np.ndarray:
    replies = []
    for client, row in enumerate(x):
        numbers = MetricRecord({"num-examples": 1 + client})
        content = RecordDict({ARRAYS: record_of({"w": torch.from_numpy(row)}), "metrics": numbers})
        replies.append(Message(content, reply_to=Message(RecordDict(), client, "train")))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return from_array(arrays["w"])


@pytest.mark.parametrize("x", ROUNDS, ids=len)
def test_flowers_own_are_those_of_the_papers(x: np.ndarray):
    """Clients of any number of examples count alike; `Krum` is one update, whose weight is nothing."""
    assert np.allclose(flowers(Krum(num_malicious_nodes=2), x), x[krum_order(x, 2)[0]])
    assert np.allclose(flowers(FedTrimmedAvg(beta=0.2), x), trimmed(x, int(0.2 * len(x))))
    assert np.allclose(flowers(FedMedian(), x), np.median(x, axis=0))


@pytest.mark.parametrize("x", ROUNDS, ids=len)
@pytest.mark.parametrize("f", [0, 1, 2])
def test_multi_krum_and_bulyan_are_those_of_the_papers(x: np.ndarray, f: int):
    assert np.allclose(ours(MultiKrum(f, 1), x), x[krum_order(x, f)[0]])
    assert np.allclose(ours(MultiKrum(f), x, examples=range(1, 1 + len(x))), x[krum_order(x, f)[: len(x) - f]].mean(0))
    if len(x) >= 4 * f + 3:
        assert np.allclose(ours(Bulyan(f), x), bulyan(x, f))


def test_bulyan_selects_anew_after_each_client_where_flowers_takes_all_at_once():
    """So that one far away, close to those that are taken first, is not drawn in; Flower's differs for some rounds."""
    from flwr.serverapp.strategy import Bulyan as Theirs

    rounds = [RNG.normal(size=(11, 6)) * RNG.uniform(0.2, 5, size=(11, 1)) for _ in range(20)]
    assert all(np.allclose(ours(Bulyan(2), x), bulyan(x, 2)) for x in rounds)
    assert not all(np.allclose(flowers(Theirs(num_malicious_nodes=2), x), bulyan(x, 2)) for x in rounds)


def test_norms_are_clipped_to_the_median_or_to_a_number():
    """Norms 1, 2 and 10 with 1, 1 and 2 examples: (1 + 2 + 2 * 2) / 4; to one: all count 1."""
    x = np.zeros((3, 6))
    x[:, 0] = (1, 2, 10)
    assert ours(NormClipping(), x, (1, 1, 2))[0] == pytest.approx(7 / 4)
    assert ours(NormClipping(norm=1.0), x, (1, 1, 2))[0] == pytest.approx(1.0)
    assert ours(NormClipping(norm=100.0), x, (1, 1, 2))[0] == pytest.approx((1 + 2 + 20) / 4)
    assert ours(NormClipping(), np.zeros((3, 6)))[0] == 0


@pytest.mark.parametrize("x", ROUNDS, ids=len)
def test_trust_is_the_cosine_to_the_servers_own_change(x: np.ndarray):
    own, made = np.linspace(-1, 2, 6), FLTrust()
    made.own_change = lambda number: torch.from_numpy(own)  # type: ignore[method-assign]
    norms = np.linalg.norm(x, axis=1)
    trust = np.maximum(0, x @ own / (norms * np.linalg.norm(own)))
    expected = (trust[:, None] * x * np.linalg.norm(own) / norms[:, None]).sum(0) / trust.sum()
    assert np.allclose(ours(made, x), expected)
    assert np.allclose(ours(made, -own[None] * np.ones((3, 1))), 0)  # nobody goes the server's way
    assert np.allclose(ours(made, np.stack([np.zeros(6), own])), own)


def test_the_servers_own_change_is_sgd_on_its_examples(federation):
    """It is what a client would do: one batch of all, one step of the rate against the gradient."""
    made = federation("method=fltrust", "strategy.root_examples=20", "strategy.batch_size=20", "strategy.lr=0.5")
    strategy, workload = made.strategy, made.world.workload
    assert len(strategy.root) == 20
    strategy.prepare(1, {n: torch.from_numpy(a.numpy().copy()) for n, a in made.arrays.items()}, None, None)
    model = workload.build_model()
    loss = workload.loss(model, strategy.root.gather(torch.arange(20)))
    gradients = dict(
        zip([n for n, _ in model.named_parameters()], torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )
    assert torch.allclose(strategy.own_change(1), strategy.flat(gradients) * -0.5, atol=1e-6)
    strategy.lr_decay = 0.1
    assert torch.allclose(strategy.own_change(3), strategy.flat(gradients) * -0.005, atol=1e-6)


def test_the_servers_examples_judge_no_model(federation):
    workload = build_world(json.dumps(compose(["workload=digits"]))).workload
    root = workload.root_examples(100).tensors["x"]
    test = workload.test.gather(torch.arange(len(workload.test)))["x"]
    assert len(root) == 100
    assert not (root[:, None] == test[None]).flatten(2).all(2).any()
    with pytest.raises(ConfigError, match="has no examples for the server beside those that judge models"):
        federation("method=fltrust", "stream=permuted", "stream.tasks=2")


def test_bounds_are_those_of_the_papers(federation):
    for method, cohort, most in (("multikrum", 6, 1), ("krum", 6, 1), ("bulyan", 6, 0)):
        with pytest.raises(ConfigError, match=rf"num_malicious_nodes=2 needs .* num_malicious_nodes={most}$"):
            federation(f"method={method}", f"cohort={cohort}", "strategy.num_malicious_nodes=2")
        federation(f"method={method}", f"cohort={cohort}", f"strategy.num_malicious_nodes={most}")
    with pytest.raises(ConfigError, match=r"num_nodes_to_select=6 must be at most 5, the clients of a round less"):
        federation("method=multikrum", "cohort=6", "strategy.num_malicious_nodes=1", "strategy.num_nodes_to_select=6")
    few = {Bulyan(2): 11, MultiKrum(2): 7, FedTrimmedAvg(beta=0.2): 5, FedTrimmedAvg(beta=0.3): 4, FedMedian(): 1}
    assert {stock.fewest_replies(strategy) for strategy in few} == set(few.values())


def test_parts_of_a_network_are_refused(federation):
    made = federation("strategy=multikrum", "strategy.num_malicious_nodes=0")
    made.strategy.weights = {"w": torch.zeros(3)}
    with pytest.raises(RunError, match="MultiKrum compares changes of the whole network, and clients sent parts of it"):
        made.strategy.combine(1, [ClientUpdate(0, 1, {"w": torch.zeros(2)})])


@pytest.mark.parametrize("method", ["bulyan", "fltrust"])
def test_every_way_of_a_run_gives_the_same_bytes(settings, tmp_path: Path, method: str):
    tree = settings(f"method={method}", "cohort=5", "rounds=3", "attack=alie", "attack.share=0.4", "model.norm=batch")
    runs = every_way(tree, tmp_path)
    assert runs["one"] == runs["parts"] == runs["alone"] == runs["longer"]


# Three of ten clients, or one, flip their sign and go back ten times as far: that outweighs the honest ones.
ATTACKED = ("attack=sign_flip", "attack.scale=10", "num_clients=10", "cohort=10", "rounds=5", "evaluate_every=5")
LEARN = ("workload.examples_per_client=40", "workload.test_examples=200", "trainer.batch_size=10")
DEFENCES = {
    "krum": (0.3, "method=krum", "strategy.num_malicious_nodes=3"),
    "multikrum": (0.3, "method=multikrum", "strategy.num_malicious_nodes=3"),
    "bulyan": (0.1, "method=bulyan", "strategy.num_malicious_nodes=1"),  # as many as it can bear among ten
    "trimmed mean": (0.3, "method=fedtrimmedavg", "strategy.beta=0.3"),
    "median": (0.3, "method=fedmedian"),
    "norm clipping": (0.3, "method=norm_clipping"),
    "fltrust": (0.3, "method=fltrust"),
}


def last_accuracy(federation: Federation) -> float:
    *_, (last, _) = federation.rounds()
    return last.metrics["accuracy"]


@pytest.fixture(scope="module")
def undefended() -> dict[tuple[float, int], float]:
    """Accuracies of federated averaging, by share and seed."""
    return {}


@pytest.mark.parametrize("name", DEFENCES)
def test_defences_keep_the_accuracy_where_federated_averaging_loses_it(federation, undefended, name: str):
    """It tells 0.84 of the examples when nobody attacks, and 0.26 at most when somebody does."""
    share, *defence = DEFENCES[name]
    for seed in (1, 2, 3):
        common = (*ATTACKED, *LEARN, f"attack.share={share}", f"seed={seed}")
        if (share, seed) not in undefended:
            undefended[share, seed] = last_accuracy(federation(*common))
        plain, robust = undefended[share, seed], last_accuracy(federation(*common, *defence))
        assert robust > plain + 0.3, (seed, plain, robust)
