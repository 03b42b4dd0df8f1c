"""Whole runs in this process: that they repeat themselves, what is learned, and what travels beside the weights.

The network is 16-64-10: 1738 float32 parameters, 6952 bytes. Each client trains on 7 examples and keeps 1 back.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from torch import nn
from torch.nn import functional as F

from clients.trainers.sgd import SGDTrainer, WorkloadLoss
from clients.worker import Worker
from fedsim.errors import ConfigError
from fedsim.messages.cohort import ClientTask
from fedsim.messages.records import from_array, tensors_of
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.report.rounds import weights_sha256
from strategies.edge import EdgeStrategy

MODEL_BYTES = 6952
ONE_CLIENT = ("num_clients=1", "cohort=1", "rounds=1", "trainer.batch_size=8", "trainer.lr=0.5")


def lines(path) -> list[dict]:
    """The rounds of a run without what the host adds."""
    rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key != "host_s"} for r in rounds]


def weights(federation) -> dict[str, torch.Tensor]:
    return tensors_of(federation.arrays)


# --- repeatable ------------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_run_and_another_seed_another(run, tmp_path):
    overrides = ("fleet=phones", "evaluate_clients=2", "over_selection=1.3", "trainer.momentum=0.9")
    a, b, c = (run(*overrides, f"seed={seed}", out=tmp_path / name) for name, seed in (("a", 5), ("b", 5), ("c", 6)))
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert {**a, "host_s": 0} == {**b, "host_s": 0}
    assert lines(tmp_path / "a") != lines(tmp_path / "c")
    assert a["weights_sha256"] != c["weights_sha256"]


class Drawn(WorkloadLoss):
    """Draws from torch's global generator, as dropout does."""

    def __call__(self, run, batch):
        return super().__call__(run, batch) * torch.rand(())


class Drawing(SGDTrainer):
    objective = Drawn()


def test_global_generators_do_not_reach_a_run(federation):
    hashes = set()
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        run = federation("trainer._target_=test_federation.Drawing")
        list(run.rounds())
        hashes.add(weights_sha256(run.arrays))
    assert len(hashes) == 1


# --- learning --------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, data) -> list[torch.Tensor]:
    """Of the mean cross-entropy over all of a client's training examples."""
    batch = data.train.gather(torch.arange(len(data.train)))
    return list(torch.autograd.grad(F.cross_entropy(model(batch["x"]), batch["y"]), list(model.parameters())))


def test_fedavg_of_one_client_and_one_step_is_gradient_descent(federation):
    """W1 = w0 - lr * gradient; the mean of one update is that update."""
    run = federation(*ONE_CLIENT, "trainer.local_steps=1")
    model = run.world.workload.build_model()
    step = gradients(model, run.world.workload.client_data(0))
    with torch.no_grad():
        for p, g in zip(model.parameters(), step, strict=True):
            p -= 0.5 * g
    list(run.rounds())
    assert all(torch.allclose(w, model.state_dict()[name], atol=1e-7) for name, w in weights(run).items())


def test_fedavg_weighs_clients_by_their_examples(federation):
    """The mean of what the two clients answer one by one, with 7 examples each."""
    run = federation("num_clients=2", "cohort=2", "rounds=1")
    run.grid.round, run.grid.averages = 1, False
    sent = run.strategy.configure_train(1, run.arrays, ConfigRecord(), run.grid)
    alone = [tensors_of(reply.content["arrays"]) for reply in run.grid.send_and_receive(sent)]
    run.grid.averages = True
    run.train(1)
    for name, w in weights(run).items():
        assert torch.allclose(w, (alone[0][name] + alone[1][name]) / 2, atol=1e-7)


def test_proximal_term_of_weight_zero_is_plain_sgd_bit_for_bit(federation):
    plain, proximal = federation("trainer=sgd"), federation("trainer=fedprox", "trainer.proximal_mu=0")
    for run in (plain, proximal):
        list(run.rounds())
    assert weights_sha256(plain.arrays) == weights_sha256(proximal.arrays)


def test_proximal_term_pulls_towards_the_broadcast(federation):
    """Two steps from w0: w1 = w0 - lr g(w0), w2 = w1 - lr (g(w1) + mu (w1 - w0)), with lr = 0.5 and mu = 0.8."""
    run = federation("trainer=fedprox", *ONE_CLIENT, "trainer.local_steps=2", "trainer.proximal_mu=0.8")
    model, data = run.world.workload.build_model(), run.world.workload.client_data(0)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        step = gradients(model, data)
        with torch.no_grad():
            for p, g, w0 in zip(model.parameters(), step, start, strict=True):
                p -= 0.5 * (g + 0.8 * (p - w0))
    list(run.rounds())
    assert all(torch.allclose(w, model.state_dict()[name], atol=1e-6) for name, w in weights(run).items())


def test_strategy_may_set_the_proximal_weight(federation):
    by_strategy = federation("strategy=fedprox", "strategy.proximal_mu=0.5", "trainer=fedprox")
    by_trainer = federation("trainer=fedprox", "trainer.proximal_mu=0.5")
    for run in (by_strategy, by_trainer):
        list(run.rounds())
    assert weights_sha256(by_strategy.arrays) == weights_sha256(by_trainer.arrays)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"clip_norm": 0.5},
        {"clip_norm": 1e6, "momentum": 0.5},
    ],
    ids=str,
)
def test_step_is_that_of_torchs_sgd_bit_for_bit(options: dict):
    generator = torch.Generator().manual_seed(1)
    ours = [torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)]
    theirs = [nn.Parameter(p.clone()) for p in ours]
    clip_norm = options.get("clip_norm")
    optimiser = torch.optim.SGD(theirs, lr=0.1, **{k: v for k, v in options.items() if k != "clip_norm"})
    trainer, velocity = SGDTrainer(lr=0.1, batch_size=1, **options), None
    for _ in range(4):
        step = [torch.randn(p.shape, generator=generator) for p in ours]
        for p, g in zip(theirs, step, strict=True):
            p.grad = g.clone()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(theirs, clip_norm)
        optimiser.step()
        velocity = trainer.step(ours, step, 0.1, velocity)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"clip_norm": 0.5}], ids=str)
@pytest.mark.parametrize("scale", [torch.ones(3), None], ids=["one gradient of two", "expanded"])
def test_step_is_right_when_autograd_hands_out_one_tensor_twice(options: dict, scale: torch.Tensor | None):
    """The gradients of a and b in f(a + b) are one tensor, and of a sum an expanded one."""
    ours = [torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimiser = torch.optim.SGD(theirs, lr=0.1, momentum=options.get("momentum", 0.0))
    trainer, velocity = SGDTrainer(lr=0.1, batch_size=1, **options), None
    for _ in range(3):
        both = []
        for a, b in (ours, theirs):
            both.append((a + b).sum() if scale is None else ((a + b) * scale * 2).sum())
        velocity = trainer.step(ours, torch.autograd.grad(both[0], ours), 0.1, velocity)
        optimiser.zero_grad()
        both[1].backward()
        nn.utils.clip_grad_norm_(theirs, options.get("clip_norm", 1e9))
        optimiser.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


class Noted(WorkloadLoss):
    """Writes down the examples of each step, by round and client."""

    seen: dict[tuple[int, int], list[float]] = {}

    def __call__(self, run, batch):
        self.seen.setdefault((run.client.round, run.client.client_id), []).extend(batch["x"][:, 0].tolist())
        return super().__call__(run, batch)


class Noting(SGDTrainer):
    objective = Noted()


def test_examples_come_once_an_epoch_in_an_order_of_round_and_client(federation):
    """Blobs' clients own 7 examples each; of the four orders of two clients in two rounds no two are alike."""
    Noted.seen.clear()
    run = federation("trainer._target_=test_federation.Noting", "num_clients=2", "cohort=2", "trainer.lr=0.001")
    list(run.rounds())
    orders = set()
    for (_, client), first in Noted.seen.items():
        own = run.world.workload.client_data(client).train.gather(torch.arange(7))["x"][:, 0].tolist()
        assert sorted(first) == sorted(own)
        orders.add(tuple(own.index(x) for x in first))
    assert len(orders) == 4


def test_learning_rate_decays_by_round(federation):
    """0.8 * 0.5 ** 2 in round 3."""
    client = Worker(federation().world).context(ClientTask(0, Broadcast(3, {})))
    assert SGDTrainer(lr=0.8, batch_size=1, lr_decay=0.5).learning_rate(client, Broadcast(3, {})) == pytest.approx(0.2)


def test_learning_rate_warms_up_and_falls_along_a_cosine(federation):
    """In equal steps to its full value at the end of warm-up, then down half a cosine, to 0 behind the last round."""
    client = Worker(federation().world).context(ClientTask(0, Broadcast(1, {})))
    trainer = SGDTrainer(lr=0.1, batch_size=1, warmup_rounds=2, cosine_rounds=6)
    rates = [trainer.learning_rate(client, Broadcast(number, {})) for number in range(1, 9)]
    root = 2**0.5
    assert rates == pytest.approx([0.05, 0.1, 0.1, (2 + root) / 40, 0.05, *[(2 - root) / 40] * 3])
    constant = SGDTrainer(lr=0.1, batch_size=1, warmup_rounds=1)
    assert constant.learning_rate(client, Broadcast(9, {})) == 0.1
    with pytest.raises(ConfigError, match=r"cosine_rounds must be more than the 3 of warm-up, got 3"):
        SGDTrainer(lr=0.1, batch_size=1, warmup_rounds=3, cosine_rounds=3)


def test_our_own_mean_is_fedavg_up_to_rounding(federation):
    flowers, ours = federation("strategy=fedavg", "cohort=5"), federation("strategy=edge_mean", "cohort=5")
    reports = [[replace(report, host_s=0, metrics={}) for report, _ in run.rounds()] for run in (flowers, ours)]
    assert reports[0] == reports[1]
    for name, w in weights(ours).items():
        assert torch.allclose(w, weights(flowers)[name], atol=1e-6)


def test_our_own_mean_is_weighted_by_examples():
    """(1 * 2 + 3 * 6) / 4 = 5."""
    updates = [ClientUpdate(0, 1, {"w": torch.tensor([2.0])}), ClientUpdate(1, 3, {"w": torch.tensor([6.0])})]
    assert EdgeStrategy().combine(1, updates)["w"].tolist() == [5.0]


def test_our_own_mean_keeps_a_counter_that_all_clients_agree_on():
    """Thirds of 5 sum up to less than 5 in floating point; a count of batches must not lose one."""
    counts = {"n": torch.tensor(5), "w": torch.tensor([0.5])}
    for clients in range(1, 50):
        mean = EdgeStrategy().combine(1, [ClientUpdate(c, 7, counts) for c in range(clients)])
        assert (mean["n"].item(), mean["n"].dtype, mean["w"].dtype) == (5, torch.int64, torch.float32)


# --- a pair of strategy and trainer with extras ----------------------------------------------------------------------


class Tailor(EdgeStrategy):
    """Sends each client weights moved by its own id, and the squares of the ids seen so far."""

    def __init__(self, **sampling):
        super().__init__(**sampling)
        self.squares: dict[int, float] = {}

    def broadcast(self, round, client, weights):
        moved = {name: w + client.client_id for name, w in weights.items()}
        extras = {"thread": {"id": torch.tensor(client.client_id), "speed": torch.tensor(client.profile.flops_per_s)}}
        if self.squares:
            extras["squares"] = {"all": torch.tensor(list(self.squares.values()))}
        return Broadcast(round, moved, extras)

    def combine(self, round, updates):
        self.squares.update({u.client_id: u.extra("square")["value"].item() for u in updates})
        return super().combine(round, updates)


class TailorTrainer(SGDTrainer):
    """Returns the weights as they came, and the square of the id it was sent."""

    def fit(self, client, task):
        assert task.extra("thread")["speed"] == client.profile.flops_per_s
        update = super().fit(client, task)
        value = task.extra("thread")["id"].float() ** 2
        return replace(update, weights=task.weights, extras={"square": {"value": value}})


def test_each_client_gets_its_own_broadcast_and_answers_with_extras(federation):
    """Equal examples: the mean moves by (0 + ... + 5) / 6 = 2.5 a round. Extras: 8 + 4 bytes down, 6 * 4 more from
    round 2 on, 4 bytes up.
    """
    run = federation(
        "strategy=edge_mean",
        "strategy._target_=test_federation.Tailor",
        "trainer._target_=test_federation.TailorTrainer",
        "cohort=6",
    )
    before = weights(run)
    _, (first, _), (second, _) = run.rounds()
    assert run.strategy.squares == {0: 0, 1: 1, 2: 4, 3: 9, 4: 16, 5: 25}
    for name, w in weights(run).items():
        assert torch.allclose(w, before[name] + 5.0, atol=1e-5)
    assert (first.down_bytes, second.down_bytes) == (6 * (MODEL_BYTES + 12), 6 * (MODEL_BYTES + 12 + 24))
    assert first.up_bytes == second.up_bytes == 6 * (MODEL_BYTES + 4)


class Talkative(SGDTrainer):
    """Sends something beside its weights that nobody asked for."""

    def fit(self, client, task):
        return replace(super().fit(client, task), extras={"prototypes": {"mean": torch.zeros(3)}})


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        ("fedavg", "the clients sent ['prototypes'] beside their weights, which the strategy drops, so take"),
        ("fedadam", "the clients sent ['prototypes'] beside their weights, which the strategy drops, so take"),
        (
            "krum",
            "Krum cannot use what the clients sent: Expected exactly one ArrayRecord in replies; "
            "beside their weights they sent ['prototypes'], so take",
        ),
    ],
)
def test_stock_strategy_with_a_trainer_of_another_method_stops_in_one_sentence(federation, strategy, sentence: str):
    run = federation(f"strategy={strategy}", "trainer._target_=test_federation.Talkative", "cohort=4")
    with pytest.raises(ConfigError) as caught:
        list(run.rounds())
    assert str(caught.value) == f"{sentence} the strategy and the trainer of one method"


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedavgm", "fedtrimmedavg", "qfedavg"])
def test_weights_keep_the_names_shapes_and_dtypes_of_the_model(federation, strategy: str):
    run = federation(f"strategy={strategy}", "cohort=5")
    layout = [(name, array.dtype, tuple(array.shape)) for name, array in run.arrays.items()]
    before = weights_sha256(run.arrays)
    list(run.rounds())
    assert [(name, array.dtype, tuple(array.shape)) for name, array in run.arrays.items()] == layout
    assert weights_sha256(run.arrays) != before
    assert all(from_array(array).dtype == "float32" for array in run.arrays.values())
