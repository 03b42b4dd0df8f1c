"""Sizes, masks and channel pruning: exact counts, hand-computed values, round trips."""

import pytest
import torch
from torch import nn

from devices.compression.channels import ChannelGroups
from devices.compression.masks import (
    SparsitySchedule,
    apply_masks,
    global_masks,
    masked,
    prunable,
    sparsity_of,
)
from devices.compression.prune import channel_scores, largest_ratio, strongest
from devices.compression.sizes import dense_bytes, nonzero_bytes, pack, unpack, wire_bytes
from devices.errors import DeviceError
from fedsim.models.lenet import LeNet5
from fedsim.models.resnet import ResNet


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6 * 4 * 4, 3))


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_three_sizes_of_a_sparse_tensor_by_hand():
    """64 floats with 3 that are not zero: 256 bytes, 12 bytes, and a bitmap of 8 bytes with 12 bytes of values."""
    sparse = torch.zeros(8, 8)
    sparse[0, 1], sparse[3, 3], sparse[7, 7] = 1.0, -2.0, 3.5
    assert (dense_bytes({"w": sparse}), nonzero_bytes({"w": sparse}), nonzero_bytes({"w": sparse}, {"w": 8})) == (
        256,
        12,
        3,
    )
    header = len(b'[["w","float32",[8,8],32,"bitmap",20]]')
    assert wire_bytes({"w": sparse}) == 8 + header + 8 + 3 * 4


@pytest.mark.parametrize("density, form", [(1.0, "dense"), (0.3, "bitmap"), (0.01, "index")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool])
def test_packing_takes_the_shortest_form_and_comes_back_exactly(density: float, form: str, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(1)
    values = torch.randint(1, 100, (40, 50), generator=draw) * (torch.rand(40, 50, generator=draw) < density)
    tensors = {"a": values.to(dtype), "empty": torch.zeros(0, 3), "scalar": torch.tensor(7)}
    data = pack(tensors)
    assert wire_bytes(tensors) == len(data)
    back = unpack(data)
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())
    if dtype == torch.float32:
        assert form.encode() in data[: data.index(b"empty")]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_integers_of_few_bits_lie_without_gaps(bits: int, dtype: torch.dtype):
    low = -(1 << bits - 1) if dtype == torch.int8 else 0
    values = (torch.arange(1 << bits) + low).to(dtype).repeat(5)[1:]
    data = pack({"q": values}, {"q": bits})
    assert torch.equal(unpack(data)["q"], values)
    header = int.from_bytes(data[4:8], "little")
    assert len(data) - 8 - header <= -(-len(values) * bits // 8)


def test_values_that_do_not_fit_their_bits_are_refused():
    with pytest.raises(DeviceError, match="does not fit into 4 bits; integers from -8 to 7 do"):
        pack({"q": torch.tensor([8], dtype=torch.int8)}, {"q": 4})
    with pytest.raises(DeviceError, match="begin with"):
        unpack(b"PK..1234")
    with pytest.raises(DeviceError, match="end in the middle of 'a'"):
        unpack(pack({"a": torch.ones(4)})[:-1])


# --- masks ----------------------------------------------------------------------------------------------------------


def test_global_mask_removes_the_smallest_in_all_layers_by_hand():
    """8 weights, half go, floor of one each: the largest of b stays though four of a are larger."""
    weights = {"a": torch.tensor([5.0, -6.0, 7.0, 1.0]), "b": torch.tensor([0.5, -0.25, 0.125, 0.0])}
    masks = global_masks(weights, 0.5, floor=0.1)
    assert masks["a"].tolist() == [True, True, True, False]
    assert masks["b"].tolist() == [True, False, False, False]
    assert global_masks(weights, 0.5, floor=0.0)["b"].tolist() == [False] * 4


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("floor", [0.0, 0.03])
def test_global_masks_have_exactly_the_zeros_asked_for(sparsity: float, floor: float):
    model = LeNet5((1, 28, 28), 10)
    weights = {name: model.state_dict()[name] for name in prunable(model)}
    masks = global_masks(weights, sparsity, floor)
    total = sum(w.numel() for w in weights.values())
    assert sum(int((~m).sum()) for m in masks.values()) == int(sparsity * total + 1e-9)
    if floor:
        assert all(int(mask.sum()) >= max(1, floor * weights[n].numel()) for n, mask in masks.items())


def test_ties_go_in_order():
    masks = global_masks({"a": torch.ones(10)}, 0.3, 0.0)
    assert masks["a"].tolist() == [False] * 3 + [True] * 7
    assert sparsity_of(masks) == pytest.approx(0.3)


def test_a_floor_that_is_too_high_and_a_sparsity_out_of_range_are_named():
    weights = {"a": torch.tensor([5.0, 6.0]), "b": torch.tensor([0.1, 0.2])}
    with pytest.raises(DeviceError, match=r"removes 3 weights, but floor=0.9 leaves only 0"):
        global_masks(weights, 0.75, floor=0.9)
    with pytest.raises(DeviceError, match=r"sparsity must be in \[0, 1\), got 1.0"):
        global_masks(weights, 1.0)


def test_masks_touch_weights_of_convolutions_and_linear_layers_only():
    model = ResNet((1, 8, 8), 3)
    names = prunable(model)
    assert "stem.weight" in names
    assert "head.weight" in names
    assert not any("norm" in name or "bias" in name for name in names)
    state = model.state_dict()
    done = apply_masks(state, global_masks({n: state[n] for n in names}, 0.8))
    assert all(done[n] is state[n] for n in state if n not in names)
    assert sum(int((done[n] == 0).sum()) for n in names) == int(0.8 * sum(state[n].numel() for n in names))


def test_cubic_schedule_by_hand():
    """s(E/2) = (1 - 1/8) s_f; it starts at s_i, never falls and ends at s_f."""
    schedule = SparsitySchedule(final=0.8, end=100)
    assert (schedule.at(0), schedule.at(50), schedule.at(100), schedule.at(500)) == (0.0, pytest.approx(0.7), 0.8, 0.8)
    general = SparsitySchedule(final=0.9, initial=0.5, start=10, end=30)
    assert (general.at(0), general.at(10), general.at(20)) == (0.5, 0.5, pytest.approx(0.9 - 0.4 / 8))
    values = [general.at(t) for t in range(40)]
    assert values == sorted(values)
    assert SparsitySchedule(final=0.9, start=5, end=5).at(5) == 0.9


@pytest.mark.parametrize("rule, gradient", [("masked", [2.0, 0.0, 2.0]), ("ste", [2.0, 2.0, 2.0])])
def test_gradients_of_masked_weights(rule: str, gradient: list[float]):
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out = masked(weight, torch.tensor([True, False, True]), rule)
    assert out.tolist() == [1.0, 0.0, 3.0]
    (2 * out).sum().backward()
    assert weight.grad.tolist() == gradient


# --- channels -------------------------------------------------------------------------------------------------------


def test_channel_scores_are_those_of_torch_pruning():
    """A mean over the filter is the L1 norm of Torch-Pruning over the size of the filter."""
    import torch_pruning as tp

    model, x = small_net(), torch.randn(1, 1, 8, 8)
    scores = channel_scores(ChannelGroups.find(model, x), model.state_dict())
    graph = tp.DependencyGraph().build_dependency(model, x)
    for name, layer in (("0", model[0]), ("2", model[2])):
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
        theirs = tp.importance.GroupMagnitudeImportance(
            p=1, group_reduction="first", normalizer=None, bias=False, target_types=(nn.Conv2d,)
        )(group)
        torch.testing.assert_close(scores[name].float() * layer.weight[0].numel(), theirs)


def test_scores_of_a_residual_stage_are_the_mean_over_its_layers():
    model = ResNet((1, 8, 8), 3)
    groups = ChannelGroups.find(model, torch.randn(1, 1, 8, 8))
    by_hand = (model.stem.weight.abs().mean((1, 2, 3)) + model.blocks[0].conv2.weight.abs().mean((1, 2, 3))) / 2
    torch.testing.assert_close(channel_scores(groups, model.state_dict())["stem"].float(), by_hand)


def test_pruning_keeps_the_strongest_channels():
    model = small_net()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 1.0, 4.0, 2.0]).view(4, 1, 1, 1).expand(4, 1, 3, 3))
    groups = ChannelGroups.find(model, torch.randn(1, 1, 8, 8))
    kept = strongest(groups, channel_scores(groups, model.state_dict()), 0.5, round_to=1)
    pruned = groups.build(model, kept)
    assert kept["0"].tolist() == [0, 2]
    assert torch.equal(pruned[0].weight, model[0].weight[[0, 2]])
    assert (pruned[2].in_channels, pruned[2].out_channels, pruned[4].in_features) == (2, 3, 48)


def test_counts_are_rounded_to_eight_and_blocks_stay_whole():
    model, x = ResNet((1, 8, 8), 3, width=32), torch.randn(2, 1, 8, 8)
    groups = ChannelGroups.find(model, x)
    kept = strongest(groups, channel_scores(groups, model.state_dict()), 0.4)
    assert [len(k) for k in kept.values()] == [16, 16, 32, 32, 64, 64]
    assert groups.build(model, kept)(x).shape == (2, 3)


def test_of_channels_with_equal_scores_the_first_stay():
    groups = ChannelGroups.find(small_net(), torch.randn(1, 1, 8, 8))
    scores = {"0": torch.tensor([1.0, 1.0, 1.0, 1.0]), "2": torch.tensor([5.9, 0.02, 0.02, 0.02, 0.02, 0.02])}
    kept = strongest(groups, scores, 0.5, round_to=1)
    assert {n: k.tolist() for n, k in kept.items()} == {"0": [0, 1], "2": [0, 1, 2]}


def test_width_scaling_is_the_network_of_that_width():
    model, x = ResNet((1, 8, 8), 3, width=32), torch.randn(1, 1, 8, 8)
    groups = ChannelGroups.find(model, x)
    half = groups.build(model, groups.first(0.5))
    groups_kept = {k: v.shape for k, v in half.state_dict().items()}
    assert groups_kept == {k: v.shape for k, v in ResNet((1, 8, 8), 3, width=16).state_dict().items()}


def test_largest_ratio_that_is_fast_enough():
    ratios = [0.25, 0.5, 1.0]
    assert largest_ratio(lambda r: 10 * r, 6.0, ratios) == 0.5
    assert largest_ratio(lambda r: 10 * r, 1.0, ratios) == 0.25
    assert largest_ratio(lambda r: 10 * r, 10.0, ratios) == 1.0
