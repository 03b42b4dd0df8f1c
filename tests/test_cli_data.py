"""Data at the command line: bundles of one's own, `fedsim data list` and `fedsim data describe`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHORT, Ended, assert_refused

pytestmark = pytest.mark.usefixtures("place")


def bundle(folder: Path, n: int = 30, **arrays: Any) -> Path:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, 4)).astype(np.float32), np.arange(n) % 3
    train = {k: v for k, v in {"x": x, "y": y, **arrays}.items() if v is not None}
    folder.mkdir(parents=True)
    np.savez(folder / "train.npz", **train)
    np.savez(folder / "test.npz", x=x, y=y)
    (folder / "meta.json").write_text(json.dumps({"classes": ["a", "b", "c"], "kind": "tabular"}))
    return folder


BAD_BUNDLES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no labels": ({"y": None}, "has no array 'y' (it holds: x)", ""),
    "float labels": ({"y": np.arange(30) % 3 * 1.0}, "labels must be integers, got float64", ""),
    "nan": ({"x": np.where(np.arange(120).reshape(30, 4) == 7, np.nan, 1.0)}, "NaN or infinite", "1 of 30"),
    "label too large": ({"y": np.arange(30) % 4}, "labels must be in 0..2", "got 0..3"),
    "objects": ({"x": np.array([{}] * 30, dtype=object)}, "Python objects", "plain"),
    "few examples": ({}, "30 training examples are too few for 100 clients", "at most 30"),
}


@pytest.mark.parametrize("case", BAD_BUNDLES)
def test_a_bad_bundle_is_one_sentence_and_leaves_nothing(case: str, place: Path, fedsim: Callable[..., Ended]):
    arrays, *words = BAD_BUNDLES[case]
    bundle(place / "bundles" / "mine", **arrays)
    assert_refused(fedsim("run", "workload=bundle", "workload.path=mine"), *words)


def test_a_missing_bundle_is_named_with_the_nearest_one(place: Path, fedsim: Callable[..., Ended]):
    bundle(place / "bundles" / "flowers")
    assert_refused(fedsim("run", "workload=bundle", "workload.path=flower"), "no bundle 'flower'", "'flowers'")
    assert_refused(fedsim("run", "workload=bundle", f"workload.path={place}/nope"), f"'{place}/nope'")


def test_a_bundle_with_a_number_for_a_name_has_to_be_quoted(place: Path, fedsim: Callable[..., Ended]):
    bundle(place / "bundles" / "2024")
    assert_refused(fedsim("run", "workload=bundle", "workload.path=2024"), "must be text", "workload.path='\"2024\"'")
    ended = fedsim("run", "workload=bundle", 'workload.path="2024"', "num_clients=5", *SHORT, f"out={place}/out")
    assert ended.code == 0


def test_data_describe_draws_the_split(fedsim: Callable[..., Ended]):
    ended = fedsim("data", "describe", "num_clients=5", "--picture", "split.png", "--limit", "3")
    assert (ended.code, ended.err) == (0, "")
    assert "the first 3 of 5 clients" in ended.out
    assert Path("split.png").read_bytes().startswith(b"\x89PNG")


def test_data_describe_refuses_like_run(place: Path, fedsim: Callable[..., Ended]):
    assert_refused(fedsim("data", "describe", "workload=digts"), "did you mean 'digits'?")
    assert_refused(fedsim("data", "describe", "--picture", "/nope/x.png"), "--picture='/nope/x.png'", "is no folder")
    assert_refused(fedsim("data", "describe", "--limit", "0"), "'--limit'", "1<=x")


def test_data_list_says_what_is_here(place: Path, fedsim: Callable[..., Ended]):
    bundle(place / "bundles" / "mnist")
    ended = fedsim("data", "list")
    assert ended.code == 0
    rows = {line.split()[1]: line for line in ended.out.splitlines() if line.startswith("│")}
    assert " yes " in rows["mnist_writers"]
    assert " no " in rows["cifar10"]
    assert "mnist" in rows["bundle"]
