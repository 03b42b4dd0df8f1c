"""Sums whose shape depends on the cohort alone."""

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    QFedAvg,
)

from fedsim import network
from fedsim.engines.blocks import WeightedSum, blocks, is_plain_mean
from fedsim.messages import from_array, to_array
from strategies.edge import EdgeStrategy


def record(**values) -> ArrayRecord:
    return ArrayRecord({name: to_array(np.asarray(v)) for name, v in values.items()})


@pytest.mark.parametrize(
    ("clients", "sizes"),
    [
        (0, []),
        (1, [1]),
        (10, [1] * 10),
        (64, [1] * 64),
        (65, [2] * 32 + [1]),  # ceil(65 / 64) = 2
        (1000, [16] * 62 + [8]),  # ceil(1000 / 64) = 16
    ],
)
def test_cohort_is_cut_into_blocks_of_equal_size(clients: int, sizes: list[int]):
    cut = blocks(range(clients))
    assert [len(block) for block in cut] == sizes
    assert [client for block in cut for client in block] == list(range(clients))


def test_mean_is_weighted_by_examples():
    """(1 * [1, 2] + 3 * [5, 10]) / 4 = [4, 8]."""
    total = WeightedSum()
    total.add(record(w=np.array([1, 2], np.float32)), 1, block=0)
    total.add(record(w=np.array([5, 10], np.float32)), 3, block=1)
    mean = from_array(total.mean()["w"])
    assert (mean.tolist(), mean.dtype) == ([4.0, 8.0], np.float32)


def test_blocks_are_summed_by_themselves_in_float64():
    """1e16 swallows a single 1 in float64, but not the 2 that a block of its own adds up to."""
    alone, together = WeightedSum(), WeightedSum()
    for client, value in enumerate([1e16, 1.0, 1.0]):
        alone.add(record(w=np.array([value])), 1, block=client)
        together.add(record(w=np.array([value])), 1, block=min(client, 1))
    assert from_array(alone.mean()["w"])[0] == 1e16 / 3
    assert from_array(together.mean()["w"])[0] == (1e16 + 2) / 3


def test_products_are_made_in_float64():
    """(3 a + 7 b) / 10, rounded once at the end."""
    a, b = np.random.default_rng(1).standard_normal((2, 1000)).astype(np.float32)
    total = WeightedSum()
    for client, values in enumerate((a, b)):
        total.add(record(w=values), (3, 7)[client], block=0)
    by_hand = (3 * a.astype(np.float64) + 7 * b.astype(np.float64)) / 10
    assert np.array_equal(from_array(total.mean()["w"]), by_hand.astype(np.float32))


def test_many_examples_do_not_overflow_half_precision():
    """7000 x 100 is beyond the 65504 of float16."""
    total = WeightedSum()
    for client in range(2):
        total.add(record(w=np.array([100], np.float16)), 7000, block=client)
    assert from_array(total.mean()["w"]).tolist() == [100]


def test_mean_of_integers_is_rounded_to_the_nearest():
    """(1 * 2 + 2 * 3) / 3 = 2.67, and a counter that all agree on stays as it is."""
    total = WeightedSum()
    total.add(record(n=np.int64(2), same=np.int64(5)), 1, block=0)
    total.add(record(n=np.int64(3), same=np.int64(5)), 2, block=1)
    mean = total.mean()
    assert (from_array(mean["n"]), from_array(mean["same"]), mean["n"].dtype) == (3, 5, "int64")


def test_adding_does_not_change_what_was_added():
    first = record(w=np.array([1.0, 2.0]))
    before = first["w"].data
    total = WeightedSum()
    total.add(first, 2, block=0)
    total.add(first, 2, block=0)
    total.mean()
    assert first["w"].data == before


@pytest.mark.parametrize("other", [{"v": np.zeros(2)}, {"w": np.zeros(3)}, {"w": np.zeros(2), "v": np.zeros(1)}])
def test_mean_of_unlike_weights_is_refused(other: dict):
    total = WeightedSum()
    total.add(record(w=np.zeros(2)), 1, block=0)
    with pytest.raises(ValueError, match=r"^clients sent weights of different names or shapes; a mean needs equal"):
        total.add(record(**other), 1, block=0)


def test_mean_over_no_examples_is_refused():
    total = WeightedSum()
    total.add(record(w=np.zeros(2)), 0, block=0)
    with pytest.raises(ValueError, match=r"must sum to more than zero, got 0\.0$"):
        total.mean()


def test_weights_do_not_depend_on_how_clients_are_put_into_messages(federation, monkeypatch):
    """70 clients are blocks of two, which messages of one and of three clients cut through."""
    hashes, counts = set(), []
    for clients in (1, 3, 16):
        monkeypatch.setattr(network, "CLIENTS_PER_MESSAGE", clients)
        run = federation("num_clients=80", "cohort=70", "rounds=1", "trainer.batch_size=8")
        sent = run.grid.engine.send_and_receive
        monkeypatch.setattr(run.grid.engine, "send_and_receive", lambda m, s=sent: counts.append(len(m)) or s(m))
        list(run.rounds())
        hashes.add(tuple(array.data for array in run.arrays.values()))
    assert counts == [70, 24, 5]
    assert len(hashes) == 1


@pytest.mark.parametrize("strategy", [FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi])
def test_flowers_means_take_one_summed_reply(strategy: type):
    assert is_plain_mean(strategy())
    assert is_plain_mean(FedProx(proximal_mu=0.1))


class Watching(FedAvg):
    """A subclass may look at every reply."""


@pytest.mark.parametrize(
    "strategy",
    [
        Watching(),
        EdgeStrategy(),
        FedMedian(),
        FedTrimmedAvg(),
        Krum(num_malicious_nodes=1),
        QFedAvg(client_learning_rate=0.1),
        FedAvg(weighted_by_key="num-batches"),
        FedAvg(train_metrics_aggr_fn=lambda records, key: None),
    ],
    ids=lambda s: type(s).__name__,
)
def test_every_other_strategy_gets_each_reply(strategy):
    assert not is_plain_mean(strategy)
