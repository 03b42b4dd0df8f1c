"""Channel groups: for every architecture, the narrowed network computes what one with silenced channels does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from devices.compression.channels import ChannelGroups
from devices.errors import DeviceError
from devices.trace import trace
from fedsim.settings.build import model_factory
from fedsim.settings.compose import compose

MODELS = {
    "mlp": (1, 8, 8),
    "lenet5": (1, 28, 28),
    "femnist_cnn": (1, 28, 28),
    "resnet8": (3, 16, 16),
    "vgg": (3, 16, 16),
}
HEARING = {"bcresnet": (1, 40, 9), "ds_cnn": (1, 10, 21), "matchboxnet": (1, 8, 21)}


class Inverted(nn.Module):
    """An inverted residual with batch norms and a depthwise convolution, as mobile networks have it."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.norm1 = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.deep, self.norm2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24, affine=False)
        self.slim, self.norm3 = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.act, self.head = nn.PReLU(8), nn.Linear(16, 5)

    def forward(self, x):
        x = self.act(self.norm0(self.stem(x)))
        y = F.relu(self.norm2(self.deep(F.relu(self.norm1(self.wide(x))))))
        y = x + self.norm3(self.slim(y))
        y = torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1)
        return self.head(y)


def model_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    if name == "inverted":
        model, x = Inverted(), torch.randn(3, 3, 8, 8)
    else:
        settings, shape = compose([f"model={name}", "workload=digits"]), {**MODELS, **HEARING}[name]
        model, x = model_factory(settings)(input_shape=shape, num_classes=10), torch.randn(3, *shape)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, getattr(module, "running_mean", None)):
                if tensor is not None:
                    nn.init.normal_(tensor, mean=0.5)
    return model.eval(), x


def some(groups: ChannelGroups, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random half of the units of every group."""
    draw, kept = torch.Generator().manual_seed(seed), {}
    for name, group in groups.groups.items():
        units = torch.randperm(group.channels // group.unit, generator=draw)
        chosen = units[: max(1, len(units) // 2)].sort().values
        kept[name] = (chosen[:, None] * group.unit + torch.arange(group.unit)).flatten()
    return kept


def silence(model: nn.Module, groups: ChannelGroups, kept) -> None:
    """Zeroes removed channels where plain layers read them, which is behind norm and nonlinearity."""
    for name, group in groups.groups.items():
        gone = torch.ones(group.channels, dtype=torch.bool)
        gone[kept[name]] = False
        for coupling in group.couplings:
            if coupling.side == "in":
                entries = coupling.entries[gone].flatten()
                layer = model.get_submodule(coupling.layer)
                layer.register_forward_pre_hook(lambda _, given, entries=entries: given[0].index_fill(1, entries, 0.0))


@pytest.mark.parametrize("name", [*MODELS, *HEARING, "inverted"])
@torch.no_grad()
def test_sliced_network_is_the_masked_network(name: str):
    model, x = model_of(name)
    groups = ChannelGroups.find(model, x[:1])
    kept = some(groups)
    narrow = groups.build(model, kept)
    silence(model, groups, kept)
    assert narrow(x).shape == (3, model.head.out_features)
    assert sum(p.numel() for p in narrow.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS, "inverted"])
@torch.no_grad()
def test_keeping_all_channels_is_the_dense_network_bit_for_bit(name: str):
    model, x = model_of(name)
    groups = ChannelGroups.find(model, x[:1])
    same = groups.build(model, groups.all())
    assert torch.equal(same(x), model(x))
    state, sliced = model.state_dict(), groups.slice(model.state_dict(), groups.all())
    assert list(sliced) == list(state)
    assert all(torch.equal(t, state[key]) and t.stride() == state[key].stride() for key, t in sliced.items())


@pytest.mark.parametrize("name", [*MODELS, *HEARING, "inverted"])
def test_scatter_is_the_inverse_of_slice(name: str):
    model, x = model_of(name)
    groups, state = ChannelGroups.find(model, x[:1]), model.state_dict()
    kept = some(groups)
    small = groups.slice(state, kept)
    dense, masks = groups.scatter(small, kept, state)
    for key, tensor in state.items():
        assert torch.equal(dense[key], torch.where(masks[key], tensor, torch.zeros_like(tensor)))
        assert int(masks[key].sum()) == small[key].numel()
        assert dense[key].stride() == tensor.stride()
    again = groups.slice(dense, kept)
    assert all(torch.equal(again[key], small[key]) for key in small)


@pytest.mark.parametrize("name", [*MODELS, "inverted"])
@torch.no_grad()
def test_built_network_takes_the_sliced_weights(name: str):
    """The state dict of what `build` makes is what `slice` cuts: a client loads the one into the other."""
    model, x = model_of(name)
    groups = ChannelGroups.find(model, x[:1])
    kept = groups.first(0.5)
    narrow, small = groups.build(model, kept), groups.slice(model.state_dict(), kept)
    assert {k: v.shape for k, v in narrow.state_dict().items()} == {k: v.shape for k, v in small.items()}
    assert all(torch.equal(v, small[k]) for k, v in narrow.state_dict().items())


def test_traced_cost_of_a_sliced_lenet_is_the_count_by_hand():
    """Half of 6, 16, 120, 84: 3x25x784 + 8x3x25x100 + 200x60 + 60x42 + 42x10 multiply-adds."""
    model, x = model_of("lenet5")
    groups = ChannelGroups.find(model, x[:1])
    narrow = groups.build(model, groups.first(0.5))
    assert trace(narrow, x).macs == 3 * 25 * 784 + 8 * 3 * 25 * 100 + 200 * 60 + 60 * 42 + 42 * 10
    assert [m.out_channels for m in narrow.modules() if isinstance(m, nn.Conv2d)] == [3, 8]


@pytest.mark.parametrize("name", ["resnet8", "inverted"])
def test_traced_cost_of_a_sliced_network_is_an_independent_count(name: str):
    model, x = model_of(name)
    groups = ChannelGroups.find(model, x[:1])
    narrow, counted = groups.build(model, some(groups)), []

    def count(layer: nn.Module, _, out: torch.Tensor) -> None:
        fan_in = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels // layer.groups * 3**2
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            fan_in = layer.in_channels
        counted.append(out[0].numel() * fan_in)

    table = trace(narrow, x)
    for layer in narrow.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    narrow(x)
    assert table.macs == sum(counted)


def test_residual_layers_share_one_group_and_norms_come_in_blocks():
    model, x = model_of("resnet8")
    groups = ChannelGroups.find(model, x[:1])
    assert list(groups.groups) == [
        *("stem", "blocks.0.conv1", "blocks.1.conv1", "blocks.1.conv2", "blocks.2.conv1", "blocks.2.conv2")
    ]
    stem = groups.groups["stem"]
    assert (stem.channels, stem.unit) == (16, 2)
    assert [c.layer for c in stem.couplings if c.side == "out"] == ["stem", "blocks.0.conv2"]
    narrow = groups.build(model, groups.first(0.3))  # 3 of 8 norm groups
    assert (narrow.norm.num_groups, narrow.norm.num_channels) == (3, 6)
    assert (narrow.blocks[2].norm2.num_groups, narrow.blocks[2].norm2.num_channels) == (3, 24)
    assert not any("head.bias" in key for g in groups.groups.values() for c in g.couplings for key, _ in c.dims)


def test_a_flattened_map_gives_every_channel_its_columns():
    model, x = model_of("lenet5")
    group = ChannelGroups.find(model, x[:1]).groups["body.3"]
    columns = next(c for c in group.couplings if c.layer == "body.7")
    assert columns.entries.tolist() == [list(range(25 * c, 25 * c + 25)) for c in range(16)]


def test_first_rounds_up_and_smaller_widths_are_nested():
    groups = ChannelGroups.find(*_first(model_of("lenet5")))
    assert {n: len(k) for n, k in groups.first(0.3).items()} == {"body.0": 2, "body.3": 5, "body.7": 36, "body.9": 26}
    assert {n: len(k) for n, k in groups.first(0.3, round_to=8).items()} == {
        "body.0": 6, "body.3": 8, "body.7": 40, "body.9": 32,
    }  # fmt: skip
    assert all(len(k) == 1 for k in groups.first(1e-3).values())
    for small, large in zip(groups.first(0.3).values(), groups.first(0.6).values(), strict=True):
        assert torch.equal(small, large[: len(small)])


def test_masks_and_packed_bits_are_the_same_choice():
    groups = ChannelGroups.find(*_first(model_of("resnet8")))
    kept = some(groups, seed=5)
    packed = groups.pack(kept)
    assert len(packed) == (16 + 16 + 32 + 32 + 64 + 64) // 8
    for other in (groups.unpack(packed), groups.kept_of(groups.mask_of(kept))):
        assert all(torch.equal(other[name], kept[name]) for name in kept)
    assert groups.keep_ratio(kept) == 0.5


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"stem": torch.tensor([0])}, "normalised in blocks of 2"),
        ({"stem": torch.tensor([1, 2])}, "normalised in blocks of 2"),
        ({"stem": torch.tensor([2, 3, 0, 1])}, "ascending"),
        ({"stem": torch.tensor([14, 15, 16, 17])}, r"0\.\.15"),
        ({"stem": torch.tensor([], dtype=torch.int64)}, "one or more"),
        ({"sten": torch.arange(2)}, "did you mean 'stem'"),
    ],
)
def test_a_wrong_choice_is_one_sentence(change, sentence):
    groups = ChannelGroups.find(*_first(model_of("resnet8")))
    with pytest.raises(DeviceError, match=sentence):
        groups.check({**groups.all(), **change})


class Mixing(nn.Module):
    """Divides every channel by the sum over channels: silencing is not removing."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.conv(x).softmax(1).mean((2, 3)))


def normed():
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def grouped():
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 2))


def counted():
    return nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    "make, shape, sentence",
    [
        (Mixing, (1, 4, 4), "mixes its channels"),
        (normed, (4,), "LayerNorm"),
        (grouped, (4, 3, 3), "in 2 groups"),
        (counted, (4,), "cannot run with fewer channels"),
        (lambda: nn.Linear(4, 2), (4,), "no layer whose channels"),
        (lambda: nn.Sequential(nn.LSTM(4, 4)), (3, 4), "LSTM"),
    ],
)
def test_networks_that_cannot_be_narrowed_are_refused_in_one_sentence(make, shape, sentence):
    with pytest.raises(DeviceError, match=sentence) as refused:
        ChannelGroups.find(make(), torch.randn(1, *shape))
    assert "\n" not in str(refused.value)


def test_finding_leaves_model_and_random_state_alone():
    model, x = model_of("resnet8")
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    model.train()
    ChannelGroups.find(model, x[:1])
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def _first(pair):
    return pair[0], pair[1][:1]
