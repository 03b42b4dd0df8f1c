"""K clients at once, against the same clients one after the other."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import Parted
from torch.nn import functional as F

from clients.trainers.fedprox import Proximal, Pulled
from clients.trainers.sgd import SGDTrainer, WorkloadLoss
from clients.worker import Worker
from fedsim.errors import ConfigError
from fedsim.messages.cohort import ClientTask
from fedsim.messages.records import from_array
from fedsim.messages.updates import Broadcast
from fedsim.models.mlp import MLP
from fedsim.settings.build import build_world, instantiate
from fedsim.settings.compose import compose
from fedsim.workloads.base import ClientData, Examples

BLOBS = ("workload=blobs", "workload.examples_per_client=20", "workload.input_shape=[3,32,32]")
STREAM = ("workload=digits", "stream=split_classes", "stream.tasks=2", "stream.order=shuffled")
UNEQUAL = ("workload=digits", "partition=dirichlet", "partition.alpha=0.5")
COMMON = (
    "num_clients=12",
    "cohort=7",
    "fleet=uniform",
    "engine.device=cpu",
    "rounds=2",
    "trainer.batch_size=16",
    "trainer.local_epochs=2",
)


def settings(*overrides: str, k: int = 1):
    data = () if any(o.startswith("workload=") for o in overrides) else UNEQUAL
    return compose([*data, *COMMON, *overrides, f"engine.batch_clients={k}"])


def in_dtype(client, dtype: torch.dtype):
    """The same client with its numbers in another precision."""
    parts = (
        Examples({n: t.to(dtype) if t.is_floating_point() else t for n, t in part.tensors.items()})
        for part in (client.data.train, client.data.test)
    )
    return replace(client, data=ClientData(*parts), parameters=list(client.model.parameters()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    "overrides",
    [
        ["model=mlp"],
        ["model=mlp", "trainer.momentum=0.9", "trainer.weight_decay=0.01", "trainer.clip_norm=0.5"],
        ["model=mlp", "method=fedprox", "trainer.proximal_mu=0.1"],
        ["model=mlp", "trainer.local_steps=5"],
        ["model=femnist_cnn", "model.hidden=16"],
        ["model=resnet8", "model.width=8"],
        [*STREAM, "model=mlp", "method=finetune"],
        [*BLOBS, "model=vgg", "model.width=4", "model.hidden=16", "trainer.lr=0.003"],
    ],
    ids=lambda overrides: " ".join(overrides[-3:]),
)
def test_clients_at_once_learn_what_they_learn_alone(overrides: list[str], dtype: torch.dtype, tolerance: float):
    world = build_world(json.dumps(settings(*overrides)))
    worker, trainer = Worker(world), instantiate(world.settings.groups, "trainer")
    worker.model.to(dtype)
    start = copy.deepcopy(worker.model.state_dict())
    task = Broadcast(1, start, settings={"server-round": 1})
    alone = []
    for client_id in range(5):
        worker.model.load_state_dict(start)
        client = in_dtype(worker.context(ClientTask(client_id, Broadcast(1, {}))), dtype)
        live = {name: t.detach() for name, t in worker.model.state_dict().items()}
        update = trainer.fit(replace(client, weights=live), task)
        alone.append((replace(update, weights=copy.deepcopy(live)), client.log.work()))
    clients = [in_dtype(worker.context(ClientTask(client_id, Broadcast(1, {}))), dtype) for client_id in range(5)]
    together = trainer.fit_together(clients, [task] * 5)
    for client, one, (other, work) in zip(clients, together, alone, strict=True):
        assert (one.client_id, one.num_examples) == (other.client_id, other.num_examples)
        assert client.log.work() == work
        assert one.metrics["train_loss"] == pytest.approx(other.metrics["train_loss"], rel=tolerance)
        assert list(one.weights) == list(other.weights)
        for name, weights in one.weights.items():
            assert torch.allclose(weights, other.weights[name], rtol=0, atol=tolerance), name
            assert not torch.equal(weights, start[name])


def test_sizes_of_clients_and_last_batches_differ_in_these_tests():
    """Or the padding would not be tested."""
    workload = build_world(json.dumps(settings())).workload
    sizes = [len(workload.client_data(client).train) for client in range(5)]
    assert len({-(-size // 16) for size in sizes}) > 1
    assert len({size % 16 for size in sizes}) > 1


def test_a_run_does_not_depend_on_its_parts_but_on_the_groups():
    """70 clients are blocks of two; groups of four are two blocks. K = 1 is the sequential run, bit for bit."""
    from fedsim.runs.federation import Federation

    def weights(k: int, clients: int):
        tiny = settings("num_clients=80", "cohort=70", "rounds=1", "trainer.local_epochs=1", *BLOBS, k=k)
        run = Federation(build_world(json.dumps(tiny)), Parted(clients))
        list(run.rounds())
        return torch.cat([torch.from_numpy(from_array(a).copy()).flatten() for a in run.arrays.values()])

    four = weights(4, 16)
    assert torch.equal(four, weights(4, 1))
    assert torch.equal(weights(1, 16), weights(1, 1))
    assert torch.allclose(four, weights(1, 16), rtol=0, atol=1e-5)


class OfTheClient(WorkloadLoss):
    """A loss that looks at the client; it does not say that it is pure, as the one it comes from does."""

    def __call__(self, run, batch):
        return super().__call__(run, batch) * (1 + run.client.client_id)


class Curious(SGDTrainer):
    objective = OfTheClient()


class Frank(Curious):
    """Says nothing of its own, so it stays as impure as its parent."""


class Noisy(Pulled):
    """An equation of its own, around one that is pure."""

    def __call__(self, run, batch):
        return super().__call__(run, batch) * (1 + run.client.client_id)


class Stronger(Proximal):
    """A part of an equation that looks at the client."""

    def strength(self, run):
        return 1.0 + run.client.client_id


class Around(Pulled):
    """Says that it is pure; what it is around does not."""

    is_pure = True


class WithNoise(SGDTrainer):
    objective = Noisy(WorkloadLoss(), 0.1)


class WithStrength(SGDTrainer):
    objective = Stronger(WorkloadLoss(), 0.1)


class WithImpurePart(SGDTrainer):
    objective = Around(OfTheClient(), 0.1)


class Hasty(SGDTrainer):
    """Each client has a learning rate of its own."""

    def learning_rate(self, client, broadcast):
        return super().learning_rate(client, broadcast) / (1 + client.client_id)


class Busy(SGDTrainer):
    """Does something around the loop, which clients that train at once would miss."""

    def fit(self, client, broadcast):
        return super().fit(client, broadcast)


class Stepping(SGDTrainer):
    """Takes steps of its own."""

    def step(self, parameters, gradients, lr, velocity):
        return super().step(parameters, gradients, lr / 2, velocity)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer._target_=test_batched.Curious"], "Curious does not train by a pure function"),
        (["trainer._target_=test_batched.Frank"], "Frank does not train by a pure function"),
        (["trainer._target_=test_batched.WithNoise"], "WithNoise does not train by a pure function"),
        (["trainer._target_=test_batched.WithStrength"], "WithStrength does not train by a pure function"),
        (["trainer._target_=test_batched.WithImpurePart"], "WithImpurePart does not train by a pure function"),
        (["trainer._target_=test_batched.Busy"], "Busy does not train by a pure function"),
        (["trainer._target_=test_batched.Stepping"], "Stepping does not train by a pure function"),
        ([*STREAM, "model=mlp", "method=ocs"], "OCSTrainer does not train by a pure function"),
        (
            [*BLOBS, "model=vgg", "model.dropout=0.1"],
            "VGG uses dropout, which would be drawn differently",
        ),
    ],
)
def test_what_cannot_be_batched_is_refused_in_one_sentence(overrides: list[str], sentence: str):
    with pytest.raises(ConfigError, match=rf"^engine\.batch_clients=4 cannot be used: {sentence}.*; set engine\.batch"):
        Worker(build_world(json.dumps(settings(*overrides, k=4))))


def test_clients_with_learning_rates_of_their_own_are_refused(federation):
    made = federation("engine.batch_clients=2", "workload=blobs", "trainer._target_=test_batched.Hasty")
    with pytest.raises(ConfigError, match=r"have learning rates from [\d.]+ to [\d.]+; set engine"):
        list(made.rounds())


def test_random_numbers_of_a_model_without_dropout_layers_are_refused(federation, monkeypatch):
    """They would be drawn once for all clients, not from each one's own stream."""
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda model, x: forward(model, F.dropout(x, 0.5, model.training)))
    with pytest.raises(ConfigError, match=r"engine\.batch_clients=2 failed: vmap: called random operation"):
        list(federation("engine.batch_clients=2", "workload=blobs").rounds())
