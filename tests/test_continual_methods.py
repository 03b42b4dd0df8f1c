"""The federated protocol of OCS, and the baselines of continual learning: limit cases and numbers by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import task_of
from flwr.app import Message, RecordDict
from torch import Tensor

from clients.app import serve
from clients.state import ClientState
from clients.trainers.rehearsal.agem import project
from clients.trainers.rehearsal.ewc import EWCTrainer, bounded, fisher
from clients.trainers.rehearsal.gss import replaced
from clients.trainers.rehearsal.joint import JointTrainer
from clients.trainers.rehearsal.lwf import LwFTrainer
from clients.trainers.rehearsal.memory import CANDIDATES, PHASES
from clients.trainers.sgd import Objective
from clients.worker import Worker
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.messages.cohort import ClientTask
from fedsim.messages.records import record_bytes, record_of, tensors_of
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.report.rounds import weights_sha256
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from strategies.ewc import EWC
from strategies.ocs import OCS

BASE = (
    *("workload=digits", "partition=iid", "num_clients=4", "cohort=2", "rounds=10", "fleet=uniform", "latency=flops"),
    *("engine.device=cpu", "stream=split_classes", "trainer.local_epochs=1", "trainer.batch_size=10"),
    "model.hidden=[12]",
)
MEMORY = ("trainer.memory_size=20", "trainer.warm_start=2")


def federation(*overrides: str) -> Federation:
    return Federation(build_world(json.dumps(compose([*BASE, *overrides]))), LocalEngine(serve))


def finished(*overrides: str) -> Federation:
    run = federation(*overrides)
    list(run.rounds())
    return run


def states(run: Federation) -> dict[int, dict[str, Tensor]]:
    return run.grid.store.all()


def worker(*overrides: str) -> Worker:
    return Worker(build_world(json.dumps(compose([*BASE, *overrides]))))


# --- the end of a task -------------------------------------------------------------------------------------------


def test_everybody_who_trained_picks_when_the_task_has_ended_with_the_global_model():
    run = federation("method=ocs", *MEMORY)
    trained: set[int] = set()
    for report, rows in run.rounds():
        ended = {row.client for row in rows if row.phase == "query.end_of_task"}
        if report.round == 3:
            assert ended == trained
            assert all(row.work.down_bytes == record_bytes(run.arrays) for row in rows)
            for client in trained - set(report.cohort):
                state = states(run)[client]
                assert state[PHASES].tolist() == [0] * 20
                assert CANDIDATES not in state
        elif report.round != 5:
            assert not ended or (report.round - 1) % 2 == 0
        trained = trained | set(report.cohort) if report.round < 3 else trained


def test_who_was_not_asked_picks_when_it_next_trains():
    run = federation("strategy=fedavg", "trainer=ocs", *MEMORY)
    for report, rows in run.rounds():
        assert {row.phase for row in rows} <= {"train"}
        for client in report.cohort:
            phases = set(states(run)[client][PHASES].tolist())
            assert all(phase < run.world.workload.phase(report.round) for phase in phases)
    assert any(len(state[PHASES]) for state in states(run).values())


def test_asked_or_not_a_single_client_keeps_the_same():
    one = ("num_clients=1", "cohort=1", "trainer.final_pick=score", *MEMORY)
    asked, lazy = finished("method=ocs", *one), finished("strategy=fedavg", "trainer=ocs", *one)
    assert weights_sha256(asked.arrays) == weights_sha256(lazy.arrays)
    ours, theirs = states(asked)[0], states(lazy)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_client_that_is_offline_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    run = federation("method=ocs", *MEMORY)
    online = type(run.world.fleet).online
    monkeypatch.setattr(type(run.world.fleet), "online", lambda fleet, c, now: c != 1 and online(fleet, c, now))
    phases = [row.client for _, rows in run.rounds() for row in rows if row.phase == "query.end_of_task"]
    assert phases
    assert 1 not in phases


# --- the shared reference ------------------------------------------------------------------------------------------


def test_the_reference_is_the_mean_direction_weighted_by_coreset_sizes():
    """(3 * (1, 0) + 1 * (0, 1)) / |...| = (3, 1) / sqrt(10); a client without a coreset sends none."""
    strategy = OCS()
    weights = {"w": torch.zeros(1)}

    def update(client: int, *direction: float, examples: int) -> ClientUpdate:
        record = {"direction": torch.tensor(direction), "examples": torch.tensor(examples)}
        return ClientUpdate(client, 1, weights, extras={"reference": record} if examples else {})

    client = SimpleNamespace(client_id=0)
    assert strategy.broadcast(1, client, weights).extras == {}  # type: ignore[arg-type]
    strategy.combine(1, [update(0, 1.0, 0.0, examples=3), update(1, 0.0, 1.0, examples=1), update(2, examples=0)])
    sent = strategy.broadcast(2, client, weights).extra("reference")["direction"]  # type: ignore[arg-type]
    assert torch.allclose(sent, torch.tensor([3.0, 1.0]) / 10**0.5)


def test_the_reference_travels_both_ways_and_is_counted():
    """Digits through 64-12-10: 64 * 12 + 12 + 12 * 10 + 10 weights of four bytes, and the size in eight."""
    weights = 4 * (64 * 12 + 12 + 12 * 10 + 10)
    run = federation("method=ocs", "trainer.ref_scope=global", *MEMORY)
    for report, rows in run.rounds():
        for row in (row for row in rows if row.phase == "train"):
            extra = row.work.up_bytes - weights
            assert extra == (weights + 8 if int(row.metrics["memory_examples"]) else 0)
            assert row.work.down_bytes - weights == (weights if report.round > 3 else 0)
            if report.round > 3:
                assert row.metrics["affinity"] != 0
    assert weights_sha256(run.arrays) != weights_sha256(finished("method=ocs", *MEMORY).arrays)


# --- A-GEM -------------------------------------------------------------------------------------------------------


def test_a_gradient_against_the_memory_loses_that_part():
    """Over two tensors: g.r = -2 + 1 = -1, r.r = 2, so g + r / 2."""
    g, r = (torch.tensor([1.0, -2.0]), torch.tensor([1.0])), (torch.tensor([0.0, 1.0]), torch.tensor([1.0]))
    found = project(g, r)
    assert [t.tolist() for t in found] == [[1.0, -1.5], [1.5]]
    assert sum(float((a * b).sum()) for a, b in zip(found, r, strict=True)) == 0
    assert project(r, r) is r


def test_without_replay_agem_is_finetuning():
    ours = finished("method=agem", "trainer.replay_weight=0")
    assert weights_sha256(ours.arrays) == weights_sha256(finished("method=finetune").arrays)
    assert weights_sha256(ours.arrays) != weights_sha256(finished("method=agem").arrays)


# --- GSS ---------------------------------------------------------------------------------------------------------


def test_an_example_like_the_others_replaces_nothing_and_a_new_one_by_the_scores():
    """With scores (1, 3) held and 1 for the new one: place 1 is drawn in 3 / 4 and taken in 3 / 4; place 0 in 1 / 8."""
    held, draw = torch.tensor([1.0, 3.0]), torch.Generator().manual_seed(0)
    assert all(replaced(1.0, held, draw) is None for _ in range(20))
    found = [replaced(0.9999999, held, draw) for _ in range(4000)]
    for place, chance in ((1, 9 / 16), (0, 1 / 8)):
        assert found.count(place) / 4000 == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 4000) ** 0.5)


def test_a_diverse_memory_is_full_and_holds_distinct_examples():
    run = finished("method=gss", "trainer.memory_size=12")
    for state in states(run).values():
        assert len(state["memory_names"].unique()) == 12 == len(state["gss_scores"])
        assert 0 <= float(state["gss_scores"].min()) <= float(state["gss_scores"].max()) <= 2


# --- EWC ---------------------------------------------------------------------------------------------------------


def test_the_penalty_is_one_quadratic_per_task():
    """Its gradient is lambda (F_1 (w - w_1) + F_2 (w - w_2)), and its value their sum."""
    one = worker("method=ewc", "trainer.penalty=3.0")
    client = one.context(task_of(RecordDict(), 0, 5))
    trainer = one.trainer
    assert isinstance(trainer, EWCTrainer)
    w = torch.cat([p.detach().flatten() for p in client.parameters]).double()
    importance, anchors = torch.rand(2, len(w), dtype=torch.float64), torch.randn(2, len(w), dtype=torch.float64)
    record = {
        "curvature": importance.sum(0).float(),
        "weighted": (importance * anchors).sum(0).float(),
        "constant": (importance * anchors**2).sum().float(),
    }
    batch = client.data.train.gather(torch.arange(4))
    plain = trainer.objective(trainer.start(client, Broadcast(5, {})), batch)
    held = trainer.objective(trainer.start(client, Broadcast(5, {}, {"penalty": record})), batch)
    assert float((held - plain).detach()) == pytest.approx(
        float(1.5 * (importance * (w - anchors) ** 2).sum()), rel=1e-3
    )
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(held - plain, client.parameters)])
    assert torch.allclose(gradient, (3.0 * (importance * (w - anchors)).sum(0)).float(), atol=1e-4)


def test_fisher_is_the_mean_squared_gradient_of_single_examples():
    client = worker("method=ewc").context(ClientTask(0, Broadcast(1, {})))
    weights = dict(client.model.named_parameters())
    batch = client.data.train.gather(torch.arange(5))
    squares = []
    for i in range(5):
        loss = client.workload.loss(client.model, {key: t[i : i + 1] for key, t in batch.items()})
        squares.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, client.parameters)]).square())
    assert torch.allclose(fisher(client, weights, batch, at_once=2), torch.stack(squares).mean(0), atol=1e-7)


def test_the_server_asks_once_per_task_and_sends_the_penalty_from_then_on():
    run = federation("method=ewc")
    weights = record_bytes(run.arrays)
    for report, rows in run.rounds():
        asked = [row for row in rows if row.phase == "query.fisher"]
        assert bool(asked) == (report.round in (3, 5, 7, 9))
        assert all(row.work.up_bytes == weights + 8 for row in asked)
        trained = [row.work.down_bytes - weights for row in rows if row.phase == "train"]
        assert set(trained) <= {2 * weights + 4 if report.round > 2 else 0}
    assert isinstance(run.strategy, EWC)


def test_without_a_penalty_ewc_is_finetuning_up_to_the_servers_rounding():
    base = finished("strategy=edge_mean", "trainer=sgd")
    assert weights_sha256(finished("method=ewc", "trainer.penalty=0").arrays) == weights_sha256(base.arrays)
    assert weights_sha256(finished("method=ewc").arrays) != weights_sha256(base.arrays)


def test_curvature_is_lowered_only_where_a_step_would_overshoot():
    """Centre 2 and curvature 4, at most 1: a quarter of it, 16 - 32 + 20 = 4 - 8 + 8 at the centre all the same."""
    given = {"curvature": torch.tensor([4.0, 0.5, 0.0]), "weighted": torch.tensor([8.0, 1.0, 0.0])}
    given["constant"] = torch.tensor(20.0)
    found = bounded(given, 1.0)
    assert found["curvature"].tolist() == [1.0, 0.5, 0.0]
    assert found["weighted"].tolist() == [2.0, 1.0, 0.0]
    assert float(found["constant"]) == 8.0
    assert bounded(given, 4.0) is given


class Alone(Objective):
    """An objective without the workload's loss."""

    def __init__(self, whole: Objective):
        self.whole = whole

    def __call__(self, run, batch):
        return self.whole(run, batch) - run.client.workload.loss(run.client.model, batch)


def test_a_stiff_weight_is_at_its_centre_after_one_step():
    """Without a loss of its own: w - lr lambda F (w - c) with lr lambda F cut to 1, whatever F is."""
    one = worker("method=ewc", "trainer.penalty=100", "trainer.lr=0.1", "trainer.local_steps=1")
    client, centre = one.context(task_of(RecordDict(), 0, 5)), 0.25
    size = sum(p.numel() for p in client.parameters)
    stiff = {"curvature": torch.full((size,), 1e4), "weighted": torch.full((size,), 1e4 * centre)}
    stiff["constant"] = torch.tensor(size * 1e4 * centre**2)
    run, held = one.trainer.start(client, Broadcast(5, dict(client.weights), {"penalty": stiff})), one.trainer.objective
    run.objective = Alone(held)
    run.fit()
    assert all(torch.allclose(p, torch.full_like(p, centre), atol=1e-5) for p in client.parameters)


@pytest.mark.parametrize("norm", ["null", "batch"])
def test_ewc_ends_with_finite_weights_where_its_penalty_is_stiff(norm: str):
    """Rounds of few steps on digits with a penalty a hundred times the usual one."""
    run = finished("method=ewc", "trainer.penalty=10000", f"model.norm={norm}")
    assert all(torch.isfinite(t).all() for t in tensors_of(run.arrays).values())


def test_ewc_holds_what_is_trained_and_shared_and_nothing_else():
    run = finished("method=ewc", "model.norm=batch", "private=[head]")
    assert isinstance(run.strategy, EWC)
    assert run.strategy.penalty is not None
    held = run.roles.trained - run.roles.private
    assert len(run.strategy.penalty["curvature"]) == sum(
        t.numel() for name, t in tensors_of(run.arrays).items() if name in held
    )


def test_ewc_refuses_models_with_frozen_weights():
    answer = RecordDict({"fisher": record_of({"curvature": torch.zeros(3), "examples": torch.tensor(1)})})
    reply = Message(answer, reply_to=Message(RecordDict(), 0, "query.fisher"))
    with pytest.raises(ConfigError, match="needs a model without frozen weights"):
        EWC().learn(federation().arrays, [reply])


# --- LwF and the oracle --------------------------------------------------------------------------------------------


def test_without_distillation_lwf_is_finetuning():
    plain = weights_sha256(finished("method=finetune").arrays)
    assert weights_sha256(finished("method=lwf", "trainer.distill_weight=0").arrays) == plain
    assert weights_sha256(finished("method=lwf").arrays) != plain


def test_a_model_that_agrees_with_its_teacher_learns_nothing_from_it():
    one = worker("method=lwf")
    trainer = one.trainer
    assert isinstance(trainer, LwFTrainer)
    client = one.context(ClientTask(0, Broadcast(5, {})))
    run, objective = trainer.start(client, Broadcast(5, {})), trainer.objective
    own = torch.randn(6, 10, requires_grad=True)
    same = objective.distance(run, own, own.detach().clone())
    assert float(same.detach()) == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(objective.distance(run, own, own.detach() + torch.randn(6, 10)), own)
    assert gradient[:, :4].abs().min() > 0  # the classes of tasks 0 and 1
    assert not gradient[:, 4:].any()


def test_the_teacher_is_the_first_model_of_the_task_and_is_stored():
    one, weights = worker("method=lwf"), {}
    state = ClientState()
    for number in (2, 3, 4):
        client = one.context(ClientTask(0, Broadcast(number, {}), state))
        sent = {name: t + number for name, t in client.weights.items()}
        weights[number] = {name: t.clone() for name, t in sent.items()}
        one.trainer.fit(client, Broadcast(number, sent))
        state = client.state
    kept = {name.removeprefix("teacher."): t for name, t in state.items() if name.startswith("teacher.")}
    assert all(torch.equal(kept[name], t) for name, t in weights[3].items())
    assert state.storage_bytes == client.step_cost.parameter_bytes + 8


def test_the_oracle_draws_from_all_tasks_as_many_examples_as_have_arrived():
    one = worker("method=joint")
    assert isinstance(one.trainer, JointTrainer)
    client = one.context(task_of(RecordDict(), 0, 1))
    batches = list(one.trainer.batches(client, Broadcast(1, {})))
    assert sum(len(batch["y"]) for batch in batches) == len(client.data.train)
    assert len(torch.cat([batch["task"] for batch in batches]).unique()) == 5


def test_without_a_stream_the_oracle_sees_every_example_once():
    one = worker("method=joint", "stream=none")
    client = one.context(task_of(RecordDict(), 0, 1))
    drawn = torch.cat([batch["x"] for batch in one.trainer.batches(client, Broadcast(1, {}))])
    own = client.data.train.gather(torch.arange(len(client.data.train)))["x"]
    assert sorted(map(tuple, drawn.flatten(1).tolist())) == sorted(map(tuple, own.flatten(1).tolist()))


def test_the_learning_rate_falls_with_every_task():
    made = worker("method=stable_sgd", "trainer.lr=0.1")
    client = made.context(task_of(RecordDict(), 0, 1))
    rates = [made.trainer.learning_rate(client, Broadcast(number, {})) for number in (1, 2, 3, 10)]  # type: ignore[attr-defined]
    assert rates == pytest.approx([0.1, 0.1, 0.08, 0.1 * 0.8**4])
