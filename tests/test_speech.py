"""Keyword spotting: BC-ResNet and the first residual networks against their published sizes, and the log-mel front-end.

Sources: as in the modules; sizes from the papers' tables and, to the last parameter, by hand.
"""

import json
import math
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import array_workload
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from devices.compression.channels import ChannelGroups
from devices.compression.kernels import int8_network, integer_operators
from devices.compression.masks import apply_masks, global_masks, prunable
from devices.compression.sizes import dense_bytes, nonzero_bytes
from fedsim.errors import ConfigError, DataError
from fedsim.models.bcresnet import BCResNet, BroadcastedBlock, SubSpectralNorm
from fedsim.models.bcresnet_asc import BCResNetASC
from fedsim.models.ds_cnn import DSCNN
from fedsim.models.matchboxnet import MatchboxNet
from fedsim.models.speech_resnet import SpeechResNet
from fedsim.settings.compose import compose
from fedsim.workloads.arrays import Arrays, ArrayWorkload
from fedsim.workloads.augmenting import Augmentation
from fedsim.workloads.bundle import Bundle
from fedsim.workloads.log_mel import LogMel, Mfcc
from fedsim.workloads.partition import Iid, Natural
from fedsim.workloads.speech_commands import FOLDER, KEYWORDS, SpeechCommands

SHAPE = (1, 40, 101)


def noisy_norms(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics that are not those of a fresh model."""
    draw = torch.Generator().manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1, generator=draw)
            m.running_var.uniform_(0.5, 1.5, generator=draw)
    return model.eval()


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tau, published, parameters", [(1, 9.2, 9232), (1.5, 17.2, 17154), (2, 27.3, 27284), (3, 54.2, 54168)]
)
def test_bcresnet_has_the_published_size(tau: float, published: float, parameters: int):
    """69 c^2 + 552.5 c + 4 c K + K with c = 8 tau: weights of 105 tensors, and 90 of statistics."""
    model = BCResNet(SHAPE, 12, tau)
    c, size = 8 * tau, sum(p.numel() for p in model.parameters())
    assert size == parameters == 69 * c**2 + 552.5 * c + 4 * c * 12 + 12
    assert round(size / 1000, 1) == published
    assert (len(list(model.parameters())), len(list(model.buffers()))) == (105, 90)


@pytest.mark.parametrize("tau, parameters", [(6, 187_812), (8, 321_068), (0.625, 4585)])
def test_wider_and_narrower_ones_too(tau: float, parameters: int):
    assert sum(p.numel() for p in BCResNet(SHAPE, 12, tau).parameters()) == parameters


@pytest.mark.parametrize(
    "tau, ten, thirty_five, statistics, products",
    [
        (1, 9166, 9991, 2446, 2_482_156),
        (1.5, 17_056, 18_281, 3654, 4_607_994),
        (2, 27_154, 28_779, 4862, 7_323_672),
        (3, 53_974, 56_399, 7278, 14_524_548),
        (6, 187_426, 192_251, 14_526, 50_283_336),
        (8, 320_554, 326_979, 19_358, 85_919_328),
    ],
)
def test_other_classes_statistics_and_multiply_adds_of_bcresnet(tau, ten, thirty_five, statistics, products):
    """Statistics travel with the weights; products are those of convolutions and head, one clip and 12 classes."""
    for classes, parameters in ((10, ten), (35, thirty_five)):
        assert sum(p.numel() for p in BCResNet(SHAPE, classes, tau).parameters()) == parameters
    model = BCResNet(SHAPE, 12, tau).eval()
    assert sum(b.numel() for b in model.buffers()) == statistics
    with FlopCounterMode(display=False) as counted:
        model(torch.zeros(1, *SHAPE))
    assert counted.get_total_flops() == 2 * products


@pytest.mark.parametrize(
    "tau, parts",
    [(1, (432, 560, 840, 2400, 3400, 1600)), (8, (3456, 18_816, 28_224, 87_296, 134_720, 48_556))],
)
def test_each_part_of_bcresnet_has_its_size(tau: int, parts: tuple[int, ...]):
    """Stem, four stages, and what is behind them."""
    model = BCResNet(SHAPE, 12, tau)
    blocks = list(model.blocks)
    stages = [nn.ModuleList(blocks[begin:end]) for begin, end in ((0, 2), (2, 4), (4, 8), (8, 12))]
    found = [model.stem, *stages, nn.ModuleList([model.tail, model.head])]
    assert tuple(sum(p.numel() for p in part.parameters()) for part in found) == parts


@pytest.mark.parametrize(
    "depth, width, parameters",
    [(8, 45, 110_307), (8, 19, 19_905), (15, 45, 237_882), (15, 19, 42_648), (26, 45, 438_357), (26, 19, 78_387)],
)
def test_speech_resnets_have_the_published_sizes(depth: int, width: int, parameters: int):
    model = SpeechResNet(SHAPE, 12, depth, width)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(2, *SHAPE)).shape == (2, 12)


@pytest.mark.parametrize("tau, parameters", [(1, 8045), (2, 25_040), (4, 85_880), (6, 182_520), (8, 314_960)])
def test_bcresnet_asc_has_the_published_size(tau: int, parameters: int):
    """44.75 c^2 + 332 c + 2.5 c K with c = 10 tau and K = 10, whatever its norms by frequency; 315k are published."""
    c = 10 * tau
    assert parameters == 44.75 * c**2 + 332 * c + 2.5 * c * 10
    for norm in ("none", "resnorm"):
        assert sum(p.numel() for p in BCResNetASC((1, 256, 64), 10, tau, norm_in=norm).parameters()) == parameters


@pytest.mark.parametrize("bands, height, parameters", [(5, 320, 317_600), (1, 256, 307_040)])
def test_other_bands_would_not_give_the_published_315_thousand(bands: int, height: int, parameters: int):
    assert sum(p.numel() for p in BCResNetASC((1, height, 64), 10, 8, bands=bands).parameters()) == parameters


def test_the_head_for_scenes_is_the_convolution_before_the_average():
    model, seen = noisy_norms(BCResNetASC((1, 32, 101), 10)), []
    model.blocks.register_forward_hook(lambda module, args, out: seen.append(out))
    found = model(torch.randn(2, 1, 32, 101, generator=torch.Generator().manual_seed(0)))
    expected = nn.functional.conv2d(seen[0], model.head.weight[:, :, None, None]).mean((2, 3))
    torch.testing.assert_close(found, expected)
    assert model.head.bias is None


def test_the_small_system_for_scenes_has_61_kb_of_parameters():
    """As the challenge counts: a byte for each parameter that is not zero, those of norms too, and 1,024 in a KB.

    PQK never prunes the classifier, the network for devices may; none of the norms' parameters are taken to be zero.
    """
    settings = compose(["experiment=dcase_esc10"])
    model = BCResNetASC((1, 256, 101), 10, settings["model"]["tau"])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    names = prunable(model)
    trained, deployed = settings["trainer"], settings["compression"]
    for pruned, given in ((names[:-1], trained), (names, deployed)):
        masks = global_masks({name: weights[name] for name in pruned}, given["sparsity"], given["floor"])
        kept = {name: masks.get(name, torch.ones_like(w)).to(torch.int8) for name, w in weights.items()}
        assert 60.5 * 1024 < nonzero_bytes(kept) <= 61 * 1024
        assert given["bits"] == 8


def test_ds_cnn_has_the_size_of_its_layers():
    """40 * 64 weights and 128 of the norm; four times 9 * 64 + 128 + 64 * 64 + 128; 65 * 12."""
    assert sum(p.numel() for p in DSCNN((1, 10, 49), 12).parameters()) == 2560 + 128 + 4 * 4928 + 780 == 23_180


@pytest.mark.parametrize(
    "blocks, repeats, published, parameters", [(3, 1, 77, 77_214), (3, 2, 93, 92_766), (6, 2, 140, 138_846)]
)
def test_matchboxnets_have_the_published_sizes(blocks: int, repeats: int, published: int, parameters: int):
    """Within 1 %, for the 30 classes of the first Speech Commands; 129 weights fewer for each class less."""
    model = MatchboxNet((1, 64, 101), 30, blocks, repeats)
    assert sum(p.numel() for p in model.parameters()) == parameters == pytest.approx(published * 1000, rel=0.01)
    assert sum(p.numel() for p in MatchboxNet((1, 64, 101), 12, blocks, repeats).parameters()) == parameters - 18 * 129


def test_speech_resnet_computes_what_its_definition_says():
    """res8 with two pairs written out: a map joins the next pair's sum before it is normalised."""
    model = noisy_norms(SpeechResNet(SHAPE, 3, width=5))
    x = torch.nn.functional.avg_pool2d(model.stem(torch.ones(1, *SHAPE)).relu(), (3, 4))
    first = x
    x = model.norms[0](model.convs[0](x).relu())
    second = model.convs[1](x).relu() + first
    x = model.norms[2](model.convs[2](model.norms[1](second)).relu())
    third = model.convs[3](x).relu() + second
    x = model.norms[4](model.convs[4](model.norms[3](third)).relu())
    x = model.norms[5](model.convs[5](x).relu() + third)
    torch.testing.assert_close(model(torch.ones(1, *SHAPE)), model.head(x.mean((2, 3))))


@pytest.mark.parametrize("tau", [1, 8])
def test_shapes_of_the_stages(tau: int):
    model, seen = BCResNet(SHAPE, 12, tau).eval(), []
    for part in (model.stem, *[model.blocks[i] for i in (1, 3, 7, 11)], model.tail):
        part.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[1:])))
    assert model(torch.randn(1, *SHAPE)).shape == (1, 12)
    rows = [(16, 20), (8, 20), (12, 10), (16, 5), (20, 5), (32, 1)]
    assert seen == [(tau * channels, left, 101) for channels, left in rows]


@torch.no_grad()
def test_bcresnet_computes_what_its_definition_says():
    """Written out from the paper's table, with weights and statistics in the order in which the network has them."""
    model, f = noisy_norms(BCResNet(SHAPE, 12)), nn.functional
    left = iter([t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")])

    def norm(x: torch.Tensor, bands: int = 1) -> torch.Tensor:
        weight, bias, mean, variance = (next(left).view(1, -1, bands, 1, 1) for _ in range(4))
        y = x.view(len(x), x.shape[1], bands, -1, x.shape[3])
        return ((y - mean) / (variance + 1e-5).sqrt() * weight + bias).view(x.shape)

    x = given = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    x = norm(f.conv2d(x, next(left), stride=(2, 1), padding=2)).relu()
    for stage, (width, count) in enumerate(((8, 2), (12, 2), (16, 4), (20, 4))):
        for block in range(count):
            y = x if block else norm(f.conv2d(x, next(left))).relu()
            stride = 2 if block == 0 and stage in (1, 2) else 1
            h = norm(f.conv2d(y, next(left), stride=(stride, 1), padding=(1, 0), groups=width), 5)
            far = 2**stage
            g = f.conv2d(h.mean(2, keepdim=True), next(left), padding=(0, far), dilation=(1, far), groups=width)
            g = f.conv2d(f.silu(norm(g)), next(left))
            x = (h + g + x if block else h + g).relu()
    x = f.conv2d(x, next(left), padding=(0, 2), groups=20)
    x = norm(f.conv2d(x, next(left))).relu().mean((2, 3))
    torch.testing.assert_close(model(given), x @ next(left).T + next(left))
    assert not list(left)


def test_shapes_of_the_stages_for_scenes():
    """Halved by the first convolution and by pools behind the first two stages, in frequency and in time."""
    model, seen = BCResNetASC((1, 256, 101), 10, 8).eval(), []
    for part in (model.stem, *(m for m in model.blocks if isinstance(m, BroadcastedBlock))):
        part.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[1:])))
    features = model.features(torch.randn(1, 1, 256, 101))
    first, second, rest = (80, 128, 51), (120, 64, 25), (160, 32, 12)
    assert seen == [(160, 128, 51), first, first, second, second, rest, rest, *3 * [(200, 32, 12)]]
    assert features.shape == (1, 200)


def test_shapes_of_ds_cnn_and_matchboxnet():
    small, box = DSCNN((1, 10, 49), 12).eval(), MatchboxNet((1, 64, 101), 12).eval()
    assert small.body[:-2](torch.zeros(2, 1, 10, 49)).shape == (2, 64, 5, 25)
    assert box.body[:-2](torch.zeros(2, 1, 64, 101)).shape == (2, 128, 101)
    assert [m.kernel_size for m in box.modules() if isinstance(m, nn.Conv1d) and m.groups > 1] == [
        *((11,), (13,), (15,), (17,), (29,))
    ]


@torch.no_grad()
def test_an_impulse_reaches_54_frames_of_a_scene():
    """2 frames by the stem, then one in each of 2, 2, 2 and 3 blocks, of 2, 4, 8 and 8 frames: 2 + 4 + 8 + 40 = 54."""
    torch.manual_seed(0)
    model = noisy_norms(BCResNetASC((1, 32, 401), 10, norm_in="none")).double()
    quiet, impulse, seen = torch.zeros(1, 1, 32, 401).double(), torch.zeros(1, 1, 32, 401).double(), []
    impulse[..., 200] = 100.0
    model.blocks.register_forward_hook(lambda module, args, out: seen.append(out))
    model(quiet), model(impulse)
    changed = (seen[0] != seen[1]).any(2).any(1)[0].nonzero().flatten()
    assert 8 * int(changed.min()) >= 200 - 54 - 8
    assert 8 * int(changed.max()) <= 200 + 54
    assert len(changed) >= 9


@pytest.mark.parametrize("frames", [51, 201])
def test_any_number_of_frames_will_do(frames: int):
    assert BCResNet(SHAPE, 12)(torch.randn(2, 1, 40, frames)).shape == (2, 12)


@pytest.mark.parametrize("width, before", [(8, 8), (8, 16)])
def test_a_block_without_its_branch_over_time(width: int, before: int):
    """relu(x + h), or relu(h) where the width changes."""
    block = noisy_norms(BroadcastedBlock(before, width, 1, 2, 5, 0.1))
    nn.init.zeros_(block.over_time[3].weight)
    x = torch.randn(2, before, 20, 11)
    h = block.over_frequency(block.widen(x))
    torch.testing.assert_close(block(x), torch.relu(h + x if width == before else h), rtol=0, atol=0)


def test_the_branch_over_time_is_the_same_for_all_frequencies():
    block, sums = noisy_norms(BroadcastedBlock(8, 8, 1, 4, 5, 0.1)), []
    x = torch.randn(2, 8, 20, 30)
    block.over_time.register_forward_hook(lambda module, args, out: sums.append(out))
    h, y = block.over_frequency(x), block(x)
    assert sums[0].shape == (2, 8, 1, 30)
    torch.testing.assert_close(y, torch.relu(x + h + sums[0].expand(-1, -1, 20, -1)))


def test_an_impulse_reaches_56_frames_and_no_further():
    """5x5 stem: 2; dilations 1, 2, 4, 8 in 2, 2, 4, 4 blocks: 2 + 4 + 16 + 32."""
    torch.manual_seed(0)
    model = noisy_norms(BCResNet((1, 40, 201), 12)).double()  # the rim is faint
    quiet, impulse = torch.zeros(1, 1, 40, 201).double(), torch.zeros(1, 1, 40, 201).double()
    impulse[..., 100] = 100.0
    with torch.no_grad():
        changed = (model.blocks(model.stem(quiet)) != model.blocks(model.stem(impulse))).any(2).any(1)[0]
    first, last = changed.nonzero().flatten().aminmax()
    assert 100 - 56 <= first < 50
    assert 150 < last <= 100 + 56


def test_one_band_is_batch_norm_and_bands_do_not_see_each_other():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 10, 7)
    assert torch.equal(SubSpectralNorm(4, 1)(x), nn.BatchNorm2d(4)(x))
    norm, louder = SubSpectralNorm(4, 5).train(), x.clone()
    louder[:, :, 2:4] *= 3  # the second band
    torch.testing.assert_close(norm(x), norm(louder), rtol=0, atol=1e-4)
    assert norm.norm.running_var[1] > 1.5 * norm.norm.running_var[0]  # channel 0, bands 1 and 0
    assert sum(p.numel() for p in norm.parameters()) == 2 * 5 * 4
    assert sum(b.numel() for b in norm.buffers()) == 2 * 5 * 4 + 1


def test_half_of_the_channels_can_be_removed():
    """As many parameters as Torch-Pruning leaves of the widest one; what they compute is asked in test_channels."""
    groups = ChannelGroups.find(BCResNet(SHAPE, 12, 8), torch.randn(2, *SHAPE))
    small = groups.build(BCResNet(SHAPE, 12, 8), groups.first(0.5, round_to=8))
    assert sum(p.numel() for p in small.parameters()) == 89_884


@torch.no_grad()
@pytest.mark.parametrize(
    "make, shape, operators",
    [
        (BCResNet, SHAPE, 60),
        (partial(SpeechResNet, width=48), SHAPE, 10),
        (BCResNetASC, (1, 32, 101), 50),
        (DSCNN, (1, 10, 49), 10),
        (MatchboxNet, (1, 64, 101), 20),
    ],
)
def test_they_run_on_int8_kernels(make, shape: tuple[int, ...], operators: int):
    torch.manual_seed(0)
    model, x = noisy_norms(make(shape, 12)), torch.randn(8, *shape)
    network = int8_network(model, x)
    assert len(integer_operators(network)) >= operators
    assert float((network(x) - model(x)).abs().mean() / model(x).abs().mean()) < 0.1


def test_a_fifth_of_the_weights_in_int8_takes_a_twentieth_of_the_bytes():
    model = BCResNet(SHAPE, 12)
    weights = {name: model.get_parameter(name) for name in prunable(model)}
    kept = apply_masks(weights, global_masks(weights, 0.8, floor=0.03))
    assert nonzero_bytes(kept, dict.fromkeys(kept, 8)) <= 0.06 * dense_bytes(weights)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (partial(BCResNet, (1, 32, 101), 12), "32 frequencies leave 16 rows in between, .* 40 frequencies fit"),
        (partial(BCResNet, (1, 24, 101), 12, bands=3), "needs 5 rows behind its stages, and 24 frequencies leave 3"),
        (
            partial(BCResNet, SHAPE, 12, tau=1.3),
            "model.tau must be a multiple of 1/8, got 1.3",
        ),
        (
            partial(BCResNetASC, SHAPE, 10),
            "40 frequencies leave 10 rows .* 32 frequencies fit, or model.bands=5",
        ),
        (partial(BCResNetASC, (1, 32, 6), 10), "model bcresnet_asc needs images .* of at least 7x7"),
        (partial(BCResNetASC, (1, 32, 9), 10, tau=0.25), "model.tau must be a multiple of 1/10, got 0.25"),
        (partial(BCResNet, SHAPE, 12, dropout=1), r"model.dropout must be in \[0, 1\)"),
        (partial(BCResNet, (16000,), 12), "model bcresnet needs images"),
        (partial(SpeechResNet, SHAPE, 12, depth=9), "model.depth must be 8, 15 or 26, got 9"),
    ],
)
def test_what_does_not_fit_is_named(make, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        make()


# --- spectrograms ---------------------------------------------------------------------------------------------------


def test_a_second_becomes_101_frames_of_40_bands_and_silence_the_floor():
    mel = LogMel()(torch.zeros(2, 16000))
    assert mel.shape == (2, *SHAPE)
    torch.testing.assert_close(mel, torch.full_like(mel, math.log(1e-6)))


def test_no_clips_have_spectrograms_of_the_same_shape():
    assert LogMel()(torch.zeros(0, 16000)).shape == (0, *SHAPE)


def test_twice_the_amplitude_adds_ln_4():
    sound = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        LogMel()(2 * sound) - LogMel()(sound), torch.full((1, *SHAPE), math.log(4)), atol=1e-2, rtol=0
    )


def test_a_second_becomes_49_frames_of_10_coefficients():
    """Windows of 40 ms every 20 ms: 1 + (1000 - 40) / 20. The first coefficient of flat bands is sqrt(40) times one."""
    found = Mfcc()(torch.zeros(2, 16000))
    assert found.shape == (2, 1, 10, 49)
    assert Mfcc()(torch.zeros(0, 16000)).shape == (0, 1, 10, 49)
    expected = torch.zeros(2, 1, 10, 49)
    expected[:, :, 0] = math.sqrt(40) * math.log(1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("option, settings", [("mfcc", {}), ("mfcc_64", {"center": True, "f_min": 0.0, "f_max": None})])
def test_coefficients_are_those_of_torchaudio(option: str, settings: dict):
    """All of them as of torchaudio's own transform; without the last ones, what it gives is cut."""
    tree = compose(["workload=kws", f"workload/features={option}"])["workload"]["features"]
    front_end = hydra.utils.instantiate(tree)
    mel = {
        "n_fft": tree.get("fft", 640),
        "win_length": tree["window"],
        "hop_length": tree["hop"],
        "n_mels": tree["mels"],
    }
    mel |= {"f_min": 20.0, "f_max": 4000.0, "center": False, **settings}
    theirs = torchaudio.transforms.MFCC(16000, tree["coefficients"], log_mels=True, melkwargs=mel)
    sound = 0.1 * torch.randn(3, 16000, generator=torch.Generator().manual_seed(0))
    found = front_end(sound)
    torch.testing.assert_close(found[:, 0], theirs(sound), rtol=0, atol=1e-3)
    assert found.shape[1:] == ((1, 10, 49) if option == "mfcc" else (1, 64, 101))
    assert torch.equal(found[1:2], front_end(sound[1:2]))


def test_a_tone_is_loudest_in_its_band():
    """1 kHz is 1000 of 2840 mel (2595 log10(1 + f / 700)): band 13.4 of 40 + 1."""
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000)[None]
    assert LogMel()(tone)[0, 0, :, 50].argmax() == 13


def test_a_clip_does_not_depend_on_its_batch():
    sound, mel = torch.randn(7, 4000, generator=torch.Generator().manual_seed(0)), LogMel()
    assert torch.equal(mel(sound)[3:4], mel(sound[3:4]))


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"mels": 0}, "workload.features.mels must be at least 1, got 0"),
        ({"fft": 400}, "workload.features.fft must be at least workload.features.window=480, got 400"),
        ({"floor": 0}, "workload.features.floor must be greater than 0, got 0"),
    ],
)
def test_wrong_settings_of_the_front_end(wrong: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        LogMel(**wrong)


def test_wrong_settings_of_the_coefficients():
    with pytest.raises(ConfigError, match=r"features.coefficients must be at most workload.features.mels=8, got 9"):
        Mfcc(coefficients=9, mels=8)
    with pytest.raises(ConfigError, match=r"low_hz < high_hz <= 4000, half the sample rate, got 20 and 5000"):
        Mfcc(8000, high_hz=5000.0)
    with pytest.raises(ConfigError, match=r"unknown workload/features 'mfc'; did you mean 'mfcc'"):
        compose(["workload=kws", "workload/features=mfc"])


def sound_workload(**settings) -> ArrayWorkload:
    x = np.random.default_rng(0).integers(-3000, 3000, (12, 1600)).astype(np.int16)
    part = Arrays(x, np.arange(12) % 3)
    front_end = LogMel(mels=20, fft=256, window=200, hop=80)
    settings = {"features": front_end, "client_test_fraction": 0.0, **settings}
    return array_workload("w", part, part, ["a", "b", "c"], "audio", SpeechResNet, Iid(), 2, seed=1, **settings)


def test_sound_is_kept_as_it_came_and_fed_as_spectrograms():
    workload = sound_workload()
    data = workload.client_data(0).train
    assert (data.tensors["x"].dtype, workload.input_shape) == (torch.int16, (1, 20, 21))
    expected = LogMel(mels=20, fft=256, window=200, hop=80)(data.tensors["x"][data.rows[:1]] / 32768)
    assert torch.equal(data.gather(torch.tensor([0]))["x"], expected)


def test_standard_is_of_the_spectrograms():
    x = torch.cat(
        [sound_workload(input_range="standard").client_data(c).train.materialise().tensors["x"] for c in (0, 1)]
    )
    torch.testing.assert_close(torch.stack([x.mean(), x.std()]), torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)


def test_front_ends_are_for_sound_only_and_for_its_sample_rate(tmp_path):
    part = Arrays(np.zeros((4, 8), np.float32), np.zeros(4, int))
    with pytest.raises(
        ConfigError, match=r"must be a front-end, .* got '?mfcc'?; .* a slash, e.g. workload/features=mfcc"
    ):
        array_workload("w", part, part, ["a"], "tabular", SpeechResNet, Iid(), 2, seed=1, features="mfcc")
    with pytest.raises(ConfigError, match=r"workload.features is for sound, and w holds tabular \[4, 8\]"):
        array_workload("w", part, part, ["a"], "tabular", SpeechResNet, Iid(), 2, seed=1, features=LogMel())
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", x=np.zeros((4, 800), np.int16), y=np.zeros(4, int), client=np.arange(4))
    meta = {"classes": ["a"], "kind": "audio", "sample_rate_hz": 8000}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"has 8000 samples a second; set workload.features.sample_rate_hz to that"):
        Bundle(str(tmp_path), model=SpeechResNet, partition=Natural(), num_clients=2, seed=1, features=LogMel())


# --- the official files -----------------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six clips of each of 12 words by six speakers, the last two for testing, and one background recording."""
    folder = tmp_path / FOLDER
    held: dict[str, list[str]] = {"testing": [], "validation": []}
    for number, word in enumerate((*KEYWORDS, "bed", "cat")):
        (folder / word).mkdir(parents=True)
        for speaker in range(6):
            name = f"{word}/{speaker:08x}_nohash_0.wav"
            soundfile.write(folder / name, np.full(100 + speaker, 100 * number + speaker, np.int16), 16000)
            if speaker >= 3:
                held["testing" if speaker > 3 else "validation"].append(name)
    (folder / "_background_noise_").mkdir()
    soundfile.write(folder / "_background_noise_" / "hum.wav", np.full(20000, 3000, np.int16), 16000)
    for name, lines in held.items():
        (folder / f"{name}_list.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    return folder


def speech_commands(**settings) -> SpeechCommands:
    return SpeechCommands(
        model=SpeechResNet, partition=Natural(1), num_clients=None, seed=1, features=LogMel(), **settings
    )


def test_official_files_become_twelve_classes_by_speaker(official: Path):
    """3 speakers x 10 keywords, a tenth as many other words and as many seconds of noise, given to the speakers."""
    workload = speech_commands()
    y, x = workload.train_tensors["y"], workload.train_tensors["x"]
    assert torch.bincount(y, minlength=12).tolist() == [3] * 12
    assert workload.num_clients == 3
    assert workload.classes == [*KEYWORDS, "_unknown_", "_silence_"]
    assert (x.shape, x.dtype) == ((36, 16000), torch.int16)
    row = int((y == 3).nonzero()[1])  # "down", by the second speaker
    assert x[row].tolist() == [301] * 101 + [0] * 15899
    assert set((x[y == 10, 0] // 100).tolist()) <= {10, 11}
    loud = x[y == 11].float().std(1), x[y == 11].float().mean(1)
    assert bool((loud[0] == 0).all())
    assert bool(((loud[1] >= 0) & (loud[1] <= 3000)).all())
    assert torch.bincount(workload.test.labels, minlength=12).tolist() == [2] * 12
    again = speech_commands()
    assert torch.equal(again.train_tensors["x"], x)


def test_augmentation_takes_the_archives_recordings_of_backgrounds(official: Path):
    recordings = speech_commands(augment=Augmentation()).noise_recordings()
    assert [(len(one), float(one[0])) for one in recordings] == [(20000, 3000 / 32768)]
    (official / "_background_noise_" / "hum.wav").unlink()
    assert {len(one) for one in speech_commands().noise_recordings()} == {16000}  # silence of the train part


def test_all_words_of_the_official_files(official: Path):
    workload = speech_commands(classes=35)
    assert workload.classes == sorted((*KEYWORDS, "bed", "cat"))
    assert torch.bincount(workload.train_tensors["y"]).tolist() == [3] * 12


def test_what_is_wrong_with_the_official_files(official: Path, monkeypatch):
    with pytest.raises(ConfigError, match=r"workload.classes must be 12 or 35, got 10"):
        speech_commands(classes=10)
    soundfile.write(official / "yes" / "00000000_nohash_0.wav", np.zeros(100, np.int16), 8000)
    with pytest.raises(DataError, match="must have one channel of 16000 samples a second, got 8000"):
        speech_commands()
    (official / "yes" / "00000000_nohash_0.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"00000000_nohash_0.wav cannot be read: "):
        speech_commands()
    monkeypatch.setenv("FEDSIM_DATA", str(official))
    monkeypatch.chdir(official)  # ./data of the checkout may hold real bundles
    with pytest.raises(
        DataError,
        match=r"the official files of speech_commands are not here or broken: set workload.download=true or put",
    ):
        speech_commands()
