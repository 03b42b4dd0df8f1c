"""Online coreset selection: its scores by hand, its limit cases, what is kept and what never leaves the device."""

import json
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from torch import Tensor

from clients.app import serve
from clients.state import ClientState
from clients.trainers.rehearsal.memory import CANDIDATES, NAMES, PHASES, Memory
from clients.trainers.rehearsal.ocs import OCSRun, best, scores
from clients.trainers.rehearsal.spaces import Products
from clients.worker import Worker, worker_for
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.grid.exchange import Exchange
from fedsim.messages.cohort import ClientTask
from fedsim.messages.records import payload_bytes, record_bytes, tensors_of
from fedsim.messages.updates import Broadcast
from fedsim.report.rounds import weights_sha256
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.workloads.streams.base import Stream

BASE = (
    *("workload=digits", "partition=iid", "num_clients=3", "cohort=3", "rounds=5", "fleet=uniform", "latency=flops"),
    *(
        "engine.device=cpu",
        "stream=split_classes",
        "trainer.local_epochs=1",
        "trainer.batch_size=10",
        "model.hidden=[12]",
    ),
    "stream.forward_transfer=false",
)
OCS = ("method=ocs", "trainer.memory_size=20", "trainer.warm_start=2", "trainer.stream_size=20")


def federation(*overrides: str) -> Federation:
    return Federation(build_world(json.dumps(compose([*BASE, *overrides]))), LocalEngine(serve))


def finished(*overrides: str) -> Federation:
    run = federation(*overrides)
    list(run.rounds())
    return run


def products_of(gradients: Tensor, past: Tensor | None = None) -> Products:
    own = gradients @ gradients.T
    return Products(own) if past is None else Products(own, gradients @ past, past.norm())


def gradients(n: int = 9, seed: int = 0) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- scores ---------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_equations():
    """Each cosine written out, one by one."""
    g, past = gradients(), gradients(1, seed=5)[0]

    def cos(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-6))

    similarity, apart, affinity = scores(products_of(g, past), tau=1.0)
    for n in range(9):
        assert float(similarity[n]) == pytest.approx(cos(g[n], g.mean(0)), abs=1e-12)
        others = [cos(g[n], g[p]) for p in range(9) if p != n]
        assert float(apart[n]) == pytest.approx(-sum(others) / 8, abs=1e-12)
        assert float(affinity[n]) == pytest.approx(cos(g[n], past), abs=1e-12)
    code = scores(products_of(g, past), 1.0, "code")[1]
    assert torch.allclose(code, (apart * 8 - 1) / 9)


def test_two_copies_and_two_orthogonal_gradients():
    g = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]]
    assert scores(products_of(g), 0.0)[1].tolist() == [-1 / 3, -1 / 3, 0, 0]


def test_scores_lie_between_minus_one_and_one():
    for seed in range(20):
        for term in scores(products_of(gradients(seed=seed), gradients(1, seed=99 - seed)[0]), 1.0):
            assert term.abs().max() <= 1 + 1e-12


def test_the_length_of_a_gradient_changes_neither_diversity_nor_affinity():
    g, past = gradients(), gradients(1, seed=5)[0]
    longer = g.clone()
    longer[3] *= 7.0
    before, after = scores(products_of(g, past), 1.0), scores(products_of(longer, past), 1.0)
    assert torch.allclose(before[1], after[1])
    assert torch.allclose(before[2], after[2])
    assert not torch.allclose(before[0], after[0])  # the mean has moved


def test_another_order_of_the_batch_gives_the_scores_in_that_order():
    g, past, order = gradients(), gradients(1, seed=5)[0], torch.tensor([4, 1, 8, 0, 2, 3, 7, 6, 5])
    for a, b in zip(scores(products_of(g, past), 1.0), scores(products_of(g[order], past), 1.0), strict=True):
        assert torch.allclose(a[order], b)


def test_tau_decides_between_the_terms():
    g, past = gradients(), gradients(1, seed=5)[0]
    similarity, apart, affinity = scores(products_of(g, past), 1e9)
    assert torch.equal((similarity + apart + 1e9 * affinity).argsort(), affinity.argsort())
    assert not scores(products_of(g, past), 0.0)[2].any()
    assert not scores(products_of(g), 1000.0)[2].any()


def test_a_perfectly_fitted_example_scores_zero_and_ties_go_to_the_first():
    g = torch.zeros(4, 3, dtype=torch.float64)
    assert all(not term.any() for term in scores(products_of(g, torch.ones(3, dtype=torch.float64)), 1.0))
    assert best(torch.zeros(5), 2).tolist() == [0, 1]
    assert best(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 2]


# --- limit cases ----------------------------------------------------------------------------------------------


def test_all_of_every_batch_and_no_replay_is_finetuning_bit_for_bit():
    momentum = ("trainer.momentum=0.8", "trainer.lr_decay=0.9", "trainer.local_epochs=2")
    plain = finished("method=finetune", *momentum)
    ours = finished("method=ocs", "trainer.stream_size=10", "trainer.replay_weight=0", *momentum)
    assert weights_sha256(plain.arrays) == weights_sha256(ours.arrays)
    assert weights_sha256(plain.arrays) != weights_sha256(finished(*OCS, *momentum).arrays)


def test_a_memory_of_nothing_is_finetuning_bit_for_bit():
    assert weights_sha256(finished("method=coreset", "trainer.memory_size=0").arrays) == weights_sha256(
        finished("method=finetune").arrays
    )


class Alone:
    """The same training without a federation: one client, its trainer, the weights handed from round to round."""

    def __init__(self, *overrides: str):
        self.settings = compose([*BASE, *overrides])
        self.worker = Worker(build_world(json.dumps(self.settings)))
        self.weights = {name: t.clone() for name, t in self.worker.workload.build_model().state_dict().items()}
        self.state = ClientState()

    def train(self, number: int) -> None:
        self.worker.live.load(self.weights)
        self.worker.model.train()
        client = self.worker.context(ClientTask(0, Broadcast(number, {}), self.state))
        client.seed_dropout(self.worker.model)
        update = self.worker.trainer.fit(client, Broadcast(number, self.weights))
        self.weights = {name: t.clone() for name, t in update.weights.items()}
        self.state = client.state


@pytest.mark.parametrize("method", ["finetune", "coreset", "reservoir", "ocs"])
def test_a_federation_of_one_is_central_training_bit_for_bit(method: str):
    own = OCS[1:] if method == "ocs" else (["trainer.memory_size=20"] if method != "finetune" else [])
    one = [
        "num_clients=1",
        "cohort=1",
        f"method={method}",
        "stream.arrival=chunk",
        "rounds=10",
        "model.dropout=0.2",
        *own,
    ]
    together, alone = finished(*one), Alone(*one)
    for number in range(1, 11):
        alone.train(number)
    sent = tensors_of(together.arrays)
    assert all(torch.equal(sent[name], t) for name, t in alone.weights.items())
    kept = together.grid.store.get(0)
    assert kept.keys() == alone.state.keys()
    assert all(torch.equal(t, alone.state[name]) for name, t in kept.items())


# --- what is kept ---------------------------------------------------------------------------------------------


def kept_after(run: Federation, client: int = 0) -> dict[str, Tensor]:
    return run.grid.store.get(client)


def test_every_task_has_its_share_and_every_class_as_many():
    """After t tasks there are floor(20 / t) of each of them, and of the two classes of a task as many, or one more."""
    run = federation(*OCS)
    workload = run.world.workload
    assert isinstance(workload, Stream)
    for report, _ in run.rounds():
        if report.round < 2:
            continue
        tasks = report.round - 1  # that have ended
        kept = kept_after(run)
        assert kept[PHASES].bincount(minlength=tasks).tolist() == [20 // tasks] * tasks
        assert len(kept[NAMES].unique()) == len(kept[NAMES])
        examples = workload.recall(0, kept[NAMES])
        assert torch.equal(examples["task"], kept[PHASES])
        counts = examples["y"].bincount(minlength=10)[: 2 * tasks].view(tasks, 2)
        assert (counts[:, 0] - counts[:, 1]).abs().max() <= 1


def test_the_coreset_is_chosen_among_what_was_trained_on():
    run = federation(*OCS)
    for report, _ in run.rounds():
        if report.round == 1:
            candidates = set(kept_after(run)[CANDIDATES].tolist())
            part = set(run.world.workload.arrivals(0, 0).tolist())
    assert candidates <= part
    assert len(candidates) == pytest.approx(len(part) / 2, abs=10)  # ten of every twenty
    kept = kept_after(run)
    assert set(kept[NAMES][kept[PHASES] == 0].tolist()) <= candidates


@pytest.mark.parametrize("method", ["ocs", "coreset", "reservoir"])
@pytest.mark.parametrize("arrival", ["task", "chunk"])
def test_the_memory_never_leaves_its_budget(method: str, arrival: str, monkeypatch: pytest.MonkeyPatch):
    """A device of 300 kB of which 0.5 % are for the coreset: 22 examples of 64 + 4 bytes."""
    settings = ["stream.arrival=" + arrival, "rounds=10", "trainer.memory_size=null", "trainer.budget_share=0.005"]
    held: list[int] = []
    check = Memory.check
    monkeypatch.setattr(Memory, "check", lambda self: (held.append(len(self)), check(self))[1])
    run = federation(f"method={method}", *settings)
    small = run.world.fleet[0].__class__(**{**vars(run.world.fleet[0]), "memory_bytes": 300_000})
    monkeypatch.setattr(type(run.world.fleet), "__getitem__", lambda fleet, client: small)
    budget = int(0.005 * 300_000)
    stored = []
    for report, rows in run.rounds():
        for row in rows:
            assert row.outcome == "completed"
            state = run.grid.store.get(row.client)
            own = sum(t.element_size() * t.numel() for t in state.values())
            stored.append(row.work.storage_bytes - own)
            assert len(state[NAMES]) * 68 <= budget
        assert report.peak_memory_bytes <= 300_000
    assert max(held) <= 22
    assert max(stored) <= budget
    assert max(stored) > 0.8 * budget


def test_nothing_of_the_coreset_is_ever_sent():
    """Messages hold the weights and numbers; what a client keeps rides beside and is no traffic."""
    run = federation(*OCS)
    seen: list[RecordDict] = []
    exchange = run.grid.exchange

    def overheard(messages: Any, timeout: float | None = None) -> Exchange:
        found = exchange(messages, timeout)
        seen.extend(message.content for message in found.replies)
        return found

    run.grid.exchange = overheard  # type: ignore[method-assign]
    run.grid.averages = False
    for report, rows in run.rounds():
        if report.round:
            assert {row.work.down_bytes for row in rows} == {record_bytes(run.arrays)}
            assert {row.work.up_bytes for row in rows if row.phase == "train"} == {record_bytes(run.arrays)}
            assert {row.work.up_bytes for row in rows if row.phase != "train"} <= {0}
    assert seen
    assert all(set(content) in ({"arrays", "metrics"}, set()) for content in seen)  # empty: the task's end
    assert all(payload_bytes(content) in (record_bytes(run.arrays), 0) for content in seen)


def test_a_stopped_client_goes_on_from_its_state_alone():
    """Every round with a new worker, as after a restart: the same coreset and weights."""
    whole, run = finished(*OCS), federation(*OCS)
    for _ in run.rounds():
        worker_for.cache_clear()
    assert weights_sha256(whole.arrays) == weights_sha256(run.arrays)
    for client in range(3):
        ours, theirs = kept_after(whole, client), kept_after(run, client)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_used_examples_are_counted_not_seen_ones():
    run = federation(*OCS)
    for report, rows in run.rounds():
        for row in (row for row in rows if row.phase == "train"):
            part = len(run.world.workload.client_part(row.client, report.round - 1).train)
            assert row.num_examples == part // 20 * 10 + min(10, part % 20)


# --- what it costs --------------------------------------------------------------------------------------------


def flops_of(*overrides: str) -> float:
    run = federation("stream=rotated", "stream.tasks=5", *overrides)
    rows = next(rows for report, rows in run.rounds() if report.round == 2)
    return next(row for row in rows if row.phase == "train").work.flops


def test_selection_in_the_last_layer_costs_less_than_a_step_with_replay():
    """N = 2 kappa: one forward pass of 2 kappa and of the memory batch, against forward and backward of 2 kappa."""
    common = ("trainer.memory_size=20", "trainer.replay_batch_size=10", "model.hidden=[64]", "trainer.local_epochs=2")
    plain = flops_of("method=coreset", *common)
    ours = flops_of("method=ocs", *common, "trainer.grad_mode=last_layer", "trainer.ref_source=batch")
    assert 1.2 < ours / plain < 2.3


def test_the_reference_is_the_mean_gradient_of_the_memory_under_each_examples_own_mask():
    alone = Alone("num_clients=1", "cohort=1", *OCS)
    for number in (1, 2, 3):
        alone.train(number)
    client = alone.worker.context(ClientTask(0, Broadcast(4, {}), alone.state))
    run = alone.worker.trainer.start(client, Broadcast(4, {}))
    assert isinstance(run, OCSRun)
    run.before_training()
    memory = Memory(client, 20)
    batch = client.data.train.gather(torch.arange(20))
    found = run.products(batch, None)
    client.model.eval()
    weights = list(client.model.parameters())
    past = torch.autograd.grad(client.workload.loss(client.model, memory.examples()), weights)
    assert found.past_norm == pytest.approx(float(torch.cat([g.flatten() for g in past]).norm()), rel=1e-5)
    assert set(memory.examples()["task"].tolist()) == {0, 1}


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["trainer.grad_mode=all"], "unknown value for trainer.grad_mode 'all'.*"),
        (["trainer.stream_size=5"], "trainer.stream_size must be at least trainer.batch_size=10, got 5"),
        (["trainer.selection=uniform"], "unknown value for trainer.selection 'uniform'"),
        (["trainer.memory_size=null"], "one of trainer.memory_size, budget_bytes and budget_share must say"),
        (["trainer.budget_share=2.0"], r"trainer.budget_share must be null or in \[0, 1\], got 2.0"),
    ],
)
def test_a_wrong_setting_gets_one_sentence(overrides: list[str], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        federation("method=ocs", *overrides)


def test_affinity_in_the_last_layer_of_separate_tasks_is_refused():
    with pytest.raises(ConfigError, match="last_layer cannot compare tasks that have their own outputs"):
        finished("method=ocs", "trainer.grad_mode=last_layer")
    assert any(finished("method=ocs", "trainer.grad_mode=features", "rounds=5").arrays)
