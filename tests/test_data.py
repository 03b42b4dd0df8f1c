"""Workloads over arrays: preparation, splits, held-out parts, bundles and what is wrong with them."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import array_workload
from hydra import compose, initialize_config_module

from fedsim.errors import ConfigError, DataError
from fedsim.models.char_lstm import CharLSTM
from fedsim.models.mlp import MLP
from fedsim.report.plots.split import split_picture
from fedsim.settings.catalogue import list_workloads
from fedsim.workloads.arrays import Arrays, ArrayWorkload
from fedsim.workloads.blobs import Blobs
from fedsim.workloads.bundle import Bundle
from fedsim.workloads.describe import split_table, summary_lines
from fedsim.workloads.digits import Digits
from fedsim.workloads.partition import Dirichlet, Iid, Natural, Shards
from fedsim.workloads.torchvision import Torchvision

rng = np.random.default_rng(0)
TRAIN = Arrays(rng.integers(0, 256, (60, 4, 5, 3)).astype(np.uint8), np.arange(60) % 3, np.arange(60) % 6)
TEST = Arrays(rng.integers(0, 256, (12, 4, 5, 3)).astype(np.uint8), np.arange(12) % 3, np.arange(12) % 4)


def workload(train=TRAIN, test=TEST, kind="image", partition=None, num_clients=6, seed=1, **settings) -> ArrayWorkload:
    classes = settings.pop("classes", ["a", "b", "c"])
    return array_workload(
        "w", train, test, classes, kind, MLP, partition or Iid(), num_clients=num_clients, seed=seed, **settings
    )


def write_bundle(folder: Path, meta=None, **changes) -> Path:
    """A good bundle of 20 + 6 grey 4x4 images, then the changes: train_x=..., test_client=..., None leaves out."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", 20), ("test", 6)):
        arrays = {"x": np.full((n, 4, 4, 1), 7, np.uint8), "y": np.arange(n) % 2, "client": np.arange(n) % 5}
        arrays |= {key: changes[f"{split}_{key}"] for key in arrays if f"{split}_{key}" in changes}
        np.savez(folder / f"{split}.npz", **{key: a for key, a in arrays.items() if a is not None})
    (folder / "meta.json").write_text(json.dumps(meta or {"classes": ["even", "odd"], "kind": "image"}))
    return folder


def open_bundle(path, partition=None, num_clients: int | None = 2) -> Bundle:
    return Bundle(str(path), model=MLP, partition=partition or Iid(), num_clients=num_clients, seed=0)


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


# Bundles


def test_bundle_is_found_by_folder_and_by_bare_name(tmp_path, monkeypatch):
    write_bundle(tmp_path / "here" / "parity")
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "here"))
    for path in ("parity", tmp_path / "here" / "parity"):
        w = open_bundle(path, Natural(), None)
        assert (w.num_clients, w.input_shape, w.num_classes, len(w.test)) == (5, (1, 4, 4), 2, 6)


def test_bare_name_is_also_looked_up_in_data(tmp_path, monkeypatch):
    write_bundle(tmp_path / "data" / "parity")
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert open_bundle("parity").num_clients == 2


def test_missing_bundle_names_the_places_and_the_nearest_name(tmp_path, monkeypatch):
    write_bundle(tmp_path / "parity")
    monkeypatch.chdir(tmp_path)  # ./data of the checkout may hold real bundles
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no bundle 'partiy'; did you mean 'parity'\? \(looked for .*found: parity"):
        open_bundle("partiy")
    with pytest.raises(DataError, match=r"is no bundle: it has none of train.npz"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("file", ["train.npz", "test.npz", "meta.json"])
def test_missing_file_of_a_bundle_is_named(tmp_path, file: str):
    (write_bundle(tmp_path) / file).unlink()
    with pytest.raises(DataError, match=f"has no {file}; a bundle is a folder with train.npz, test.npz, meta.json"):
        open_bundle(tmp_path)


SPOILT = np.full((20, 4, 4, 1), 0.5, np.float32)
SPOILT[3, 0, 0] = np.nan
SPOILT[5, 1, 1] = np.inf


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"train_x": None}, r"train.npz has no array 'x' \(it holds: y, client\)"),
        ({"test_y": None}, r"test.npz has no array 'y'"),
        ({"train_x": np.full((20, 4, 4, 1), None)}, "train.npz holds an array of Python objects"),
        ({"train_client": np.full(20, None)}, "train.npz holds an array of Python objects"),
        ({"train_y": np.zeros(19, int)}, "train part: x has 20 examples but y has 19 labels"),
        ({"train_y": np.zeros(20)}, "train part: labels must be integers, got float64"),
        ({"train_y": np.full(20, -1)}, r"train part: labels must be in 0..1 \(there are 2 classes\), got -1..-1"),
        ({"test_y": np.full(6, 2)}, r"test part: labels must be in 0..1 .* got 2..2"),
        ({"train_y": np.zeros((20, 3), int)}, r"train part: y must have shape \[20\], got \[20, 3\]"),
        ({"train_x": SPOILT}, "train part: x holds NaN or infinite values in 2 of 20 examples"),
        ({"train_x": SPOILT.astype(np.float64) * 1e300}, "x holds NaN or infinite values in 20 of 20 examples"),
        ({"test_x": np.zeros((0, 4, 4, 1), np.uint8), "test_y": np.zeros(0, int)}, "test part is empty"),
        ({"train_client": np.zeros(3, int)}, r"client must be one integer or string id per example \(\[20\]\)"),
        ({"train_client": np.zeros(20)}, "train part: client must be one integer or string id"),
        ({"test_client": np.array(["a"] * 6)}, "client is int64 in the train part but <U1 in the test part"),
        ({"train_x": np.zeros((20, 16), np.uint8)}, r"x of kind image must be .* got shape \[20, 16\]"),
        ({"train_x": np.zeros((20, 3, 32, 32), np.uint8)}, "looks like channels first; images are"),
        ({"train_x": np.zeros((20, 4, 4, 1), np.int32)}, "x must be uint8, int16 or floating, got int32"),
        ({"test_x": np.zeros((6, 4, 5, 1), np.uint8)}, r"x is uint8 \[4, 4, 1\] in .* but uint8 \[4, 5, 1\]"),
        ({"test_x": np.zeros((6, 4, 4, 1), np.float32)}, r"x is uint8 .* but float32 .* save both parts alike"),
        ({"train_x": np.uint8(3)}, "x and y must have one row per example, got a single value"),
    ],
)
def test_what_is_wrong_with_an_array_is_one_sentence(tmp_path, changes, sentence: str):
    with pytest.raises(DataError, match=sentence) as caught:
        open_bundle(write_bundle(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"{", "meta.json is not readable JSON"),
        (b"\xff\xfe", "meta.json cannot be read as a text file"),
        (b"[" * 100_000, "meta.json is not readable JSON"),
        (b"[]", "meta.json must hold `classes`"),
        (b'{"kind": "image", "classes": []}', "meta.json must hold `classes`, a list with the name of every class"),
        (b'{"classes": ["a", "b"]}', "meta.json must hold `kind`, .* got None"),
        (b'{"classes": ["a", "b"], "kind": ["image"]}', r"meta.json must hold `kind`, .* got \['image'\]"),
    ],
)
def test_what_is_wrong_with_the_meta_file_is_one_sentence(tmp_path, content: bytes, sentence: str):
    (write_bundle(tmp_path) / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        open_bundle(tmp_path)


def single_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04broken", single_array()])
def test_corrupt_npz_is_refused(tmp_path, content: bytes):
    (write_bundle(tmp_path) / "train.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"train.npz is not a readable npz file: .*; write it again with numpy.savez"):
        open_bundle(tmp_path)


def test_cut_off_or_damaged_npz_is_refused(tmp_path):
    path = write_bundle(tmp_path) / "train.npz"
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], good[:200] + bytes(50) + good[250:]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"train.npz is not a readable npz file"):
            open_bundle(tmp_path)


def test_token_beyond_the_vocabulary_is_refused(tmp_path):
    x = np.full((20, 5), 2, np.uint8)
    folder = write_bundle(
        tmp_path, {"classes": ["a", "b"], "kind": "text"}, train_x=x, train_y=x * 0, test_x=x[:6], test_y=x[:6] * 0
    )
    with pytest.raises(DataError, match=r"token ids in x must be in 0..1 \(the classes\), got 2..2"):
        open_bundle(folder)


def test_more_clients_than_examples_is_refused(tmp_path):
    with pytest.raises(DataError, match="20 training examples are too few for 21 clients"):
        open_bundle(write_bundle(tmp_path), num_clients=21)


# The workloads


def test_digits_test_split_is_a_fixed_fifth_of_each_class():
    first, other = (Digits(model=MLP, partition=Shards(2), num_clients=20, seed=s) for s in (1, 2))
    assert len(first.test) == 359
    assert len(first.train_tensors["y"]) == 1797 - 359
    assert torch.equal(first.test.tensors["x"], other.test.tensors["x"])
    assert first.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert 0 <= first.sample(359)["x"].min() < first.sample(359)["x"].max() == 1


def test_absent_official_files_say_how_to_get_them(tmp_path):
    with pytest.raises(
        DataError, match=r"cifar10 is not here or broken: set workload.download=true or put the official"
    ):
        Torchvision("cifar10", model=MLP, partition=Iid(), num_clients=10, seed=0, root=str(tmp_path))
    with pytest.raises(ConfigError, match=r"unknown value for workload.dataset 'cifar'; did you mean 'cifar10'"):
        Torchvision("cifar", model=MLP, partition=Iid(), num_clients=10, seed=0)


def test_a_million_blob_clients_cost_nothing_and_repeat_themselves():
    w, again = (Blobs(MLP, num_clients=1_000_000, seed=3) for _ in range(2))
    data = w.client_data(999_999)
    assert (len(data.train), len(data.test)) == (29, 3)
    assert torch.equal(data.train.tensors["x"], again.client_data(999_999).train.tensors["x"])
    assert not torch.equal(data.train.tensors["x"], w.client_data(0).train.tensors["x"])


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


def test_list_says_which_data_are_here(tmp_path, monkeypatch):
    write_bundle(tmp_path / "mnist")
    monkeypatch.chdir(tmp_path)  # ./data of the checkout may hold real bundles
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    rows = {row.name: row for row in list_workloads()}
    assert rows["digits"].found
    assert rows["blobs"].where == "made on demand"
    assert (rows["mnist_writers"].found, rows["mnist_writers"].where) == (True, str(tmp_path / "mnist"))
    assert not rows["shakespeare"].found
    assert "workload.download=true" in rows["cifar10"].where


# Real data


def real(name: str) -> str:
    root = os.environ.get("FEDSIM_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"FEDSIM_DATA has no bundle {name}")
    return name


@pytest.mark.data
def test_mnist_writers_are_clients_with_held_out_digits():
    w = Bundle(real("mnist"), model=MLP, partition=Natural(2), num_clients=None, seed=0)
    assert (w.num_clients, w.input_shape, len(w.test)) == (539, (1, 28, 28), 10_000)
    assert sum(row.train + row.test for row in split_table(w)) == 60_000


@pytest.mark.data
def test_shakespeare_roles_are_judged_on_their_later_lines():
    w = Bundle(real("shakespeare"), model=CharLSTM, partition=Natural(2), num_clients=None, seed=0)
    assert (w.num_clients, w.input_shape, w.num_classes) == (141, (80,), 65)
    assert sum(row.test for row in split_table(w)) == len(w.test)
    assert w.evaluate(w.build_model(), w.client_data(0).test)["loss"] == pytest.approx(np.log(65), rel=0.05)


@pytest.mark.data
def test_cifar10_standardised_has_mean_zero_per_channel():
    w = Bundle(real("cifar10"), model=MLP, partition=Dirichlet(0.3, 2), num_clients=100, seed=0, input_range="standard")
    assert w.sample(4000)["x"].mean((0, 2, 3)).abs().max() < 0.05
    assert w.num_clients == 100
