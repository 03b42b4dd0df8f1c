"""The contract that every config keeps: a new yaml file is covered by being there.

Methods, strategies and trainers run two rounds on tiny blobs; models, workloads, partitions, fleets, latency models and
engines one round each on something small that fits. Trainers x models are held to torch's own FLOP counter.
"""

import dataclasses
import json
import math
import pickle
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import answered, task_of
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hydra.utils import get_class
from omegaconf import OmegaConf
from test_models import SPEECH
from torch import nn
from torchs_counter import counter

from clients.app import serve
from clients.state import ClientState
from clients.worker import Worker, worker_for
from devices.availability import DAY_S
from devices.cost import Work
from devices.latency.help.training import HelpSettings, first_weights
from devices.latency.help.weights import save_weights
from fedsim.engines.base import Engine
from fedsim.engines.cutting import cut
from fedsim.errors import ConfigError, DataError
from fedsim.grid.exchange import ClientReport
from fedsim.messages.cohort import OUTCOMES, ClientTask, CohortAnswer, CohortTask
from fedsim.messages.packing import pack_answer, pack_task, unpack_answer, unpack_task
from fedsim.messages.records import ARRAYS, CONFIG, arrays_in, record_of
from fedsim.messages.updates import Broadcast
from fedsim.report.rounds import HOST_FIELDS, RoundReport, weights_sha256
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world, instantiate
from fedsim.settings.compose import _composed, compose
from fedsim.settings.config_files import check_before_hydra
from fedsim.settings.groups import options, preset
from fedsim.settings.run_settings import RunSettings

TINY = [
    "workload=blobs",
    "workload.num_classes=3",
    "workload.input_shape=[6]",
    "workload.examples_per_client=14",
    "workload.test_examples=20",
    "model=mlp",
    "model.hidden=[5]",
    "fleet=uniform",
    "num_clients=7",
    "cohort=5",
    "rounds=2",
    "trainer.batch_size=4",
    "trainer.local_epochs=1",
    "engine.device=cpu",
]
# What a model is fed, where it is not a vector of numbers; a model that is not here takes blobs of 6 features.
IMAGES = ("convnet", "fbnet", "femnist_cnn", "lenet5", "nb201", "resnet8", "small_cnn", "vgg")
SHAPES = {
    **dict.fromkeys(IMAGES, "[1,16,16]"),
    "bcresnet": "[1,40,8]",
    "bcresnet_asc": "[1,32,8]",
    **dict.fromkeys(("speech_resnet", "ds_cnn", "matchboxnet"), "[1,12,12]"),
}
SMALLER = {
    "vgg": ["model.width=2", "model.hidden=4"],
    "resnet8": ["model.width=4", "model.groups=2"],
    "femnist_cnn": ["model.hidden=8"],
    "small_cnn": ["model.width=4", "model.hidden=8"],
    "char_lstm": ["model.hidden=8"],
    "nb201": ["model.channels=4", "model.cells=1"],
    "bcresnet": ["model.tau=0.25"],
    "bcresnet_asc": ["model.tau=0.2"],
    **{name: ["model.width=4"] for name in ("speech_resnet", "ds_cnn", "matchboxnet")},
    "fbnet": [f"model.ops={[1, 4] + 20 * [8]}"],
}
BUILT = ("workload", "model", "fleet", "strategy", "trainer", "partition", "latency", "compression", "uplink")
# Of which no channel can be removed: a recurrent layer, a convolution in groups, norms over all channels.
WHOLE = {
    **dict.fromkeys(("char_lstm", "fbnet"), r"cannot be narrowed: layer '"),
    "bcresnet_asc": r"mixes its channels .* \(a norm, .* it cannot be narrowed",
}

# Statistics of a batch norm would be made public without their noise.
HIDING = ("dp_adaptive", "dp_client_adaptive", "dp_client_fedavg", "dp_fedavg")

# What a method wants of a model and the tiny one has not.
NEEDS = {
    "method=fedbn": ["model.norm=layer"],
    **{f"{group}=bulyan": ["strategy.num_malicious_nodes=0"] for group in ("method", "strategy")},
    "method=fedbuff": ["loop.concurrency=${cohort}", "loop.buffer_size=${cohort}"],
    "method=fedasync": ["loop.concurrency=${cohort}"],
    "strategy=fedasync": ["loop=buffer", "loop.concurrency=${cohort}", "loop.buffer_size=1"],
}


def numbers_in(task: CohortTask) -> dict[str, dict[str, bytes]]:
    """All that a task sends, and what its clients keep, byte by byte."""
    records = arrays_in(pack_task(task))
    return {name: {key: bytes(array.data) for key, array in record.items()} for name, record in records.items()}


class Spy(Engine):
    """The engine of the run, with every task and answer packed and sent as it would be to another process."""

    def __init__(self, engine: Engine):
        self.engine, self.crossed = engine, 0

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        for part in cut(task, 1):
            arrived = unpack_task(self._across(pack_task(part)))
            before = numbers_in(arrived)
            for answer in self.engine.run(arrived):
                yield unpack_answer(self._across(pack_answer(answer)))
            # Clients share what they are sent, and the server goes on with it: nobody may change it in place.
            assert numbers_in(arrived) == before

    def _across(self, content: RecordDict) -> RecordDict:
        self.crossed += 1
        return pickle.loads(pickle.dumps(content))


@dataclasses.dataclass
class Outcome:
    reports: list[RoundReport]
    clients: list[ClientReport]
    federation: Federation
    first: ArrayRecord
    crossed: int

    def comparable(self) -> str:
        """Everything that equal runs share."""
        lines = [{k: v for k, v in dataclasses.asdict(r).items() if k not in HOST_FIELDS} for r in self.reports]
        rows = [dataclasses.asdict(c) for c in self.clients]
        return json.dumps([lines, rows, weights_sha256(self.federation.arrays)], default=str)


STILL = ("tune_only",)  # trainers that leave the weights as they came


def for_case(base: Sequence[str], *chosen: str) -> list[str]:
    """The overrides without the epochs of a trainer that has none."""
    still = any(f"trainer={name}" in chosen for name in STILL)
    return [text for text in base if not (still and text.startswith("trainer.local_epochs="))]


def federate(*overrides: str, base: list[str] = TINY) -> Outcome:
    settings = compose(
        [*for_case(base, *overrides), *(need for o in overrides for need in NEEDS.get(o, [])), *overrides]
    )
    spy = Spy(instantiate(settings, "engine", serve=serve))
    federation = Federation(build_world(json.dumps(settings)), spy)
    first = federation.arrays
    reports, clients = [], []
    for report, rows in federation.rounds():
        reports.append(report)
        clients += rows
    spy.engine.close()
    return Outcome(reports, clients, federation, first, spy.crossed)


def replies_of(settings: RunSettings) -> int:
    """How many replies make new weights."""
    return settings.groups["loop"].get("buffer_size", settings.cohort)


def assert_contract(result: Outcome, rounds: int) -> None:
    """What must hold of every run, whatever the method."""
    settings = result.federation.settings
    trains = settings.choices["trainer"] not in STILL
    assert [r.round for r in result.reports] == list(range(rounds + 1))
    for report in result.reports:
        assert math.isfinite(report.metrics["loss"])
        assert 0 <= report.metrics["accuracy"] <= 1
        assert report.now_s >= 0
        assert report.round_s >= 0
    layout = [(name, a.dtype, tuple(a.shape)) for name, a in result.first.items()]
    assert [(name, a.dtype, tuple(a.shape)) for name, a in result.federation.arrays.items()] == layout
    for report in result.reports[1:]:
        assert report.round_s > 0 or result.federation.loop.is_buffered  # two may share an instant
        assert len(report.cohort) >= replies_of(settings)
        assert list(report.cohort) == sorted(set(report.cohort))
        assert set(report.outcomes) <= set(OUTCOMES)
        assert sorted(c for ids in report.outcomes.values() for c in ids) == list(report.cohort)
    trained = [c for c in result.clients if c.phase == "train"]
    assert len(trained) == sum(len(r.cohort) for r in result.reports)
    for client in trained:
        if client.outcome == "completed":
            assert (client.work.flops > 0) == (client.work.peak_memory_bytes > 0) == trains
            assert client.work.down_bytes > 0 or (result.federation.roles.keeps_all and client.round == 1)
            assert client.work.up_bytes > 0
            assert client.cost.total_s > 0
            assert client.joules > 0
            assert client.num_examples > 0
            assert all(math.isfinite(v) for v in client.metrics.values())
        assert pickle.loads(pickle.dumps(client)) == client
        assert Work.from_dict(json.loads(json.dumps(client.work.to_dict()))) == client.work
    assert result.crossed > 0


# Left to slow: strategies and trainers that some method takes, and so has run.
OF_METHODS = {g: {preset(method).get(g) for method in options("method")} for g in ("strategy", "trainer")}


def everything(*groups: str) -> list[Any]:
    """(group, option) of every method, strategy and trainer there is."""
    marks = {True: [pytest.mark.slow], False: []}
    return [
        pytest.param(g, o, id=f"{g}={o}", marks=marks[o in OF_METHODS.get(g, ())]) for g in groups for o in options(g)
    ]


# Whose kind another method stands for, where a contract hangs on how a method reads devices, rounds or what it keeps:
# these are left to slow there. A new method is in none of them, and so in the fast suite.
STOOD_FOR = (
    *("agem", "coreset", "finetune", "gss", "lwf", "reservoir", "stable_sgd"),  # by ewc, joint and ocs
    *("apfl", "fedavg_ft", "fedrep", "lg_fedavg", "perfedavg"),  # by ditto and fedbn
    *("attribution", "cpq", "dcil", "dropbits", "gradual", "magnitude_attention"),  # by pqk and sub_fedavg
    *("dp_fedavg", "fedmedian", "fedtrimmedavg", "global_mixup", "naivemix"),  # by dp_adaptive, krum and the mixups
    *("fedadagrad", "fedavgm", "fedyogi", "qfedavg"),  # by fedadam
    *("feddecorr", "feddyn", "fedlc", "fednova", "fedprox", "moon", "scaffold"),  # by fedavg and fedmix
)


def methods_of_each_kind() -> list[Any]:
    return [pytest.param(m, marks=[pytest.mark.slow] if m in STOOD_FOR else []) for m in options("method")]


def taken(group: str, option: str) -> str:
    """The override that takes an option: a trainer whose method has its name comes with the strategy it needs."""
    own = group == "trainer" and option in options("method")
    return f"method={option}" if own and chosen(option) == option else f"{group}={option}"


def chosen(method: str) -> str:
    """The trainer that a method takes: that of `method=finetune` is plain SGD."""
    return preset(method).get("trainer", "sgd")


@pytest.mark.parametrize("group, option", everything("method", "strategy", "trainer"))
def test_two_rounds_keep_the_contract_and_repeat(group: str, option: str):
    first = federate(taken(group, option))
    build_world.cache_clear()
    worker_for.cache_clear()
    # Priced anew, by a process that has trained before, and in slots.
    again = federate(taken(group, option), "engine.slots=2")
    assert_contract(first, rounds=2)
    replies = replies_of(first.federation.settings)  # always online, no crash
    assert all(len(r.outcomes["completed"]) == len(r.cohort) == replies for r in first.reports[1:])
    learnt = weights_sha256(first.federation.arrays) != weights_sha256(first.first)
    assert learnt == (option not in STILL and not first.federation.roles.keeps_all), "nothing was learnt"
    assert first.comparable() == again.comparable()
    if group == "method":
        assert federate(f"{group}={option}", "seed=2").comparable() != first.comparable()


@pytest.mark.parametrize("method", methods_of_each_kind())
def test_clients_judge_the_model_where_asked_and_pay_for_it(method: str):
    result = federate(f"method={method}", "evaluate_clients=3", "rounds=1")
    judged = [c for c in result.clients if c.phase == "evaluate"]
    assert len(judged) == 3
    assert all(c.work.down_bytes > 0 and c.outcome == "completed" for c in judged)
    assert 0 <= result.reports[-1].metrics["client_accuracy"] <= 1


@pytest.mark.parametrize("method", methods_of_each_kind())
def test_nobody_online_leaves_the_weights_alone(method: str):
    """Windows of a second at random times of the day: with this seed, no client of either round is online."""
    fleet = ["fleet.availability._target_=devices.availability.Diurnal", "+fleet.availability.hours=0.0003"]
    result = federate(f"method={method}", *fleet)
    asked = set() if result.federation.loop.is_buffered else {"offline"}  # one that waits asks whom it can reach
    assert [set(r.outcomes) for r in result.reports[1:]] == [asked, asked]
    assert weights_sha256(result.federation.arrays) == weights_sha256(result.first)
    assert 0 < result.reports[-1].now_s < DAY_S


# --- models, and the work that trainers report ---------------------------------------------------------------------


def write_bundle(folder: Path, kind: str) -> None:
    """A bundle with 60 examples, 6 owners and 3 classes (text: a vocabulary of 5, the next token is the label)."""
    rng = np.random.default_rng(0)
    owner = np.arange(60) % 6
    classes = ["a", "b", "c"]
    y = rng.integers(3, size=60)
    if kind == "image":
        x = rng.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    elif kind == "text":
        classes, line = list("abcde"), rng.integers(5, size=(60, 8))
        x, y = line[:, :-1], line[:, 1:]
    elif kind == "audio":
        x = rng.integers(-9999, 9999, (60, 1600)).astype(np.int16)
    else:
        x = rng.standard_normal((60, 6)).astype(np.float32)
    folder.mkdir(parents=True)
    np.savez(folder / "train.npz", x=x, y=y, client=owner)
    np.savez(folder / "test.npz", x=x[:20], y=y[:20], client=owner[:20])
    (folder / "meta.json").write_text(json.dumps({"classes": classes, "kind": kind}))


@pytest.fixture(autouse=True)
def bundles(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FEDSIM_DATA with the bundles that the shipped workloads name, and one without a fixed name."""
    root = tmp_path_factory.getbasetemp() / "bundles"
    if not root.exists():
        for name, kind in (("mnist", "image"), ("shakespeare", "text"), ("kws", "audio"), ("plain", "tabular")):
            write_bundle(root / name, kind)
    monkeypatch.setenv("FEDSIM_DATA", str(root))
    # QFedAvg lets Flower collect garbage at every conversion, 0.2 s each with a heap as large as this suite's.
    monkeypatch.setattr("flwr.app.message.arrayrecord.gc", SimpleNamespace(collect=lambda: 0))
    return root


def fitting(model: str) -> list[str]:
    """Overrides that give `model` little data of the kind it takes."""
    common = ["fleet=uniform", "cohort=3", "rounds=1", "trainer.batch_size=4", "trainer.local_epochs=1"]
    common += [f"model={model}", *SMALLER.get(model, []), "engine.device=cpu"]
    if model == "char_lstm":
        return ["workload=bundle", "workload.path=shakespeare", "partition=iid", "num_clients=6", *common]
    data = [
        "workload=blobs",
        f"workload.input_shape={SHAPES.get(model, '[6]')}",
        "workload.examples_per_client=11",
        "num_clients=4",
    ]
    return [*data, "workload.test_examples=20", *common]


@pytest.mark.parametrize("model", options("model"))
def test_every_model_trains_a_round(model: str):
    result = federate(base=fitting(model))
    assert_contract(result, rounds=1)
    assert weights_sha256(result.federation.arrays) != weights_sha256(result.first)


def spoken(federation: Federation) -> tuple[int, RecordDict]:
    """The first client of round 1, and what the strategy really sends it."""
    messages = federation.strategy.configure_train(1, federation.arrays, ConfigRecord(), federation.grid)
    first = min(messages, key=lambda m: m.metadata.dst_node_id)
    return first.metadata.dst_node_id, first.content


# Every model with plain SGD, every trainer with one model, those that change a network with each kind of layer: what
# differs between other trainers does not hang on layers. All other pairs are left to slow.
USUAL = ("mlp", "convnet", "char_lstm", "resnet8")
CHANGE_NETWORKS = ("fjord", "heterofl", "ppp", "pqk", "sub_fedavg")


def is_usual(trainer: str, model: str) -> bool:
    return trainer == "sgd" or model == "convnet" or (trainer in CHANGE_NETWORKS and model in USUAL)


COUNTED = [
    pytest.param(trainer, model, marks=[] if is_usual(trainer, model) else [pytest.mark.slow])
    for trainer in options("trainer")
    for model in options("model")
    if trainer not in STILL
]


@pytest.mark.parametrize("trainer, model", COUNTED)
def test_reported_flops_are_those_that_torch_counts(trainer: str, model: str):
    """One client's round through the real app: within 1 % of the project's counter, a short last batch included."""
    settings = compose([*fitting(model), taken("trainer", trainer), "trainer.local_epochs=2"])
    make = partial(instantiate, settings, "engine", serve=serve)
    if model in WHOLE and get_class(settings["trainer"]["_target_"]).own_network:
        with pytest.raises(ConfigError, match=WHOLE[model]):
            Federation(build_world(json.dumps(settings)), make())
        return
    federation = Federation(build_world(json.dumps(settings)), make())
    if trainer == "fjord" and model in SPEECH:
        with pytest.raises(ConfigError, match="batch statistics differ"):
            Worker(federation.world)
        return
    worker, (first, part) = Worker(federation.world), spoken(federation)
    answered(
        worker, worker.context(task_of(part, first, 1)), part, "train"
    )  # what it prices when it first meets it is no work
    client = worker.context(task_of(part, first, 1))
    assert len(client.data.train) % 4
    with counter() as counted:
        answered(worker, client, part, "train")
    work = client.log.work()
    assert work.flops > 0
    assert work.flops == pytest.approx(counted.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("method", methods_of_each_kind())
def test_a_method_reports_the_flops_of_what_it_sends_and_trains(method: str):
    """As above with the method's own broadcast: settings and extras of its strategy included."""
    unseen = (
        ["strategy.clipping_norm=1e6"] if "client" in method else []
    )  # torch's counter sees no vector that is scaled
    settings = compose([*TINY, f"method={method}", *NEEDS.get(f"method={method}", []), "cohort=7", *unseen])
    federation = Federation(build_world(json.dumps(settings)), instantiate(settings, "engine", serve=serve))
    worker, (first, part) = Worker(federation.world), spoken(federation)
    answered(
        worker, worker.context(task_of(part, first, 1)), part, "train"
    )  # what it prices when it first meets it is no work
    client = worker.context(task_of(part, first, 1))
    with counter() as counted:
        answered(worker, client, part, "train")
    assert client.log.work().flops == pytest.approx(counted.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("model", options("model"))
def test_judging_a_model_costs_its_forward_passes(model: str):
    settings = compose(fitting(model))
    worker = Worker(build_world(json.dumps(settings)))
    part = RecordDict({ARRAYS: record_of(worker.model.state_dict()), CONFIG: ConfigRecord({"server-round": 1})})
    client = worker.context(task_of(part, 0, 1))
    assert len(client.data.test)
    with counter() as counted:
        answered(worker, client, part, "evaluate")
    assert client.log.work().flops == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_a_client_keeps_its_state_apart_from_the_traffic():
    """No shipped trainer keeps state yet: one that does must find it again, and it is never counted as bytes."""
    settings = compose(TINY)
    worker = Worker(build_world(json.dumps(settings)))
    state = ClientState({"seen": torch.arange(3)})
    client = worker.context(ClientTask(0, Broadcast(1, {}), state))
    assert torch.equal(client.state["seen"], torch.arange(3))
    assert client.state.storage_bytes == 24


# --- everything else that can be chosen ------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", options("workload"))
def test_every_workload_runs_a_round_or_says_how_to_get_its_data(workload: str):
    common = ["num_clients=5", "cohort=2", "rounds=1", "fleet=uniform", "trainer.local_epochs=1", "engine.device=cpu"]
    shorter = ["workload.path=kws", "workload/features=log_mel", "model.bands=5"]  # clips than its own
    given = {"bundle": ["workload.path=plain"], "esc10": shorter}.get(workload, [])
    small = {"mnist_writers": [], "shakespeare": ["model.hidden=8"]}.get(workload, [])
    settings = compose([f"workload={workload}", *given, *small, *common])
    if "download" in settings["workload"]:
        with pytest.raises(
            DataError,
            match=rf"^the official files of {workload} are not here or broken: .*set workload.download=true .*$",
        ):
            build_world(json.dumps(settings))
        return
    result = federate(base=[f"workload={workload}", *given, *small, *common])
    assert_contract(result, rounds=1)


@pytest.mark.parametrize("partition", options("partition"))
def test_every_partition_runs_a_round(partition: str):
    base = ["workload=bundle", "workload.path=plain", f"partition={partition}", "num_clients=5", "cohort=3", "rounds=1"]
    if partition == "shards":
        base.append("partition.classes_per_client=1")
    result = federate(base=[*base, "fleet=uniform", "trainer.local_epochs=1"])
    assert_contract(result, rounds=1)
    workload = result.federation.world.workload
    assert workload.num_clients == 5
    assert all(len(workload.client_data(i).train) for i in range(5))


@pytest.mark.parametrize("fleet", options("fleet"))
def test_every_fleet_runs_a_round(fleet: str):
    own = ["fleet.microphones=null"]  # there is nothing to hear
    result = federate(f"fleet={fleet}", "rounds=1", "num_clients=40", "cohort=20", *own)
    assert_contract(result, rounds=1)
    shares = {name for name, count, _ in result.federation.world.fleet.summary() if count}
    assert {c.device for c in result.clients} <= shares


@pytest.mark.parametrize("latency", options("latency"))
def test_every_latency_model_runs_a_round(latency: str, tmp_path: Path):
    """HELP gets untrained weights and a network of its space: what it says is wrong, but it says something."""
    if latency == "help":
        save_weights(first_weights("nb201", HelpSettings(seed=2)), tmp_path / "help.safetensors")
        own = [f"latency.weights={tmp_path / 'help.safetensors'}", "fleet=help_phones"]
        result = federate(f"latency={latency}", *own, base=fitting("nb201"))
    else:
        result = federate(f"latency={latency}", "rounds=1")
    assert_contract(result, rounds=1)


@pytest.mark.parametrize("uplink", options("uplink"))
def test_every_uplink_runs_and_repeats(uplink: str):
    first, again = federate(f"uplink={uplink}"), federate(f"uplink={uplink}", "engine.slots=2")
    assert_contract(first, rounds=2)
    assert first.comparable() == again.comparable()


@pytest.mark.parametrize("compression", options("compression"))
def test_every_compression_runs_a_round(compression: str):
    result = federate(f"compression={compression}", "rounds=1", "evaluate_clients=2", "fleet=mixed", "num_clients=40")
    assert_contract(result, rounds=1)
    assert all(math.isfinite(entry["loss"]) for entry in result.federation.deploy())


def engines() -> list[Any]:
    return [pytest.param(e, marks=[pytest.mark.ray] if "ray" in e else []) for e in options("engine")]


@pytest.mark.parametrize("engine", engines())
def test_every_engine_gives_the_run_of_the_local_one(engine: str):
    result = federate(f"engine={engine}")
    assert_contract(result, rounds=2)
    assert result.comparable() == federate("engine=local").comparable()


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_composes(experiment: str):
    assert compose([f"experiment={experiment}"])["choices"]["experiment"] == experiment


BUILDING = ("workload", "model", "fleet", "strategy", "trainer", "partition", "stream", "latency")
BUILDING += ("compression", "uplink")


@cache
def row(number: int) -> Any:
    """The options of that number of all groups, composed together: what a group says is its own."""
    check_before_hydra()
    there = {group: names[number] for group in BUILDING if number < len(names := options(group))}
    path = ["workload.path=plain"] if there.get("workload") == "bundle" else []
    path += ["latency.weights=w.npz"] if there.get("latency") == "help" else []
    path += ["stream.bundles=[plain]"] if there.get("stream") == "domains" else []
    return _composed([*(f"{group}={name}" for group, name in there.items()), *path])


@pytest.mark.parametrize("group", BUILDING)
def test_every_constructor_takes_exactly_what_its_config_says(group: str):
    """A key of a yaml that no constructor takes, or of another type, is a mistake in the file."""
    from fedsim.settings.parameters import check_parameters, takes

    given = {
        "workload": ("model", "partition", "num_clients", "seed"),
        "stream": ("workload", "rounds", "evaluate_every", "seed"),
        "fleet": ("num_clients", "seed"),
    }.get(group, ())
    rule = ("architecture",)
    for number in range(len(options(group))):
        tree = OmegaConf.to_container(row(number)[group], resolve=True)
        if group == "model":
            tree.pop("memory_format", None)  # read by `model_factory`, which has its own test
        given = rule if group == "strategy" and takes(tree, "architecture") else given
        check_parameters(group, tree, given)
        with pytest.raises(ConfigError, match=f"unknown setting for .*{group}.zzz"):
            check_parameters(group, {**tree, "zzz": 1}, given)


def test_a_model_is_the_same_for_the_same_seed_whatever_was_drawn_before():
    def built() -> dict[str, torch.Tensor]:
        return build_world(json.dumps(compose(TINY))).workload.build_model().state_dict()

    first = built()
    torch.rand(3)
    nn.Linear(2, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), built().values(), strict=True))
