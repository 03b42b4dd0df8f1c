"""Splits: who owns which example, and the sentences for settings that cannot work."""

import numpy as np
import pytest

from fedsim.errors import ConfigError, DataError
from fedsim.workloads.partition import Dirichlet, Iid, Natural, Partition, Quantity, Shards

LABELS = np.repeat(np.arange(10), 60)  # 10 classes of 60
OWNERS = np.arange(600) % 25


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


PARTITIONS = [Iid(), Dirichlet(0.1, 3), Shards(2), Quantity(1.0, 3), Natural(3)]


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: type(p).__name__)
def test_every_example_belongs_to_exactly_one_client(partition: Partition):
    parts = partition.split(LABELS, OWNERS, 25, rng())
    assert len(parts) == 25
    assert min(len(part) for part in parts) >= 3
    assert all((np.diff(part) > 0).all() for part in parts)  # sorted
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(600))


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: type(p).__name__)
def test_same_seed_gives_the_same_clients_and_another_seed_others(partition: Partition):
    first, again, other = (partition.split(LABELS, OWNERS, 20 if partition.by_owner else 25, rng(s)) for s in (1, 1, 2))
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert [part.tolist() for part in first] != [part.tolist() for part in other]


def test_iid_sizes_differ_by_at_most_one():
    assert sorted(len(part) for part in Iid().split(LABELS[:10], None, 4, rng())) == [2, 2, 3, 3]


@pytest.mark.parametrize("each", [1, 2, 3, 10])
def test_shards_give_every_client_exactly_so_many_classes(each: int):
    parts = Shards(each).split(LABELS, None, 25, rng())
    assert {len(np.unique(LABELS[part])) for part in parts} == {each}


def test_clients_that_hold_a_class_share_it_evenly():
    """20 clients x 2 classes = 40 shards; 10 equal classes get 4 holders each: 60 / 4 = 15 examples."""
    parts = Shards(2).split(LABELS, None, 20, rng())
    counts = np.array([np.bincount(LABELS[part], minlength=10) for part in parts])
    assert ((counts > 0).sum(0) == 4).all()
    assert set(counts[counts > 0]) == {15}


def test_a_class_three_times_as_large_gets_three_times_the_holders():
    """8 shards of 30 + 10 examples with one class each: 6 holders with 5 of class 0, 2 with 5 of class 1."""
    labels = np.repeat([0, 1], [30, 10])
    parts = Shards(1).split(labels, None, 8, rng())
    assert sorted(labels[part].mean() for part in parts) == [0.0] * 6 + [1.0] * 2
    assert {len(part) for part in parts} == {5}


def test_dirichlet_is_skewed_for_small_alpha_and_even_for_large():
    def classes(alpha: float) -> float:
        parts = Dirichlet(alpha).split(LABELS, None, 10, rng())
        return float(np.mean([len(np.unique(LABELS[part])) for part in parts]))

    assert classes(0.01) < 3
    assert classes(1000.0) == 10


def test_dirichlet_fills_up_small_clients_even_where_a_redraw_would_never_end():
    """600 examples for 60 clients with at least 10 each leaves no choice: everyone gets exactly 10."""
    assert {len(part) for part in Dirichlet(0.001, 10).split(LABELS, None, 60, rng())} == {10}


def test_quantity_zero_gives_equal_sizes_and_a_huge_sigma_does_not_overflow():
    assert {len(part) for part in Quantity(0.0).split(LABELS, None, 20, rng())} == {30}
    sizes = [len(part) for part in Quantity(1e6).split(LABELS, None, 20, rng())]
    assert sorted(sizes) == [1] * 19 + [581]


def test_natural_takes_owners_in_the_order_of_their_ids_and_leaves_out_small_ones():
    owners = np.array(["b", "a", "b", "c", "a"])
    parts = Natural(min_examples=2).split(np.zeros(5, int), owners, None, rng())
    assert [part.tolist() for part in parts] == [[1, 4], [0, 2]]


def test_examples_without_an_owner_are_dealt_over_the_clients():
    owners = np.array(["a", "", "b", "", "a", "b"])
    parts = Natural().split(np.zeros(6, int), owners, None, rng())
    assert [sorted(owners[part]) for part in parts] == [["", "a", "a"], ["", "b", "b"]]


def test_natural_draws_as_many_owners_as_asked():
    assert len(Natural().split(LABELS, OWNERS, 7, rng())) == 7
    assert len(Natural(max_clients=9).split(LABELS, OWNERS, None, rng())) == 9


def test_natural_client_keeps_all_examples_of_some_classes():
    whole = Natural().split(LABELS, OWNERS, None, rng())
    parts = Natural(classes_per_client=2).split(LABELS, OWNERS, None, rng())
    for own, kept in zip(whole, parts, strict=True):
        assert len(np.unique(LABELS[kept])) == 2
        assert kept.tolist() == own[np.isin(LABELS[own], np.unique(LABELS[kept]))].tolist()
    assert len(np.unique(np.concatenate([LABELS[kept] for kept in parts]))) == 10
    all_kept = Natural(classes_per_client=10).split(LABELS, OWNERS, None, rng())
    assert [kept.tolist() for kept in all_kept] == [own.tolist() for own in whole]


def test_sequences_have_no_classes_to_keep():
    with pytest.raises(ConfigError, match=r"sequences of 8 labels: use partition.classes_per_client=null"):
        Natural(classes_per_client=2).split(np.zeros((600, 8), int), OWNERS, None, rng())


@pytest.mark.parametrize("partition", [Iid(), Quantity(1.0), Natural()], ids=lambda p: type(p).__name__)
def test_sequences_are_split_by_whatever_needs_no_label(partition: Partition):
    parts = partition.split(np.zeros((600, 8), int), OWNERS, 25, rng())
    assert sum(map(len, parts)) == 600


@pytest.mark.parametrize("partition", [Dirichlet(1.0), Shards(2)], ids=lambda p: type(p).__name__)
def test_sequences_cannot_be_split_by_label(partition: Partition):
    with pytest.raises(ConfigError, match="sequences of 8 labels: use partition=natural, iid or quantity"):
        partition.split(np.zeros((600, 8), int), None, 25, rng())


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Dirichlet(0.0), r"partition.alpha must be greater than 0, got 0.0"),
        (lambda: Dirichlet(float("nan")), r"partition.alpha must be a finite number greater than 0, got nan"),
        (lambda: Dirichlet("small"), r"partition.alpha must be a finite number greater than 0, got 'small'"),
        (lambda: Dirichlet(1.0, 0), r"partition.min_examples must be at least 1, got 0"),
        (lambda: Quantity(-1.0), r"partition.sigma must be at least 0, got -1.0"),
        (lambda: Shards(0), r"partition.classes_per_client must be at least 1, got 0"),
        (lambda: Natural(max_clients=0), r"partition.max_clients must be null or at least 1, got 0"),
    ],
)
def test_wrong_setting_is_named(make, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        make()


@pytest.mark.parametrize(
    "partition, num_clients, sentence",
    [
        (Iid(), 601, "600 training examples are too few for 601 clients with at least 1 each: .* at most 600"),
        (Iid(), None, "num_clients must be a whole number of at least 1 for this partition, got None"),
        (Iid(), 0, "num_clients must be a whole number of at least 1"),
        (Dirichlet(1.0, 10), 61, "too few for 61 clients with at least 10 each: num_clients can be at most 60"),
        (Shards(11), 25, r"partition.classes_per_client must be at most 10 \(the classes\), got 11"),
        (Shards(2), 4, "set num_clients to at least 5 or partition.classes_per_client to 3"),
        (Shards(2), 400, "600 examples are too few for 400 clients with 2 classes each"),
        (Natural(), 26, r"num_clients must be in 1..25 .* got 26"),
        (Natural(25), None, r"no owner has partition.min_examples=25 examples \(the largest has 24\)"),
    ],
)
def test_setting_that_does_not_fit_the_data_says_what_does(partition: Partition, num_clients, sentence: str):
    with pytest.raises((ConfigError, DataError), match=sentence):
        partition.split(LABELS, OWNERS, num_clients, rng())


def test_natural_without_owners_names_the_alternatives():
    with pytest.raises(DataError, match="use another partition"):
        Natural().split(LABELS, None, 5, rng())
