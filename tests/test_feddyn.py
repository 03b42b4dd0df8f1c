"""FedDyn: its first round, what client and server keep, and what it costs."""

from pathlib import Path

import torch
from conftest import every_way
from test_scaffold import WEIGHTS, after

from clients.trainers.drift.feddyn import LINEAR
from fedsim.messages.records import tensors_of
from fedsim.messages.updates import ClientUpdate
from strategies.feddyn import FedDyn


def test_in_its_first_round_a_client_is_fedproxs(federation, monkeypatch):
    """The server adds what it has learnt from three of six clients: half of the mean's move, by equal sizes."""
    ours, prox = (
        federation("method=feddyn", "trainer.alpha=0.5"),
        federation("strategy=edge_mean", "trainer=fedprox", "trainer.proximal_mu=0.5"),
    )
    before, (mine, *_), (mean, *_) = tensors_of(ours.arrays), after(ours), after(prox)
    for name, x in before.items():
        assert torch.allclose(mine[name], mean[name] + 0.5 * (mean[name] - x), atol=1e-6)


def test_what_clients_and_server_keep_agrees(federation):
    """H is the mean of l over all clients, where l = -alpha sum (y - x) and the server keeps -h / alpha."""
    made = federation("method=feddyn", "trainer.alpha=0.5", "rounds=3")
    after(made)
    for name, moves in made.strategy.moves.items():
        own = [made.grid.store.get(i).get(f"{LINEAR}.{name}", torch.zeros(())).double() for i in range(6)]
        assert moves.abs().max() > 1e-3
        assert torch.allclose(0.5 * moves, sum(own) / 6, atol=1e-7)


def test_the_servers_step_by_hand():
    """Two of four from 1 to 2 and 5: mean 3.5 and moves (1 + 4) / 4 = 1.25; a statistic is averaged."""
    strategy = FedDyn()
    strategy.context = type("Context", (), {"trained": frozenset({"w"}), "num_clients": 4})
    strategy.weights = {"w": torch.ones(1), "mean": torch.ones(1)}
    updates = [
        ClientUpdate(i, i + 1, {"w": torch.tensor([y]), "mean": torch.tensor([y])}) for i, y in ((0, 2.0), (1, 5.0))
    ]
    assert strategy.combine(1, updates) == {"w": torch.tensor([4.75]), "mean": torch.tensor([3.5])}
    assert strategy.combine(2, updates)["w"].item() == 3.5 + 2.5


def test_a_reply_that_is_not_taken_leaves_the_linear_term(federation):
    made = federation("method=feddyn", "rounds=1", "cohort=6")
    after(made)
    before = {i: dict(made.grid.store.get(i)) for i in range(6)}
    made.grid.deadline_s = 1e-9
    made.train(2)
    assert {r.outcome for r in made.grid.take_reports()} == {"late"}
    for i, kept in before.items():
        assert kept
        assert all(torch.equal(t, made.grid.store.get(i)[name]) for name, t in kept.items())


def test_only_weights_travel_and_the_linear_term_is_work_from_the_second_round_on(federation):
    rows = {
        (row.round, row.client): row.work
        for _, clients in federation("method=feddyn", "cohort=6").rounds()
        for row in clients
    }
    for work in rows.values():
        assert (work.down_bytes, work.up_bytes, work.storage_bytes) == (4 * WEIGHTS,) * 3
    assert rows[2, 0].flops - rows[1, 0].flops == 2 * WEIGHTS * 2


def test_every_way_of_a_run_gives_the_same_bytes(settings, tmp_path: Path):
    runs = every_way(settings("method=feddyn", "rounds=3"), tmp_path)
    assert runs["one"] == runs["parts"] == runs["alone"] == runs["longer"]
