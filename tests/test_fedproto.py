"""FedProto: what is averaged and pulled, who predicts what, that no weights travel, and what is paid for."""

import pytest
import torch
from conftest import answered, every_way, task_of
from flwr.app import RecordDict
from test_personal import TINY, alone, federate, state_of
from torch.nn import functional as F
from torchs_counter import counter

from clients.trainers.personal.fedproto import NearestPrototype
from clients.trainers.sgd import SGDTrainer
from fedsim.errors import ConfigError
from fedsim.exchanges.fedproto import averaged
from fedsim.messages.records import record_of, tensors_of
from fedsim.models.mlp import MLP
from fedsim.report.rounds import weights_sha256
from fedsim.settings.compose import compose

SHARED = {"class": torch.tensor([0, 2]), "mean": torch.full((2, 5), 0.7), "count": torch.tensor([4.0, 1.0])}
SHARING = "private=[]"


def test_prototypes_are_means_by_labels_and_those_of_absent_classes_stay():
    """Class 1: (2 x 1 + 6 x 3) / 4 = 5 of two clients; 4 of one; 0 of nobody in this round, and of an earlier one."""

    def record(classes, means, counts):
        return {
            "class": torch.tensor(classes),
            "mean": torch.tensor(means)[:, None].expand(-1, 2),
            "count": torch.tensor(counts),
        }

    before = record([0, 1], [8.0, 9.0], [3.0, 3.0])
    found = averaged([record([1], [2.0], [1.0]), record([1, 4], [6.0, 7.0], [3.0, 2.0])], before)
    assert found["class"].tolist() == [0, 1, 4]
    assert found["mean"].tolist() == [[8.0, 8.0], [5.0, 5.0], [7.0, 7.0]]
    assert found["count"].tolist() == [3.0, 4.0, 2.0]


@pytest.mark.parametrize("pull", [0.0, 0.8])
def test_a_client_follows_its_loss_and_the_prototypes_of_known_classes(pull):
    """By hand; class 1 has no prototype. Then its own prototypes are the means of its features."""
    settings = ["method=fedproto", f"trainer.pull={pull}", "trainer.lr=0.3", "trainer.local_epochs=2"]
    worker, client, part = alone(*settings)
    part = RecordDict({**part, "prototypes": record_of(SHARED)})
    client, model = worker.context(task_of(part, client.client_id, 1)), client.workload.build_model()
    for batch in SGDTrainer(lr=0.3, batch_size=4).shuffled(client, "batches", 2):
        model.zero_grad()
        features = model.features(batch["x"])
        known = (batch["y"] != 1).float()
        distance = ((features - 0.7).square().mean(1) * known).mean()
        (F.cross_entropy(model.head(features), batch["y"]) + pull * distance).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.3 * p.grad
    record = tensors_of(answered(worker, client, part, "train")["prototypes"])
    for name, p in model.named_parameters():
        assert torch.allclose(client.state[f"private.{name}"], p, atol=1e-5), name
    everything = client.data.train.gather(torch.arange(len(client.data.train)))
    features = model.features(everything["x"]).detach()
    for label, mean, count in zip(*(record[name] for name in ("class", "mean", "count")), strict=True):
        mine = features[everything["y"] == label]
        assert count == len(mine)
        assert torch.allclose(mean, mine.mean(0), atol=1e-5)
    assert record["class"].tolist() == sorted(set(everything["y"].tolist()))


def test_the_nearest_prototype_of_the_clients_classes_is_predicted():
    """Squared distances over two features, by mean: class 0 1/2, class 2 2; class 1, which is nearest, is not known."""
    model = MLP([2], 3, [])
    table = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    network = NearestPrototype(model, table, torch.tensor([True, False, True]))
    assert network(torch.zeros(1, 2)).tolist() == [[-0.5, -3.0, -2.0]]


@pytest.mark.parametrize("predict", ["prototype", "head"])
def test_clients_are_judged_as_they_predict(predict):
    run = federate("method=fedproto", f"trainer.predict={predict}", "rounds=1", "cohort=6", "evaluate_clients=6")
    model, shared = run.world.workload.build_model(), run.strategy.prototypes
    for row in (c for c in run.clients if c.phase == "evaluate"):
        model.load_state_dict({n.removeprefix("private."): t for n, t in state_of(run, row.client).items()})
        data = run.world.workload.client_data(row.client)
        batch = data.test.gather(torch.arange(len(data.test)))
        with torch.no_grad():
            scores = model(batch["x"])
            if predict == "prototype":
                scores = -torch.cdist(model.features(batch["x"]), shared["mean"]).square()
                absent = [c for c in range(3) if c not in data.train.labels]
                scores[:, [shared["class"].tolist().index(c) for c in absent]] = -torch.inf
        labels = scores.argmax(1) if predict == "head" else shared["class"][scores.argmax(1)]
        assert row.metrics["accuracy"] == pytest.approx(float((labels == batch["y"]).float().mean()))


def test_prototypes_alone_travel():
    """Up 8 bytes for a class, 4 for its count and 4 for each of 5 features; down the same of all known ones."""
    run = federate("method=fedproto", "cohort=6", "evaluate_clients=2")
    assert weights_sha256(run.arrays) == weights_sha256(federate("method=fedproto", "rounds=1").arrays)
    known = 32 * len(run.strategy.prototypes["class"])
    for client in run.clients:
        labels = run.world.workload.client_data(client.client).train.labels
        trains = client.phase == "train"
        assert client.work.up_bytes == (32 * len(labels.unique()) if trains else 0)
        assert client.work.down_bytes == (0 if trains and client.round == 1 else known)
        assert client.work.storage_bytes == 4 * sum(t.numel() for t in run.model.state_dict().values())


def test_with_shared_weights_and_no_pull_it_is_federated_averaging():
    """Bit for bit; with private ones clients then learn alone, as the test of a client's steps shows."""
    shared = federate("method=fedproto", "trainer.pull=0", SHARING)
    assert weights_sha256(shared.arrays) == weights_sha256(federate("strategy=edge_mean").arrays)
    assert weights_sha256(federate("method=fedproto", SHARING).arrays) != weights_sha256(shared.arrays)


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_every_pass_is_reported(phase):
    worker, client, part = alone("method=fedproto")
    part = RecordDict({**part, "prototypes": record_of(SHARED)})
    client = worker.context(task_of(part, client.client_id, 2))
    with counter() as counted:
        answered(worker, client, part, phase)
    assert client.log.work().flops == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_sharing_nothing_is_for_methods_that_share_something_else():
    with pytest.raises(ConfigError, match=r"^private=\[all\] leaves nothing to share: fedprox sends weights alone; "):
        federate("method=fedprox", "private=[all]")


def test_it_goes_on_where_it_was_cut(tmp_path):
    one, *others = every_way(compose([*TINY, "method=fedproto", "evaluate_clients=3"]), tmp_path).values()
    assert all(rounds == one for rounds in others)
