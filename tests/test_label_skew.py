"""FedLC and FedDecorr: their equations by hand, what is FedAvg, and what they cost."""

import pytest
import torch
from test_scaffold import after, same
from torch.nn import functional as F

from clients.trainers.skew.features import last_linear
from clients.trainers.skew.feddecorr import FedDecorrTrainer, correlation
from fedsim.errors import ConfigError
from fedsim.messages.records import tensors_of

SKEWED = ("workload.alpha=0.3", "num_clients=1", "cohort=1", "rounds=1", "trainer.batch_size=99")


@pytest.mark.parametrize("off", ["method=fedlc trainer.tau=0", "method=feddecorr trainer.strength=0"])
def test_switched_off_all_rounds_are_federated_averaging(federation, off: str):
    ours, plain = after(federation(*off.split(), "rounds=3")), after(federation("method=fedavg", "rounds=3"))
    assert all(same(a, b) for a, b in zip(ours, plain, strict=True))
    on = after(federation(off.split()[0], "rounds=3"))
    assert not same(on[0], plain[0])


def test_a_step_of_fedlc_is_that_of_its_equation(federation):
    """Of the classes that the client has: -log(e^(f_y - m_y) / sum e^(f_i - m_i)), m = tau n^(-1/4)."""
    made = federation("method=fedlc", "trainer.tau=2", "trainer.lr=0.1", *SKEWED)
    data, model = made.world.workload.client_data(0).train, made.world.workload.build_model()
    batch = data.gather(torch.arange(len(data)))
    counts = torch.stack([(batch["y"] == c).sum() for c in range(10)])
    present = counts.nonzero().flatten()
    assert 1 < len(present) < 10
    calibrated = model(batch["x"])[:, present] - 2 / counts[present].sqrt().sqrt()
    label = (batch["y"][:, None] == present).int().argmax(1)
    loss = -(calibrated.exp()[torch.arange(len(data)), label] / calibrated.exp().sum(1)).log().mean()
    (weights,) = after(made)
    for (name, p), g in zip(model.named_parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
        assert torch.allclose(weights[name], p - 0.1 * g, atol=1e-6)


def test_a_class_that_a_client_lacks_is_left_as_it_is(federation):
    made = federation("method=fedlc", *SKEWED)
    data, before = made.world.workload.client_data(0).train, tensors_of(made.arrays)
    (weights,) = after(made)
    absent = sorted(set(range(10)) - set(data.labels.tolist()))
    assert torch.equal(weights["head.weight"][absent], before["head.weight"][absent])


@pytest.mark.parametrize("n, d", [(5, 3), (3, 5)])
def test_correlation_is_that_of_the_features(n: int, d: int):
    """Against numpy's correlation matrix, by both ways to its norm."""
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = torch.corrcoef(features.T)
    off = matrix[~torch.eye(d, dtype=torch.bool)]
    assert correlation(features, "frobenius").item() == pytest.approx(float(matrix.square().sum()) / d**2, rel=1e-6)
    authors = float(((n - 1) * off).square().mean()) / n
    assert correlation(features, "off_diagonal").item() == pytest.approx(authors, rel=1e-6)
    assert correlation(features[:1], "frobenius").item() == 0


def test_a_step_of_feddecorr_is_that_of_its_equation(federation):
    made = federation("method=feddecorr", "trainer.strength=5", "trainer.lr=0.1", *SKEWED)
    data, model = made.world.workload.client_data(0).train, made.world.workload.build_model()
    batch = data.gather(torch.arange(len(data)))
    features = model.features(batch["x"])
    z = features - features.mean(0)
    z = z / (z.square().sum(0) / (len(z) - 1) + 1e-8).sqrt()
    loss = F.cross_entropy(model.head(features), batch["y"]) + 5 * (z.T @ z / (len(z) - 1)).square().sum() / 64**2
    (weights,) = after(made)
    for (name, p), g in zip(model.named_parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
        assert torch.allclose(weights[name], p - 0.1 * g, atol=1e-6)


def test_the_product_of_features_is_work(federation):
    """Batches of 4 and 3 with 64 features: three products of [n, 64] by [64, n]."""
    works = [
        row.work.flops
        for method in ("feddecorr", "fedavg")
        for _, clients in federation(f"method={method}", "rounds=1", "cohort=6").rounds()
        for row in clients
        if row.client == 0
    ]
    assert works[0] - works[1] == 3 * 2 * 64 * (4 * 4 + 3 * 3)


def test_a_network_without_a_last_linear_layer_has_no_features():
    with pytest.raises(ConfigError, match="Conv2d has no linear layer, before which its features would be read"):
        last_linear(torch.nn.Conv2d(1, 1, 3))


def test_feddecorrs_step_can_be_recorded_and_clients_are_not_stacked():
    """Padding of a stacked batch would be correlated too."""
    trainer = FedDecorrTrainer(lr=0.1, batch_size=4)
    assert trainer.objective.can_be_mapped()
    assert trainer.reason_against_together(torch.nn.Linear(1, 1))
