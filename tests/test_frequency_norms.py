"""Norms by frequency and mixed styles, by themselves and in the networks that take them."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Parted
from test_models import CONFIGS, SPEECH, from_config
from torch import Tensor, nn
from torch.nn import functional as F

from clients.app import serve
from devices.compression.channels import ChannelGroups
from devices.errors import DeviceError
from devices.microphones import Microphones
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.models.bcresnet import BCResNet
from fedsim.models.bcresnet_asc import BCResNetASC
from fedsim.models.frequency_norms import FreqMixStyle, RelaxedNorm, ResidualNorm, frequency_norm
from fedsim.models.roles import private_names
from fedsim.report.rounds import weights_sha256
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.workloads.log_mel import LogMel

NETWORKS = {"bcresnet": partial(BCResNet, (1, 40, 33), 12), "bcresnet_asc": partial(BCResNetASC, (1, 32, 33), 12)}


def spectrograms(dtype: torch.dtype = torch.float32, channels: int = 1) -> Tensor:
    """Log-mel powers between silence and speech, [3, channels, 40, 21]."""
    return 4 * torch.randn(3, channels, 40, 21, dtype=dtype, generator=torch.Generator().manual_seed(0)) - 5


def microphone(dtype: torch.dtype = torch.float32) -> Tensor:
    """What a microphone adds to every frame of a log-mel spectrogram: a random walk over the frequencies, [40, 1]."""
    return torch.randn(40, 1, dtype=dtype, generator=torch.Generator().manual_seed(1)).cumsum(0)


# --- the norms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [RelaxedNorm(0.0), ResidualNorm(0.0), *frequency_norm("ifn")])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_without_its_other_part_a_norm_does_not_hear_the_microphone(norm: nn.Module, dtype: torch.dtype, error: float):
    x = spectrograms(dtype)
    torch.testing.assert_close(norm(x + microphone(dtype)), norm(x), rtol=0, atol=error)


def test_each_frequency_of_each_clip_has_mean_0_and_variance_1():
    """Over channels and frames; gains and offsets by frequency change nothing, beside the 1e-5 in the variance."""
    x = spectrograms(torch.float64, channels=4)
    y = ResidualNorm(0.0)(x)
    assert y.mean((1, 3)).abs().max() < 1e-12
    torch.testing.assert_close(y.var((1, 3), correction=0), torch.ones(3, 40).double(), rtol=0, atol=1e-5)
    assert y.mean(3).abs().max() > 0.1  # not each channel by itself
    gains = (microphone(torch.float64) / 4).exp()
    assert gains.max() / gains.min() > 4
    torch.testing.assert_close(ResidualNorm(0.0)(gains * x + microphone(torch.float64)), y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", [RelaxedNorm(0.5), ResidualNorm(0.0)])
def test_where_nothing_varies_zeros_come_out(norm: nn.Module):
    """One frame of one channel, or silence: the variance is 0, and its 1e-5 decides."""
    assert not ResidualNorm(0.0)(spectrograms()[..., :1]).any()
    assert torch.equal(norm(torch.full((2, 1, 40, 5), -13.8155)), torch.zeros(2, 1, 40, 5))
    assert not [*norm.parameters(), *norm.buffers()]


def test_the_residual_part_is_lambda_times_the_input():
    """A constant on one frequency adds lambda times it there, and nothing elsewhere."""
    x, louder = spectrograms(torch.float64), spectrograms(torch.float64)
    louder[:, :, 7] += 3
    change = ResidualNorm(0.1)(louder) - ResidualNorm(0.1)(x)
    expected = torch.zeros_like(x)
    expected[:, :, 7] = 0.3
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-12)


def test_relaxed_norm_goes_from_frequency_norm_to_layer_norm():
    x = spectrograms(torch.float64, channels=4)
    layer, frequency = F.layer_norm(x, x.shape[1:]), ResidualNorm(0.0)(x)
    for weight in (0.0, 0.3, 0.5, 1.0):
        torch.testing.assert_close(RelaxedNorm(weight)(x), weight * layer + (1 - weight) * frequency)
    assert (layer - frequency).abs().max() > 0.1


def test_lambda_is_the_published_one_where_none_is_given():
    x = spectrograms()
    (residual,), (relaxed,), (other,) = frequency_norm("resnorm"), frequency_norm("rfn"), frequency_norm("rfn", 0.2)
    assert torch.equal(residual(x), ResidualNorm(0.1)(x))
    assert torch.equal(relaxed(x), RelaxedNorm(0.5)(x))
    assert torch.equal(other(x), RelaxedNorm(0.2)(x))
    assert frequency_norm("none") == []


# --- mixed styles ----------------------------------------------------------------------------------------------------


def styles(x: Tensor) -> Tensor:
    """Mean and deviation of each frequency of each clip, [2, batch, 1, frequencies, 1]."""
    return torch.stack([x.mean((1, 3), keepdim=True), x.std((1, 3), keepdim=True)])


def test_a_mixed_clip_has_a_style_between_its_own_and_that_of_another_one():
    """The same share of the own style in mean and deviation of every frequency; all else of the clip stays."""
    torch.manual_seed(3)
    x = spectrograms(torch.float64) + torch.tensor([0.0, 10.0, 20.0]).view(3, 1, 1, 1)
    y = FreqMixStyle(1.0, 2.0).train()(x)
    before, after = styles(x), styles(y)
    torch.testing.assert_close((y - after[0]) / after[1], (x - before[0]) / before[1], rtol=0, atol=1e-6)
    shares = []
    for clip in range(3):
        for other in {0, 1, 2} - {clip}:
            share = (after[:, clip] - before[:, other]) / (before[:, clip] - before[:, other])
            if share.std() < 1e-4:
                shares.append(float(share.mean()))
    assert len(shares) >= 2  # a clip that met itself has kept its style
    assert all(0 < share < 1 for share in shares)


def test_a_share_of_the_batches_is_mixed_and_none_that_is_judged():
    torch.manual_seed(0)
    layer, x = FreqMixStyle(0.3, 0.3), spectrograms()
    mixed = [not torch.equal(layer.train()(x), x) for _ in range(400)]
    assert 0.23 < sum(mixed) / 400 < 0.37
    assert all(torch.equal(layer.eval()(x), x) for _ in range(20))


# --- in the networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_norms_stand_at_the_input_and_behind_each_stage_and_have_nothing_to_send(make: Callable[..., nn.Module]):
    """For scenes before the pool of the stage."""
    model, seen = make(norm_in="rfn").eval(), []
    for part in model.modules():
        if isinstance(part, RelaxedNorm):
            part.register_forward_hook(lambda _, given, out: seen.append(tuple(given[0].shape[1:3])))
    model(torch.zeros(2, *((1, 40, 33) if isinstance(model, BCResNet) else (1, 32, 33))))
    if isinstance(model, BCResNet):
        assert seen == [(1, 40), (8, 20), (12, 10), (16, 5), (20, 5)]
    else:
        assert seen == [(1, 32), (10, 16), (15, 8), (20, 4), (25, 4)]
    plain, mixed = make(norm_in="none"), make(norm_in="ifn", mixstyle=0.5)
    assert plain.state_dict().keys() == model.state_dict().keys() == mixed.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_network_with_ifn_at_its_input_does_not_hear_the_microphone(make: Callable[..., nn.Module]):
    x = spectrograms(torch.float64)[:, :, : 40 if make.func is BCResNet else 32]
    curve = microphone(torch.float64)[: x.shape[2]]
    for norm, deaf in (("ifn", True), ("none", False)):
        model = make(norm_in=norm).eval().double()
        assert torch.allclose(model(x + curve), model(x), rtol=0, atol=1e-9) == deaf


def test_what_hears_by_ifn_does_not_hear_the_gain_of_a_real_recording():
    """Sound through a microphone that is a gain alone, and the front-end: 2 ln gain is added to every loud band."""
    clips = np.random.default_rng(0).uniform(-0.1, 0.1, (3, 8000)).astype(np.float32)
    heard = Microphones(curve_db=0, gain_db=9, noise_db=None).of("a").record(clips)
    before, after = (LogMel()(torch.from_numpy(sound)) for sound in (clips, heard))
    added = after - before
    assert added.std() < 1e-2 < 0.3 < abs(added.mean())
    for kind, deaf in (("ifn", True), ("none", False)):
        heard_by = nn.Sequential(*frequency_norm(kind))
        assert torch.allclose(heard_by(after), heard_by(before), rtol=0, atol=5e-2) == deaf


def test_only_a_network_without_norms_over_all_channels_can_be_narrowed():
    """Half of all channels of tau = 2 are the network of tau = 1."""
    model, x = partial(BCResNetASC, (1, 32, 17), 10), torch.randn(2, 1, 32, 17)
    groups = ChannelGroups.find(model(2, norm_in="none"), x)
    assert sum(p.numel() for p in groups.build(model(2), groups.first(0.5)).parameters()) == 8045
    for norm in ("resnorm", "rfn", "ifn"):
        with pytest.raises(DeviceError, match=r"mixes its channels .*\(a norm, "):
            ChannelGroups.find(model(1, norm_in=norm), x)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"norm_in": "batch"}, r"model.norm_in 'batch' \(allowed: ifn, none, resnorm, rfn\)"),
        ({"norm_in": "rfn", "norm_weight": 1.5}, r"model.norm_weight must be null or in \[0, 1\], got 1.5"),
        ({"norm_in": "ifn", "norm_weight": 0.5}, "norm_weight is for resnorm and rfn, and model.norm_in=ifn has none"),
        ({"mixstyle": 2}, r"model.mixstyle must be in \[0, 1\], got 2"),
        ({"mixstyle_alpha": 0}, "model.mixstyle_alpha must be greater than 0, got 0"),
    ],
)
def test_what_does_not_fit_is_named(wrong: dict, sentence: str):
    for make in NETWORKS.values():
        with pytest.raises(ConfigError, match=sentence):
            make(**wrong)


# --- in a federation -------------------------------------------------------------------------------------------------

RUN = ("workload=blobs", "workload.input_shape=[1,40,8]", "workload.examples_per_client=9", "num_clients=3", "cohort=3")
RUN += ("model=bcresnet", "model.tau=0.25", "rounds=1", "trainer.batch_size=4", "fleet=uniform", "engine.device=cpu")
MIXED = ("model.norm_in=rfn", "model.mixstyle=0.7")


def after_the_rounds(engine: LocalEngine, *overrides: str) -> Federation:
    run = Federation(build_world(json.dumps(compose([*RUN, *overrides]))), engine)
    assert [math.isfinite(report.metrics["loss"]) for report, _ in run.rounds()] == [True] * 2
    return run


def test_mixed_styles_are_drawn_by_client_whoever_was_trained_before():
    """All three clients in one process in order, or each by itself and the last one first."""
    together, apart, plain = (
        weights_sha256(after_the_rounds(engine, *settings).arrays)
        for engine, settings in ((LocalEngine(serve), MIXED), (Parted(1), MIXED), (LocalEngine(serve), MIXED[:1]))
    )
    assert together == apart != plain


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem in SPEECH], ids=lambda path: path.stem)
def test_the_role_of_norms_covers_every_batch_norm_those_of_bands_too(path: Path):
    """What has one dimension or none here is a norm's, but for the bias of the head."""
    state = from_config(path).state_dict()
    vectors = {name for name, tensor in state.items() if tensor.dim() < 2 and name != "head.bias"}
    assert private_names(from_config(path), ["norm"]) == vectors
    assert len(vectors) > 10


def test_fedbn_keeps_the_norms_of_bands_at_home_and_fedavg_averages_them():
    band = "blocks.0.over_frequency.1.norm.running_var"
    for method, stays in (("fedbn", True), ("fedavg", False)):
        run = after_the_rounds(LocalEngine(serve), f"method={method}")
        fresh, kept = run.world.workload.build_model().state_dict(), [run.grid.store.get(client) for client in range(3)]
        assert torch.equal(torch.from_numpy(run.arrays[band].numpy()), fresh[band]) == stays
        assert [any(name.endswith(band) for name in state) for state in kept] == [stays] * 3
        if stays:
            own = [next(t for name, t in state.items() if name.endswith(band)) for state in kept]
            assert not torch.equal(own[0], own[1])
