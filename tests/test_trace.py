"""What one example costs in a network, by layer kind."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision.models
from test_models import SPEECH
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchs_counter import counter

from devices.errors import DeviceError
from devices.latency.structured import predict_ms
from devices.trace import FEATURES, KINDS, LayerTable, trace
from fedsim.settings.build import model_factory
from fedsim.settings.groups import model_settings

CONFIGS = Path(__file__).parent.parent / "configs"
VISION = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "squeezenet1_1", "efficientnet_b0"]
VISION += ["vit_b_16"]
IMAGES = {"femnist_cnn": (1, 28, 28), "char_lstm": (12,), **SPEECH}


def row(table: LayerTable, kind: str) -> tuple[float, ...]:
    return table.rows[KINDS.index(kind)]


def counted_macs(model: nn.Module, x: Tensor) -> float:
    """Per example, by torch's counter on shapes alone, where attention falls apart into products that it knows."""
    with torch.no_grad(), counter() as flops:
        copy.deepcopy(model).to("meta").eval()(x.to("meta"))
    return flops.get_total_flops() / 2 / len(x)


def test_small_conv_net_is_its_layers_by_hand():
    """Input 3 x 8 x 8 = 192, after the first convolution 4 x 8 x 8 = 256, pooled 4 x 4 x 4 = 64, last 2 x 4 x 4 = 32.

    conv 9*3*4*64 = 6912 with 108 + 4 weights; depthwise 9*4*16 = 576 with 36; pointwise 4*2*16 = 128 with 8; pool 4*64;
    foldable: batch norm (256 + 256, four vectors of 4) and ReLU (256 + 256); fc 32*5 = 160 with 160 + 5.
    """
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Conv2d(4, 2, 1, bias=False)]
    table = trace(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5)), torch.randn(7, 3, 8, 8))
    assert row(table, "conv3x3") == (6912, 192 + 256, 112, 1)
    assert row(table, "depthwise") == (576, 64 + 64, 36, 1)
    assert row(table, "pointwise") == (128, 64 + 32, 8, 1)
    assert row(table, "pool") == (256, 256 + 64, 0, 1)
    assert row(table, "foldable") == (512, 1024, 16, 2)
    assert row(table, "elementwise") == row(table, "conv") == (0, 0, 0, 0)
    assert row(table, "fc") == (160, 32 + 5, 165, 1)
    assert row(table, "recurrent") == (0, 0, 0, 0)
    assert table.macs == 6912 + 576 + 128 + 160


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), "conv3x3"),
        (nn.Conv2d(4, 4, 3, padding=1, stride=2), "conv"),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2), "conv"),
        (nn.Conv2d(4, 4, 5, padding=2), "conv"),
        (nn.Conv2d(4, 4, (1, 3)), "conv"),
        (nn.Conv2d(4, 4, 1, stride=2), "pointwise"),
        (nn.Conv2d(4, 4, 3, groups=2), "grouped"),
        (nn.Conv2d(4, 8, 1, groups=2), "grouped"),
        (nn.Conv2d(4, 8, 3, groups=4), "depthwise"),
        (nn.ConvTranspose2d(4, 4, 3), "conv"),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), "depthwise"),
        (nn.ReLU6(), "foldable"),
        (nn.BatchNorm2d(4), "foldable"),
        (nn.GELU(), "elementwise"),
        (nn.GroupNorm(2, 4), "elementwise"),
    ],
)
def test_each_layer_has_its_kind(layer: nn.Module, kind: str):
    """Winograd is for dense 3x3 at stride 1; a group of one channel is depthwise; runtimes fold norms."""
    table = trace(layer, torch.randn(2, 4, 8, 8))
    assert [k for k in KINDS if any(row(table, k))] == [kind]


@pytest.mark.parametrize("batch_first", [True, False])
def test_lstm_reads_its_weights_at_every_step(batch_first: bool):
    """I = 5, H = 7, 2 layers, 4 steps: matrices 28*(5+7) and 28*(7+7), 728 in all, with 4 vectors of 28.

    MACs 728 * 4; activations 4 * (5 + 7 + 7 + 7); weights (728 + 112) * 4; calls 4 * 2.
    """
    x = torch.randn(3, 4, 5) if batch_first else torch.randn(4, 3, 5)
    lstm = nn.LSTM(5, 7, 2, batch_first=batch_first)
    table = trace(lstm, x)
    # The first dimension is taken for the examples: time first is per step, three examples at once.
    per_example = 3 / len(x)
    assert row(table, "recurrent") == (2912 * per_example, 104 * per_example, 3360, 8)


def test_gru_both_ways_and_packed_and_single_cells_are_recurrent():
    """GRU I = 5, H = 7 both ways, 4 steps: 2 * 21 * (5 + 7) * 4 = 2016 MACs in 8 calls; LSTM cell 28 * 12 = 336."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(5, 7, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(nn.utils.rnn.pack_padded_sequence(x, [4, 4], batch_first=True))[0].data

    plain = trace(nn.GRU(5, 7, batch_first=True, bidirectional=True), torch.randn(2, 4, 5))
    assert row(plain, "recurrent")[0::3] == row(trace(Packed(), torch.randn(2, 4, 5)), "recurrent")[0::3] == (2016, 8)
    assert row(trace(nn.LSTMCell(5, 7), torch.randn(2, 5)), "recurrent") == (336, 12, 336 + 56, 1)


def test_attention_counts_its_products_as_fc():
    """Size 8, 2 heads, 5 tokens: projections 4 * 8*8*5 = 1280 MACs; scores and weighted values 5*5*8 = 200 each.

    Four calls: into the heads, the two products, and out of them.
    """

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    assert row(trace(Attention(), torch.randn(3, 5, 8)), "fc")[0::3] == (1680, 4)


def test_functions_and_all_dimensions_are_seen():
    """Transposed 9*2*3 weights at 16 input pixels, 864; conv1d 3*2*4 at 6, 144; conv3d 8*1*2 at 8, 128."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x @ self.weight + x)

    table = trace(Functional(), torch.randn(2, 4))
    assert row(table, "fc") == (16, 8, 16, 1)
    assert row(table, "elementwise") == (4, 12, 0, 1)
    assert row(table, "foldable") == (4, 8, 0, 1)
    assert trace(nn.ConvTranspose2d(2, 3, 3, 2), torch.randn(2, 2, 4, 4)).macs == 864
    assert trace(nn.Conv1d(2, 4, 3), torch.randn(2, 2, 8)).macs == 144
    assert trace(nn.Conv3d(1, 2, 2), torch.randn(2, 1, 3, 3, 3)).macs == 128
    pools = nn.Sequential(nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1))
    assert row(trace(pools, torch.randn(2, 3, 8)), "pool")[0::3] == (3 * 8 + 3 * 4 + 3 * 2, 3)


def test_a_mean_over_one_pixel_is_a_pool_as_over_more():
    """Else a larger image would be another kind of network, and could take less time."""
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    one, four = (trace(mean, torch.randn(2, 3, side, side)) for side in (1, 2))
    assert (row(one, "pool"), row(four, "pool")) == ((3, 6, 0, 1), (12, 15, 0, 1))
    assert row(one, "elementwise") == row(four, "elementwise") == (0, 0, 0, 0)


def test_masked_and_pruned_weights_are_folded():
    pruned = prune.l1_unstructured(nn.Linear(6, 4), "weight", amount=0.5)
    assert trace(pruned, torch.randn(2, 6)).rows == trace(nn.Linear(6, 4), torch.randn(2, 6)).rows
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    assert trace(normed, torch.randn(2, 6)).rows == trace(nn.Linear(6, 4), torch.randn(2, 6)).rows


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml")))
def test_macs_of_our_models_agree_with_the_flop_counter(name: str):
    shape = IMAGES.get(name, (3, 32, 32))
    model = model_factory({"model": model_settings(name)})(input_shape=shape, num_classes=10)
    x = torch.zeros(2, *shape, dtype=torch.long) if getattr(model, "takes_tokens", False) else torch.randn(2, *shape)
    assert trace(model, x).macs == pytest.approx(counted_macs(model, x), rel=0.01)


@pytest.mark.parametrize("name", VISION)
def test_macs_of_known_models_agree_with_the_flop_counter(name: str):
    model = getattr(torchvision.models, name)().eval()
    x = torch.randn(1, 3, 224, 224)
    assert trace(model, x).macs == pytest.approx(counted_macs(model, x), rel=0.01)


def test_tracing_leaves_the_model_and_the_random_state_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2)
    ).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    trace(model, torch.zeros(1, 3, 8, 8))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None and p.device.type == "cpu" for p in model.parameters())


def test_fused_attention_on_a_real_copy_is_counted_too():
    """Size 4, 3 tokens: 3*3*4 = 36 for the scores and 36 for the weighted values."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert float(x.sum()) == 12  # asks for numbers
            return F.scaled_dot_product_attention(x, x, x)

    assert trace(Attention(), torch.ones(1, 1, 3, 4)).macs == 72


def test_path_that_depends_on_numbers_is_traced_on_a_real_copy():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if float(x.sum()) > 0 else x

    assert (trace(Gate(), torch.ones(2, 4)).macs, trace(Gate(), -torch.ones(2, 4)).macs) == (16, 0)


def test_failing_module_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 2))
    with pytest.raises(DeviceError, match=r"module '1' \(Linear\) cannot be traced: .*shapes"):
        trace(model, torch.randn(2, 4))
    with pytest.raises(DeviceError, match="one example or more"):
        trace(model, torch.randn(0, 4))


def test_resnet18_takes_less_than_a_second():
    model, x = torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224)
    start = time.process_time()
    trace(model, x)
    assert time.process_time() - start < 1


def test_table_survives_json_adds_up_and_scales_with_the_batch():
    table = trace(nn.Linear(3, 2), torch.randn(4, 3))
    assert LayerTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert hash(table) == hash(trace(nn.Linear(3, 2), torch.randn(1, 3)))
    assert row(table + table, "fc") == (12, 10, 16, 2)
    fc = 4 * KINDS.index("fc")
    assert table.features(5).shape == (FEATURES,)
    assert table.features(5)[fc : fc + 4].tolist() == [30, 25, 8, 1]
    assert table.features(5)[-1] == 1
    with pytest.raises(DeviceError, match="batch must be 1 or more, got 0"):
        table.features(0)
    with pytest.raises(DeviceError, match="kinds conv3x3, conv"):
        LayerTable.from_dict({"conv": [0, 0, 0, 0]})


def test_wider_deeper_and_larger_batches_never_cost_less():
    def net(width: int, depth: int) -> LayerTable:
        layers = [nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()) for _ in range(depth)]
        return trace(nn.Sequential(nn.Conv2d(3, width, 1), *layers), torch.zeros(1, 3, 8, 8))

    coefficients = torch.rand(50, FEATURES, generator=torch.Generator().manual_seed(0)).numpy()
    small = predict_ms(coefficients, net(4, 2).features(1)[None])
    for larger in (net(8, 2).features(1), net(4, 3).features(1), net(4, 2).features(2)):
        assert (predict_ms(coefficients, larger[None]) > small).all()


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml")))
def test_a_pass_with_numbers_counts_what_one_without_does(name: str, monkeypatch: pytest.MonkeyPatch):
    shape = IMAGES.get(name, (3, 32, 32))
    model = model_factory({"model": model_settings(name)})(input_shape=shape, num_classes=10)
    x = torch.zeros(2, *shape, dtype=torch.long) if getattr(model, "takes_tokens", False) else torch.randn(2, *shape)
    x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
    tables = []
    for limit in (0.0, float("inf")):
        monkeypatch.setattr("devices.trace.MAX_REAL", limit)
        tables.append(trace(model, x).rows)
    assert tables[0] == tables[1]


def test_pricing_a_small_network_leaves_torchs_compiler_alone():
    """Its import takes most of a second, in every process that prices."""
    code = (
        "import sys, torch\n"
        "from devices.meter import measure\n"
        "from devices.trace import trace\n"
        "from torch import nn\n"
        "net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))\n"
        "trace(net, torch.randn(2, 1, 8, 8))\n"
        "measure(net, lambda m, b: m(b['x']).sum(), {'x': torch.randn(4, 1, 8, 8)}, 'net')\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
