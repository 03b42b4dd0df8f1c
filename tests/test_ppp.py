"""Prototype-based personalised pruning: what must hold exactly of gates, masks, cut networks and their federation."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import answered, sent_to, task_of
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch.nn import functional as F
from torchs_counter import counter

from clients.trainers.widths.masks import deployed
from clients.worker import Worker
from devices.compression.channels import ChannelGroups
from devices.compression.gates import (
    GatedNetwork,
    Gates,
    PerSample,
    PerUser,
    hard,
    layer_flops,
    mean_jaccard_distance,
    personal_masks,
)
from devices.profile import load_profile
from fedsim.errors import ConfigError
from fedsim.exchanges.slices import BITS, KEPT
from fedsim.grid.edge import Enrolled
from fedsim.messages.records import (
    ARRAYS,
    METRICS,
    STATE,
    payload_bytes,
    record_bytes,
    record_of,
    tensors_of,
    update_of,
)
from fedsim.report.rounds import weights_sha256
from fedsim.settings.build import build_world

IMAGES = ("workload.input_shape=[1,16,16]", "workload.separation=16")
PPP = ("method=ppp", "trainer.batch_size=4", "strategy.warmup=0")
MASKED = (*PPP, "strategy.train_mode=masked")
MODELS = {
    "mlp": ("model=mlp", "model.hidden=[12,9]", "workload.input_shape=[6]"),
    "lenet5": ("model=lenet5", *IMAGES),
    "small_cnn": ("model=small_cnn", "model.width=6", "model.hidden=12", *IMAGES),
    "femnist_cnn": ("model=femnist_cnn", "model.hidden=12", *IMAGES),
    "vgg": ("model=vgg", "model.width=4", "model.hidden=8", *IMAGES),
    "resnet8": ("model=resnet8", "model.width=8", "model.groups=4", *IMAGES),
    "nb201": ("model=nb201", "model.channels=4", "model.cells=1", "model.norm=batch", *IMAGES),
}


def built(settings, model: str):
    """Workload, model in evaluation mode, groups, and gates that really differ from input to input."""
    workload = build_world(json.dumps(settings(*MODELS[model]))).workload
    network = workload.build_model().eval()
    groups = ChannelGroups.find(network, workload.sample(2)["x"])
    torch.manual_seed(0)
    gates = Gates(network, groups)
    for mlp in gates.mlps.values():
        torch.nn.init.normal_(mlp[2].weight, 0, 3)
        torch.nn.init.normal_(mlp[2].bias, 0, 1)
    for module in network.modules():  # fresh norms are all alike
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.ndim == 1 and tensor.is_floating_point():
                tensor.data += 0.3 * torch.rand_like(tensor)
    return workload, network, groups, gates


def fixed(masks):
    """A switch with the same masks for every example: by group, [units]."""
    return lambda name, pooled: masks[name].to(pooled)[None]


def start(federation, *overrides: str, round: int = 1):
    """Federation, worker, and the id, records and context of the first client of a round."""
    made = federation(*overrides)
    message = min(made.instructions(round), key=lambda m: m.metadata.dst_node_id)
    worker, part = Worker(made.world), message.content
    client = worker.context(task_of(part, message.metadata.dst_node_id, round))
    return made, worker, part, client, sent_to(worker, client, part)


# --- gates ------------------------------------------------------------------------------------------------------------


def test_a_hard_gate_is_exactly_0_or_1_with_the_gradient_of_the_soft_one():
    logits = torch.linspace(-3, 3, 101, requires_grad=True)
    soft = torch.sigmoid(logits)
    gates = hard(soft)
    assert set(gates.tolist()) == {0.0, 1.0}
    assert torch.equal(gates == 1, soft > 0.5)
    (gradient,) = torch.autograd.grad(gates.sum(), logits)
    torch.testing.assert_close(gradient, (soft * (1 - soft)).detach())


@pytest.mark.parametrize("model", MODELS)
def test_open_gates_leave_the_network_as_it_is_bit_for_bit(settings, model):
    workload, network, _, gates = built(settings, model)
    x = workload.sample(5)["x"]
    ones = fixed({name: torch.ones(gates.units(name)) for name in gates.names})
    with torch.no_grad():
        assert torch.equal(GatedNetwork(network, gates).eval().through(ones)(x), network(x))


@pytest.mark.parametrize("mode", ["threshold", "topk"])
@pytest.mark.parametrize("model", MODELS)
def test_the_cut_network_computes_what_the_masked_one_does(settings, model, mode):
    workload, network, groups, gates = built(settings, model)
    x = workload.sample(8)["x"]
    found = personal_masks(GatedNetwork(network, gates), x, 0.5, mode)
    kept = gates.kept(found.masks)
    assert 0 < gates.keep_ratio(kept) < 1
    small = groups.build(network, kept)
    with torch.no_grad():
        masked = GatedNetwork(network, gates).eval().through(fixed(found.masks))(x)
        torch.testing.assert_close(small(x), masked, rtol=0, atol=1e-5)
        assert not torch.allclose(masked, network(x))
    # the gates, too, see the same on the network that was cut
    again = personal_masks(GatedNetwork(small, gates, kept), x, 0.5, "threshold")
    if mode == "threshold":
        assert all(torch.equal(again.masks[n], found.masks[n]) for n in gates.names)
        for n in gates.names:
            torch.testing.assert_close(again.prototypes[n], found.prototypes[n], rtol=0, atol=1e-5)


def test_gates_act_on_inner_channels_of_residual_blocks_only(settings):
    _, _, groups, gates = built(settings, "resnet8")
    assert gates.names == [f"blocks.{i}.conv1" for i in range(3)]
    assert len(groups.groups) > 3
    half = gates.at_ratio(0.5)
    assert all(len(half[n]) == groups.groups[n].channels for n in groups.groups if n not in gates.names)


def test_gradients_reach_gates_that_are_closed_for_all_examples(settings):
    workload, network, _, gates = built(settings, "lenet5")
    x = workload.sample(4)["x"]
    switch = PerSample(gates, 0.5)
    GatedNetwork(network, gates).through(switch)(x).square().sum().backward()
    first = next(iter(gates.mlps.values()))[2].bias.grad
    closed = (next(iter(switch.values.values())) == 0).all(0)
    assert bool(closed.any())
    assert bool((first[closed] != 0).any()), "a closed gate could never open again"


def test_a_prototype_is_the_mean_of_gates_and_knows_no_order(settings):
    workload, network, _, gates = built(settings, "lenet5")
    gated, x = GatedNetwork(network, gates), workload.sample(6)["x"]
    one = personal_masks(gated, x[:1], 0.5, "threshold")
    copies = personal_masks(gated, x[:1].expand(5, *x.shape[1:]), 0.5, "threshold")
    shuffled = personal_masks(gated, x[torch.tensor([3, 1, 5, 0, 2, 4])], 0.5, "threshold")
    straight = personal_masks(gated, x, 0.5, "threshold")
    first = gates.names[0]
    with torch.no_grad():
        alone = gates.soft(first, gates.site(first).pooled(x, None), 0.5)
    torch.testing.assert_close(straight.prototypes[first], alone.mean(0))
    for name in gates.names:
        torch.testing.assert_close(copies.prototypes[name], one.prototypes[name])
        torch.testing.assert_close(shuffled.prototypes[name], straight.prototypes[name])
        assert torch.equal(shuffled.masks[name], straight.masks[name])


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("model", ["lenet5", "resnet8"])
def test_topk_keeps_exactly_its_share_and_of_equal_prototypes_the_first(settings, model, ratio):
    _, _, groups, gates = built(settings, model)
    for name in gates.names:
        unit, units = groups.groups[name].unit, gates.units(name)
        mask = gates.choose(name, torch.full((units,), 0.5), ratio, "topk")
        count = -(-math.ceil(ratio * groups.groups[name].channels - 1e-9) // unit)
        assert mask.tolist() == [True] * count + [False] * (units - count)


def test_threshold_keeps_the_highest_where_nothing_is_above_one_half(settings):
    _, _, _, gates = built(settings, "mlp")
    name = gates.names[0]
    low = torch.full((gates.units(name),), 0.2)
    low[3] = 0.4
    assert gates.choose(name, low, 0.5, "threshold").nonzero().tolist() == [[3]]
    held = torch.ones(gates.units(name)).bool()
    held[3] = False
    assert gates.choose(name, low, 0.5, "threshold", held).nonzero().tolist() == [[0]]


def test_conditioned_gates_read_the_ratio_and_come_back_from_their_tensors(settings):
    workload, network, groups, _ = built(settings, "lenet5")
    gates = Gates(network, groups, hidden=5, conditioned=True)
    again = Gates.like(gates.state_dict(), network, groups)
    assert again.conditioned
    pooled = gates.site(gates.names[0]).pooled(workload.sample(3)["x"], None)
    a, b = (gates.soft(gates.names[0], pooled, ratio) for ratio in (0.3, 0.9))
    assert not torch.equal(a, b)
    assert torch.equal(again.soft(gates.names[0], pooled, 0.3), a)


def test_jaccard_distance_by_hand():
    """Pairs of {0,1}, {1,2}, {0,1}: 1 - 1/3, 0, 1 - 1/3."""
    masks = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 0]]).bool()
    assert mean_jaccard_distance(masks) == pytest.approx(4 / 9)
    assert mean_jaccard_distance(masks[:1]) == 0


def test_flops_of_layers_by_hand(settings):
    """5x5 convolutions of lenet5 on 16 x 16, padded or not: 2 x weights x positions; linear layers have one."""
    workload, network, _, gates = built(settings, "lenet5")
    x = workload.sample(1)["x"]
    found = layer_flops(network, x, gates.names)
    with counter() as counted, torch.no_grad():
        network(x)
    head = 2 * network.head.weight.numel() if hasattr(network, "head") else 2 * list(network.parameters())[-2].numel()
    assert sum(found.values()) + head == counted.get_total_flops()


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


# --- the federation ---------------------------------------------------------------------------------------------------


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


def uplinks(made, worker_rounds: int):
    """What every client sent in some rounds: round, records without state, and the strategy's new state after it."""
    worker = Worker(made.world)
    for number in range(1, worker_rounds + 1):
        messages, replies = made.instructions(number), []
        for message in messages:
            client = message.metadata.dst_node_id
            answer = answered(
                worker, worker.context(task_of(message.content, client, number)), message.content, "train"
            )
            replies.append((client, message.content, answer))
        yield number, worker, replies
        updates = [update_of(answer, client) for client, _, answer in replies]
        made.take(number, record_of(made.strategy.combine(number, updates)))


@pytest.mark.parametrize("mode", ["full", "masked"])
def test_no_support_prototype_or_label_is_sent_up(federation, mode):
    """Names and sizes: the network or its part, the gate modules, and one bit per channel; nothing of another size."""
    own = (*PPP, "model=lenet5", *IMAGES, f"strategy.train_mode={mode}")
    made = federation(*own)
    for _, worker, replies in uplinks(made, 3):
        groups = worker.trainer.slices.groups
        channels = sum(g.channels for g in groups.groups.values())
        for _, _, answer in replies:
            arrays = {n: r for n, r in answer.items() if isinstance(r, ArrayRecord)}
            assert set(arrays) <= {ARRAYS, "gates", "mask", "kept", STATE}
            assert STATE not in arrays, "there is nothing to keep"
            assert set(answer) - set(arrays) == {METRICS}
            assert set(answer[METRICS]) == {"num-examples", "train_loss", "keep_ratio"}
            gates = sum(p.numel() for p in worker.trainer.plan.parameters())
            assert record_bytes(arrays["gates"]) == 4 * gates
            bits = [record_bytes(arrays[n]) for n in ("mask", "kept") if n in arrays]
            assert bits
            assert all(size == -(-channels // 8) for size in bits)
            kept = groups.unpack(tensors_of(arrays["kept"])[BITS]) if mode == "masked" else groups.all()
            part = groups.slice(worker.trainer.slices.model.state_dict(), kept)
            assert record_bytes(arrays[ARRAYS]) == sum(t.numel() * t.itemsize for t in part.values())


def test_masked_training_sends_and_trains_only_the_clients_own_channels(federation):
    made = federation(*MASKED, "trainer.mask_mode=topk", "model=lenet5", *IMAGES, "cohort=6", "rounds=3")
    sizes = {}
    for number, worker, replies in uplinks(made, 2):
        sizes[number] = [payload_bytes(content) for _, content, _ in replies]
        plan, groups = worker.trainer.plan, worker.trainer.slices.groups
        for client, content, answer in replies:
            held = groups.unpack(tensors_of(content[KEPT])[BITS])
            own = groups.unpack(tensors_of(answer[KEPT])[BITS])
            assert all(bool(torch.isin(own[n], held[n]).all()) for n in own)
            assert {n: len(own[n]) for n in own} == {n: groups.count(n, 0.5) for n in plan.names}
            client_context = worker.context(task_of(content, client, number))
            answered(worker, client_context, content, "train")
            trained_passes = [p for p in client_context.log.work().passes if p.backwards]
            assert all(
                p.network.parameter_bytes < worker.network.parameter_bytes
                for p in trained_passes
                if not p.network.name.endswith("gated")
            )
        before = tensors_of(made.arrays)
        kept = [groups.mask_of(groups.unpack(tensors_of(a[KEPT])[BITS])) for _, _, a in replies]
    assert max(sizes[2]) < min(sizes[1])
    after = tensors_of(made.arrays)
    assert set(after) == set(before)
    name = made.strategy.plan.names[0]
    nobody = ~torch.stack([masks[name] for masks in kept]).any(0)
    assert torch.equal(after[f"{name}.weight"][nobody], before[f"{name}.weight"][nobody])
    assert not torch.equal(after[f"{name}.weight"][~nobody], before[f"{name}.weight"][~nobody])


def test_disjoint_masks_leave_each_coordinate_to_its_owner(federation):
    made, worker, _part, client, task = start(federation, *MASKED, "model=mlp", "model.hidden=[8]")
    groups = made.strategy.slices.groups
    update = worker.trainer.fit(client, task)
    parts, kepts = [], ([0, 3], [1, 6])
    for number, channels in enumerate(kepts):
        kept = {"body.1": torch.tensor(channels)}
        tensors = {n: torch.randn(t.shape) for n, t in groups.slice(task.weights, kept).items()}
        extras = {**update.extras, KEPT: {BITS: groups.pack(kept)}}
        extras.pop("mask", None)
        parts.append(replace(update, client_id=number, num_examples=3 + 5 * number, weights=tensors, extras=extras))
    mean = made.strategy.combine(1, parts)["body.1.weight"]
    for one, channels in zip(parts, kepts, strict=True):
        assert torch.equal(mean[channels], one.weights["body.1.weight"])
    assert torch.equal(mean[[2, 4, 5, 7]], made.strategy.weights["body.1.weight"][[2, 4, 5, 7]])
    assert made.strategy.distance == 1.0


def test_gates_are_averaged_over_all_clients_by_their_examples(federation):
    made, worker, _part, client, task = start(federation, *PPP)
    update = worker.trainer.fit(client, task)
    gates = {n: t.clone() for n, t in update.extras["gates"].items()}
    more = {n: t + 1 for n, t in gates.items()}
    other = next(number for number in made.strategy.sent if number != client.client_id)
    a, b = replace(update, num_examples=3), replace(update, client_id=other, num_examples=1)
    made.strategy.combine(
        1, [replace(a, extras={**a.extras, "gates": gates}), replace(b, extras={**b.extras, "gates": more})]
    )
    for name, tensor in made.strategy.gates.items():
        torch.testing.assert_close(tensor, gates[name] + 0.25)


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


# --- deployment -------------------------------------------------------------------------------------------------------

JUDGED = ("workload.client_test_fraction=0.5", "workload.examples_per_client=24", "evaluate_clients=6")


def judge(made, number: int = 1, clients: int = 6):
    """A worker, and by client its context and metrics after `evaluate`."""
    made.instructions(number)
    messages = made.strategy.configure_evaluate(number, made.shared, ConfigRecord(), made.grid)
    worker, found = Worker(made.world), {}
    for message in messages:
        client = worker.context(task_of(message.content, message.metadata.dst_node_id, number))
        found[client.client_id] = (
            client,
            message.content,
            answered(worker, client, message.content, "evaluate")["metrics"],
        )
    return worker, found


def perturbed(made):
    """Fresh gates are open for all: these differ from user to user."""
    made.instructions(1)
    torch.manual_seed(1)
    made.strategy.gates = {
        n: torch.randn(t.shape) * 3 if n.endswith("2.weight") else torch.zeros_like(t) if n.endswith("2.bias") else t
        for n, t in made.strategy.gates.items()
    }
    return made


@pytest.mark.parametrize("model", ["lenet5", "resnet8"])
def test_every_client_is_judged_with_its_cut_network_and_priced_for_it(federation, model):
    made = perturbed(federation(*PPP, *MODELS[model], *JUDGED, "latency=structured", "trainer.mask_mode=topk"))
    worker, found = judge(made)
    assert len(found) == 6, "also clients that never trained"
    plan, slices = worker.trainer.plan, worker.trainer.slices
    for client, part, metrics in found.values():
        assert metrics["keep_ratio"] == pytest.approx(plan.keep_ratio(plan.at_ratio(0.5)))
        last = client.log.work().passes[-1]
        small = slices.groups.build(slices.model, plan.at_ratio(0.5))
        with counter() as counted, torch.no_grad():
            small(client.workload.sample(1)["x"])
        assert metrics["flops"] == last.network.forward_flops == counted.get_total_flops()
        assert last.network.parameter_bytes == sum(4 * p.numel() for p in small.parameters())
        assert last.network.layers != worker.network.layers
        assert (last.batch, last.forwards, last.backwards) == (len(client.data.test), 1, 0)
        assert metrics["latency_ms"] == pytest.approx(made.world.latency.inference_ms(last.network, client.profile))
        assert all(p.backwards == 0 for p in client.log.work().passes)
        assert STATE not in part


def test_equal_support_gives_equal_masks_and_personal_ones_differ(federation):
    made = perturbed(federation(*PPP, *MODELS["lenet5"], *JUDGED))
    worker, found = judge(made)
    trainer = worker.trainer
    packed = {}
    for number, (client, part, _) in found.items():
        kept = deployed(trainer, client, sent_to(worker, client, part), "personal", 0.5)
        packed[number] = trainer.slices.groups.pack(kept).tolist()
    assert len({tuple(p) for p in packed.values()}) > 1
    (a, part, _), (b, _, _) = found[0], found[1]
    twin = replace(b, client_id=0, data=a.data)
    assert (
        trainer.slices.groups.pack(deployed(trainer, twin, sent_to(worker, b, part), "personal", 0.5)).tolist()
        == packed[0]
    )


def test_control_masks_are_what_they_say(federation):
    made = perturbed(
        federation(*PPP, *MODELS["lenet5"], *JUDGED, "trainer.controls=[other,global,random,magnitude,gates,dense]")
    )
    worker, found = judge(made)
    trainer, plan = worker.trainer, worker.trainer.plan
    kept = {}
    for client, part, metrics in found.values():
        assert {f"accuracy_{c}" for c in ("other", "global", "random", "magnitude", "gates", "dense")} <= set(metrics)
        task = sent_to(worker, client, part)
        kept[client.client_id] = {
            m: deployed(trainer, client, task, m, 0.5) for m in ("personal", "other", "global", "random", "magnitude")
        }
        dense = trainer.narrowed(client, trainer.slices.groups.all(), task.weights).model
        assert metrics["accuracy_dense"] == client.workload.evaluate(dense, client.data.test)["accuracy"]
    for number, own in kept.items():
        following = kept[(number + 1) % 6]["personal"]
        assert all(torch.equal(own["other"][n], following[n]) for n in following)
        assert all(torch.equal(own["global"][n], kept[0]["global"][n]) for n in plan.names)
        for name in plan.names:
            assert len(own["random"][name]) == len(own["magnitude"][name]) == len(own["personal"][name])
    assert any(not torch.equal(own["random"][n], own["personal"][n]) for own in kept.values() for n in plan.names)


def test_magnitude_and_random_masks_need_no_gates(federation):
    """Federated averaging, then a mask at deployment: gates are neither trained nor sent."""
    for mask in ("magnitude", "random"):
        made = federation(
            *(*PPP, *MODELS["lenet5"], *JUDGED, "strategy.ratio=1.0", "strategy.deploy_ratio=0.5"),
            *(f"trainer.mask={mask}", "trainer.mask_mode=topk"),
        )
        _, found = judge(made)
        assert all("gates" not in part for _, part, _ in found.values())
        assert all(0.4 < metrics["keep_ratio"] < 0.6 for _, _, metrics in found.values())


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_one_run_tells_what_other_masks_and_ratios_would_give(federation, ratio):
    """Each figure is that of the cut network; with ratio 1 there are no gates, and masks are chosen by magnitude."""
    mask = "personal" if ratio < 1 else "magnitude"
    made = federation(
        *(*PPP, *MODELS["lenet5"], *JUDGED, f"strategy.ratio={ratio}", "trainer.mask_mode=topk"),
        *(f"trainer.mask={mask}", "trainer.controls=[random]", "trainer.judged_at=[0.25,1.0]"),
    )
    made = perturbed(made)
    worker, found = judge(made)
    trainer, groups = worker.trainer, worker.trainer.slices.groups
    for client, part, metrics in found.values():
        task = sent_to(worker, client, part)
        for name, control, at in (
            ("_at_0.25", mask, 0.25),
            ("_random_at_0.25", "random", 0.25),
            ("_at_1.0", mask, 1.0),
        ):
            kept = deployed(trainer, client, task, control, at)
            model = groups.build(worker.model, kept)
            model.load_state_dict(groups.slice(task.weights, kept))
            assert metrics[f"accuracy{name}"] == client.workload.evaluate(model, client.data.test)["accuracy"]
            assert metrics[f"flops{name}"] == trainer.slices.cost(kept).forward_flops
        assert metrics["flops_at_0.25"] == metrics["flops_random_at_0.25"] < metrics["flops_at_1.0"]
        assert metrics["flops_at_1.0"] == worker.network.forward_flops
        judged = [p for p in client.log.work().passes if not p.network.name.endswith("gated")]
        assert len(judged) == 1, "masks that are only compared with are no work of the device"


def test_personal_masks_without_gates_are_refused(federation):
    made = federation(*PPP, *JUDGED, "strategy.ratio=1.0", "strategy.deploy_ratio=0.5")
    with pytest.raises(ConfigError, match="needs trained gates"):
        judge(made)


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


@pytest.mark.parametrize("mode", ["full", "masked"])
def test_a_private_head_stays_whole_on_the_device(federation, mode):
    made = federation(
        *PPP, *MODELS["lenet5"], "private=[head]", f"strategy.train_mode={mode}", "trainer.mask_mode=topk"
    )
    head = {n for n in tensors_of(made.arrays) if n not in tensors_of(made.shared)}
    assert head
    for _, worker, replies in uplinks(made, 2):
        for client, content, answer in replies:
            assert not head & set(content[ARRAYS])
            assert not head & set(answer[ARRAYS])
            stored = RecordDict({**content, STATE: answer[STATE]})
            kept = worker.context(task_of(stored, client, 9)).state.restored("private", worker.initial)
            for name in head:
                assert kept[name].shape == tensors_of(made.arrays)[name].shape
                assert not torch.equal(kept[name], tensors_of(made.arrays)[name])


def test_a_private_head_learns_in_the_channels_that_the_mask_keeps(federation):
    """Columns of removed channels stay as they were; the client is judged with its own head, cut by its own mask."""
    own = ("private=[head]", "trainer.mask_mode=topk", "model=mlp", "model.hidden=[8]", "trainer.weight_decay=0.1")
    made = federation(*MASKED, *own, "workload.client_test_fraction=0.5", "evaluate_clients=6")
    head, stored = "head.weight", {}
    for _, worker, replies in uplinks(made, 3):
        for client, content, answer in replies:
            after = tensors_of(answer[STATE])[f"private.{head}"]
            kept = worker.trainer.slices.groups.unpack(tensors_of(answer[KEPT])[BITS])["body.1"]
            gone = [channel for channel in range(8) if channel not in kept.tolist()]
            assert len(gone) == 4
            assert torch.equal(after[:, gone], worker.initial[head][:, gone]), "decay would have moved them too"
            assert not torch.equal(after[:, kept], worker.initial[head][:, kept])
            stored[client] = RecordDict({**content, STATE: answer[STATE]})
    made.instructions(4)
    worker = Worker(made.world)
    for message in made.strategy.configure_evaluate(4, made.shared, ConfigRecord(), made.grid):
        client = message.metadata.dst_node_id
        if client not in stored:
            continue
        part = RecordDict({**message.content, STATE: stored[client][STATE]})
        context = worker.context(task_of(part, client, 4))
        metrics = answered(worker, context, part, "evaluate")["metrics"]
        task, groups = (
            sent_to(worker, context, part),
            worker.trainer.slices.groups,
        )
        assert torch.equal(task.weights[head], tensors_of(stored[client][STATE])[f"private.{head}"])
        kept = deployed(worker.trainer, context, task, "personal", 0.5)
        model = groups.build(worker.model, kept)
        model.load_state_dict(groups.slice(task.weights, kept))
        assert metrics["accuracy"] == context.workload.evaluate(model, context.data.test)["accuracy"]


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
