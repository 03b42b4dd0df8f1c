"""Workloads over arrays, blobs and digits: preparation, splits, held-out parts, and how they are described."""

import statistics

import numpy as np
import pytest
import torch
from conftest import array_workload
from hydra import compose, initialize_config_module

from fedsim.errors import ConfigError
from fedsim.models.char_lstm import CharLSTM
from fedsim.models.mlp import MLP
from fedsim.report.plots.split import split_picture
from fedsim.workloads.arrays import Arrays, ArrayWorkload
from fedsim.workloads.blobs import Blobs
from fedsim.workloads.describe import split_table, summary_lines
from fedsim.workloads.digits import Digits
from fedsim.workloads.partition import Iid, Natural, Shards

rng = np.random.default_rng(0)
TRAIN = Arrays(rng.integers(0, 256, (60, 4, 5, 3)).astype(np.uint8), np.arange(60) % 3, np.arange(60) % 6)
TEST = Arrays(rng.integers(0, 256, (12, 4, 5, 3)).astype(np.uint8), np.arange(12) % 3, np.arange(12) % 4)


def workload(train=TRAIN, test=TEST, kind="image", partition=None, num_clients=6, seed=1, **settings) -> ArrayWorkload:
    classes = settings.pop("classes", ["a", "b", "c"])
    return array_workload(
        "w", train, test, classes, kind, MLP, partition or Iid(), num_clients=num_clients, seed=seed, **settings
    )


# Preparation


def test_bytes_become_unit_floats_with_channels_first():
    x = workload().test.gather(torch.tensor([3, 5]))["x"]
    assert (x.dtype, x.shape, x.is_contiguous()) == (torch.float32, (2, 3, 4, 5), True)
    np.testing.assert_allclose(x[1, 2, 3, 4], TEST.x[5, 3, 4, 2] / 255, rtol=1e-6)


def test_raw_arrays_stay_raw_in_memory_and_are_shared_by_the_clients():
    w = workload()
    assert w.client_data(0).train.tensors["x"].dtype == torch.uint8
    assert w.client_data(0).train.tensors["x"] is w.client_data(1).train.tensors["x"]


def test_standard_brings_each_training_channel_to_mean_0_and_deviation_1():
    w = workload(num_clients=1, client_test_fraction=0.0, input_range="standard")
    x = w.client_data(0).train.materialise().tensors["x"]
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_audio_samples_become_floats_below_one():
    x = np.array([[-32768, 16384]] * 4, np.int16)
    w = workload(Arrays(x, np.zeros(4, int)), Arrays(x, np.zeros(4, int)), "audio", num_clients=2)
    assert w.sample(1)["x"].tolist() == [[-1.0, 0.5]]


def test_tokens_become_int64():
    part = Arrays(np.array([[0, 1, 2]] * 4, np.uint8), np.array([[1, 2, 0]] * 4, np.uint8))
    w = workload(part, part, "text", num_clients=2)
    assert w.sample(1)["x"].dtype == w.sample(1)["y"].dtype == torch.int64
    assert (w.input_shape, w.num_classes) == ((3,), 3)


def test_grey_images_without_a_channel_axis_and_foreign_byte_order_work():
    x = np.ones((4, 2, 2), ">f8")
    w = workload(Arrays(x, np.zeros(4, ">i4")), Arrays(x, np.zeros(4, int)), num_clients=2)
    assert w.input_shape == (1, 2, 2)


# Clients


def test_held_out_examples_are_a_tenth_and_never_trained_on():
    w = workload()
    for client, part in enumerate(w.parts):
        data = w.client_data(client)
        train, test = data.train.rows.tolist(), data.test.rows.tolist()
        assert (len(train), len(test)) == (9, 1)
        assert sorted(train + test) == part.tolist()


def test_at_least_one_example_trains_even_with_a_large_held_out_share():
    data = workload(num_clients=60, client_test_fraction=0.9).client_data(0)
    assert (len(data.train), len(data.test)) == (1, 0)


def test_owner_that_is_in_the_test_split_is_judged_on_its_rows_there():
    """Test owners are 0..3 over 12 rows, so owner 2 has rows 2, 6, 10; owner 5 has none and holds out its own."""
    w = workload(partition=Natural(), num_clients=None)
    known, unknown = w.client_data(2), w.client_data(5)
    assert len(known.train) == 10
    assert known.test.tensors is w.test.tensors
    assert known.test.rows.tolist() == [2, 6, 10]
    assert (len(unknown.train), len(unknown.test)) == (9, 1)


def test_no_client_trains_on_the_test_split():
    w = workload(partition=Natural(), num_clients=None)
    assert all(w.client_data(c).train.tensors is w.train_tensors for c in range(6))
    assert w.test.tensors["x"] is not w.train_tensors["x"]


def test_same_seed_gives_the_same_clients_and_held_out_parts():
    first, again, other = (workload(seed=s).client_data(3) for s in (1, 1, 2))
    assert first.train.rows.tolist() == again.train.rows.tolist()
    assert first.test.rows.tolist() == again.test.rows.tolist()
    assert first.train.rows.tolist() != other.train.rows.tolist()


@pytest.mark.parametrize("make", [workload, lambda: Blobs(MLP, num_clients=6, seed=0)], ids=["arrays", "blobs"])
@pytest.mark.parametrize("client_id", [-1, 6])
def test_unknown_client_is_refused(make, client_id: int):
    with pytest.raises(IndexError, match=rf"client_id must be in 0..5 .* got {client_id}"):
        make().client_data(client_id)


def test_population_that_is_not_given_is_the_workloads_own():
    assert workload(num_clients=None, default_clients=5).num_clients == 5
    assert workload(num_clients=None, default_clients=5, partition=Natural()).num_clients == 6  # every owner
    assert Blobs(MLP, num_clients=None, seed=0, default_clients=7).num_clients == 7


# Settings


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"input_range": "bytes"}, r"unknown value for workload.input_range 'bytes' .*standard, unit"),
        ({"client_test_fraction": 1.0}, r"workload.client_test_fraction must be in \[0, 1\), got 1.0"),
        ({"kind": "video"}, "kind must be one of image, text, audio, tabular, got 'video'"),
    ],
)
def test_wrong_setting_is_named(settings, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        workload(**settings)


def test_model_that_does_not_take_what_is_fed_is_refused():
    part = Arrays(np.zeros((4, 3), int), np.zeros((4, 3), int))
    with pytest.raises(ConfigError, match="feeds token ids, which MLP does not take; try model=char_lstm"):
        workload(part, part, "text", num_clients=2).build_model()
    flat = Arrays(np.zeros((4, 3)), np.zeros(4, int))
    numbers = array_workload("w", flat, flat, ["a"], "tabular", CharLSTM, Iid(), num_clients=2, seed=0)
    with pytest.raises(ConfigError, match="feeds numbers, not token ids, which CharLSTM does not take; try model=mlp"):
        numbers.build_model()


# The workloads


def test_digits_test_split_is_a_fixed_fifth_of_each_class():
    first, other = (Digits(model=MLP, partition=Shards(2), num_clients=20, seed=s) for s in (1, 2))
    assert len(first.test) == 359
    assert len(first.train_tensors["y"]) == 1797 - 359
    assert torch.equal(first.test.tensors["x"], other.test.tensors["x"])
    assert first.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert 0 <= first.sample(359)["x"].min() < first.sample(359)["x"].max() == 1


def test_a_million_blob_clients_cost_nothing_and_repeat_themselves():
    w, again = (Blobs(MLP, num_clients=1_000_000, seed=3) for _ in range(2))
    data = w.client_data(999_999)
    assert (len(data.train), len(data.test)) == (29, 3)
    assert torch.equal(data.train.tensors["x"], again.client_data(999_999).train.tensors["x"])
    assert not torch.equal(data.train.tensors["x"], w.client_data(0).train.tensors["x"])


def test_sizes_of_blobs_are_dirichlet_shares_but_for_their_sum():
    """Variance of a share of n clients: (n - 1) / (n^2 (n alpha + 1)), of a size 100^2 / alpha for many."""
    sizes = [len(Blobs(MLP, 400, 3, examples_per_client=100, size_alpha=0.3).client_data(c).train) for c in range(400)]
    whole = [size / 0.9 for size in sizes]  # a tenth is held out
    assert statistics.mean(whole) == pytest.approx(100, rel=0.2)
    assert statistics.stdev(whole) == pytest.approx(100 / 0.3**0.5, rel=0.3)
    assert min(sizes) == 2


def test_blobs_can_be_skewed_and_image_shaped():
    w = Blobs(MLP, num_clients=50, seed=3, input_shape=(1, 28, 28), alpha=0.05)
    assert w.sample(2)["x"].shape == (2, 1, 28, 28)
    assert np.mean([row.classes for row in split_table(w)]) < 4


def test_blobs_around_far_centres_can_be_told_apart_and_others_not():
    """The nearest centre classifies: with separation 0 that is guessing, with 8 nearly perfect."""

    def accuracy(separation: float) -> float:
        w = Blobs(MLP, num_clients=1, seed=0, separation=separation)
        x, y = w.test.tensors["x"], w.test.labels
        return float((torch.cdist(x, torch.from_numpy(w._centres)).argmin(1) == y).float().mean())

    assert accuracy(8.0) > 0.99
    assert accuracy(0.0) < 0.2


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"num_clients": 0}, "num_clients must be a whole number of at least 1 for workload blobs, got 0"),
        ({"input_shape": 16}, r"workload.input_shape must be a list of whole numbers.*, got 16"),
        ({"input_shape": (1, 0)}, r"workload.input_shape\[1\] must be at least 1, got 0"),
        (
            {"alpha": 0.0},
            r"workload.alpha must be null or greater than 0, got 0\.0",
        ),
        ({"separation": -1.0}, r"workload.separation must be at least 0, got -1\.0"),
    ],
)
def test_wrong_blob_setting_is_named(settings, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        Blobs(**{"model": MLP, "num_clients": 2, "seed": 0, **settings})


def test_workload_config_chooses_model_and_partition_and_the_command_line_wins():
    with initialize_config_module("configs", version_base="1.3"):
        chosen = compose("run", ["workload=mnist_writers"])
        beaten = compose("run", ["model=mlp", "workload=mnist_writers", "partition=iid"])
    assert chosen.model._target_.endswith("LeNet5")
    assert chosen.partition._target_.endswith("Natural")
    assert beaten.model._target_.endswith("MLP")
    assert beaten.partition._target_.endswith("Iid")
    assert chosen.workload.name == "mnist_writers"


# Describing


def test_table_counts_what_each_client_holds():
    w = workload(partition=Shards(1), num_clients=3, client_test_fraction=0.0)
    rows = split_table(w, 2)
    assert [(row.client, row.train, row.test, row.classes) for row in rows] == [(0, 20, 0, 1), (1, 20, 0, 1)]
    assert sorted(rows[0].label_counts) == [0, 0, 20]


def test_summary_says_sizes_and_how_many_clients_were_looked_at():
    text = "\n".join(summary_lines(Blobs(MLP, num_clients=5000, seed=0)))
    assert "58000 (of 2000 clients looked at)" in text  # 2000 clients x 29 examples
    assert "29 to 29, median 29" in text


@pytest.mark.parametrize("classes", [10, 62])
def test_picture_is_written(tmp_path, classes: int):
    split_picture(Blobs(MLP, num_clients=80, seed=0, num_classes=classes), tmp_path / "split.png")
    assert (tmp_path / "split.png").read_bytes().startswith(b"\x89PNG")
