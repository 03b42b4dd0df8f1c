"""Training with PPP: its loss, its keep ratio, what it computes, and which settings it takes."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import answered, task_of
from ppp_federation import IMAGES, MODELS, PPP, start
from torch.nn import functional as F
from torchs_counter import counter

from devices.compression.gates import PerSample, PerUser, hard
from devices.profile import load_profile
from fedsim.errors import ConfigError
from fedsim.grid.edge import Enrolled
from fedsim.messages.records import tensors_of
from fedsim.report.rounds import weights_sha256

# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["per_layer", "flops"])
def test_the_budget_is_zero_with_zero_gradient_where_every_mean_gate_is_the_ratio(federation, mode):
    _, worker, *_ = start(federation, *PPP, "model=lenet5", *IMAGES, f"trainer.reg_mode={mode}")
    trainer = worker.trainer
    soft = {n: torch.tensor([[0.9, 0.2], [0.8, 0.3]], requires_grad=True) for n in trainer.plan.names}
    value = trainer.objective.regulariser({n: hard(s) for n, s in soft.items()}, 0.5, trainer.flops)
    assert value == 0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(value, list(soft.values())))
    off = trainer.objective.regulariser({n: hard(s) for n, s in soft.items()}, 0.25, trainer.flops)
    expected = 0.0625 * (len(soft) if mode == "per_layer" else 1)
    assert off.item() == pytest.approx(expected)
    assert all(bool((g > 0).all()) for g in torch.autograd.grad(off, list(soft.values())))  # too many are open


def test_the_loss_is_both_paths_and_the_budget(federation):
    _, worker, _, client, task = start(federation, *PPP, "model=lenet5", *IMAGES, "trainer.beta=3")
    trainer, batch = worker.trainer, client.data.train.gather(torch.arange(4))
    narrowed = trainer.narrowed(client, trainer.channels_sent(task), task.weights)
    gates = trainer.gates(task)
    gated = trainer.gated(narrowed, gates, trainer.channels_sent(task))
    value = trainer.objective(trainer.start(gated, task), batch)
    alone, user = PerSample(gates, 0.5), PerUser(gates, 0.5)
    expected = sum(F.cross_entropy(gated.model.through(s)(batch["x"]), batch["y"]) for s in (alone, user))
    for values in (alone.values, user.values):
        expected = expected + 3 * sum((g.mean() - 0.5) ** 2 for g in values.values())
    torch.testing.assert_close(value, expected)


def test_the_diversity_term_is_one_for_the_mask_of_all(federation):
    sums = {}
    for gamma in (0.0, 0.5):
        _, worker, _, client, task = start(federation, *PPP, "model=lenet5", *IMAGES, f"trainer.diversity={gamma}")
        trainer, gates = worker.trainer, worker.trainer.gates(task)
        gated = trainer.gated(
            trainer.narrowed(client, trainer.channels_sent(task), task.weights), gates, trainer.channels_sent(task)
        )
        batch, user = client.data.train.gather(torch.arange(4)), PerUser(gates, 0.5)
        gated.model.through(user)(batch["x"])
        share = {n: p[0].detach() for n, p in user.prototypes.items()}
        shared = replace(task, extras={**task.extras, "share": share})
        sums[gamma] = trainer.objective(trainer.start(gated, shared), batch).item()
    assert sums[0.5] - sums[0.0] == pytest.approx(0.5 * len(share), rel=1e-5)


# --- the keep ratio ---------------------------------------------------------------------------------------------------


def trained(federation, *overrides: str) -> str:
    made = federation(*overrides)
    list(made.rounds())
    return weights_sha256(made.arrays)


@pytest.mark.parametrize("mode", ["full", "masked"])
@pytest.mark.parametrize("model", ["mlp", "lenet5", "resnet8", "nb201"])
def test_keep_ratio_one_is_federated_averaging_bit_for_bit(federation, model, mode):
    own = (*MODELS[model], "trainer.momentum=0.5", "trainer.weight_decay=0.001")
    assert trained(federation, *own, "method=ppp", "strategy.ratio=1.0", f"strategy.train_mode={mode}") == trained(
        federation, *own, "strategy=edge_mean"
    )


def test_the_warm_up_falls_from_one_to_the_ratio(federation):
    made = federation("method=ppp", "strategy.ratio=0.4", "rounds=20")
    ratios = [min(made.instructions(r), key=str).content["config"]["keep-ratio"] for r in (1, 2, 3, 4, 5, 6, 20)]
    assert ratios == pytest.approx([1, 0.85, 0.7, 0.55, 0.4, 0.4, 0.4])


def test_slower_devices_get_smaller_networks_by_predicted_latency(federation):
    made = federation(
        *("method=ppp", "strategy.ratio=null", "strategy.latency_budget_ms=1.0", "latency=structured", "model=vgg"),
        *("fleet=mixed", "num_clients=40", "cohort=3", *IMAGES),
    )
    made.strategy.begin_round(tensors_of(made.arrays))
    strategy, latency = made.strategy, made.world.latency

    def predicted(ratio, device):
        return latency.inference_ms(strategy.slices.cost(strategy.plan.at_ratio(ratio)), device)

    slow, fast = load_profile("raspberry_pi_zero_2w"), load_profile("raspberry_pi_4")
    strategy.latency_budget_ms = predicted(1.0, fast)
    assert strategy.ratio(Enrolled(0, fast)) == 1.0
    ratio = strategy.ratio(Enrolled(0, slow))
    assert ratio < 1
    wider = min(level for level in strategy.levels if level > ratio)
    assert predicted(wider, slow) > strategy.latency_budget_ms


def test_levels_are_refused_for_gates_that_do_not_read_them(federation):
    with pytest.raises(
        ConfigError, match=r"trainer\.levels=\[0\.3\] needs gates that read the keep ratio: set strategy"
    ):
        list(federation(*PPP, *MODELS["lenet5"], "trainer.levels=[0.3]").rounds())


def test_levels_are_drawn_for_conditioned_gates(federation):
    own = (*PPP, *MODELS["lenet5"], "strategy.budget_conditioned=true", "trainer.levels=[0.3,1.0]")
    _, worker, _part, client, task = start(federation, *own, "trainer.local_epochs=8")
    update = worker.trainer.fit(client, task)
    assert math.isfinite(update.metrics["train_loss"])
    narrowed = worker.trainer.narrowed(client, worker.trainer.channels_sent(task), task.weights)
    gated = worker.trainer.gated(narrowed, worker.trainer.gates(task), worker.trainer.channels_sent(task))
    drawn = [round(float(b["keep-ratio"]), 1) for b in worker.trainer.batches(gated, task)]
    assert set(drawn) == {0.3, 1.0}


@pytest.mark.parametrize("mode", ["full", "masked"])
@pytest.mark.parametrize("model", ["mlp", "lenet5", "resnet8"])
def test_reported_flops_under_gates_are_those_that_torch_counts(federation, model, mode):
    own = (*MODELS[model], *PPP, f"strategy.train_mode={mode}", "trainer.momentum=0.9")
    _, worker, part, client, _ = start(federation, *own)
    answered(worker, client, part, "train")
    client = worker.context(task_of(part, client.client_id, 1))
    with counter() as counted:
        answered(worker, client, part, "train")
    assert client.log.work().flops == pytest.approx(counted.get_total_flops(), rel=1e-6)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("trainer.mask=mine",), "value for trainer.mask"),
        (("trainer.mask_mode=top",), "did you mean 'topk'"),
        (("trainer.controls=[denses]",), "did you mean 'dense'"),
        (("trainer.reg_mode=flop",), "did you mean 'flops'"),
        (("trainer.support=0",), "trainer.support must be at least 1"),
        (("strategy.ratio=0.0",), r"strategy.ratio must be null or in \(0, 1\]"),
        (("strategy.latency_budget_ms=3.0",), "needs strategy.ratio=null"),
        (("strategy.train_mode=mask",), "did you mean 'masked'"),
        (("strategy.warmup=2.0",), r"strategy.warmup must be in \[0, 1\]"),
    ],
)
def test_wrong_settings_are_one_sentence(federation, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        federation("method=ppp", *overrides)


def test_halves_that_do_not_belong_together_say_so(federation):
    with pytest.raises(ConfigError, match="got no keep ratio"):
        list(federation("method=ppp", "strategy=edge_mean").rounds())
