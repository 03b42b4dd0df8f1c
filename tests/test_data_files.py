"""Data in files: bundles and what is wrong with them, official files, and which are here."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fedsim.errors import ConfigError, DataError
from fedsim.models.char_lstm import CharLSTM
from fedsim.models.mlp import MLP
from fedsim.settings.catalogue import list_workloads
from fedsim.workloads.bundle import Bundle
from fedsim.workloads.describe import split_table
from fedsim.workloads.partition import Dirichlet, Iid, Natural
from fedsim.workloads.torchvision import Torchvision


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


def test_a_bundle_that_is_here_comes_before_files_that_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # ./data of the checkout may hold real bundles
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "meta.json").write_text("{}")
    _, here, where = Torchvision.locate({"dataset": "mnist"})
    start = "take the bundle that is here, workload=bundle workload.path=mnist, or set workload.download=true"
    assert (here, where.startswith(start)) == (False, True)
    assert Bundle.locate({}) == ("any", True, "any folder or name of a bundle: workload.path=... (here: mnist)")


def test_absent_official_files_say_how_to_get_them(tmp_path):
    with pytest.raises(
        DataError,
        match=r"the official files of cifar10 are not here or broken: .*set workload.download=true or put the official",
    ):
        Torchvision("cifar10", model=MLP, partition=Iid(), num_clients=10, seed=0, root=str(tmp_path))
    with pytest.raises(ConfigError, match=r"unknown value for workload.dataset 'cifar'; did you mean 'cifar10'"):
        Torchvision("cifar", model=MLP, partition=Iid(), num_clients=10, seed=0)


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
