"""FedNova: the length of a client's way, what is FedAvg, and what travels."""

from pathlib import Path

import pytest
import torch
from conftest import every_way
from test_scaffold import WEIGHTS, after, same

from clients.trainers.drift.fednova import FedNovaTrainer
from fedsim.errors import ConfigError
from fedsim.exchanges.fednova import NORM, STEPS, WAY
from fedsim.messages.updates import ClientUpdate
from strategies.fednova import FedNova


def test_the_length_of_a_way_is_the_papers_formula():
    """Five steps: of plain SGD, with momentum, with a proximal term; with both, of two steps 1 + (0.9 + 1 - 0.1)."""
    plain = FedNovaTrainer(lr=0.1, batch_size=4)
    rolling = FedNovaTrainer(lr=0.1, batch_size=4, momentum=0.9)
    assert plain.norm(5, 0.0) == 5
    assert rolling.norm(5, 0.0) == pytest.approx((5 - 0.9 * (1 - 0.9**5) / 0.1) / 0.1)
    assert plain.norm(5, 0.2) == pytest.approx((1 - 0.8**5) / 0.2)
    assert rolling.norm(2, 0.1) == pytest.approx(1 + 1.8)


@pytest.mark.parametrize("method", ["", "trainer.momentum=0.9", "trainer.proximal_mu=0.5"])
def test_equal_steps_are_federated_averaging_to_the_last_bit(federation, method: str):
    """Or FedProx, with its term; examples differ, steps do not."""
    common = ("trainer.local_steps=3", "workload.size_alpha=1.0", "rounds=3", *filter(None, [method]))
    plain = "trainer=fedprox" if "proximal" in method else "trainer=sgd"
    ours, theirs = after(federation("method=fednova", *common)), after(federation("strategy=edge_mean", plain, *common))
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_unequal_steps_weigh_ways_by_hand():
    """Equal shares from 1: one step to 2, three to 7, a way of 1 and 2 a step: 2 steps x 1.5 = 3; statistics: 4.5."""
    updates = [
        ClientUpdate(
            i,
            5,
            {"w": torch.tensor([y]), "mean": torch.tensor([y])},
            {},
            {WAY: {STEPS: torch.tensor(tau), NORM: torch.tensor(norm, dtype=torch.float64)}},
        )
        for i, (y, tau, norm) in enumerate(((2.0, 1, 1.0), (7.0, 3, 3.0)))
    ]
    strategy = FedNova()
    strategy.context = type("Context", (), {"trained": frozenset({"w"})})
    strategy.weights = {"w": torch.ones(1), "mean": torch.ones(1)}
    mean = strategy.combine(1, updates)
    assert (mean["w"].item(), mean["mean"].item()) == (4.0, 4.5)
    for update in updates:
        update.extras[WAY][NORM] /= 2  # ways of half the weight: the authors' tau_eff goes on counting steps
    assert strategy.combine(1, updates)["w"].item() == 4.0
    strategy.effective = "steps"
    assert strategy.combine(1, updates)["w"].item() == 7.0


def test_sixteen_bytes_travel_with_the_weights(federation):
    for report, clients in federation("method=fednova").rounds():
        for row in clients:
            assert (row.work.down_bytes, row.work.up_bytes) == (4 * WEIGHTS, 4 * WEIGHTS + 16), report.round
            assert row.work.storage_bytes == 0


def test_what_has_no_length_is_refused():
    with pytest.raises(ConfigError, match=r"trainer.clip_norm=1.0 and trainer.proximal_mu=0.5 exclude"):
        FedNovaTrainer(lr=0.1, batch_size=4, clip_norm=1.0, proximal_mu=0.5)
    with pytest.raises(ConfigError, match=r"trainer.lr times trainer.proximal_mu must be less than 1, got 1.5"):
        FedNovaTrainer(lr=0.1, batch_size=4).norm(2, 1.5)


def test_every_way_of_a_run_gives_the_same_bytes(settings, tmp_path: Path):
    runs = every_way(settings("method=fednova", "workload.size_alpha=1.0", "rounds=3"), tmp_path)
    assert runs["one"] == runs["parts"] == runs["alone"] == runs["longer"]
