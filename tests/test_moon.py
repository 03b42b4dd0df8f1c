"""MOON: its contrast by hand, what is FedAvg, and what two more models cost."""

import math
from pathlib import Path

import pytest
import torch
from conftest import every_way
from test_scaffold import WEIGHTS, after, same
from torch.nn import functional as F

from clients.trainers.sgd import WorkloadLoss
from clients.trainers.skew.features import features_under
from clients.trainers.skew.moon import PREVIOUS, Contrasted
from fedsim.messages.records import tensors_of
from fedsim.models.convnet import ConvNet
from fedsim.runs.federation import Federation
from fedsim.workloads.base import Tensors
from fedsim.workloads.blobs import Blobs

LR = 0.1


def whole(made: Federation, client: int) -> Tensors:
    """All of a client's examples as one batch."""
    data = made.world.workload.client_data(client).train
    return data.gather(torch.arange(len(data)))


def test_the_contrast_by_hand():
    """Features along x: the received model's too (cosine 1), the previous one's across (0): log(1 + e^(-1 / 0.5))."""
    x, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    contrast = Contrasted(WorkloadLoss(), 1.0, 0.5).contrast
    assert contrast(x, x, y).item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert contrast(x, y, x).item() == pytest.approx(math.log(1 + math.exp(2)))
    assert contrast(x, y, y).item() == pytest.approx(math.log(2))


def test_without_a_pull_all_rounds_are_federated_averaging(federation):
    made = federation("method=moon", "trainer.pull=0", "rounds=3")
    ours, plain = after(made), after(federation("method=fedavg", "rounds=3"))
    assert all(same(a, b) for a, b in zip(ours, plain, strict=True))
    assert not any(made.grid.store.all().values())


def test_a_client_that_has_not_trained_has_no_contrast(federation):
    """Whole cohorts: the first round is plain, the second is not."""
    ours, plain = after(federation("method=moon", "cohort=6")), after(federation("method=fedavg", "cohort=6"))
    assert same(ours[0], plain[0])
    assert not same(ours[1], plain[1])


def test_a_client_keeps_the_model_that_it_sent(federation):
    made = federation("method=moon", "num_clients=1", "cohort=1", "rounds=1")
    (weights,) = after(made)
    kept = made.grid.store.get(0)
    assert all(torch.equal(kept[f"{PREVIOUS}.{name}"], t) for name, t in weights.items())


def test_features_under_other_weights_are_that_models_and_move_no_statistic():
    made = Blobs(name="blobs", model=None, num_classes=3, input_shape=[1, 8, 8], num_clients=2, seed=1)
    torch.manual_seed(0)
    model, other = (ConvNet([1, 8, 8], 3, channels=[4], batch_norm=True) for _ in range(2))
    batch, before = made.sample(5), {name: t.clone() for name, t in model.state_dict().items()}
    found = features_under(other.state_dict(), made, model, batch)
    assert torch.equal(found, other.eval().features(batch["x"]))
    assert model.training
    assert same(before, dict(model.state_dict()))


def test_two_forward_passes_a_step_and_a_model_are_paid_for(federation):
    rows = {
        (row.round, row.client): row.work
        for _, clients in federation("method=moon", "cohort=6").rounds()
        for row in clients
    }
    first, second = rows[1, 0], rows[2, 0]
    assert (first.down_bytes, first.up_bytes, first.storage_bytes) == (4 * WEIGHTS,) * 3
    assert second.storage_bytes == 4 * WEIGHTS
    assert second.flops - first.flops == 2 * 7 * 2 * (16 * 64 + 64 * 10)  # of seven examples
    plain = next(row.work for _, clients in federation("method=fedavg", "cohort=6").rounds() for row in clients)
    assert second.peak_memory_bytes - plain.peak_memory_bytes == 2 * 4 * WEIGHTS


def test_a_step_is_the_gradient_of_the_whole_objective(federation):
    """One step a round: a client's second model by hand, from the received one and the one that it kept."""
    made = federation("method=moon", "rounds=1", "cohort=6", "trainer.batch_size=99", "trainer.pull=3")
    after(made)
    kept, received = dict(made.grid.store.get(0)), tensors_of(made.arrays)
    made.train(2)
    batch, model = whole(made, 0), made.world.workload.build_model()
    model.load_state_dict({name: kept[f"{PREVIOUS}.{name}"] for name in received})
    previous = model.features(batch["x"]).detach()
    model.load_state_dict(received)
    features = model.features(batch["x"])
    near, far = (F.cosine_similarity(features, z) / 0.5 for z in (features.detach(), previous))
    contrast = -(near.exp() / (near.exp() + far.exp())).log().mean()
    loss = F.cross_entropy(model.head(features), batch["y"]) + 3 * contrast
    new = made.grid.store.get(0)
    for (name, p), g in zip(model.named_parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
        assert torch.allclose(new[f"{PREVIOUS}.{name}"], p - LR * g, atol=1e-6)


def test_every_way_of_a_run_gives_the_same_bytes(settings, tmp_path: Path):
    runs = every_way(settings("method=moon", "rounds=3"), tmp_path)
    assert runs["one"] == runs["parts"] == runs["alone"] == runs["longer"]
