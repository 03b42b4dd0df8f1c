"""One rule for both parts of a data set: what is left out, renamed or refused in training is so in testing."""

import json
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import array_workload

from fedsim.errors import DataError
from fedsim.models.mlp import MLP
from fedsim.settings.build import build_world, instantiate
from fedsim.settings.compose import compose
from fedsim.settings.groups import options
from fedsim.workloads.arrays import Arrays, ArrayWorkload
from fedsim.workloads.base import Examples, Workload
from fedsim.workloads.digits import Digits
from fedsim.workloads.partition import Iid, Natural

OWNERS, EACH, TESTED = 6, 20, 8


def part(each: int, owners: np.ndarray, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, len(owners) * each)
    return Arrays(rng.normal(size=(len(y), 3)).astype(np.float32), y, np.repeat(owners, each))


def users(owners: np.ndarray, test_owners: np.ndarray | None = None, partition: Natural | None = None) -> ArrayWorkload:
    """Six owners with 20 training and 8 test examples each, of four classes."""
    train, test = part(EACH, owners, 1), part(TESTED, owners if test_owners is None else test_owners, 2)
    return array_workload("w", train, test, list("abcd"), "tabular", MLP, partition or Natural(), None, seed=3)


def labels(workload: Workload, client: int) -> tuple[set[int], set[int]]:
    data = workload.client_data(client)
    return set(data.train.labels.tolist()), set(data.test.labels.tolist())


# What a client keeps


@pytest.mark.parametrize("owners", [np.arange(OWNERS), np.array(["", "a", "b", "c", "d", ""])], ids=["all", "nobodys"])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_user_is_judged_on_the_classes_that_it_keeps(owners: np.ndarray, kept: int):
    workload = users(owners, partition=Natural(classes_per_client=kept))
    for client in range(workload.num_clients):
        trained, judged = labels(workload, client)
        assert len(trained) == kept
        assert judged
        assert judged <= trained


def test_all_test_rows_of_the_kept_classes_stay():
    workload = users(np.arange(OWNERS), partition=Natural(classes_per_client=2))
    test = part(TESTED, np.arange(OWNERS), 2)
    for client in range(OWNERS):
        trained, _ = labels(workload, client)
        expected = np.flatnonzero((test.owners == client) & np.isin(test.y, list(trained)))
        assert workload.client_data(client).test.rows.tolist() == expected.tolist()


def test_a_user_without_test_rows_of_its_classes_holds_out_some_of_its_own():
    train = Arrays(np.zeros((20, 1), np.float32), np.zeros(20, int), np.repeat([1, 2], 10))
    test = Arrays(np.zeros((4, 1), np.float32), np.array([1, 1, 0, 1]), np.array([1, 1, 2, 2]))
    workload = array_workload("w", train, test, ["a", "b"], "tabular", MLP, Natural(classes_per_client=1), None, seed=0)
    assert [(len(d.train), len(d.test)) for d in map(workload.client_data, range(2))] == [(9, 1), (10, 1)]
    assert labels(workload, 0) == ({0}, {0})


def test_a_user_keeps_classes_of_its_own_where_nobodys_rows_are_dealt():
    """User a has class 0 alone; nobody's rows of class 1, which are in the test split too, are not its own."""
    owners = np.array(["a"] * 3 + [""] * 30)
    train = Arrays(np.zeros((33, 1), np.float32), (owners == "").astype(int), owners)
    test = Arrays(np.zeros((6, 1), np.float32), np.array([0, 1] * 3), np.array(["a", ""] * 3))
    for seed in range(5):
        natural = Natural(classes_per_client=1)
        workload = array_workload("w", train, test, ["a", "b"], "tabular", MLP, natural, None, seed=seed)
        assert labels(workload, 0) == ({0}, {0})


def test_training_examples_that_are_all_nobodys_are_refused():
    with pytest.raises(DataError, match="none of the 40 training examples has an owner"):
        users(np.array(["", ""]))


# Who a user is


WIDE = 2**62 + 7 * np.arange(OWNERS, dtype=np.int64)  # neighbours that float64 cannot tell apart


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (WIDE.astype(np.uint64), WIDE),
        (WIDE, WIDE.astype(np.uint64)),
        (np.arange(OWNERS, dtype=np.int8), np.arange(OWNERS, dtype=np.uint64)),
        (np.arange(OWNERS) - 3, np.arange(OWNERS).astype(np.uint64)),
        (np.uint64(2**63) + np.arange(OWNERS, dtype=np.uint64), np.arange(OWNERS)),
        (WIDE.astype("<U30"), WIDE.astype("<U20")),
    ],
)
def test_ids_of_one_number_are_one_user_whatever_their_types(ours: np.ndarray, theirs: np.ndarray):
    workload = users(ours, theirs)
    for client, owner in enumerate(sorted(ours.tolist())):
        there = owner in theirs.tolist()
        rows = workload.client_data(client).test.rows.tolist()
        place = theirs.tolist().index(owner) if there else 0
        assert not there or rows == list(range(place * TESTED, (place + 1) * TESTED))


@pytest.mark.parametrize(
    "ours, theirs, sentence",
    [
        (
            np.arange(OWNERS) - 3,
            np.uint64(2**63) + np.arange(OWNERS, dtype=np.uint64),
            "from -3 to 9223372036854775813",
        ),
        (np.arange(OWNERS), np.arange(OWNERS).astype(str), "client is int64 in the train part but <U"),
        (np.array(["a", "b"]), np.arange(2, dtype=np.uint64), "client is <U1 in the train part but uint64"),
    ],
)
def test_ids_that_have_no_type_in_common_are_refused(ours: np.ndarray, theirs: np.ndarray, sentence: str):
    with pytest.raises(DataError, match=sentence):
        users(ours, theirs)


# What a task is judged on


def cut_digits(last: int) -> Digits:
    """Digits, of whose test part only those below `last` are left."""
    workload = Digits(model=MLP, partition=Iid(), num_clients=2, seed=0)
    rows = torch.nonzero(workload.test.labels < last).flatten()
    workload.test = Examples(workload.test.tensors, rows, workload.prepare)
    return workload


@pytest.mark.parametrize("changes", [{}, {"test_per_class": 5}, {"forward_transfer": False}])
@pytest.mark.parametrize("missing", ["a task", "all"])
@pytest.mark.parametrize("kind", [kind for kind in options("stream") if kind != "none"])
def test_a_task_without_test_examples_is_refused(kind: str, missing: str, changes: dict[str, object], tmp_path: Path):
    bundles = [f"stream.bundles=[{tmp_path}]", "stream.tasks=2"] if kind == "domains" else []
    if bundles:
        for name in ("train", "test"):
            np.savez(tmp_path / f"{name}.npz", x=np.zeros((8, 4, 4), np.uint8), y=np.arange(8) % 2)
        (tmp_path / "meta.json").write_text(json.dumps({"kind": "image", "classes": ["a", "b"]}))
    settings = compose(["workload=digits", f"stream={kind}", *bundles, "rounds=10"])
    settings["stream"] |= changes
    make = instantiate(settings, "stream")
    share_classes = kind != "split_classes"  # then only a task of a data set without any test examples has none
    workload = cut_digits(8 if missing == "a task" else 0)
    if share_classes and missing == "a task":
        make(workload=workload, rounds=10, evaluate_every=1, seed=0)
        return
    with pytest.raises(DataError, match=r"workload digits has no test examples of task [04] \(stream.tasks="):
        make(workload=workload, rounds=10, evaluate_every=1, seed=0)


@pytest.mark.parametrize("kind", [kind for kind in options("stream") if kind != "domains"])
def test_a_workload_without_test_examples_is_refused_before_the_run(kind: str, monkeypatch: pytest.MonkeyPatch):
    made = Digits.__init__

    @wraps(made)
    def emptied(self: Digits, *arguments: object, **settings: object) -> None:
        made(self, *arguments, **settings)  # type: ignore[arg-type]
        self.test = Examples(self.test.tensors, torch.zeros(0, dtype=torch.int64), self.prepare)

    monkeypatch.setattr(Digits, "__init__", emptied)
    with pytest.raises(DataError, match="workload digits has no test examples"):
        build_world(json.dumps(compose(["workload=digits", f"stream={kind}", "rounds=10", "seed=77"])))
