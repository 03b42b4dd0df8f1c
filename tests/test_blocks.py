"""Sums whose shape depends on the cohort alone."""

import json

import pytest
import torch
from conftest import DAILY, Parted

from fedsim.grid.round_sum import RoundSum
from fedsim.messages.blocks import BlockSum, WeightedSum, blocks
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.workloads.base import Tensors


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


def mean(*blocks_of: list[tuple[Tensors, float]]) -> Tensors:
    """The weighted mean over blocks, each a list of (tensors, weight), in the dtypes of the first."""
    total = WeightedSum()
    for clients in blocks_of:
        block = BlockSum()
        for own, weight in clients:
            block.add(own, weight)
        total.add(block.tensors, block.weight, block.clients)
    return total.mean({name: t.dtype for name, t in blocks_of[0][0][0].items()})


def test_mean_is_weighted_by_examples():
    """(1 * [1, 2] + 3 * [5, 10]) / 4 = [4, 8]."""
    one, two = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, 10.0])}
    for result in (mean([(one, 1)], [(two, 3)]), mean([(one, 1), (two, 3)])):
        values = result["w"]
        assert (values.tolist(), values.dtype) == ([4.0, 8.0], torch.float32)


def test_blocks_are_summed_by_themselves_in_float64():
    """1e16 swallows a single 1 in float64, but not the 2 that a block of its own adds up to."""
    big, one = ({"w": torch.tensor([value], dtype=torch.float64)} for value in (1e16, 1.0))
    assert mean([(big, 1)], [(one, 1)], [(one, 1)])["w"][0] == 1e16 / 3
    assert mean([(big, 1)], [(one, 1), (one, 1)])["w"][0] == (1e16 + 2) / 3


def test_products_are_made_in_float64():
    """(3 a + 7 b) / 10, rounded once at the end."""
    a, b = torch.randn(2, 1000)
    by_hand = (3 * a.double() + 7 * b.double()) / 10
    result = mean([({"w": a}, 3), ({"w": b}, 7)])
    assert torch.equal(result["w"], by_hand.float())


def test_sum_of_a_block_is_the_same_whoever_adds_it_up():
    """A worker's float64 sum of two clients, and the clients' own tensors added up by the server."""
    a, b, c = ({"w": values} for values in torch.randn(3, 1000))
    in_worker = BlockSum()
    in_worker.add(a, 3)
    in_worker.add(b, 7)
    assert (in_worker.tensors["w"].dtype, in_worker.clients, in_worker.weight) == (torch.float64, 2, 10)
    total = WeightedSum()
    total.add(in_worker.tensors, 10, 2)
    total.add(c, 5, 1)
    by_server = mean([(a, 3), (b, 7)], [(c, 5)])["w"]
    assert torch.equal(total.mean({"w": torch.float32})["w"], by_server)


def test_many_examples_do_not_overflow_half_precision():
    """7000 x 100 is beyond the 65504 of float16."""
    hundred = {"w": torch.tensor([100], dtype=torch.float16)}
    assert mean([(hundred, 7000)], [(hundred, 7000)])["w"].tolist() == [100]


def test_mean_of_integers_is_rounded_to_the_nearest():
    """(1 * 2 + 2 * 3) / 3 = 2.67, and a counter that all agree on stays as it is."""
    first, second = ({"n": torch.tensor(n), "same": torch.tensor(5)} for n in (2, 3))
    result = mean([(first, 1)], [(second, 2)])
    assert (result["n"], result["same"], result["n"].dtype) == (3, 5, torch.int64)


def test_adding_does_not_change_what_was_added():
    first = {"w": torch.tensor([1.0, 2.0])}
    before = first["w"].tolist()
    mean([(first, 2), (first, 2)], [(first, 1)])
    assert first["w"].tolist() == before


@pytest.mark.parametrize("sizes", [{"v": 2}, {"w": 3}, {"w": 2, "v": 1}])
def test_mean_of_unlike_weights_is_refused(sizes: dict[str, int]):
    sentence = r"^clients sent weights of different names or shapes; a mean needs equal"
    first, second = {"w": torch.zeros(2)}, {name: torch.zeros(size) for name, size in sizes.items()}
    with pytest.raises(ValueError, match=sentence):
        mean([(first, 1)], [(second, 1)])
    with pytest.raises(ValueError, match=sentence):
        mean([(first, 1), (second, 1)])


def test_mean_over_no_examples_is_refused():
    with pytest.raises(ValueError, match=r"must sum to more than zero, got 0\.0$"):
        mean([({"w": torch.zeros(2)}, 0)])


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
