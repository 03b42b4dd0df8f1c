"""SCAFFOLD: what it is without variates, what they are, and what they cost."""

from pathlib import Path

import pytest
import torch
from conftest import every_way

from clients.trainers.drift.scaffold import OWN, ScaffoldRun, ScaffoldTrainer
from fedsim.errors import ConfigError
from fedsim.exchanges.scaffold import VARIATE
from fedsim.messages.records import tensors_of
from fedsim.messages.updates import ClientUpdate
from fedsim.runs.federation import Federation
from strategies.scaffold import Scaffold

WEIGHTS = 16 * 64 + 64 + 64 * 10 + 10  # of the network


def after(federation: Federation) -> list[dict[str, torch.Tensor]]:
    """The weights after each round."""
    return [tensors_of(federation.arrays) for report, _ in federation.rounds() if report.round]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(t, other[name]) for name, t in one.items())


def own_variate(made: Federation, client: int, name: str) -> torch.Tensor:
    """A client's c_i; zero where it has never been accepted."""
    return made.grid.store.get(client).get(f"{OWN}.{name}", torch.zeros(()))


def test_the_first_round_is_federated_averaging_and_the_second_is_not(federation):
    ours, plain = after(federation("method=scaffold")), after(federation("strategy=edge_mean"))
    assert same(ours[0], plain[0])
    assert not same(ours[1], plain[1])


def test_with_variates_of_zero_all_rounds_are_federated_averaging(federation, monkeypatch: pytest.MonkeyPatch):
    def frozen(run: ScaffoldRun) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(run.client.weights[name]) for name in run.trainer.shared}

    monkeypatch.setattr(ScaffoldRun, "renewed", frozen)
    ours, plain = after(federation("method=scaffold", "rounds=3")), after(federation("strategy=edge_mean", "rounds=3"))
    assert all(same(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("option", [1, 2])
def test_the_servers_variate_is_the_mean_of_all_clients(federation, option: int):
    made = federation("method=scaffold", "rounds=3", f"trainer.option={option}", "workload.size_alpha=1.0")
    after(made)
    for name, c in made.strategy.variate.items():
        own = sum(own_variate(made, i, name).double() for i in range(6)) / 6
        assert c.abs().max() > 1e-3
        assert torch.allclose(c, own, atol=1e-7)


def test_a_reply_that_is_not_taken_changes_no_variate(federation):
    made = federation("method=scaffold", "rounds=1", "cohort=6")
    after(made)
    before = {i: dict(made.grid.store.get(i)) for i in range(6)}
    made.grid.deadline_s = 1e-9
    made.train(2)
    assert {r.outcome for r in made.grid.take_reports()} == {"late"}
    assert all(same(before[i], made.grid.store.get(i)) for i in range(6))


def test_of_one_client_both_variates_are_equal_and_correct_nothing(federation):
    alone = ("num_clients=1", "cohort=1", "rounds=3")
    ours, plain = after(federation("method=scaffold", *alone)), after(federation("strategy=edge_mean", *alone))
    for a, b in zip(ours, plain, strict=True):
        assert all(torch.allclose(t, b[name], atol=1e-6) for name, t in a.items())


def test_option_1_is_the_gradient_of_all_examples_where_the_round_begins(federation):
    """Weight decay is a part of the loss; momentum changes the steps and not the variate."""
    made = federation(
        "method=scaffold", "rounds=1", "trainer.option=1", "trainer.weight_decay=0.1", "trainer.momentum=0.9"
    )
    workload, model = made.world.workload, made.world.workload.build_model()
    after(made)
    assert len(made.grid.store.all()) == 3
    for client, kept in made.grid.store.all().items():
        data = workload.client_data(client).train
        loss = workload.loss(model, data.gather(torch.arange(len(data))))
        for (name, p), g in zip(model.named_parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
            assert torch.allclose(kept[f"{OWN}.{name}"], g + 0.1 * p, atol=1e-6)


def test_what_a_variate_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"trainer.momentum=0.9 and trainer.option=2 .* take trainer.option=1"):
        ScaffoldTrainer(lr=0.1, batch_size=4, momentum=0.9)
    with pytest.raises(ConfigError, match=r"trainer.clip_norm=1.0 and trainer.option=2"):
        ScaffoldTrainer(lr=0.1, batch_size=4, clip_norm=1.0)
    ScaffoldTrainer(lr=0.1, batch_size=4, option=1, momentum=0.9, clip_norm=1.0)


def test_the_server_steps_along_the_mean_by_hand():
    """From 1 towards (3 x 2 + 1 x 6) / 4 = 3, or (2 + 6) / 2 = 4; c = (0.5 + 1.5) / 8 of eight clients."""
    updates = [
        ClientUpdate(i, n, {"w": torch.tensor([y]), "mean": torch.tensor([y])}, {}, {VARIATE: {"w": torch.tensor([d])}})
        for i, (n, y, d) in enumerate(((3, 2.0, 0.5), (1, 6.0, 1.5)))
    ]
    for weight, expected in (("examples", 3.0), ("equal", 4.0)):
        strategy = Scaffold(server_lr=0.5, weight=weight)
        strategy.context = type("Context", (), {"num_clients": 8})
        strategy.weights = {"w": torch.ones(1), "mean": torch.ones(1)}
        assert strategy.combine(1, updates)["w"].item() == 1 + 0.5 * (expected - 1)
        assert strategy.combine(1, updates)["mean"].item() == expected  # a statistic: no step, the mean
        assert strategy.variate["w"].item() == 2 * 0.25


def test_weights_that_stay_on_the_device_have_no_variate(federation):
    made = federation("method=scaffold", "private=[head]")
    after(made)
    assert set(made.strategy.variate) == {"body.1.weight", "body.1.bias"}
    assert all(torch.isfinite(t).all() for t in made.strategy.variate.values())


def test_all_clients_of_a_round_share_one_packed_variate(federation):
    made = federation("method=scaffold", "rounds=1")
    after(made)
    records = {id(message.content[VARIATE]) for message in made.instructions(2)}
    assert len(records) == 1


def test_clients_are_not_stacked(federation):
    with pytest.raises(ConfigError, match=r"batch_clients=2 cannot be used: ScaffoldTrainer does not train by"):
        after(federation("method=scaffold", "engine.batch_clients=2"))


def test_bytes_double_and_corrections_and_passes_are_work(federation):
    """Seven examples in two steps: a multiply-add for each weight and step, and with option 1 a third backward pass."""
    rows = {
        (option, row.round): row.work
        for option in (1, 2)
        for report, clients in federation("method=scaffold", "cohort=6", f"trainer.option={option}").rounds()
        for row in clients
        if row.client == 0
    }
    assert rows[2, 1].down_bytes == 4 * WEIGHTS
    assert rows[2, 1].up_bytes == rows[2, 2].down_bytes == rows[2, 2].up_bytes == 8 * WEIGHTS
    assert rows[2, 1].storage_bytes == 4 * WEIGHTS
    for option in (1, 2):
        assert rows[option, 2].flops - rows[option, 1].flops == 2 * WEIGHTS * 2
    assert rows[1, 1].flops == 2 * rows[2, 1].flops


def test_every_way_of_a_run_gives_the_same_bytes(settings, tmp_path: Path):
    runs = every_way(settings("method=scaffold", "rounds=3"), tmp_path)
    assert runs["one"] == runs["parts"] == runs["alone"] == runs["longer"]
