"""Tasks to learn over, cells trained on them, and MetaD2A's training: the same bytes however often it is stopped."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused

from devices.nas.nb201 import from_string
from fedsim.errors import DataError
from fedsim.meta.features import FEATURES, task_features
from fedsim.meta.fitting import Fitting
from fedsim.meta.judged import bundle_features, judge_tables
from fedsim.meta.metad2a import Lesson, MetaD2A, MetaSettings, meta_train
from fedsim.meta.tasks import CORRUPTIONS, SIDE, Images, Recipe, TaskSettings, make_task, recipes
from fedsim.meta.trained_cells import CellTraining, TrainedCells, train_cell
from fedsim.seeding import generator
from fedsim.study.paired import mean_with_interval

TASKS = TaskSettings(("toy", "grey"), train=2, valid=1, held_out=2, seed=3)
BRIEF, CELLS = CellTraining(channels=2, steps=2, batch=8), 4
SHORT = MetaSettings(predictor_steps=4, generator_steps=4, tasks=2, look_every=2)


@pytest.fixture(autouse=True)
def data(small_bundles: Path) -> Path:
    return small_bundles


def bundle(folder: Path) -> TrainedCells:
    return TrainedCells(folder, TASKS, BRIEF, CELLS)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed(BaseException):
    """What ends a process from outside."""


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_follow_from_the_seed_and_held_out_ones_have_classes_of_their_own():
    images = {name: Images(name) for name in TASKS.bundles}
    made = recipes(TASKS, images)
    assert made == recipes(TASKS, images)
    assert [recipe.part for recipe in made] == ["train", "train", "valid", "held_out", "held_out"]
    for name in TASKS.bundles:
        classes = {
            part: {c for r in made if r.bundle == name and (r.part == "held_out") == part for c in r.classes}
            for part in (True, False)
        }
        assert classes[True]
        assert not classes[True] & classes[False]
    first, again = (make_task(made[0], images["toy"], 3) for _ in range(2))
    assert first.fingerprint == again.fingerprint != make_task(made[0], images["toy"], 4).fingerprint


def test_task_has_its_classes_in_equal_numbers_and_judges_by_other_images():
    recipe = Recipe("t", "train", "toy", (2, 5, 7), "clean", 40)
    task = make_task(recipe, Images("toy"), 0)
    assert task.train_x.shape == (120, 3, SIDE, SIDE)
    assert np.bincount(task.train_y.numpy()).tolist() == [40] * 3
    assert np.bincount(task.test_y.numpy()).tolist() == [25] * 3
    rows = {part: {row.numpy().tobytes() for row in x} for part, x in (("a", task.train_x), ("b", task.test_x))}
    assert len(rows["a"]) == 120
    assert not rows["a"] & rows["b"]


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "clean"])
def test_corruption_changes_images_and_nothing_else(name: str):
    x = torch.rand(30, 3, SIDE, SIDE)
    made, again = (CORRUPTIONS[name](x, np.random.default_rng(1)) for _ in range(2))
    assert made.shape == x.shape
    assert made.isfinite().all()
    assert torch.equal(made, again)
    changed = (made - x).abs().flatten(1).amax(1) > 1e-4
    assert changed.float().mean() > 0.5
    if name in ("turned", "shuffled"):
        assert torch.equal(made.flatten(2).sort().values, x.flatten(2).sort().values)


def test_features_of_a_task_are_by_class():
    task = make_task(Recipe("t", "train", "grey", (1, 3, 4), "clean", 40), Images("grey"), 0)
    assert task_features(task).shape == (3, 40, FEATURES)
    assert task.train_x[:, 0].equal(task.train_x[:, 2])


@pytest.mark.parametrize("classes, images, message", [(5, 65, "6 classes or more"), (10, 30, "60 images each")])
def test_small_bundle_is_refused(data: Path, classes: int, images: int, message: str):
    y = np.repeat(np.arange(classes), images)
    for part in ("train", "test"):
        np.savez(data / "toy" / f"{part}.npz", x=np.zeros((len(y), 8, 8), np.uint8), y=y)
    (data / "toy" / "meta.json").write_text(json.dumps({"classes": list("abcdefghij")[:classes], "kind": "image"}))
    if classes == 10:
        np.savez(data / "toy" / "test.npz", x=np.zeros((1, 8, 8), np.uint8), y=[0])
    with pytest.raises(DataError, match=message):
        bundle(data / "tasks")


# --- trained cells ---------------------------------------------------------------------------------------------------


def test_cells_trained_after_a_kill_are_in_the_same_bytes(tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    bundle(straight).train(lambda task: None)
    for after in (1, 6):
        seen: list[str] = []

        def kill(task: str, seen: list[str] = seen, after: int = after) -> None:
            seen.append(task)
            if len(seen) == after:
                raise Killed

        with pytest.raises(Killed):
            bundle(killed).train(kill)
    trained = bundle(killed)
    before = sum(len(trained.known(name)) for name in trained.recipes)
    trained.train(lambda task: None)
    assert before == 6 < trained.total == 20
    assert files(straight) == files(killed)


def test_accuracy_of_a_cell_does_not_depend_on_what_was_trained_before(tmp_path: Path):
    one, other = bundle(tmp_path / "one"), bundle(tmp_path / "other")
    name = one.names("train")[0]
    cells = one.cells(name)
    assert one.accuracies(name, cells) == other.accuracies(name, cells[::-1])[::-1]
    assert len(set(cells)) == CELLS


def test_folder_of_other_tasks_or_other_images_is_refused(tmp_path: Path, data: Path):
    folder = tmp_path / "tasks"
    trained = bundle(folder)
    name = trained.names("train")[0]
    trained.accuracies(name, trained.cells(name)[:1])
    with pytest.raises(DataError, match="holds other tasks"):
        TrainedCells(folder, TASKS, CellTraining(channels=2, steps=3, batch=8), CELLS)
    with np.load(data / "toy" / "train.npz") as file:
        x, y = file["x"], file["y"]
    np.savez(data / "toy" / "train.npz", x=255 - x, y=y)
    with pytest.raises(DataError, match="trained on other images"):
        TrainedCells.open(folder).known(name)


def test_trained_cell_learns_what_can_be_learned(tmp_path: Path):
    """Every class of one brightness: far above chance, a fifth, after 40 steps."""
    trained = bundle(tmp_path / "tasks")
    task = trained.task(trained.names("train")[0])
    shown = [(y / task.num_classes)[:, None, None, None].expand(-1, 3, SIDE, SIDE) for y in (task.train_y, task.test_y)]
    easy = replace(task, train_x=shown[0], test_x=shown[1])
    assert task.num_classes == 5
    assert train_cell(easy, (1, 3, 0, 2, 4, 1), CellTraining(channels=4, steps=40), 0) > 60


# --- meta-training ---------------------------------------------------------------------------------------------------


def test_resumed_training_gives_the_bytes_of_one_that_never_stopped(tmp_path: Path):
    trained = bundle(tmp_path / "tasks")
    meta_train(trained, SHORT, tmp_path / "straight").save(tmp_path / "straight.safetensors", {})
    for stop in (1, 3):
        looks: list[str] = []

        def kill(kind: str, look: object, looks: list[str] = looks, stop: int = stop) -> None:
            looks.append(kind)
            if len(looks) == stop:
                raise Killed

        with pytest.raises(Killed):
            meta_train(trained, SHORT, tmp_path / "killed", kill)
    meta_train(trained, SHORT, tmp_path / "killed").save(tmp_path / "killed.safetensors", {})
    for end in (".safetensors", ".predictor", ".generator"):
        assert (tmp_path / f"straight{end}").read_bytes() == (tmp_path / f"killed{end}").read_bytes()


def test_seed_decides_the_bytes(tmp_path: Path):
    trained = bundle(tmp_path / "tasks")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = MetaSettings(predictor_steps=2, generator_steps=2, tasks=1, look_every=2, seed=seed)
        meta_train(trained, settings).save(tmp_path / name, {})
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_checkpoint_of_another_training_is_refused(tmp_path: Path):
    trained = bundle(tmp_path / "tasks")
    meta_train(trained, SHORT, tmp_path / "w")
    with pytest.raises(DataError, match="other tasks or with other settings"):
        meta_train(trained, MetaSettings(predictor_steps=4, seed=1), tmp_path / "w")


def test_best_weights_are_kept():
    """The score falls from the first look on: the weights of that look are the ones that stay."""
    model = torch.nn.Linear(1, 1)
    fitting = Fitting(model, 0.1, generator(0, "x"), {}, "MetaD2A")
    at_looks = []
    for score in (2.0, 1.0):
        fitting.advance(lambda draw: model(torch.ones(1)).sum())
        fitting.look(score)
        at_looks.append(model.weight.detach().clone())
    assert fitting.best["weight"].equal(at_looks[0])
    assert not at_looks[0].equal(at_looks[1])
    assert [look.best for look in fitting.history] == [True, False]


def test_lesson_draws_images_of_each_class_and_picks_the_best_cells():
    features = torch.arange(2 * 30).float().reshape(2, 30, 1)
    ops, accuracy = torch.arange(10)[:, None].expand(-1, 6), torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6, 5, 0])
    lesson = Lesson(features, ops, accuracy)
    drawn = lesson.images(np.random.default_rng(0)).squeeze(2)
    assert drawn.shape == (2, 20)
    assert all(len(set(row.tolist())) == 20 for row in drawn)
    assert drawn[0].max() < 30 <= drawn[1].min()
    assert lesson.best(0.2)[:, 0].tolist() == [1, 3]


def test_interval_of_pairs_is_that_of_students_t():
    """Differences 1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3); t at 97.5 % with 2 degrees of freedom is 4.3027."""
    mean, half = mean_with_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.30265 / 3**0.5, abs=1e-4))


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands_make_tasks_and_judge_what_learned_from_them(fedsim):
    """After two steps no drawn graph is a cell: there are figures of the predictor, and none of proposals."""
    tasks = ["--bundles", "toy,grey", "--train", "2", "--valid", "1", "--held-out", "2", "--cells", "4", "--steps", "1"]
    made = fedsim("devices", "make-tasks", "--out", "tasks", *tasks)
    assert (made.code, made.err) == (0, "")
    assert "20 cells on 5 tasks" in made.out
    train = ["devices", "train-metad2a", "--tasks", "tasks", "--out", "m.safetensors", "--seeds", "2", "--count", "1"]
    short = ["--predictor-steps", "2", "--generator-steps", "2"]
    scores = json.loads(fedsim(*train, *short, "--json").out)
    assert [score["seed"] for score in scores] == [0, 0, 1, 1]
    assert all(-1 <= score["spearman"] <= 1 and score["random"] <= score["best"] for score in scores)
    assert [score["first"] for score in scores] == [None] * 4
    again = fedsim(*train, *short)
    assert (again.code, again.err) == (0, "")
    assert "drawn graphs: 0.0% valid" in again.out
    assert "nan" not in again.out
    ended = fedsim("devices", "propose", "--weights", "m.safetensors", "--data", "toy")
    assert (ended.code, "none of 500 drawn graphs is a cell" in ended.err) == (2, True)


def test_proposals_are_distinct_cells_with_scores_best_first(fedsim, tmp_path: Path):
    settings = MetaSettings(predictor_steps=2, generator_steps=100, good_share=1.0, learning_rate=0.01)
    made = meta_train(bundle(tmp_path / "tasks"), settings)
    made.save(tmp_path / "m.safetensors", {})
    features = bundle_features("toy", 0)
    for out in ("p.csv", "q.csv"):
        arguments = ["--weights", str(tmp_path / "m.safetensors"), "--data", "toy", "--out", out]
        ended = fedsim("devices", "propose", *arguments)
        assert (ended.code, ended.err) == (0, "")
    assert Path("p.csv").read_bytes() == Path("q.csv").read_bytes()
    rows = list(csv.DictReader(Path("p.csv").read_text().splitlines()))
    assert list(rows[0]) == ["network", "score"]
    cells, scores = [from_string(row["network"]) for row in rows], [float(row["score"]) for row in rows]
    assert len(set(cells)) == len(cells)
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx(made.predict(features, np.array(cells)).tolist(), abs=1e-3)


def test_known_tables_are_looked_up(tmp_path: Path):
    """The best of the whole space is the table's, and cells of another table are refused."""
    ops = np.stack(np.unravel_index(np.arange(5**6), (5,) * 6), axis=1)
    accuracy = np.linspace(10, 90, len(ops), dtype=np.float32)
    np.savez(tmp_path / "help_nb201.npz", arch_ops=ops.astype(np.uint8))
    np.savez(tmp_path / "nb201_accuracy.npz", toy_test=accuracy)
    made = meta_train(bundle(tmp_path / "tasks"), SHORT)
    (score,) = judge_tables(made, tmp_path, ["toy"], 0, 3)
    assert score.is_known
    assert (score.best, score.random_all) == (pytest.approx(90), pytest.approx(50, abs=0.01))
    np.savez(tmp_path / "nb201_accuracy.npz", toy_test=accuracy[1:])
    with pytest.raises(DataError, match=r"toy_test has \(15624,\), not a row for each of 15625"):
        judge_tables(made, tmp_path, ["toy"], 0, 3)


def test_commands_refuse_what_they_cannot_use(fedsim, tmp_path: Path):
    ended = fedsim("devices", "train-metad2a", "--tasks", "nowhere", "--out", "m.safetensors")
    assert_refused(ended, "make-tasks --out")
    assert_refused(fedsim("devices", "make-tasks", "--out", "tasks", "--bundles", "toyy"), "did you mean 'toy'")
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read as a file of MetaD2A's weights"):
        MetaD2A.load(weights)
    ended = fedsim("devices", "propose", "--weights", str(weights), "--data", "toy")
    assert_refused(ended, "a file of MetaD2A's weights")
