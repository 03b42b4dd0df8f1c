"""Sub-FedAvg: limit cases that are FedAvg, masks by hand, and averages over those who keep a coordinate."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import answered, task_of
from flwr.app import ConfigRecord

from clients.trainers.personal.sub_fedavg import SubFedAvgTrainer, alive
from clients.worker import Worker
from devices.compression.bits import pack_bits, unpack_bits
from fedsim.errors import ConfigError
from fedsim.messages.records import ARRAYS, record_bytes, tensors_of
from fedsim.messages.updates import ClientUpdate
from fedsim.settings.build import build_world
from strategies.sub_fedavg import SubFedAvg

OWN = ("method=sub_fedavg", "workload.examples_per_client=24", "workload.client_test_fraction=0.25")


def trainer(**own):
    return SubFedAvgTrainer(lr=0.1, batch_size=4, **own)


def test_bits_of_a_mask_come_back():
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == 5
    assert torch.equal(unpack_bits(bits, mask.shape), mask)


def test_pruning_takes_a_share_of_the_smallest_alive_weights_of_each_layer():
    """Ten weights, the smallest already gone: a fifth of the nine alive is one, the smallest of them."""
    made = trainer(prune_step=0.2)
    masks = {"w": torch.tensor([[False, True, True, True, True], [True] * 5])}
    weights = {"w": torch.tensor([[0.0, 0.5, -0.1, 0.9, 0.3], [1.0, -0.2, 2.0, 0.4, 0.6]])}
    left = made.pruned(weights, masks)["w"]
    assert (masks["w"] & ~left).nonzero().tolist() == [[0, 2]]
    assert alive({"w": left}) == 0.8


def test_each_coordinate_is_the_mean_of_those_who_keep_it_by_hand():
    """Weights 1 and 3: both keep the first (10 + 3 x 20) / 4, one each of the next, nobody the last, which stays."""
    strategy = SubFedAvg()
    strategy.weights = {"w": torch.full((1, 4), 7.0), "b": torch.zeros(1)}
    masks = [torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, True, False]])]
    updates = [
        ClientUpdate(i, n, {"w": value * mask, "b": torch.tensor([value])}, {}, {"mask": {"w": pack_bits(mask)}})
        for i, (n, value, mask) in enumerate(zip((1, 3), (10.0, 20.0), masks, strict=True))
    ]
    mean = strategy.combine(1, updates)
    assert mean["w"].tolist() == [[17.5, 10.0, 20.0, 7.0]]
    assert mean["b"].tolist() == [17.5]  # biases: the plain mean
    whole = [replace(u, extras={"mask": {"w": pack_bits(torch.ones(1, 4).bool())}}) for u in updates]
    assert strategy.combine(1, whole)["w"].tolist() == [[17.5, 2.5, 15.0, 0.0]]


def rounds(made, count: int, client: int = 0):
    """A client's training, round by round on one broadcast, with the state that it keeps: context, answer."""
    message = next(iter(made.instructions(1)))
    worker, part = Worker(made.world), message.content
    for number in range(1, count + 1):
        context = worker.context(task_of(part, message.metadata.dst_node_id, number))
        answer = answered(worker, context, part, "train")
        part = type(part)({**part, "state": answer["state"]})
        yield worker, part, context, answer


def test_masks_shrink_to_the_target_and_what_is_pruned_stays_zero(federation):
    own = ("trainer.local_epochs=2", "trainer.least_accuracy=0", "trainer.target=0.4", "trainer.prune_step=0.15")
    before, sparsities = None, []
    for worker, part, _, answer in rounds(federation(*OWN, *own, "trainer.lr=0.05", "model.hidden=[20]"), 7):
        weights, masks = tensors_of(answer[ARRAYS]), tensors_of(answer["mask"])
        masks = {name: unpack_bits(bits, weights[name].shape) for name, bits in masks.items()}
        assert set(masks) == {name for name, t in weights.items() if t.dim() > 1}
        for name, mask in masks.items():
            assert bool((weights[name][~mask] == 0).all())
            assert before is None or not bool((mask & ~before[name]).any()), "pruned weights never come back"
        sparsities.append(1 - alive(masks))
        assert answer["metrics"]["sparsity"] == pytest.approx(sparsities[-1])
        bits = sum(-(-mask.numel() // 8) for mask in masks.values())
        assert record_bytes(answer["mask"]) == bits
        before = masks
        judged = answered(worker, worker.context(task_of(part, 0, 9)), part, "evaluate")["metrics"]
        assert judged["keep_ratio"] == pytest.approx(alive(masks))
    assert sparsities == sorted(sparsities)
    assert 0.2 < sparsities[-1] <= 0.4


@pytest.mark.parametrize(
    "setting",
    ["trainer.least_accuracy=1.0", "trainer.least_change=1.0", "trainer.target=0.01", "trainer.local_epochs=1"],
)
def test_each_condition_alone_keeps_the_mask(federation, setting):
    own = ("trainer.least_accuracy=0", "trainer.local_epochs=2", "trainer.target=0.5", setting)
    for _, _, _, answer in rounds(federation(*OWN, *own), 2):
        assert answer["metrics"]["sparsity"] == 0


def test_the_split_that_decides_is_never_trained_on(federation):
    made = federation(*OWN)
    worker = Worker(made.world)
    message = next(iter(made.instructions(1)))
    client = worker.context(task_of(message.content, message.metadata.dst_node_id, 1))
    training, judged = worker.trainer.split(client)
    assert len(judged) == round(0.1 * len(client.data.train))
    rows = [tuple(row.tolist()) for row in training.data.train.tensors["x"]]
    held = [tuple(row.tolist()) for row in judged.tensors["x"]]
    assert not set(rows) & set(held)
    assert len(rows) + len(held) == len(client.data.train)
    again, _ = worker.trainer.split(worker.context(task_of(message.content, client.client_id, 5)))
    assert torch.equal(again.data.train.tensors["x"], training.data.train.tensors["x"])


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("trainer.prune_step=1.0",), r"trainer.prune_step must be in \(0, 1\), got 1"),
        (("trainer.target=0",), r"trainer.target must be in \(0, 1\), got 0"),
        (("trainer.least_accuracy=2",), r"trainer.least_accuracy must be in \[0, 1\]"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_world(json.dumps(settings("method=sub_fedavg", *overrides)))


def test_clients_that_never_trained_are_judged_with_everything(federation):
    made = federation(*OWN, "evaluate_clients=6")
    made.instructions(1)
    worker = Worker(made.world)
    for message in made.strategy.configure_evaluate(1, made.shared, ConfigRecord(), made.grid):
        client = worker.context(task_of(message.content, message.metadata.dst_node_id, 1))
        assert answered(worker, client, message.content, "evaluate")["metrics"]["keep_ratio"] == 1
