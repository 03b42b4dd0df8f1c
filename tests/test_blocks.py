"""Sums whose shape depends on the cohort alone."""

import json

import numpy as np
import pytest
from conftest import DAILY, Parted

from fedsim.engines.blocks import Arrays, BlockSum, WeightedSum, blocks
from fedsim.grid.round_sum import RoundSum
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world


def arrays(**values) -> Arrays:
    return {name: np.asarray(v) for name, v in values.items()}


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


def mean(*blocks_of: list[tuple[Arrays, float]]) -> Arrays:
    """The weighted mean over blocks, each a list of (arrays, weight), in the dtypes of the first."""
    total = WeightedSum()
    for clients in blocks_of:
        block = BlockSum()
        for own, weight in clients:
            block.add(own, weight)
        total.add(block.arrays, block.weight, block.clients)
    return total.mean({name: values.dtype for name, values in blocks_of[0][0][0].items()})


def test_mean_is_weighted_by_examples():
    """(1 * [1, 2] + 3 * [5, 10]) / 4 = [4, 8]."""
    one, two = arrays(w=np.array([1, 2], np.float32)), arrays(w=np.array([5, 10], np.float32))
    for result in (mean([(one, 1)], [(two, 3)]), mean([(one, 1), (two, 3)])):
        values = result["w"]
        assert (values.tolist(), values.dtype) == ([4.0, 8.0], np.float32)


def test_blocks_are_summed_by_themselves_in_float64():
    """1e16 swallows a single 1 in float64, but not the 2 that a block of its own adds up to."""
    big, one = arrays(w=np.array([1e16])), arrays(w=np.array([1.0]))
    assert mean([(big, 1)], [(one, 1)], [(one, 1)])["w"][0] == 1e16 / 3
    assert mean([(big, 1)], [(one, 1), (one, 1)])["w"][0] == (1e16 + 2) / 3


def test_products_are_made_in_float64():
    """(3 a + 7 b) / 10, rounded once at the end."""
    a, b = np.random.default_rng(1).standard_normal((2, 1000)).astype(np.float32)
    by_hand = (3 * a.astype(np.float64) + 7 * b.astype(np.float64)) / 10
    result = mean([(arrays(w=a), 3), (arrays(w=b), 7)])
    assert np.array_equal(result["w"], by_hand.astype(np.float32))


def test_sum_of_a_block_is_the_same_whoever_adds_it_up():
    """A worker's float64 sum of two clients, and the clients' own arrays added up by the server."""
    a, b, c = (arrays(w=v) for v in np.random.default_rng(2).standard_normal((3, 1000)).astype(np.float32))
    in_worker = BlockSum()
    in_worker.add(a, 3)
    in_worker.add(b, 7)
    assert (in_worker.arrays["w"].dtype, in_worker.clients, in_worker.weight) == (np.float64, 2, 10)
    total = WeightedSum()
    total.add(in_worker.arrays, 10, 2)
    total.add(c, 5, 1)
    by_server = mean([(a, 3), (b, 7)], [(c, 5)])["w"]
    assert total.mean({"w": np.dtype(np.float32)})["w"].tobytes() == by_server.tobytes()


def test_many_examples_do_not_overflow_half_precision():
    """7000 x 100 is beyond the 65504 of float16."""
    hundred = arrays(w=np.array([100], np.float16))
    assert mean([(hundred, 7000)], [(hundred, 7000)])["w"].tolist() == [100]


def test_mean_of_integers_is_rounded_to_the_nearest():
    """(1 * 2 + 2 * 3) / 3 = 2.67, and a counter that all agree on stays as it is."""
    first, second = arrays(n=np.int64(2), same=np.int64(5)), arrays(n=np.int64(3), same=np.int64(5))
    result = mean([(first, 1)], [(second, 2)])
    assert (result["n"], result["same"], result["n"].dtype) == (3, 5, np.int64)


def test_adding_does_not_change_what_was_added():
    first = arrays(w=np.array([1.0, 2.0]))
    before = first["w"].tolist()
    mean([(first, 2), (first, 2)], [(first, 1)])
    assert first["w"].tolist() == before


@pytest.mark.parametrize("other", [{"v": np.zeros(2)}, {"w": np.zeros(3)}, {"w": np.zeros(2), "v": np.zeros(1)}])
def test_mean_of_unlike_weights_is_refused(other: dict):
    sentence = r"^clients sent weights of different names or shapes; a mean needs equal"
    first, second = arrays(w=np.zeros(2)), arrays(**other)
    with pytest.raises(ValueError, match=sentence):
        mean([(first, 1)], [(second, 1)])
    with pytest.raises(ValueError, match=sentence):
        mean([(first, 1), (second, 1)])


def test_mean_over_no_examples_is_refused():
    with pytest.raises(ValueError, match=r"must sum to more than zero, got 0\.0$"):
        mean([(arrays(w=np.zeros(2)), 0)])


def test_weights_do_not_depend_on_how_clients_are_put_into_parts(settings):
    """70 clients are blocks of two; the last engine cuts through them, so that the server adds up their updates."""
    results, counts = set(), []
    chosen = settings(
        *("num_clients=80", "cohort=70", "rounds=1", "trainer.batch_size=8", "fleet=mixed", "deadline_s=0.2"), *DAILY
    )
    for clients, alone in ((1, False), (6, False), (16, False), (16, True)):
        engine = Parted(clients, alone)
        run = Federation(build_world(json.dumps(chosen)), engine)
        (_, _), (report, _) = run.rounds()
        counts.append(engine.parts)
        assert {"completed", "late"} <= set(report.outcomes)
        results.add((report.to_json().partition('"host_s"')[0], *(array.data for array in run.arrays.values())))
    online = 70 - len(report.outcomes["offline"])
    assert counts[3] == online > counts[0] > counts[1] > counts[2] > 1
    assert len(results) == 1


def test_server_holds_no_more_than_the_blocks_that_came_early(federation, monkeypatch):
    """130 clients in blocks of three: answers bring sums instead of updates, and none is kept once it is added."""
    run = federation("num_clients=130", "cohort=130", "rounds=1", "trainer.batch_size=8")
    held = []
    add = RoundSum.add_sums
    monkeypatch.setattr(RoundSum, "add_sums", lambda self, sums: add(self, sums) or held.append(len(self._early)))
    list(run.rounds())
    assert held
    assert max(held) == 0
