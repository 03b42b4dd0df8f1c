"""Crops and mirror images that clients train on: which there are, whose draws they are, and what stays as it is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import array_workload, every_way, rounds_in

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.models.mlp import MLP
from fedsim.runs import writer
from fedsim.runs.federation import Federation
from fedsim.seeding import torch_generator
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.workloads.arrays import Arrays
from fedsim.workloads.cropping import CropAndFlip
from fedsim.workloads.partition import Iid

CROPS = ("workload/augment=crop_flip", "workload.augment.padding=1")
STILL = ("workload/augment=crop_flip", "workload.augment.padding=0", "workload.augment.flip=0")


def digits(*overrides: str) -> dict:
    base = (
        *("model=convnet", "partition=iid", "num_clients=6", "cohort=3", "rounds=3", "evaluate_clients=2"),
        *("trainer.local_epochs=1", "engine.device=cpu", "fleet=uniform", "latency=flops", "checkpoint_s=0"),
    )
    return compose([*base, *overrides])


def made_of(image: list, count: int, **settings) -> torch.Tensor:
    """Many changed copies of an image [channels, height, width] on a padding of 9."""
    x, draw = torch.tensor(image, dtype=torch.float32), torch.Generator().manual_seed(3)
    return CropAndFlip(**settings).images(x.expand(count, *x.shape), torch.full((1, len(x), 1, 1), 9.0), draw)


# --- what an image becomes ------------------------------------------------------------------------------------------


def test_crops_are_all_windows_of_the_padded_image_and_no_other():
    made = made_of([[[1, 2, 3], [4, 5, 6]]], 400, padding=1, flip=0.0)[:, 0]
    by_hand = {
        ((9, 9, 9), (9, 1, 2)), ((9, 9, 9), (1, 2, 3)), ((9, 9, 9), (2, 3, 9)),
        ((9, 1, 2), (9, 4, 5)), ((1, 2, 3), (4, 5, 6)), ((2, 3, 9), (5, 6, 9)),
        ((9, 4, 5), (9, 9, 9)), ((4, 5, 6), (9, 9, 9)), ((5, 6, 9), (9, 9, 9)),
    }  # fmt: skip
    found = [tuple(map(tuple, image)) for image in made.int().tolist()]
    assert set(found) == by_hand
    assert all(20 < found.count(image) < 75 for image in by_hand)  # 44 of each are expected


def test_an_image_is_mirrored_left_to_right_with_its_probability():
    made = made_of([[[1, 2, 3], [4, 5, 6]]], 400, padding=0, flip=0.25)[:, 0].int().tolist()
    mirrored, plain = made.count([[3, 2, 1], [6, 5, 4]]), made.count([[1, 2, 3], [4, 5, 6]])
    assert mirrored + plain == 400
    assert 70 < mirrored < 130


def test_channels_move_together_and_the_given_images_stay():
    image = torch.arange(50.0).view(2, 1, 5, 5)
    given = image.clone()
    both = image.view(1, 2, 5, 5).expand(30, 2, 5, 5)
    made = CropAndFlip(padding=2).images(both, torch.tensor([-1.0, 24.0]).view(1, 2, 1, 1), torch.Generator())
    assert torch.equal(made[:, 1], made[:, 0] + 25)
    assert torch.equal(image, given)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_black_is_what_the_network_is_fed_for_it(channels: tuple[int, ...]):
    """Cropping prepared images gives the bits of preparing cropped ones."""
    draw = np.random.default_rng(5)
    x = draw.integers(0, 256, (12, 6, 5, *channels), dtype=np.uint8)
    part = Arrays(x, np.arange(12) % 2)
    augment = CropAndFlip(padding=2)
    workload = array_workload(
        "w", part, part, ["a", "b"], "image", MLP, Iid(), 1, 3, input_range="standard", augment=augment
    )
    data = workload.client_data(0)
    fed = replace(data, train=data.train.materialise())
    made = workload.for_training(0, fed, torch_generator(1)).train
    assert torch.equal(made.labels, fed.train.labels)
    padded = np.pad(x[data.train.rows.numpy()], [(0, 0), (2, 2), (2, 2)] + [(0, 0)] * len(channels))
    for row, image in enumerate(made.tensors["x"]):
        windows = np.stack([padded[row, i : i + 6, j : j + 5] for i in range(5) for j in range(5)])
        windows = np.concatenate([windows, windows[:, :, ::-1]])
        allowed = workload.prepare({"x": torch.from_numpy(windows.copy())})["x"]
        assert any(torch.equal(image, one) for one in allowed)


# --- whose images change, and when ----------------------------------------------------------------------------------


def test_images_change_from_round_to_round_and_not_those_held_out():
    workload = build_world(json.dumps(digits(*CROPS))).workload
    data = workload.client_data(1)
    data = replace(data, train=data.train.materialise(), test=data.test.materialise())
    first, again, later = (workload.for_training(1, data, torch_generator(n)) for n in (1, 1, 2))
    assert torch.equal(first.train.tensors["x"], again.train.tensors["x"])
    assert not torch.equal(first.train.tensors["x"], later.train.tensors["x"])
    assert not torch.equal(first.train.tensors["x"], data.train.tensors["x"])
    assert torch.equal(first.test.tensors["x"], data.test.tensors["x"])


def test_means_that_clients_share_are_of_images_as_they_are():
    run = Federation(build_world(json.dumps(digits("method=fedmix", *CROPS, "rounds=1"))), LocalEngine(serve))
    list(run.rounds())
    data = [run.world.workload.client_data(client).train.materialise() for client in range(6)]
    means = torch.stack([some.tensors["x"].mean(0) for some in data])
    assert torch.allclose(run.strategy.pool["x"], means, atol=1e-6)


# --- the same bytes -------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_where_clients_train_or_on_a_pause(tmp_path: Path):
    settings = digits(*CROPS)
    lines = every_way(settings, tmp_path)
    assert lines["one"] == lines["parts"] == lines["alone"] == lines["longer"]


def test_without_augmentation_nothing_changes_and_with_it_no_price(tmp_path: Path):
    """An augmentation that does nothing gives the bytes of none; one that acts costs devices nothing."""
    rows = {}
    for name, more in (("none", ()), ("null", ("+workload.augment=null",)), ("still", STILL), ("crops", CROPS)):
        writer.run(digits(*more), LocalEngine(serve), tmp_path / name)
        rows[name] = rounds_in(tmp_path / name)
    assert rows["none"] == rows["null"] == rows["still"]
    assert rows["crops"] != rows["none"]
    assert [row | {"metrics": {}} for row in rows["crops"]] == [row | {"metrics": {}} for row in rows["none"]]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "length"), [("tabular", 8), ("text", 8), ("audio", 9)])
def test_other_data_than_images_are_refused(kind: str, length: int):
    part = Arrays(np.zeros((4, length), np.int16), np.zeros(4, np.int64))
    sentence = rf"workload.augment is for images, and w holds {kind} \[4, {length}\]; set it to null"
    with pytest.raises(ConfigError, match=sentence):
        array_workload("w", part, part, ["a"], kind, MLP, Iid(), 1, 3, augment=CropAndFlip())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["workload.augment.padding=8"], "padding must be less than the 8 pixels of an image's shorter side, got 8"),
        (["workload.augment.flip=1.5"], r"workload.augment.flip must be in \[0, 1\], got 1.5"),
        (["stream=permuted", "stream.tasks=3", "workload.client_test_fraction=0"], "does not go with a stream"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides: list[str], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        build_world(json.dumps(digits(*CROPS, *overrides)))
