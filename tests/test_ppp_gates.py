"""The gates of PPP: what they let through, and the masks and cut networks that come of them."""

import json
import math

import pytest
import torch
from ppp_federation import MODELS
from torchs_counter import counter

from devices.compression.channels import ChannelGroups
from devices.compression.gates import (
    GatedNetwork,
    Gates,
    PerSample,
    hard,
    layer_flops,
    mean_jaccard_distance,
    personal_masks,
)
from fedsim.settings.build import build_world


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
