"""What a classifier does for each class, and how far its confidence can be believed: by hand and by scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import array_workload
from sklearn import metrics as sklearn
from torch import nn

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.report.rounds import read_rounds
from fedsim.runs import writer
from fedsim.workloads.arrays import Arrays
from fedsim.workloads.by_class import CALIBRATION, CLASSES, ByClass, calibration_error, confusion_of, counts, macro_f1
from fedsim.workloads.classification import ClassificationWorkload
from fedsim.workloads.metrics import ACCURACY, Metric, worst_tenth
from fedsim.workloads.partition import Iid

NAMES = tuple("abcdefg")


class Table(nn.Module):
    """Answers with what it is given."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def judged(logits: np.ndarray, labels: np.ndarray) -> ClassificationWorkload:
    """A workload that is judged on these answers."""
    part = Arrays(logits.astype(np.float32), labels)
    return array_workload("given", part, part, list(NAMES), "tabular", Table, Iid(), 1, 0)


def of(labels: list[int], predicted: list[int], confidence: list[float], classes: int = len(NAMES)) -> dict:
    return counts(torch.tensor(labels), torch.tensor(predicted), torch.tensor(confidence), classes)


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_figures_are_those_of_scikit_learn(seed: int):
    """Class f is never a label, g neither label nor answer."""
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 6, 200)
    by_class = of(labels.tolist(), predicted.tolist(), [0.5] * 200)[CLASSES]
    assert macro_f1(by_class) == pytest.approx(sklearn.f1_score(labels, predicted, average="macro", zero_division=0))
    confusion = confusion_of(torch.from_numpy(labels), torch.from_numpy(predicted), 7)
    assert (confusion.dense() == sklearn.confusion_matrix(labels, predicted, labels=range(7))).all()
    listed = ByClass(NAMES, confusion, np.ones((3, 15))).figures()["classes"]
    recalls = sklearn.recall_score(labels, predicted, labels=range(7), average=None, zero_division=np.nan)
    assert [np.nan if one["accuracy"] is None else one["accuracy"] for one in listed] == pytest.approx(
        recalls, nan_ok=True
    )
    f1 = sklearn.f1_score(labels, predicted, labels=range(7), average=None, zero_division=np.nan)
    assert [np.nan if one["f1"] is None else one["f1"] for one in listed] == pytest.approx(f1, nan_ok=True)
    assert [one["examples"] for one in listed] == np.bincount(labels, minlength=7).tolist()


def test_confusions_add_up():
    """Class 0 was taken for 1 twice, once in each part, and class 2 for 0 in the second."""
    one, other = (confusion_of(torch.tensor(y), torch.tensor(p), 3) for y, p in (([0, 1], [1, 1]), ([2, 0], [0, 1])))
    assert (one + other).dense().tolist() == [[0, 2, 0], [0, 1, 0], [1, 0, 0]]
    assert (one + other).by_class().tolist() == [[2, 1, 1], [1, 3, 0], [0, 1, 0]]
    assert (one + 0).dense().tolist() == one.dense().tolist()


def test_calibration_error_is_that_by_hand():
    """Of four answers: two in the bin up to 0.6 at 0.55 and 0.6, one right; 0.9 (bin 14) wrong, 1.0 (bin 15) right.

    |1 - 1.15| + |0 - 0.9| + |1 - 1| over four is 1.05 / 4.
    """
    found = of([0, 1, 2, 3], [0, 0, 0, 3], [0.55, 0.6 - 1e-6, 0.9, 1.0])[CALIBRATION]
    assert np.flatnonzero(found[0]).tolist() == [8, 13, 14]
    assert calibration_error(found) == pytest.approx(1.05 / 4, abs=1e-6)


def test_answers_that_are_as_sure_as_right_are_calibrated():
    """Eight of ten right at 0.8; the same at 0.9 is 0.1 too sure."""
    labels = [0] * 8 + [1] * 2
    assert calibration_error(of(labels, [0] * 10, [0.8] * 10)[CALIBRATION]) == pytest.approx(0, abs=1e-7)
    assert calibration_error(of(labels, [0] * 10, [0.9] * 10)[CALIBRATION]) == pytest.approx(0.1)


def test_an_edge_belongs_to_the_bin_below():
    exact = torch.tensor([number / 15 for number in range(1, 16)], dtype=torch.float64)
    bins = counts(torch.zeros(15, dtype=torch.int64), torch.zeros(15, dtype=torch.int64), exact, 7)[CALIBRATION][0]
    assert bins.tolist() == [1] * 15


# --- workloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 60, 512])
def test_an_evaluation_is_the_same_in_any_batches(batch: int):
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(size=(60, 7)), rng.integers(0, 7, 60)
    workload = judged(logits, labels)
    found = workload.evaluate(workload.build_model(), workload.test, batch)
    whole = workload.evaluate(workload.build_model(), workload.test)
    assert {key: found[key] for key in ("accuracy", "macro_f1", "ece")} == {
        key: whole[key] for key in ("accuracy", "macro_f1", "ece")
    }
    answers = logits.argmax(1)
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(labels, answers, average="macro", zero_division=0))


def test_accuracy_and_loss_are_those_of_torch():
    rng = np.random.default_rng(4)
    logits, labels = torch.from_numpy(rng.normal(size=(60, 7)).astype(np.float32)), torch.arange(60) % 7
    workload = judged(logits.numpy(), labels.numpy())
    found = workload.evaluate(workload.build_model(), workload.test)
    loss = float(nn.functional.cross_entropy(logits, labels, reduction="sum")) / 60
    assert (found["accuracy"], found["loss"]) == (float((logits.argmax(1) == labels).sum()) / 60, loss)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_says_how_its_last_model_does_for_each_class(run, tmp_path: Path):
    summary, last = run(), read_rounds(tmp_path)[-1].metrics
    matrix, listed = np.array(summary["confusion"]), summary["classes"]
    assert matrix.sum() == 40
    assert matrix.diagonal().sum() / 40 == last["accuracy"] == summary["final"]["accuracy"]
    assert [one["examples"] for one in listed] == matrix.sum(1).tolist()
    assert last["macro_f1"] == summary["final"]["macro_f1"] == pytest.approx(np.mean([one["f1"] for one in listed]))
    bins = summary["calibration"]
    gaps = [one["predictions"] * abs(one["accuracy"] - one["confidence"]) for one in bins if one["predictions"]]
    assert last["ece"] == summary["final"]["ece"] == pytest.approx(sum(gaps) / 40)
    cells = pd.read_parquet(tmp_path / "confusion.parquet")
    names = [one["name"] for one in listed]
    again = cells.pivot(index="label", columns="predicted", values="count")
    assert (again.reindex(index=names, columns=names, fill_value=0).fillna(0).to_numpy() == matrix).all()


@pytest.mark.parametrize("overrides", [("evaluate_every=2", "rounds=3"), ("method=fedrep", "evaluate_clients=6")])
def test_a_run_that_was_resumed_at_its_end_says_the_same(settings, run, tmp_path: Path, overrides: tuple[str, ...]):
    before = {**run(*overrides, "checkpoint_s=0"), "host_s": 0}
    matrix = (tmp_path / "confusion.parquet").read_bytes()
    for name in ("summary.json", "confusion.parquet"):
        (tmp_path / name).unlink()
    again = writer.run(settings(*overrides, "checkpoint_s=0"), LocalEngine(serve), tmp_path, resume=True)
    assert {**again, "host_s": 0} == before
    assert (tmp_path / "confusion.parquet").read_bytes() == matrix


def test_a_stream_counts_the_classes_of_the_tasks_that_were_seen(run, tmp_path: Path):
    stream = ("stream=split_classes", "stream.tasks=2", "workload.num_classes=4", "workload.examples_per_client=48")
    summary = run(*stream, "rounds=4")
    reports = read_rounds(tmp_path)
    first, last = reports[1].metrics, reports[-1].metrics
    assert first["macro_f1"] != last["macro_f1"]
    assert sum(one["examples"] for one in summary["classes"]) == 40
    assert (
        summary["final"]["macro_f1"]
        == last["macro_f1"]
        == pytest.approx(np.mean([one["f1"] for one in summary["classes"]]))
    )


def test_many_classes_are_in_the_file_alone(run, tmp_path: Path):
    summary = run("workload.num_classes=101", "rounds=1", "workload.test_examples=202")
    assert not {"classes", "confusion"} & summary.keys()
    assert pd.read_parquet(tmp_path / "confusion.parquet")["count"].sum() == 202


def test_the_worst_tenth_is_rounded_up_and_each_client_counts_alike(run, tmp_path: Path):
    """The mean of the lowest of six."""
    run("evaluate_clients=6", "workload.client_test_fraction=0.5")
    rows = pd.read_parquet(tmp_path / "clients")
    for report in read_rounds(tmp_path)[1:]:
        own = rows[(rows["round"] == report.round) & (rows["phase"] == "evaluate")]["metrics"].map(json.loads)
        assert {"macro_f1", "ece"} <= own.iloc[0].keys()
        assert report.metrics["client_accuracy_worst_tenth"] == min(one["accuracy"] for one in own)


def test_the_worst_are_those_with_the_highest_error():
    """Of 11, two; who judged on nothing is nobody."""

    class Client:
        def __init__(self, value: float, examples: int = 1):
            self.metrics, self.num_examples = {"accuracy": value, "error": value}, examples

    clients = [*map(Client, range(11)), Client(-100.0, 0), Client(100.0, 0)]
    assert worst_tenth(clients, ACCURACY) == {"client_accuracy_worst_tenth": 0.5}
    error = Metric("error", higher_is_better=False)
    assert worst_tenth(clients, error) == {"client_error_worst_tenth": 9.5}
    assert worst_tenth([], error) == {}
