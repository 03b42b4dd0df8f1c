"""Dropout draws from the client's own stream, on every device."""

from types import SimpleNamespace

import pytest
import torch

from clients.worker import Worker
from fedsim.seeding import seed_torch
from fedsim.settings.build import build_world


def test_the_generator_of_the_device_is_seeded_beside_that_of_the_cpu(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(
        torch, "get_device_module", lambda d: SimpleNamespace(manual_seed_all=lambda s: seen.append((d.type, s)))
    )
    seed_torch(torch.device("cuda"), 5)
    first = torch.rand(3)
    seed_torch(torch.device("cpu"), 5)
    assert torch.equal(first, torch.rand(3))
    assert seen == [("cuda", 5)]


def test_every_client_of_every_round_seeds_the_device_it_trains_on(federation, monkeypatch: pytest.MonkeyPatch):
    seeds: list[tuple[str, int]] = []
    monkeypatch.setattr("clients.worker.seed_torch", lambda device, seed: seeds.append((device.type, seed)))
    list(federation("rounds=2", "cohort=3", "num_clients=3").rounds())
    assert len(set(seeds)) == len(seeds) == 6
    assert {kind for kind, _ in seeds} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dropout_on_a_gpu_does_not_depend_on_who_came_before(settings):
    import json

    made = build_world(json.dumps(settings("engine.device=cuda", "model.dropout=0.5")))
    worker = Worker(made)
    x = torch.ones(8, *made.workload.input_shape, device="cuda")
    drawn = []
    for before in (0, 3):
        torch.rand(before, device="cuda")
        seed_torch(worker.device, 7)
        drawn.append(worker.model.train()(x).detach())
    assert torch.equal(*drawn)
