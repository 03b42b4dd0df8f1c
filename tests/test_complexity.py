"""Snapshots of trainings, a measure that is learned from them, and how cells are ranked by it."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused
from test_meta import BRIEF, TASKS, Killed, bundle, data, files  # noqa: F401  # `data` is a fixture

from devices.nas.metad2a.generator import CellGenerator
from devices.nas.metad2a.predictor import AccuracyPredictor
from devices.tensor_files import read_tensors, write_tensors
from fedsim.errors import DataError
from fedsim.meta import snapshots
from fedsim.meta.complexity import Bank, Complexity, ComplexitySettings, fill, learn_complexity
from fedsim.meta.features import FEATURES
from fedsim.meta.judged_complexity import correlation, joined_ranks, judge_complexity
from fedsim.meta.metad2a import MetaD2A
from fedsim.meta.snapshots import Snapshots, TaskSnapshots
from fedsim.meta.trained_cells import CellTraining, TrainedCells, train_cell

SHORT = ComplexitySettings(steps=4, tasks=2, snapshots=3, points=8, look_every=2)
LONGER = CellTraining(channels=2, steps=5, batch=8)  # four of its steps are taken down


def made(name: str = "t", trainings: int = 3, moments: int = 2, classes: int = 3) -> TaskSnapshots:
    """Makes snapshots of a task of five images to train on and six held out, of which nothing was trained."""
    draw = torch.Generator().manual_seed(len(name))

    def said(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    y, y_test = (torch.eye(classes)[torch.arange(count) % classes] for count in (5, 6))
    log_p = [said(trainings * moments, count, classes).log_softmax(2) for count in (5, 6)]
    return TaskSnapshots(name, said(5, FEATURES), said(6, FEATURES), y, y_test, log_p[0], log_p[1], moments)


# --- snapshots -------------------------------------------------------------------------------------------------------


def test_taking_snapshots_changes_nothing_of_a_training(tmp_path: Path):
    trained = TrainedCells(tmp_path / "tasks", TASKS, LONGER, 2)
    name = trained.names("train")[0]
    cells = trained.cells(name)
    accuracies = trained.accuracies(name, cells)
    before = files(tmp_path / "tasks")
    seen: list[int] = []
    watched = [train_cell(trained.task(name), ops, LONGER, 3, lambda step, model: seen.append(step)) for ops in cells]
    assert watched == accuracies
    assert seen == [1, 2, 3, 4, 5] * 2
    taken = Snapshots(trained).of(name, cells)
    assert taken.moments == 4
    assert {path: content for path, content in files(tmp_path / "tasks").items() if path in before} == before


def test_last_snapshot_is_of_the_network_as_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Over all held-out images, its accuracy is the one that the cell got."""
    monkeypatch.setattr(snapshots, "POINTS", 10_000)
    trained = TrainedCells(tmp_path / "tasks", TASKS, LONGER, 2)
    name = trained.names("held_out")[0]
    ends = Snapshots(trained).of(name, trained.cells(name)).ends()
    assert len(ends.y_test) == len(trained.task(name).test_y)
    right = (ends.log_p_test.argmax(2) == ends.y_test.argmax(1)).double().mean(1)
    assert (100 * right).tolist() == pytest.approx(trained.accuracies(name, trained.cells(name)))


def test_snapshots_taken_after_a_kill_are_in_the_same_bytes(tmp_path: Path):
    straight, killed = bundle(tmp_path / "straight"), bundle(tmp_path / "killed")
    name = straight.names("valid")[0]
    cells = straight.cells(name)
    whole = Snapshots(straight).of(name, cells)

    def kill(task: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        Snapshots(killed).of(name, cells[2:], kill)
    again = Snapshots(killed).of(name, cells)
    assert torch.equal(whole.log_p, again.log_p)
    assert files(tmp_path / "straight") == files(tmp_path / "killed")
    assert torch.equal(Snapshots(killed).of(name, cells[::-1]).ends().gap, whole.ends().gap.flip(0))


def test_losses_and_gaps_are_as_computed_by_hand():
    """Two images to train on, one held out: losses log 2 and log 4, then log 8; the gap is 3 log 2 - 1.5 log 2."""
    own = torch.tensor([[[0.5, 0.5], [0.75, 0.25]]]).log()
    y, x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, FEATURES)
    taken = TaskSnapshots("t", x, x[:1], y, y[:1], own, torch.tensor([[[0.125, 0.875]]]).log(), 1)
    assert taken.train_loss.item() == pytest.approx(1.5 * np.log(2))
    assert taken.gap.item() == pytest.approx(1.5 * np.log(2))
    assert taken.train_accuracy.item() == 0.5


def test_ends_are_the_last_of_each_training():
    taken = made(trainings=3, moments=2)
    assert torch.equal(taken.ends().log_p, taken.log_p[[1, 3, 5]])
    assert torch.equal(taken.ends().gap, taken.gap[[1, 3, 5]])


def test_damaged_snapshots_are_refused(tmp_path: Path):
    trained = bundle(tmp_path / "tasks")
    name = trained.names("train")[0]
    Snapshots(trained).of(name, trained.cells(name)[:2])
    path = tmp_path / "tasks" / "snapshots" / f"{name}.safetensors"
    tensors, facts = read_tensors(path, "snapshots", "x")
    broken = {
        "of other images": (tensors, facts | {"images": "others"}),
        "of other steps": (tensors, facts | {"steps": [1]}),
        "cannot be read as snapshots": (tensors, facts | {"cells": facts["cells"][:1]}),
        "other numbers of images": ({key: part[:, :, :5] for key, part in tensors.items()}, facts),
        "NaN or infinite": ({key: part * torch.nan for key, part in tensors.items()}, facts),
        "'test'": ({"train": tensors["train"]}, facts),
    }
    for message, content in broken.items():
        write_tensors(path, *content, "snapshots")
        with pytest.raises(DataError, match=message):
            Snapshots(trained).of(name, trained.cells(name))


# --- learning --------------------------------------------------------------------------------------------------------


def test_bank_keeps_the_last_snapshots_and_never_more():
    bank: Bank = deque(maxlen=7)
    parts = [made("a"), made("other", trainings=2)]
    for number in range(1, 4):
        fill(bank, parts)
        assert len(bank) == min(7, 10 * number)
    assert [(own.task, row) for own, row in bank] == [
        ("other", 1),
        ("a", 2),
        ("other", 2),
        ("a", 3),
        ("other", 3),
        ("a", 4),
        ("a", 5),
    ]


def test_what_left_the_bank_is_not_learned_from():
    """Of three trainings of one task, only the last is kept: what the others said makes no difference."""
    settings = replace(SHORT, bank=2)
    first = made()
    other = replace(first, log_p_test=torch.cat([first.log_p_test[:4].flip(1), first.log_p_test[4:]]))
    scales = [learn_complexity([own], [made("v")], settings) for own in (first, other)]
    assert torch.equal(first.gap[4:], other.gap[4:])
    assert not torch.equal(first.gap, other.gap)
    for name, part in scales[0].network.state_dict().items():
        assert torch.equal(part, scales[1].network.state_dict()[name])
    assert scales[0].gap_mean == scales[1].gap_mean == pytest.approx(first.gap[4:].mean().item())


def test_resumed_learning_gives_the_bytes_of_one_that_never_stopped(tmp_path: Path):
    learned, valid = [made("a"), made("other", classes=5)], [made("v")]
    learn_complexity(learned, valid, SHORT, tmp_path / "straight").save(tmp_path / "s.safetensors", {})

    def kill(look: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        learn_complexity(learned, valid, SHORT, tmp_path / "killed", kill)
    learn_complexity(learned, valid, SHORT, tmp_path / "killed").save(tmp_path / "k.safetensors", {})
    assert (tmp_path / "straight").read_bytes() == (tmp_path / "killed").read_bytes()
    assert (tmp_path / "s.safetensors").read_bytes() == (tmp_path / "k.safetensors").read_bytes()
    other = learn_complexity(learned, valid, replace(SHORT, seed=1))
    other.save(tmp_path / "o.safetensors", {})
    assert (tmp_path / "s.safetensors").read_bytes() != (tmp_path / "o.safetensors").read_bytes()
    with pytest.raises(DataError, match="other tasks or with other settings"):
        learn_complexity(learned[:1], valid, SHORT, tmp_path / "straight")


def test_measure_is_the_same_after_it_was_written_and_sees_no_label_of_held_out_images(tmp_path: Path):
    measure, task = learn_complexity([made()], [made("v")], SHORT), made("unseen", classes=7)
    measure.save(tmp_path / "nc.safetensors", {})
    predicted = Complexity.load(tmp_path / "nc.safetensors").predict(task)
    assert np.array_equal(predicted, measure.predict(task))
    assert np.array_equal(predicted, measure.predict(replace(task, y_test=task.y_test.roll(1, 1))))
    assert not np.array_equal(predicted, measure.predict(replace(task, y=task.y.roll(1, 1))))
    assert predicted.shape == (6,)


def test_damaged_measure_is_refused(tmp_path: Path):
    path = tmp_path / "nc.safetensors"
    learn_complexity([made()], [made("v")], SHORT).save(path, {})
    tensors, facts = read_tensors(path, "neural complexity", "x")
    for content in (
        ({name: part for name, part in tensors.items() if name != "network.head.0.bias"}, facts),
        (tensors | {"feature_mean": torch.zeros(3)}, facts),
        (tensors | {"feature_std": torch.full((FEATURES,), torch.nan)}, facts),
        (tensors, {"gap_mean": 0.0}),
    ):
        write_tensors(path, *content, "neural complexity")
        with pytest.raises(DataError, match="cannot be read as a file of a neural complexity measure"):
            Complexity.load(path)


# --- judging ---------------------------------------------------------------------------------------------------------


def test_joined_ranks_are_as_computed_by_hand():
    """Ranks 1, 2, 3 and 3, 1.5, 1.5: deviations sqrt(2/3) and sqrt(1/2). A score that tells nothing apart adds none."""
    found = joined_ranks(np.array([0.1, 0.2, 9.0]), np.array([5.0, 1.0, 1.0]))
    assert found.tolist() == pytest.approx([-(1.5**0.5) + 2**0.5, -(0.5**0.5), 1.5**0.5 - 0.5**0.5])
    assert joined_ranks(np.array([1.0, 2.0]), np.zeros(2)).tolist() == [-1, 1]


class Knowing(Complexity):
    """A measure that is right."""

    def predict(self, own: TaskSnapshots) -> np.ndarray:
        return own.gap.double().numpy()


def test_measure_that_is_right_ranks_as_the_true_loss_does(tmp_path: Path):
    trained = TrainedCells(tmp_path / "tasks", TASKS, BRIEF, 4)
    held_out = [Snapshots(trained).of(name, trained.cells(name)).ends() for name in trained.names("held_out")]
    plain = learn_complexity([made()], [made("v")], SHORT)
    knowing = Knowing(**vars(plain))
    for score in judge_complexity(knowing, trained, held_out, 0, 0.5):
        assert score.spearman["training loss + NC"] == score.spearman["test loss"]
        assert (score.correlation, score.error) == (pytest.approx(1), 0)
        assert score.usual_error == pytest.approx(np.abs(0.5 - np.array(score.gap)).mean())
        assert not any("MetaD2A" in name for name in score.spearman)
    scores = list(judge_complexity(plain, trained, held_out, 0, 0.5))
    assert [len(score.gap) for score in scores] == [4, 4]
    assert -1 <= correlation(scores) <= 1
    assert correlation([replace(scores[0], predicted_gap=(1.0,) * 4)]) == 0


# --- command ---------------------------------------------------------------------------------------------------------


def test_command_learns_and_judges(fedsim):
    trained = TrainedCells(Path("tasks"), replace(TASKS, train=1, held_out=2), BRIEF, 3)
    scales = torch.zeros(FEATURES), torch.ones(FEATURES)
    MetaD2A(CellGenerator(FEATURES), AccuracyPredictor(FEATURES), *scales, 50.0, 10.0).save(Path("m.st"), {})
    command = ["devices", "train-complexity", "--tasks", "tasks", "--out", "nc.safetensors", "--steps", "2"]
    shown = fedsim(*command, "--seeds", "2", "--cells", "2", "--predictor", "m.st")
    assert (shown.code, shown.err) == (0, "")
    assert "MetaD2A and loss + NC" in shown.out
    assert "nan" not in shown.out
    weights = Path("nc.safetensors").read_bytes()
    scores = json.loads(fedsim(*command, "--seeds", "2", "--cells", "2", "--json").out)
    assert [score["seed"] for score in scores] == [0, 0, 1, 1]
    assert [score["name"] for score in scores] == trained.names("held_out") * 2
    assert all(-1 <= value <= 1 for score in scores for value in score["spearman"].values())
    assert all(len(score["gap"]) == len(score["predicted_gap"]) == 3 for score in scores)
    assert not any("MetaD2A" in name for name in scores[0]["spearman"])
    assert Path("nc.safetensors").read_bytes() == weights


def test_command_refuses_what_it_cannot_use(fedsim, tmp_path: Path):
    folder, weights = tmp_path / "tasks", tmp_path / "m.safetensors"
    command = ["devices", "train-complexity", "--tasks", str(folder), "--out", "nc.safetensors", "--steps", "2"]
    assert_refused(fedsim(*command), "make-tasks --out")
    trained = bundle(folder)
    weights.write_bytes(b"no")
    assert_refused(fedsim(*command, "--predictor", str(weights)), "a file of MetaD2A's weights")
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / f"{trained.names('train')[0]}.safetensors").write_bytes(b"no")
    assert_refused(fedsim(*command), "cannot be read as snapshots of trained cells")
