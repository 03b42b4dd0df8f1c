"""Static batch norms of HeteroFL: statistics are asked of the clients when the model is to be judged."""

import json

import pytest
import torch
from test_subnet import IMAGES
from torch.nn import functional as F

from clients.trainers.widths.heterofl import HeteroFLTrainer
from clients.worker import Worker
from fedsim.errors import ConfigError
from fedsim.exchanges.slices import Slices
from fedsim.messages.records import tensors_of
from fedsim.settings.build import build_world

NORMED = ("method=heterofl", "model=convnet", "model.channels=[4,6]", "model.batch_norm=true", *IMAGES)
NORMED = (*NORMED, "strategy.assign=random", "strategy.levels=[0.5,1.0]", "workload.examples_per_client=9")
MOMENTS = ("running_mean", "running_var")


def statistics(weights) -> dict[str, torch.Tensor]:
    return {name: t for name, t in weights.items() if name.endswith((*MOMENTS, "num_batches_tracked"))}


def test_static_norms_keep_no_statistics_in_training(federation):
    made = federation(*NORMED, "rounds=2", "evaluate_every=9")
    before = statistics(tensors_of(made.arrays))
    for number in (1, 2):
        made.train(number)
        assert all(torch.equal(t, before[name]) for name, t in statistics(tensors_of(made.arrays)).items())
    moving = federation(*NORMED, "trainer.static_norm=false")
    moving.train(1)
    assert all(not torch.equal(t, before[name]) for name, t in statistics(tensors_of(moving.arrays)).items())


def test_statistics_are_those_of_the_clients_data_by_channel(federation):
    """Eight examples in batches of four, first layer: mean and unbiased variance of each batch, by hand.

    Channels that only the wide clients hold are the mean over these, all others over everybody, by examples.
    """
    made = federation(*NORMED, "evaluate_every=9")
    made.train(1)
    weights, sent = tensors_of(made.arrays), made.strategy
    made.complete(1)
    after, workload = tensors_of(made.arrays), made.world.workload
    sums = {moment: torch.zeros(4) for moment in MOMENTS}
    held = torch.zeros(4)
    for client in range(6):
        width = len(sent.sent[client]["body.0"])
        assert width in (2, 4)
        x = workload.client_data(client).train
        x = x.gather(torch.arange(len(x)))["x"]
        assert len(x) == 8
        for batch in x.split(4):
            out = F.conv2d(batch, weights["body.0.weight"], weights["body.0.bias"], stride=2, padding=1)[:, :width]
            if width < 4:
                out = out / (width / 4)  # HeteroFL's scaler
            sums["running_mean"][:width] += out.mean((0, 2, 3))
            sums["running_var"][:width] += out.var((0, 2, 3))
            held[:width] += 1
    assert held[0] > held[3] > 0
    for moment, total in sums.items():
        torch.testing.assert_close(after[f"body.1.{moment}"], total / held, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(t, weights[name]) for name, t in after.items() if not name.endswith(MOMENTS))


def test_asking_for_statistics_costs_a_pass_and_goes_on_the_wire(federation):
    made = federation(*NORMED, "rounds=1")
    (*_, (_, clients)) = made.rounds()
    asked = [client for client in clients if client.phase == "query.statistics"]
    assert [client.client for client in asked] == list(range(6))
    for client in asked:
        assert sum(p.forwards * p.batch for p in client.work.passes) == 8
        assert all(p.backwards == 0 for p in client.work.passes)
        channels = sum(len(kept) for kept in made.strategy.sent[client.client].values())
        assert client.work.up_bytes == 2 * 4 * channels + 8
    without = federation("method=heterofl", "model=lenet5", *IMAGES, "rounds=1")
    (*_, (_, clients)) = without.rounds()
    assert {client.phase for client in clients} == {"train"}


def test_collected_statistics_judge_better_than_none(federation):
    """Untouched statistics are 0 and 1; the same weights with those of the data fit separable blobs."""
    own = ("workload.separation=16", "trainer.mask_labels=false", "trainer.lr=0.1", "cohort=6", "evaluate_every=9")
    made = federation(*NORMED, *own)
    for number in range(1, 5):
        made.train(number)
    before = made.judge(4)["loss"]
    made.complete(4)
    assert made.judge(4)["loss"] < before


def test_batch_norms_are_refused_by_ordered_dropout(settings):
    made = settings("method=fjord", "model=nb201", "model.norm=batch", "model.channels=4", "model.cells=1", IMAGES[0])
    with pytest.raises(ConfigError, match="batch statistics differ"):
        Worker(build_world(json.dumps(made)))


@pytest.mark.parametrize("scale", [True, False])
def test_a_part_is_judged_as_the_network_that_was_trained(federation, scale):
    """With the statistics of one batch, a part gives in evaluation what it gives on that batch in training."""
    workload, trainer = federation(*NORMED).world.workload, HeteroFLTrainer(scale=scale, lr=0.1, batch_size=4)
    trainer.slices = Slices(workload, torch.device("cpu"), trainer.prepare)
    part = trainer.slices.network(trainer.slices.groups.first(0.5)).train()
    x = torch.randn(64, 1, 12, 12)
    trained = part(x)
    for norm in (m for m in part.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.track_running_stats, norm.momentum = True, 1.0
    part(x)
    torch.testing.assert_close(part.eval()(x), trained, rtol=1e-2, atol=1e-3)  # variances of n - 1 examples
