"""What malicious clients do (`attack=`), against numbers worked out by hand; who is malicious, and who learns of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import every_way
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from clients.app import serve
from clients.worker import Worker
from fedsim.attacks.base import Attack
from fedsim.attacks.colluding import Alie, Colluders
from fedsim.attacks.poisoning import Backdoor, LabelFlip
from fedsim.attacks.updates import GaussianNoise, SignFlip
from fedsim.engines.base import Engine
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.messages.cohort import ClientAnswer, ClientTask, CohortAnswer, CohortTask
from fedsim.messages.records import tensors_of
from fedsim.messages.updates import Broadcast
from fedsim.messages.weights import SentWeights
from fedsim.report.files import read_all_rows
from fedsim.report.page import write_page
from fedsim.report.text import closing_lines
from fedsim.runs import summary, writer
from fedsim.settings.build import build_world, instantiate
from fedsim.settings.groups import options
from fedsim.workloads.base import Examples
from strategies.edge import EdgeStrategy

ATTACKS = [name for name in options("attack") if name != "none"]
IMAGES = ("workload.input_shape=[1,4,4]", "attack.patch=2")
NEEDS = {"backdoor": ("workload.input_shape=[1,6,6]", "attack.boost=3")}
KINDS = ("alie", "backdoor")  # one that sends what others have trained, one of data and of updates
DRAW = torch.Generator().manual_seed(0)


def attacked(name: str, *more: str) -> list[str]:
    return [f"attack={name}", "attack.share=0.4", "cohort=5", "rounds=3", *NEEDS.get(name, ()), *more]


def change(attack: Attack, *numbers: float) -> list[float]:
    return attack.changed({"w": torch.tensor(numbers)}, DRAW)["w"].tolist()


# --- who -------------------------------------------------------------------------------------------------------------


def test_who_is_malicious_depends_on_share_and_seed_alone(federation):
    """A larger share has the clients of a smaller one, too; in a fleet of six 0.4 are two."""
    small, large = SignFlip(share=0.2).clients(50, 1), Alie(share=0.5).clients(50, 1)
    assert (len(small), len(large), small < large) == (10, 25, True)
    assert small != SignFlip(share=0.2).clients(50, 2)
    runs = [federation(*attacked("sign_flip", f"cohort={cohort}")) for cohort in (2, 5)]
    assert runs[0].malicious == runs[1].malicious
    assert len(runs[0].malicious) == 2
    assert SignFlip(share=0.01).clients(6, 1) == frozenset({min(SignFlip(share=0.01).clients(6, 1))})


def test_rows_and_rounds_say_who_is_malicious_and_no_strategy_is_told(settings, tmp_path: Path, monkeypatch):
    told: list[dict[str, float]] = []
    monkeypatch.setattr(EdgeStrategy, "closed", lambda self, e: told.extend(dict(r.metrics) for r in e.reports))
    taken = EdgeStrategy.aggregate_train

    def aggregate(self, number, replies):
        told.extend(dict(reply.content["metrics"]) for reply in replies)
        return taken(self, number, replies)

    monkeypatch.setattr(EdgeStrategy, "aggregate_train", aggregate)
    tree = settings(*attacked("sign_flip", "strategy=edge_mean", "evaluate_clients=2"))
    writer.run(tree, LocalEngine(serve), tmp_path)
    malicious = SignFlip(share=0.4).clients(6, 1)
    table = read_all_rows(tmp_path)
    rows = list(zip(table["phase"], table["client"], map(json.loads, table["metrics"]), strict=True))
    assert {(client in malicious) == bool(m["malicious"]) for phase, client, m in rows if phase == "train"} == {True}
    assert not any("malicious" in m for phase, _, m in rows if phase != "train")
    lines = [json.loads(line)["metrics"] for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert all(0.2 <= line["malicious"] <= 0.4 for line in lines[1:])  # one or two of five
    assert len(told) == 30
    assert not any("malicious" in metrics for metrics in told)


# --- what they send --------------------------------------------------------------------------------------------------


def test_a_flipped_sign_goes_back_as_far_as_training_went_ahead():
    assert change(SignFlip(scale=2.0), 0.5, -1.0) == [-1.0, 2.0]


def test_noise_has_the_deviation_of_the_change_or_its_own():
    """A change of (3, 4, 0, 0) has a root mean square of 2.5."""
    numbers, size = torch.zeros(40_000), 40_000
    numbers[:2] = torch.tensor([3.0, 4.0]) * size**0.5 / 2
    for relative, deviation in ((True, 25.0), (False, 10.0)):
        noise = GaussianNoise(deviation=10.0, relative=relative).changed({"w": numbers}, DRAW)["w"] - numbers
        assert float(noise.std()) == pytest.approx(deviation, rel=0.02)
        assert float(noise.mean()) == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize(
    ("attack", "factor"),
    [
        ("attack=sign_flip", -1.0),
        ("attack=sign_flip attack.scale=3", -3.0),
        ("attack=gaussian attack.deviation=1e-9", 1.0),
    ],
)
def test_what_is_trained_is_changed_and_statistics_stay_honest(federation, attack: str, factor: float):
    """A malicious client alone: FedAvg takes what it sends, its change times a factor."""
    own = ["cohort=1", "num_clients=1", "rounds=1", "model.norm=batch"]
    honest, run = federation(*own), federation(*own, *attack.split())
    start = tensors_of(honest.arrays)
    for made in (honest, run):
        list(made.rounds())
    new, sent = tensors_of(honest.arrays), tensors_of(run.arrays)
    for name, old in start.items():
        went = (new[name] - old).double() * (factor if name in run.roles.trained else 1)
        assert torch.allclose((sent[name] - old).double(), went, atol=1e-6), name


def test_a_boost_multiplies_the_change():
    assert change(Backdoor(boost=3.0), 0.5, -1.0) == [1.5, -3.0]
    assert not Backdoor().changes


def test_z_is_that_of_the_papers_example():
    """N = 50, m = 24: s = 2, Phi(z) = 24 / 26, z = 1.43. Few colluders have none; a majority has one."""
    assert Alie().deviations(50, 24) == pytest.approx(1.426, abs=1e-3)
    assert Alie().deviations(10, 1) == 0
    assert Alie().deviations(10, 9) >= 0
    assert Alie().deviations(10, 6) == pytest.approx(0.6745, abs=1e-3)
    assert Alie(z=0.3).deviations(50, 24) == 0.3


class Told(Engine):
    """Clients have trained these numbers; it answers one by one, from the last."""

    def __init__(self, trained: dict[int, float]):
        self.trained = trained

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        assert task.close is None
        for client in sorted(self.trained, reverse=True):
            weights = {"w": torch.tensor([self.trained[client]]), "mean": torch.tensor([float(client)])}
            yield CohortAnswer((ClientAnswer(client, weights=SentWeights(weights)),))


def sent(trained: dict[int, float], malicious: set[int], z: float = 2.0) -> dict[int, tuple[float, float]]:
    """What clients send of a trained number and a statistic, by client."""
    tasks = tuple(
        ClientTask(client, Broadcast(1, {"w": torch.zeros(1), "mean": torch.zeros(1)})) for client in sorted(trained)
    )
    uplink = instantiate({"uplink": {"_target_": "devices.compression.updates.UpdateCompressor"}}, "uplink")
    engine = Colluders(Told(trained), Alie(z=z), frozenset(malicious), frozenset({"w"}), uplink, seed=1)
    answers = [one for answer in engine.run(CohortTask(1, "train", tasks, "{}")) for one in answer.clients]
    return {one.client: (float(one.weights.tensors["w"]), float(one.weights.tensors["mean"])) for one in answers}  # type: ignore[union-attr]


def test_colluders_send_their_mean_less_z_deviations_and_see_no_honest_update():
    """1 and 3 have mean 2 and deviation 1: 2 - 2 = 0, whatever the others have trained; statistics stay."""
    for honest in (10.0, -500.0):
        got = sent({0: honest, 1: 1.0, 2: honest, 5: 3.0}, malicious={1, 5, 7})
        assert got == {0: (honest, 0.0), 1: (0.0, 1.0), 2: (honest, 2.0), 5: (0.0, 5.0)}
    assert sent({0: 10.0, 1: 1.0}, malicious={1, 5}) == {0: (10.0, 0.0), 1: (1.0, 1.0)}


def test_alie_needs_rounds_and_attacks_on_weights_need_weights(federation):
    with pytest.raises(ConfigError, match=r"Alie needs rounds whose malicious clients train together.*loop=rounds"):
        federation("method=fedbuff", "loop.concurrency=3", "loop.buffer_size=2", "attack=alie")
    with pytest.raises(ConfigError, match=r"SignFlip changes the weights that clients send, and private="):
        federation("method=fedproto", "attack=sign_flip")
    list(federation("method=fedbuff", "loop.concurrency=3", "loop.buffer_size=2", "attack=sign_flip").rounds())


# --- what they train on ----------------------------------------------------------------------------------------------


def trained_on(settings, client: int, *overrides: str) -> Examples:
    worker = Worker(build_world(json.dumps(settings(*overrides))))
    return worker.context(ClientTask(client, Broadcast(1, {}))).data.train


@pytest.mark.parametrize(
    ("more", "expected"),
    [((), lambda y: 9 - y), (("attack.source=3", "attack.target=5"), lambda y: torch.where(y == 3, 5, y))],
)
def test_malicious_clients_learn_flipped_labels(settings, more, expected):
    given = ("attack=label_flip", *more, "workload.examples_per_client=60")
    malicious = LabelFlip().clients(6, 1)
    for client in range(6):
        clean, poisoned = trained_on(settings, client, given[-1]), trained_on(settings, client, *given)
        y = clean.tensors["y"]
        assert torch.equal(poisoned.tensors["y"], expected(y) if client in malicious else y)
        assert torch.equal(poisoned.tensors["x"], clean.tensors["x"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("attack=alie",), "with 2 colluders among 6 clients z is 0, and they send the mean"),
        (("attack=alie", "attack.z=0"), "z is 0"),
        (("attack=alie", "attack.z=1.5"), ""),
        (("attack=sign_flip", "method=krum", "strategy.num_malicious_nodes=1"), "the strategy withstands"),
        (("attack=sign_flip", "method=krum", "strategy.num_malicious_nodes=2", "num_clients=7", "cohort=7"), ""),
    ],
)
def test_what_changes_nothing_or_is_more_than_a_defence_is_told_is_said(federation, given, sentence: str):
    warned = summary.attacked(federation("num_clients=6", "cohort=6", "attack.share=0.3", *given))
    assert len(warned) == bool(sentence)
    assert all(sentence in text for text in warned)


@pytest.mark.parametrize("source", range(5))
def test_labels_that_no_liar_has_cannot_be_flipped(federation, source: int):
    given = ("attack=label_flip", f"attack.source={source}", f"attack.target={source + 1}", "partition=shards")
    run = federation(*given, "num_clients=6", "attack.share=0.3")
    owned = {y for c in run.malicious for y in run.world.workload.client_data(c).train.labels.tolist()}
    assert bool(summary.attacked(run)) == (source not in owned)


def test_a_backdoor_puts_its_patch_and_label_on_a_share_of_the_examples(settings):
    given = ("workload.input_shape=[1,4,4]", "attack=backdoor", "attack.target=7", "attack.grey=0.5")
    client = min(Backdoor().clients(6, 1))
    clean, poisoned = (trained_on(settings, client, *some).tensors for some in (given[:1], given))
    changed = (clean["x"] != poisoned["x"]).flatten(1).any(1)
    assert int(changed.sum()) == round(0.5 * len(changed))
    assert (poisoned["x"][changed][:, :, -2:, -2:] == 0.5).all()
    assert torch.equal(poisoned["x"][:, :, :2], clean["x"][:, :, :2])
    assert torch.equal(poisoned["y"], torch.where(changed, 7, clean["y"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attack=label_flip", "attack.source=3"], "attack.source and attack.target must be two classes"),
        (
            ["attack=label_flip", "attack.source=3", "attack.target=10"],
            r"attack.target must be .* 0\.\.9, got 10",
        ),
        (["attack=backdoor"], "Backdoor puts a patch into images"),
        (["attack=backdoor", *IMAGES[:1], "attack.patch=4"], "attack.patch must be less than the 4 pixels"),
        (["attack=sign_flip", "attack.share=-0.1"], r"attack.share must be in \[0, 1\], got -0.1"),
    ],
)
def test_what_cannot_be_attacked_is_refused(settings, overrides, words):
    with pytest.raises(ConfigError, match=words):
        build_world(json.dumps(settings(*overrides)))


# --- how far it came -------------------------------------------------------------------------------------------------


class Tells(nn.Module):
    """Tells the class that the last pixel says where that is not 0, else the one of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        told = torch.where(x[:, 0, -1, -1] > 0, x[:, 0, -1, -1], x[:, 0, 0, 0]).long()
        return nn.functional.one_hot(told, 10).float() + 0 * self.weight


def test_success_is_the_share_of_victims_that_are_told_as_the_target(settings):
    """Labels 1 1 1 3 0, told as 1 0 0 0 0: of three ones two are told as 0. With the patch all are told as 1."""
    workload = build_world(json.dumps(settings(*IMAGES[:1]))).workload
    x = torch.zeros(5, 1, 4, 4)
    x[0, 0, 0, 0] = 1
    workload.test = Examples({"x": x, "y": torch.tensor([1, 1, 1, 3, 0])})
    assert LabelFlip(source=1, target=0).judged(workload, Tells()) == {"attack_success": pytest.approx(2 / 3)}
    assert LabelFlip(source=5, target=0).judged(workload, Tells()) == {}
    assert LabelFlip().judged(workload, Tells()) == {}
    assert Backdoor(target=1).judged(workload, Tells()) == {"attack_success": 1.0}
    assert Backdoor(target=1, corner="top_left").judged(workload, Tells()) == {"attack_success": 1.0}
    assert Backdoor(target=0, grey=0.0, corner="top_left").judged(workload, Tells()) == {"attack_success": 1.0}
    assert Backdoor(target=2).judged(workload, Tells()) == {"attack_success": 0.0}


def test_every_judgement_says_how_far_a_backdoor_came(run, tmp_path: Path):
    summary = run("attack=backdoor", *IMAGES, "rounds=3", "evaluate_every=3")
    lines = [json.loads(line)["metrics"] for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert ["attack_success" in line for line in lines] == [True, False, False, True]
    assert summary["final"]["attack_success"] == lines[3]["attack_success"]
    assert "How far the attack came" in write_page(tmp_path).read_text()
    (line,) = [line for line in closing_lines(summary, tmp_path) if line.startswith("attack success: ")]
    assert line.endswith(
        " % of the test examples of other classes with the patch are taken for '0' (backdoor by 1 of 6 clients)"
    )
    assert closing_lines(summary, tmp_path)[0].startswith("fedavg on blobs, fleet uniform, attack backdoor: ")
    board = tmp_path / "tensorboard" / "fedavg-blobs-uniform-seed1"
    events = EventAccumulator(str(board / "spent")).Reload()
    assert [event.value for event in events.Scalars("by_energy_mj/attack_success")] == pytest.approx(
        [line["attack_success"] for line in lines if "attack_success" in line]
    )


def test_a_share_of_0_judges_what_nobody_has_attacked(run, tmp_path: Path):
    """The weights are those of a run without an attack, and its models are shown the patch."""
    clean = run(IMAGES[0], "rounds=2", out=tmp_path / "clean")
    judged = run("attack=backdoor", "attack.share=0", *IMAGES, "rounds=2", out=tmp_path / "judged")
    assert judged["weights_sha256"] == clean["weights_sha256"]
    assert judged["final"]["attack_success"] >= 0
    assert judged["attack"]["malicious"] == 0


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *(pytest.param(name, (), marks=[] if name in KINDS else [pytest.mark.slow]) for name in ATTACKS),
        ("alie", ("uplink=topk", "attack.z=1.0")),
    ],
)
def test_every_way_of_a_run_gives_the_same_bytes(settings, tmp_path: Path, name: str, more):
    runs = every_way(settings(*attacked(name, *more)), tmp_path)
    assert runs["one"] == runs["parts"] == runs["alone"] == runs["longer"]
    assert runs["one"][-1]["metrics"]["malicious"] > 0


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_costs_what_honesty_costs_and_slots_change_nothing(federation, name: str):
    """With the uplink too: what is poisoned is compressed after it."""
    for more in ((), ("uplink=int8",)) if name in KINDS else ((),):
        runs = []
        for own in (NEEDS.get(name, ())[:1], attacked(name, *more), attacked(name, *more, "engine.slots=2")):
            made = federation("cohort=5", "rounds=3", *more, *own)
            runs.append([(report, rows) for report, rows in made.rounds()])
        costs = [[[(r.client, r.work, r.cost) for r in rows] for _, rows in rounds] for rounds in runs]
        assert costs[0] == costs[1] == costs[2]
        metrics = [[report.metrics for report, _ in rounds] for rounds in runs]
        assert metrics[1] == metrics[2]
        assert metrics[0][-1]["loss"] != metrics[1][-1]["loss"]
