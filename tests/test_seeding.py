"""Torch's own generators, from which functions and layers of others draw, are seeded for each client."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fedsim.seeding import seed_torch


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


@pytest.mark.gpu
def test_dropout_called_as_a_function_on_a_gpu_does_not_depend_on_who_came_before():
    drawn = []
    for before in (0, 3):
        torch.rand(before, device="cuda")
        seed_torch(torch.device("cuda"), 7)
        drawn.append(F.dropout(torch.ones(8, 9, device="cuda")))
    assert torch.equal(*drawn)
