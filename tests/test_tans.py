"""TANS: its encoders and losses by hand, a zoo in equal bytes, and what is retrieved under a limit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from conftest import assert_refused

from devices.nas.search import Limit, NothingFitsError
from devices.nas.tans.encoders import ModelEncoder, PerformanceHead, QueryEncoder
from devices.nas.tans.losses import contrastive_loss
from devices.nas.tans.probe import FUNCTIONAL, IMAGES, KINDS, PROBES, functional_embedding, probe_batch
from devices.nas.tans.retrieval import retrieve
from devices.profile import load_profile
from fedsim.errors import DataError
from fedsim.meta.architectures import FAMILIES, TOPOLOGY
from fedsim.meta.net_prices import NetPrices, price_nets
from fedsim.meta.retrieved import Curve, Judge, chance
from fedsim.meta.tans import QUERY, Catalogue, Lesson, Tans, TansSettings, lessons, meta_train, recall
from fedsim.meta.tasks import TaskSettings
from fedsim.meta.tuning import Tuned, Tuning, tuned_model
from fedsim.meta.zoo import SHAPE, HeldOut, Zoo, ZooTraining

TASKS = TaskSettings(("toy", "grey"), train=2, valid=1, held_out=2, seed=3)
BRIEF = ZooTraining(nets=3, steps=2)


@pytest.fixture(autouse=True)
def _data(small_bundles: Path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "zoo"


@pytest.fixture
def zoo(kept: Path, tmp_path: Path) -> Zoo:
    """Makes a zoo, once for all tests, and hands out copies."""
    if not kept.exists():
        Zoo.begin(kept, TASKS, BRIEF).make(lambda task: None)
    copytree(kept, tmp_path / "zoo")
    return Zoo.open(tmp_path / "zoo")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed(BaseException):
    """What ends a process from outside."""


def die(*_: object) -> None:
    raise Killed


# --- encoders and losses ----------------------------------------------------------------------------------------------


def test_points_have_length_one_and_a_query_ignores_the_order_of_examples():
    x, queries, nets = torch.randn(3, 20, 7), QueryEncoder(7, 5), ModelEncoder(4, 6, 5)
    points = nets(torch.randn(3, 4), 100 * torch.randn(3, 6))
    torch.testing.assert_close(points.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(queries(x).norm(dim=1), torch.ones(3))
    torch.testing.assert_close(queries(x[:, torch.randperm(20)]), queries(x))


def test_query_is_the_linear_layer_of_the_mean_example():
    encoder = QueryEncoder(2, 2)
    encoder.linear.weight.data, encoder.linear.bias.data = torch.eye(2), torch.tensor([0.0, 1.0])
    found = encoder(torch.tensor([[2.0, 1.0], [4.0, 5.0]]))
    torch.testing.assert_close(found, torch.tensor([3.0, 4.0]) / 5)


def test_contrastive_loss_is_as_computed_by_hand():
    """S = [[1, 0.6], [0.9, 1]] with nets as rows: [0.2 - 1 + 0.6]+ = 0 and [0.2 - 1 + 0.9]+ = 0.1, as many transposed.

    With the second query turned to (0.6, -0.8) S is [[1, 0.6], [a, b]]; its rows have other diagonals than its columns.
    """
    queries, nets = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.9, math.sqrt(0.19)]])
    s = [[1.0, 0.6], [0.9, 0.54 + 0.8 * math.sqrt(0.19)]]
    rows = max(0, 0.2 - s[0][0] + s[0][1]) + max(0, 0.2 - s[1][1] + s[1][0])
    columns = max(0, 0.2 - s[0][0] + s[1][0]) + max(0, 0.2 - s[1][1] + s[0][1])
    assert rows != columns
    assert contrastive_loss(queries, nets).item() == pytest.approx(rows + columns, abs=1e-6)
    assert contrastive_loss(torch.eye(3), torch.eye(3)).item() == 0
    assert contrastive_loss(torch.eye(3), torch.eye(3), margin=1.5).item() == pytest.approx(2 * 6 * 0.5)


def test_head_is_the_sigmoid_of_both_points_and_their_product():
    """0.5 + 2 * 0.25 + 3 * 0.5 * 2 - 3 = 1."""
    head = PerformanceHead(2)
    head.linear.weight.data, head.linear.bias.data = torch.tensor([[1.0, 0, 0, 2, 3, 0]]), torch.tensor([-3.0])
    found = head(torch.tensor([[0.5, 9.0]]), torch.tensor([[2.0, 0.25]]))
    assert found.item() == pytest.approx(1 / (1 + math.exp(-1)))


def test_probe_is_the_same_again_and_answers_do_not_depend_on_the_order_of_classes():
    x = probe_batch(SHAPE)
    assert torch.equal(x, probe_batch(SHAPE))
    assert x.shape == (PROBES, *SHAPE)
    for kind, images in zip(KINDS, x.split(IMAGES), strict=True):
        torch.testing.assert_close(images.mean((1, 2, 3)), torch.full((IMAGES,), kind.mean), atol=1e-5, rtol=0)
        assert images[:, 0].equal(images[:, 1]) != kind.in_colour
        assert not images[0].equal(images[1])
    answers = torch.randn(PROBES, 5)
    found = functional_embedding(answers)
    assert found.shape == (FUNCTIONAL,)
    torch.testing.assert_close(found, functional_embedding(answers[:, torch.randperm(5)]))
    torch.testing.assert_close(found + math.log(2), functional_embedding(2 * answers), atol=1e-2, rtol=0)
    assert not torch.equal(found, functional_embedding(torch.randn(PROBES, 5)))


# --- a zoo ------------------------------------------------------------------------------------------------------------


def test_zoo_made_after_kills_has_the_bytes_of_one_that_never_stopped(zoo: Zoo, tmp_path: Path, monkeypatch):
    """It is killed after a net, and between the files of one: weights without facts are trained again."""
    killed = tmp_path / "killed"
    for after in (1, 7):
        seen: list[str] = []

        def kill(task: str, seen: list[str] = seen, after: int = after) -> None:
            seen.append(task)
            if len(seen) == after:
                raise Killed

        with pytest.raises(Killed):
            Zoo.begin(killed, TASKS, BRIEF).make(kill)
    with monkeypatch.context() as patched:
        patched.setattr("fedsim.meta.zoo.write_atomic", die)
        with pytest.raises(Killed):
            Zoo.begin(killed, TASKS, BRIEF).make(lambda task: None)
    assert len(files(killed)) == 1 + 2 * 7 + 1
    Zoo.begin(killed, TASKS, BRIEF).make(lambda task: None)
    assert files(killed) == files(zoo.folder)
    assert len(zoo.nets) == zoo.total == 15
    assert {net.architecture.family for net in zoo.nets if net.task == zoo.nets[0].task} == set(FAMILIES)


def test_no_query_holds_an_image_that_nets_were_trained_on_or_are_judged_by(zoo: Zoo):
    for name in zoo.recipes:
        task = zoo.task(name)
        held_out = HeldOut.of(task)
        assert not set(held_out.query.flatten().tolist()) & set(held_out.judged.tolist())
        assert len(held_out.judged) > 2 * held_out.query.numel() > 0
        query, train = (
            {row.numpy().tobytes() for row in x} for x in (task.test_x[held_out.query.flatten()], task.train_x)
        )
        assert not query & train
        assert task.test_y[held_out.query].equal(torch.arange(task.num_classes)[:, None].expand_as(held_out.query))


def test_damaged_zoo_is_refused_with_a_sentence(zoo: Zoo, tmp_path: Path, fedsim):
    net = zoo.nets[0]
    weights, facts = (zoo.folder / "nets" / f"{net.name}.{ending}" for ending in ("safetensors", "json"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DataError, match="is damaged or missing; remove"):
        zoo.weights(net)
    train = ["devices", "train-tans", "--zoo", str(zoo.folder), "--out", str(tmp_path / "t.safetensors")]
    good = facts.read_text()
    for text, message in (
        ("{", "is not readable JSON"),
        (good.replace('"answers"', '"answer"'), "cannot be read as facts of a net"),
        (good.replace('"family": "resnet8"', '"family": "os.system"'), "cannot be read as facts of a net"),
        (good.replace('"width": ', '"width": 1000'), "cannot be read as facts of a net"),
    ):
        facts.write_text(text)
        assert_refused(fedsim(*train), message)
    facts.unlink()
    assert_refused(fedsim(*train), "lacks net")
    tasks = zoo.folder / "zoo.json"
    for before, after in (
        ('"held_out-', '"../held_out-'),
        ('"part": "train"', '"part": "trial"'),
        ('"classes"', '"of"'),
    ):
        good = tasks.read_text()
        tasks.write_text(good.replace(before, after))
        assert_refused(fedsim(*train), "cannot be read as a zoo of this version")
        tasks.write_text(good)
    with pytest.raises(DataError, match="holds another zoo"):
        Zoo.begin(zoo.folder, TASKS, replace(BRIEF, steps=3))
    assert_refused(fedsim(*train[:3], str(tmp_path), *train[4:]), "make-zoo --out")
    (tmp_path / "w.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read as a file of TANS's weights"):
        Tans.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_net_go_into_a_run_of_other_images(family: str, tmp_path: Path, zoo: Zoo):
    """All but the head are those of the zoo; of grey images the first weights are sums, the outputs the same."""
    net = next(net for net in zoo.nets if net.architecture.family == family)
    weights = zoo.weights(net)
    colour = tuned_model(net, weights, (3, 32, 32), 7, 0)
    grey = tuned_model(net, weights, (1, 32, 32), 7, 0)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey.features(x), colour.features(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    for name, tensor in colour.state_dict().items():
        assert name.startswith("head.") or tensor.equal(weights[name])
    assert net.architecture.topology(net.num_classes, net.parameters, net.macs).shape == (TOPOLOGY,)


# --- retrieval --------------------------------------------------------------------------------------------------------


def toy(tasks: int, nets: int, draw: torch.Generator) -> tuple[Catalogue, list[Lesson]]:
    """Makes tasks with a code of three numbers each: images and nets show it, each in its own linear way."""
    codes = torch.randn(tasks, 3, generator=draw)
    to_image, to_answers = torch.randn(3, QUERY, generator=draw), torch.randn(3, FUNCTIONAL, generator=draw)
    images = (codes @ to_image)[:, None, None] + 0.05 * torch.randn(tasks, 3, 20, QUERY, generator=draw)
    answers = (codes @ to_answers).repeat_interleave(nets, 0)
    answers = answers + 0.05 * torch.randn(tasks * nets, FUNCTIONAL, generator=draw)
    catalogue = Catalogue(torch.zeros(tasks * nets, TOPOLOGY), answers)
    own = [range(nets * t, nets * t + nets) for t in range(tasks)]
    return catalogue, [Lesson(f"t{t}", images[t], own[t], {p: 60.0 + p for p in own[t]}) for t in range(tasks)]


def test_nets_of_unseen_tasks_are_recalled_where_images_and_answers_show_the_task():
    catalogue, all_lessons = toy(20, 3, torch.Generator().manual_seed(0))
    made = meta_train(catalogue, all_lessons[:14], all_lessons[14:16], TansSettings(steps=80, look_every=20))
    draw = np.random.default_rng(0)
    for lesson in all_lessons[16:]:
        similarity, _ = made.judge(lesson.query(draw), catalogue)
        assert recall(similarity, range(60), lesson.nets, 1) == 1


def test_resumed_training_gives_the_bytes_of_one_that_never_stopped(tmp_path: Path):
    catalogue, all_lessons = toy(6, 2, torch.Generator().manual_seed(0))
    settings = TansSettings(steps=6, look_every=2)
    parts = (catalogue, all_lessons[:4], all_lessons[4:], settings)
    meta_train(*parts, tmp_path / "straight").save(tmp_path / "straight.safetensors", settings)

    def kill(look: object) -> None:
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            meta_train(*parts, tmp_path / "killed", kill)
    meta_train(*parts, tmp_path / "killed").save(tmp_path / "killed.safetensors", settings)
    for end in ("", ".safetensors"):
        assert (tmp_path / f"straight{end}").read_bytes() == (tmp_path / f"killed{end}").read_bytes()
    loaded, other = Tans.load(tmp_path / "killed.safetensors"), (catalogue, all_lessons[0].features[0])
    again = meta_train(*parts)
    for found, wanted in zip(loaded.judge(other[1], other[0]), again.judge(other[1], other[0]), strict=True):
        assert np.array_equal(found, wanted)
    with pytest.raises(DataError, match="other tasks or with other settings"):
        meta_train(*parts[:3], replace(settings, margin=0.3), tmp_path / "killed")


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_no_net_beyond_the_limit_is_retrieved_and_predictions_rank_the_nearest(margin: float):
    draw = np.random.default_rng(0)
    for most in (1.0, 2.0, 5.0):
        ms, similarity, predicted = draw.uniform(0.1, 4, 50), draw.uniform(-1, 1, 50), draw.uniform(0, 100, 50)
        found = retrieve(similarity, predicted, Limit("ms", ms, most, margin), 5)
        within = np.flatnonzero(ms * (1 + margin) <= most)
        assert set(found) == set(within[np.argsort(-similarity[within])][:5].tolist())
        assert predicted[found].tolist() == sorted(predicted[found], reverse=True)
    with pytest.raises(NothingFitsError):
        retrieve(similarity, predicted, Limit("ms", ms, 0.05, margin))


class Oracle:
    """Stands for TANS: knows what every net reaches, and finds all alike near."""

    def __init__(self, reached: np.ndarray):
        self.reached = reached

    def judge(self, examples: torch.Tensor, nets: Catalogue) -> tuple[np.ndarray, np.ndarray]:
        return self.reached, self.reached


def test_perfect_predictions_have_no_regret_and_random_nets_have_some(zoo: Zoo):
    prices = price_nets(zoo.nets, load_profile("pixel2"), SHAPE, 8, 8)
    limit = prices.limit(None, None)
    assert 0 < limit.allows().sum() < len(zoo.nets)
    tuned = Tuned(zoo, Tuning(steps=2, batch=8))
    judge = Judge(zoo.nets, Catalogue.of(zoo.nets), prices, limit, tuned)
    for lesson in lessons(zoo, "held_out"):
        reached = np.zeros(len(zoo.nets))
        for place in judge.within(lesson, own=True):
            reached[place] = tuned.curve(lesson.task, zoo.nets[place], [2])[0]
        score = judge.score(Oracle(reached), lesson, 0, lambda: None)  # type: ignore[arg-type]
        assert (score.regret, score.own_best - score.own_retrieved) == (0, 0)
        assert (
            0
            <= score.random_regret
            == pytest.approx(score.best - np.mean([reached[place] for place in judge.within(lesson, own=False)]))
        )
        assert score.ms * (1 + limit.margin) <= limit.most
        assert score.largest <= score.best
    again = Tuned(zoo, Tuning(steps=2, batch=8))
    assert again.curve(lesson.task, zoo.nets[place], [2]) == [reached[place]]


def test_chance_of_recall_and_accuracy_at_equal_joules_are_as_computed_by_hand():
    """One of 2 wanted nets among 2 of 4 drawn: 1 - C(2, 2) / C(4, 2) = 5 / 6. At 3 J, halfway between 2 J and 4 J."""
    assert chance(4, 2, 2) == pytest.approx(5 / 6)
    assert chance(8, 2, 1) == pytest.approx(1 / 4)
    curve = Curve("t", "w", "n", [1, 2], [30.0, 40.0], 2.0)
    assert [curve.at_joules(j) for j in (3.0, 9.0)] == [35.0, 40.0]
    assert math.isnan(curve.at_joules(1.9))


def test_half_of_the_nets_are_within_the_limit_that_nobody_named():
    prices = NetPrices(np.arange(1.0, 11), np.ones(10), np.ones(10), 0.2)
    assert prices.limit(None, None).allows().sum() == prices.limit(None, 0.7).allows().sum() == 5
    assert prices.limit(3.6, None).allows().sum() == 3


# --- commands ---------------------------------------------------------------------------------------------------------


def test_commands_make_a_zoo_and_retrieve_weights_that_a_run_takes(fedsim, zoo: Zoo):
    folder = str(zoo.folder)
    before = files(zoo.folder)
    (zoo.folder / "nets" / f"{zoo.nets[-1].name}.json").unlink()
    tasks = ["--bundles", "toy,grey", "--train", "2", "--valid", "1", "--held-out", "2", "--nets", "3", "--seed", "3"]
    made = fedsim("devices", "make-zoo", "--out", folder, *tasks, "--steps", "2")
    assert (made.code, made.err, "15 nets of 5 tasks" in made.out) == (0, "", True)
    assert files(zoo.folder) == before
    train = ["devices", "train-tans", "--zoo", folder, "--out", "t.safetensors", "--seeds", "2", "--steps", "3"]
    found = json.loads(fedsim(*train, "--tune", "1", "--json").out)
    assert [score["seed"] for score in found["scores"]] == [0, 0, 1, 1]
    assert all(s["random"] <= s["best"] and s["retrieved"] <= s["best"] for s in found["scores"])
    shown = fedsim(*train, "--tune", "1")
    assert (shown.code, shown.err, "nan" in shown.out) == (0, "", False)
    assert "recall@1 on 2 held-out tasks" in shown.out
    judge = ["devices", "judge-tans", "--weights", "t.safetensors", "--zoo", folder, "--steps", "6"]
    judged = fedsim(*judge, "--picture", "t.png")
    assert (judged.code, judged.err) == (0, "")
    assert Path("t.png").read_bytes()[:4] == b"\x89PNG"
    curves = json.loads(fedsim(*judge, "--json").out)["curves"]
    assert [curve["steps"] for curve in curves] == [[5, 6]] * 6
    ask = ["devices", "retrieve", "--weights", "t.safetensors", "--zoo", folder, "--data", "grey", "--device", "pixel2"]
    for limit, message in (("0", "--limit-ms must be a number above 0"), ("0.0001", "is within 0.0001 ms")):
        refused = fedsim(*ask, "--limit-ms", limit)
        assert (refused.code, refused.out, message in refused.err) == (2, "", True)
    answer = json.loads(fedsim(*ask, "--save", "net.safetensors", "--top", "3", "--json").out)
    assert all(net["predicted_ms"] * (1 + answer["margin"]) <= answer["limit_ms"] for net in answer["nets"])
    predicted = [net["predicted_accuracy"] for net in answer["nets"]]
    assert len(predicted) == 3
    assert predicted == sorted(predicted, reverse=True)
    words = [word.strip("'") for word in answer["use"].split()[2:]]
    assert words[-1] == "start_from=net.safetensors"
    short = ["rounds=1", "num_clients=3", "cohort=1", "fleet=uniform", "latency=flops", "engine=local", "out=run"]
    ended = fedsim("run", *words, *short)
    assert ended.code == 0, ended.err
    table = fedsim(*ask)
    assert (table.code, table.err, "use it: fedsim run" in table.out) == (0, "", True)
