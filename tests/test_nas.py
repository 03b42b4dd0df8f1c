"""Networks of the search spaces: published and hand-counted sizes, dead branches, and the sentences of errors."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchs_counter import counter
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

from devices.errors import DeviceError
from devices.nas.blocks import normaliser
from devices.nas.fbnet import FBNet
from devices.nas.nb201 import EXAMPLE, NB201Network, counts, from_string, to_string
from devices.nas.ofa import STAGES, OFANetwork
from devices.nas.tables import network_features, network_macs
from devices.trace import KINDS, trace

ALL_NONE, ALL_SKIP, ALL_SQUARE = [0] * 6, [1] * 6, [3] * 6
# Node 1 leads nowhere; node 2 has no input but is read; the output has none; nothing of the input reaches the output.
DEAD = ([3, 1, 0, 1, 0, 2], [0, 0, 0, 1, 3, 3], [3, 3, 3, 0, 0, 0], [0, 0, 3, 0, 2, 4])


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def macs(network: nn.Module, *shape: int) -> int:
    with torch.no_grad(), counter() as counted:
        network.eval()(torch.rand(1, *shape))
    return counted.get_total_flops() // 2


@pytest.fixture
def table():
    """Reads a table of HELP's from the folder FEDSIM_NAS."""
    if "FEDSIM_NAS" not in os.environ:
        pytest.skip("FEDSIM_NAS names no folder with latency tables")

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(Path(os.environ["FEDSIM_NAS"]) / f"help_{name}.npz") as file:
            return dict(file)

    return read


# --- NAS-Bench-201 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ops, parameters", [(ALL_NONE, 73_306), (ALL_SQUARE, 1_531_546)], ids=["none", "conv3x3"])
def test_smallest_and_largest_network_have_the_published_sizes(ops: list[int], parameters: int):
    """MACs: 7.78 M and 220.12 M in the benchmark's paper; the same with GroupNorm."""
    networks = [NB201Network(ops, norm=norm) for norm in ("batch", "group")]
    assert [size(n) for n in networks] == [parameters, parameters]
    params, multiply_adds = counts(ops)
    assert params == parameters
    assert multiply_adds == macs(networks[0], 3, 32, 32) == {73_306: 7_783_040, 1_531_546: 220_119_680}[parameters]


def test_counts_of_a_table_are_those_of_the_built_modules():
    rng = np.random.default_rng(0)
    ops = rng.integers(5, size=(6, 6))
    shape, options = (1, 13, 18), {"num_classes": 7, "channels": 6, "cells": 2}
    params, multiply_adds = counts(ops, shape, **options)
    networks = [NB201Network(row, shape, **options) for row in ops]
    assert params.tolist() == [size(n) for n in networks]
    assert multiply_adds.tolist() == [macs(n, *shape) for n in networks]


@pytest.mark.data
def test_all_networks_have_the_sizes_and_strings_of_the_benchmark(table):
    nb201 = table("nb201")
    params, multiply_adds = counts(nb201["arch_ops"])
    assert np.array_equal(params, nb201["params"])
    assert np.array_equal(multiply_adds, nb201["macs"])
    assert [to_string(ops) for ops in nb201["arch_ops"]] == nb201["arch_str"].tolist()
    assert [from_string(text) for text in nb201["arch_str"].tolist()] == list(map(tuple, nb201["arch_ops"].tolist()))


@pytest.mark.data
def test_built_networks_have_the_sizes_of_the_benchmark(table):
    nb201 = table("nb201")
    for i in np.random.default_rng(0).choice(15_625, 50, replace=False):
        assert size(NB201Network(nb201["arch_ops"][i], norm="batch")) == nb201["params"][i]
    assert macs(NB201Network(nb201["arch_ops"][0]), 3, 32, 32) == nb201["macs"][0]


@pytest.mark.parametrize(
    "ops", [ALL_NONE, ALL_SKIP, [4] * 6, *DEAD, *np.random.default_rng(1).integers(5, size=(4, 6))]
)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_cell_runs_and_every_parameter_has_a_finite_gradient(ops, norm: str):
    network = NB201Network(ops, (3, 9, 8), 4, channels=4, cells=2, norm=norm)
    network(torch.rand(3, 3, 9, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.head.weight.grad is not None


def test_cell_sums_what_its_edges_bring():
    """Skips on 0>1, 0>3 and 1>3 give 2x; three skips in a chain, x; a branch that leads nowhere, nothing."""
    x = torch.rand(2, 8, 4, 4)
    for ops, factor in (
        ([1, 0, 0, 1, 1, 0], 2.0),
        ([1, 0, 1, 0, 0, 1], 1.0),
        ([1, 1, 1, 0, 0, 0], 0.0),
        (ALL_NONE, 0.0),
    ):
        network = NB201Network(ops, channels=8, cells=1)
        assert torch.equal(network.blocks[0](x), factor * x)


def test_strings_and_ids_are_each_others_inverse():
    assert from_string(EXAMPLE) == (3, 0, 2, 1, 0, 1)
    for ops in np.random.default_rng(0).integers(5, size=(50, 6)):
        assert from_string(to_string(ops)) == tuple(ops)
    assert NB201Network(EXAMPLE).ops == (3, 0, 2, 1, 0, 1)


# --- FBNet and Once-for-All ------------------------------------------------------------------------------------------


def test_fbnet_of_skips_has_the_hand_counted_size():
    """Only pointwise convolutions where the shape changes, weights and norm: 16>24>32>64>112>184>352, stem and head."""
    widths = [16, 24, 32, 64, 112, 184, 352, 1504]
    pointwise = sum(a * b + 2 * b for a, b in pairwise(widths))
    network = FBNet([8] * 22, num_classes=100)
    assert size(network) == 27 * 16 + 32 + pointwise + 1505 * 100
    sides = [32, 16, 8, 8, 4, 4, 4]  # behind each of the pointwise ones
    by_hand = sum(a * b * s * s for (a, b), s in zip(pairwise(widths), sides, strict=True))
    assert macs(network, 3, 32, 32) == 27 * 16 * 32 * 32 + by_hand + 1504 * 100


@pytest.mark.parametrize("op, kernel, expansion, groups", [(1, 3, 1, 2), (3, 3, 6, 1), (6, 5, 3, 1)])
def test_fbnet_layer_has_the_hand_counted_size(op: int, kernel: int, expansion: int, groups: int):
    """Layer 1 (16 channels, no stride) against a skip there, which is free."""
    middle = 16 * expansion
    weights = 16 * middle // groups + kernel**2 * middle + middle * 16 // groups
    extra = weights + 2 * (middle + middle + 16)
    assert size(FBNet([op] + [8] * 21)) - size(FBNet([8] * 22)) == extra


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("ops", [[1] * 22, [5, 6, 7, 8] * 5 + [0, 2]], ids=["grouped", "mixed"])
def test_fbnet_learns_from_small_images(ops: list[int], norm: str):
    network = FBNet(ops, (1, 9, 8), 4, norm=norm)
    network(torch.rand(3, 1, 9, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_ofa_is_torchvisions_mobilenet_but_for_one_bias():
    """The same blocks from torchvision's; its layer after the pool has 1280 biases more."""
    rng = np.random.default_rng(0)
    ks, e, d = rng.choice([3, 5, 7], 20), rng.choice([3, 4, 6], 20), [2, 3, 4, 2, 3]
    inputs, setting = 16, [InvertedResidualConfig(16, 3, 16, 16, False, "RE", 1, 1, 1.0)]
    for stage, (width, stride, squeezed, activation) in enumerate(STAGES):
        for i in range(d[stage]):
            kernel, middle = int(ks[4 * stage + i]), inputs * int(e[4 * stage + i])
            act, step = "RE" if activation is nn.ReLU else "HS", 1 if i else stride
            setting.append(InvertedResidualConfig(inputs, kernel, middle, width, squeezed, act, step, 1, 1.0))
            inputs = width
    theirs, ours = MobileNetV3(setting, 1280, num_classes=10), OFANetwork(ks, e, d, num_classes=10, norm="batch")
    assert size(ours) == size(theirs) - 1280
    assert macs(ours, 3, 64, 64) == macs(theirs, 3, 64, 64)


def test_ofa_leaves_out_the_blocks_behind_the_depth():
    row = [3] * 20 + [3] * 20 + [2] * 5 + [128]
    for block in range(2, 20, 4):
        row[block] = row[20 + block] = 0
    assert size(OFANetwork.from_encoding(row)) == size(OFANetwork([3] * 20, [3] * 20, [2] * 5))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_ofa_learns(norm: str):
    network = OFANetwork([7] * 20, [3] * 20, [2] * 5, (3, 32, 40), 4, norm=norm)
    network(torch.rand(3, 3, 32, 40)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("resolution", [128, 132])
def test_tables_of_ofa_are_those_of_the_traced_networks(resolution: int):
    """Multiply-adds, activations and calls of what is no activation function; biases are left out. 132 halves to 33."""
    rng = np.random.default_rng(resolution)
    row = np.concatenate([rng.choice([3, 5, 7], 20), rng.choice([3, 4, 6], 20), rng.choice([2, 3, 4], 5), [resolution]])
    traced = trace(OFANetwork.from_encoding(row.tolist()), torch.zeros(1, 3, resolution, resolution))
    made = network_features("ofa", row[None])[0, :-1].reshape(len(KINDS), -1)
    for kind in ("conv3x3", "conv", "pointwise", "grouped", "depthwise", "pool", "fc"):
        number = KINDS.index(kind)
        assert np.allclose(made[number, [0, 1, 3]], np.array(traced.rows[number])[[0, 1, 3]]), kind
    assert network_macs("ofa", row[None])[0] == traced.macs


@pytest.mark.parametrize(
    "place, value, sentence",
    [(-1, 232, "resolutions of ofa are 128 to 224, got 232"), (0, 0, "block 0 .* needs a kernel of 3, 5 or 7")],
)
def test_number_outside_of_ofa_is_named(place: int, value: int, sentence: str):
    row = np.array([3] * 40 + [2] * 5 + [128])
    row[place] = value
    with pytest.raises(DeviceError, match=sentence):
        network_features("ofa", row[None])


@pytest.mark.data
def test_every_encoding_of_the_tables_builds(table):
    fbnet, ofa = table("fbnet"), table("ofa")
    for i in range(0, 5000, 1250):
        assert size(FBNet(fbnet["arch_ops"][i])) > 1_000_000
        row = [*ofa["ks"][i], *ofa["e"][i], *ofa["d"][i], ofa["r"][i]]
        assert size(OFANetwork.from_encoding(row)) > 3_000_000


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, groups", [(1, 1), (2, 1), (6, 3), (8, 4), (16, 8), (24, 8), (184, 8)])
def test_groups_hold_two_channels_or_more_where_they_can(channels: int, groups: int):
    assert normaliser("group", channels).num_groups == groups


@pytest.mark.parametrize(
    "make",
    [
        lambda: NB201Network(EXAMPLE, num_classes=5),
        lambda: FBNet([8] * 22, num_classes=5),
        lambda: OFANetwork([3] * 20, [3] * 20, [2] * 5, (3, 32, 32), 5),
    ],
    ids=["nb201", "fbnet", "ofa"],
)
def test_forward_is_the_head_on_the_features(make):
    network, x = make().eval(), torch.rand(2, 3, 32, 32)
    assert not network.takes_tokens
    assert not list(network.buffers()), "a federated client would have to average statistics"
    assert torch.equal(network.head(network.features(x)), network(x))
    assert network(x).shape == (2, 5)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: NB201Network(EXAMPLE, (16,)), r"nb201 needs images .* at least 4x4, got examples of shape \[16\]"),
        (lambda: NB201Network([0] * 5), r"ops of network nb201 must be 6 numbers of \[0, 1, 2, 3, 4\], got \[0, 0, 0"),
        (lambda: NB201Network([0] * 5 + [5]), r"ops\[5\] of network nb201 must be one of \[0, .*4\], got 5"),
        (lambda: NB201Network([0] * 5 + [True]), r"ops\[5\] of network nb201 .* got True"),
        (lambda: NB201Network(3), r"ops of network nb201 must be 6 numbers .* got 3"),
        (lambda: NB201Network(EXAMPLE, cells=0), "model.cells must be at least 1, got 0"),
        (
            lambda: NB201Network(EXAMPLE, norm="layer"),
            r"value for model.norm 'layer' \(allowed: batch, group\)",
        ),
        (
            lambda: from_string(EXAMPLE.replace("1x1", "1x2")),
            "unknown operation 'nor_conv_1x2'; did you mean 'nor_conv",
        ),
        (lambda: from_string("|none~0|+|none~0|none~1|"), r"is a string such as '\|nor_.*', got '\|none~0\|\+\|none"),
        (lambda: from_string(EXAMPLE.replace("~2", "~1")), "is a string such as"),
        (lambda: from_string(""), "is a string such as .* got ''"),
        (lambda: FBNet([9] * 22), r"ops\[0\] of network fbnet must be one of \[0, .* 8\], got 9"),
        (lambda: FBNet("k3_e1"), "ops of network fbnet must be 22 numbers .* got 'k3_e1'"),
        (lambda: FBNet([8] * 22, (3, 7, 32)), "fbnet needs images .* of at least 8x8"),
        (lambda: OFANetwork([3] * 20, [3] * 20, [5] * 5), r"d\[0\] of network ofa must be one of \[2, 3, 4\], got 5"),
        (
            lambda: OFANetwork([4] * 20, [3] * 20, [2] * 5),
            r"ks\[0\] of network ofa must be one of \[0, 3, 5, 7\], got 4",
        ),
        (lambda: OFANetwork([3] * 20, [0] * 20, [2] * 5), "block 0 of network ofa is within depth 2 and needs"),
        (lambda: OFANetwork.from_encoding([3] * 45), "a network ofa is 20 kernel sizes, .* got 45"),
    ],
)
def test_network_or_input_that_does_not_fit_is_named(make, sentence: str):
    with pytest.raises(DeviceError, match=sentence):
        make()
