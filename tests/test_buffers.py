"""What a model keeps beside its trained weights, statistics and counters: checkpoints, strategies, engines, uplinks."""

import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import honest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Krum
from test_methods import HIDING, TINY, federate
from test_models import CONFIGS, from_config
from torch import nn

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.grid.exchange import ClientReport
from fedsim.messages.records import array_record, from_array, like, record_of, to_array
from fedsim.models.convnet import ConvNet
from fedsim.models.mlp import MLP
from fedsim.models.norms import allow_single_examples, needs_two_examples
from fedsim.models.roles import COUNTER, STATISTIC, TRAINED, TensorRoles
from fedsim.report.checksums import Beginning, Checksums
from fedsim.report.rounds import weights_sha256
from fedsim.runs.checkpoint import Checkpoints, Saved, load
from fedsim.runs.federation import Federation
from fedsim.runs.server import ServerSide
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import options


class Odd(nn.Module):
    """Tensors that only other people's models have: numbers without a dimension, none at all, bits, half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("seen", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.zeros(0, 4))
        self.register_buffer("halves", torch.arange(3).half())
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)


BUILT = [pytest.param(lambda p=p: from_config(p), id=p.stem) for p in CONFIGS] + [
    pytest.param(lambda: MLP((6,), 3, hidden=[5], norm="batch"), id="mlp-batch"),
    pytest.param(lambda: ConvNet((1, 8, 8), 3, batch_norm=True), id="convnet-batch"),
    pytest.param(Odd, id="odd"),
]


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BUILT)
def test_every_model_comes_back_from_a_checkpoint_as_it_was(make, tmp_path: Path):
    """Names, dtypes, shapes and bytes: the hash takes in all of them."""
    weights = record_of(make().state_dict())
    (tmp_path / "rounds.jsonl").touch()
    Checkpoints(tmp_path, 0).write(Saved(1, weights, {"kept": weights}, {}), lambda: Checksums(Beginning(), {}))
    back = load(tmp_path)
    assert back is not None
    assert weights_sha256(back.weights) == weights_sha256(back.state["kept"]) == weights_sha256(weights)


# --- strategies and uplinks ------------------------------------------------------------------------------------------

BATCH = (*TINY, "model.norm=batch", "trainer.local_epochs=2", "partition=quantity", "evaluate_clients=2", "rounds=1")


def after_a_round(*overrides: str) -> Federation:
    settings = compose([*BATCH, *overrides])
    federation = Federation(build_world(json.dumps(settings)), LocalEngine(serve))
    *_, (federation.last, _) = federation.rounds()
    return federation


@pytest.fixture(scope="module")
def averaged() -> Federation:
    """A round of plain FedAvg: what every strategy should make of statistics and counters."""
    return after_a_round("strategy=fedavg", "trainer=sgd")


def beside(federation: Federation) -> ArrayRecord:
    return array_record({name: federation.arrays[name] for name in sorted(federation.roles.averaged)})


def test_the_roles_of_a_model_are_read_off_it():
    roles = TensorRoles.of(Odd())
    assert roles.trained == {"scale"}
    assert roles.names(STATISTIC) == {"nothing", "halves", "turned"}
    assert roles.names(COUNTER) == {"steps", "seen"}
    assert list(roles.kinds) == list(Odd().state_dict())


def test_plain_fedavg_averages_counters_by_examples_and_rounds_them(averaged: Federation):
    """Of 2 epochs each, by n, to the nearest: n / 4 batches, and a last smaller one unless it is a single example."""
    workload = averaged.world.workload
    sizes = [len(workload.client_data(c).train) for c in averaged.last.outcomes["completed"]]
    steps = [2 * (n // 4 + (n % 4 > 1)) for n in sizes]
    mean = sum(n * s for n, s in zip(sizes, steps, strict=True)) / sum(sizes)
    (counter,) = averaged.roles.names(COUNTER)
    assert int(from_array(averaged.arrays[counter])) == round(mean)


@pytest.mark.parametrize("strategy", options("strategy"))
def test_statistics_and_counters_are_averaged_whatever_the_strategy(strategy: str, averaged: Federation):
    """To the byte where clients train as in plain FedAvg; variances above 0 and counts anywhere."""
    if strategy == "fjord":
        pytest.skip("takes no batch norm: each width would need statistics of its own")
    if strategy in HIDING:
        with pytest.raises(ConfigError, match=r"statistics of this model .* would be averaged without noise"):
            after_a_round(f"strategy={strategy}")
        return
    bears_none = ["strategy.num_malicious_nodes=0"] if strategy == "bulyan" else []  # of five
    federation = after_a_round(f"strategy={strategy}", *bears_none, *honest([f"strategy={strategy}"]))
    assert [(n, a.dtype, a.shape) for n, a in federation.arrays.items()] == [
        (n, a.dtype, a.shape) for n, a in averaged.arrays.items()
    ]
    if type(federation.strategy).__module__.startswith("flwr.") and strategy != "fedprox":
        assert weights_sha256(beside(federation)) == weights_sha256(beside(averaged))
    for name, values in beside(federation).items():
        assert (from_array(values) >= 0).all() or name.endswith("mean")


class Watching(Krum):
    """A strategy of somebody else's, which looks at every array that it is handed."""

    def __init__(self, **sampling: Any):
        super().__init__(**sampling)
        self.seen: list[set[str]] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        self.seen.append(set(arrays))
        return list(super().configure_train(server_round, arrays, config, grid))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        self.seen += [set(reply.content["arrays"]) for reply in replies]
        return super().aggregate_train(server_round, replies)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
        self.seen.append(set(arrays))
        return super().configure_evaluate(server_round, arrays, config, grid)


def test_anybodys_strategy_sees_what_is_trained_and_no_more(averaged: Federation):
    federation = after_a_round("strategy=krum", f"strategy._target_={__name__}.Watching")
    assert len(federation.strategy.seen) == 1 + 5 + 1
    assert all(names == federation.roles.trained for names in federation.strategy.seen)
    assert weights_sha256(beside(federation)) == weights_sha256(beside(averaged))


def test_what_is_trained_alone_decides_whom_krum_takes():
    """Clients of equal data sizes and steps against one that took many more: by weights it is the third's neighbour."""
    roles = TensorRoles({"w": TRAINED, "steps": COUNTER})
    replies = [reply(client, w, steps) for client, (w, steps) in enumerate([(0.0, 5), (0.1, 500), (0.15, 7), (4.0, 5)])]
    shared = record_of({"w": torch.zeros(1), "steps": torch.tensor(0)})
    arrays, _ = ServerSide(Krum(num_malicious_nodes=1), roles).aggregate(1, replies, shared)
    assert arrays is not None
    assert float(from_array(arrays["w"])[0]) == pytest.approx(0.1)
    assert int(from_array(arrays["steps"])) == round((5 + 500 + 7 + 5) / 4)


def reply(client: int, w: float, steps: int) -> Message:
    sent = Message(RecordDict(), client, "train")
    arrays = record_of({"w": torch.tensor([w]), "steps": torch.tensor(steps)})
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 3})}), reply_to=sent)


@pytest.mark.parametrize("uplink", options("uplink"))
def test_no_uplink_thins_out_statistics_or_counters(uplink: str, averaged: Federation):
    """Whole, or in half precision (11 bits) beside 8-bit values."""
    federation = after_a_round(f"uplink={uplink}")
    whole = uplink in ("none", "topk", "randomk", "sparse_mask")
    for name, values in beside(averaged).items():
        found = from_array(federation.arrays[name])
        exact = whole or federation.roles.kinds[name] == COUNTER
        np.testing.assert_allclose(found, from_array(values), rtol=0 if exact else 2**-11, atol=0)


def test_integers_of_a_strategy_that_takes_everything_are_rounded():
    model = record_of({"steps": torch.tensor(0), "seen": torch.tensor([True, False])})
    made = array_record({"steps": to_array(np.array(311.58)), "seen": to_array(np.array([0.7, 0.2]))})
    new = {name: from_array(array).tolist() for name, array in like(made, model).items()}
    assert new == {"steps": 312, "seen": [True, False]}


# --- batches of one example ------------------------------------------------------------------------------------------


def lone(*overrides: str) -> list[ClientReport]:
    """Clients with five examples in batches of four."""
    sizes = ["workload.examples_per_client=5", "workload.client_test_fraction=0"]
    return federate("model.norm=batch", *sizes, "trainer.batch_size=4", "rounds=1", *overrides).clients


SAMPLE = ("fedavg", "heterofl", "ocs", "pqk", "sub_fedavg")


@pytest.mark.parametrize(
    "method",
    [
        m if m in SAMPLE else pytest.param(m, marks=pytest.mark.slow)
        for m in options("method")
        if m not in ("fjord", *HIDING)
    ],
)
def test_every_method_trains_on_a_last_batch_of_one_example(method: str):
    trained = [c for c in lone(f"method={method}") if c.phase == "train"]
    assert [c.outcome for c in trained] == ["completed"] * 5


@pytest.mark.parametrize("method", ["fedavg", "heterofl", "ditto"])
def test_a_client_with_one_example_trains_on_it(method: str):
    trained = [c for c in lone(f"method={method}", "workload.examples_per_client=1") if c.phase == "train"]
    assert [(c.outcome, c.num_examples) for c in trained] == [("completed", 1)] * 5


def test_a_single_example_is_normalised_by_the_running_statistics():
    """Mean 1 and variance 4: (5 - 1) / 2 = 2, up to eps; neither they nor the counter move. Two are by their own."""
    norm = nn.BatchNorm1d(1)
    allow_single_examples(norm)
    norm.running_mean[:], norm.running_var[:] = 1.0, 4.0
    assert norm.train()(torch.tensor([[5.0]])).item() == pytest.approx(2.0, abs=1e-5)
    assert (norm.training, float(norm.running_mean), int(norm.num_batches_tracked)) == (True, 1.0, 0)
    assert norm(torch.tensor([[5.0], [7.0]])).flatten().tolist() == pytest.approx([-1.0, 1.0], abs=1e-4)
    assert int(norm.num_batches_tracked) == 1
    copy = deepcopy(norm)
    with pytest.raises(RuntimeError):
        copy(torch.zeros(1, 2))
    assert copy.training


@pytest.mark.parametrize(
    "model, needs", [("mlp model.norm=batch", True), ("mlp", False), ("mlp model.norm=layer", False)]
)
def test_batches_of_one_are_refused_where_statistics_would_never_move(model: str, needs: bool):
    given = [*f"model={model}".split(), "trainer.batch_size=1", "rounds=1"]
    if not needs:
        assert federate(*given).reports
        return
    with pytest.raises(ConfigError, match=r"^trainer.batch_size=1 gives the batch norms of model MLP nothing"):
        federate(*given)


@pytest.mark.parametrize("height, needs", [(4, True), (8, False)])
def test_an_image_has_values_enough_unless_strides_leave_one_pixel(height: int, needs: bool):
    model = ConvNet((1, height, height), 3, channels=[2, 2], batch_norm=True)
    assert needs_two_examples(model, torch.zeros(1, 1, height, height)) == needs
