"""Networks: sizes worked out by hand, shapes, and the sentences for inputs that do not fit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fedsim.errors import ConfigError
from fedsim.models.char_lstm import CharLSTM
from fedsim.models.convnet import ConvNet
from fedsim.models.femnist_cnn import FemnistCNN
from fedsim.models.lenet import LeNet5
from fedsim.models.mlp import MLP
from fedsim.models.resnet import ResNet
from fedsim.models.vgg import VGG
from fedsim.settings.build import model_factory
from fedsim.settings.compose import compose
from fedsim.settings.groups import model_settings
from fedsim.workloads.blobs import Blobs

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "model").glob("*.yaml"))
IMAGES = (3, 32, 32)
# As published, with batch norm: see test_speech.py. What each is fed:
SPEECH = {
    **dict.fromkeys(("bcresnet", "speech_resnet"), (1, 40, 101)),
    "bcresnet_asc": (1, 64, 51),
    "ds_cnn": (1, 10, 49),
    "matchboxnet": (1, 64, 101),
}


def from_config(path: Path) -> nn.Module:
    make = model_factory({"model": model_settings(path.stem)})
    return make(input_shape=shape_for(path), num_classes=12).eval()


def shape_for(path: Path) -> tuple[int, ...]:
    return (20,) if path.stem == "char_lstm" else SPEECH.get(path.stem, IMAGES)


def batch_for(path: Path) -> torch.Tensor:
    tokens = path.stem == "char_lstm"
    return torch.arange(40).reshape(2, 20) % 12 if tokens else torch.rand(2, *shape_for(path))


@pytest.mark.parametrize(
    "model, parameters",
    [
        (MLP((1, 8, 8), 10, hidden=[64]), 64 * 64 + 64 + 64 * 10 + 10),
        (MLP((16,), 3, hidden=[]), 16 * 3 + 3),
        (LeNet5((1, 28, 28), 10), 61_706),
        (FemnistCNN((1, 28, 28), 10), 1_663_370),
        (VGG(IMAGES, 10), 3_491_530),
        (ResNet(IMAGES, 10, depth=8), 78_042),
        # embedding 65*8; layers 4*256*(8+256)+2*1024 and 4*256*(256+256)+2*1024; head 65*257
        (CharLSTM((80,), 65), 520 + 272_384 + 526_336 + 16_705),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_number_of_parameters_is_the_published_or_hand_counted_one(model: nn.Module, parameters: int):
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_forward_is_the_head_on_the_features(path: Path):
    model = from_config(path)
    x = batch_for(path)
    features, logits = model.features(x), model(x)
    assert logits.shape == (*features.shape[:-1], 12)
    assert features.shape[:-1] == ((2, 20) if model.takes_tokens else (2,))
    assert torch.equal(model.head(features), logits)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_parameter_learns_and_nothing_is_normalised_over_the_batch(path: Path):
    model = from_config(path).train()
    model(batch_for(path)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    if path.stem in SPEECH:
        return
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
    assert not list(model.buffers())


def test_signal_reaches_the_end_of_the_network_without_normalisation():
    """He's initialisation keeps the mean square of activations; torch's default shrinks it threefold per layer."""
    features = VGG(IMAGES, 10).features(torch.randn(8, *IMAGES))
    assert features.square().mean() > 0.1


def test_same_seed_gives_the_same_weights_whatever_was_drawn_before():
    def weights(seed: int) -> torch.Tensor:
        torch.rand(7)
        return nn.utils.parameters_to_vector(Blobs(MLP, num_clients=2, seed=seed).build_model().parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("shape, classes", [((1, 28, 28), 62), ((3, 13, 17), 5)])
@pytest.mark.parametrize("make", [LeNet5, FemnistCNN, VGG, ResNet, MLP], ids=lambda make: make.__name__)
def test_image_models_take_odd_sizes(make, shape, classes: int):
    assert make(shape, classes)(torch.rand(1, *shape)).shape == (1, classes)


@pytest.mark.parametrize("depth, blocks", [(8, 3), (14, 6), (20, 9)])
def test_resnet_depth_counts_its_layers(depth: int, blocks: int):
    assert len(ResNet(IMAGES, 10, depth=depth).blocks) == blocks


def test_convnet_has_a_norm_behind_every_convolution_only_where_asked():
    kinds = [type(m) for m in ConvNet(IMAGES, 10, channels=[4, 6], groups=2).body]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.ReLU] * 2 + [nn.Flatten]
    assert [type(m) for m in ConvNet(IMAGES, 10).body] == [nn.Conv2d, nn.ReLU] * 2 + [nn.Flatten]


@pytest.mark.parametrize("height", [4, 7, 8, 32])
def test_convnet_with_pools_ends_in_an_average(height: int):
    """All but the last convolution are followed by a pool, the last by the mean over the image."""
    model = ConvNet((1, height, height), 10, channels=[4, 6, 8], pool=True)
    kinds = [type(m) for m in model.body]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.MaxPool2d] * 2 + [nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten]
    assert all(m.stride == (1, 1) for m in model.body if isinstance(m, nn.Conv2d))
    assert model(torch.rand(2, 1, height, height)).shape == (2, 10)
    assert model.head.in_features == 8


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: LeNet5((1, 8, 8), 10), r"model lenet5 needs images .* 12x12, got .*\[1, 8, 8\]; try model=mlp"),
        (lambda: LeNet5((80,), 65), r"shape \[80\]; try model=mlp or, for text, char_lstm; sound .* workload=kws"),
        (lambda: FemnistCNN((1, 3, 8), 10), "model femnist_cnn needs images .* of at least 4x4"),
        (lambda: VGG((3, 7, 32), 10), "model vgg needs images .* of at least 8x8"),
        (lambda: VGG(IMAGES, 10, dropout=1.0), r"model.dropout must be in \[0, 1\), got 1.0"),
        (lambda: ResNet((3, 3, 3), 10), "model resnet needs images .* of at least 4x4"),
        (lambda: ResNet(IMAGES, 10, depth=10), r"model.depth must be 8, 14, .* \(6n \+ 2\), got 10"),
        (lambda: ResNet(IMAGES, 10, groups=5), "model.groups must divide model.width=16, got 5"),
        (lambda: ConvNet(IMAGES, 10, groups=5), r"model.groups must divide model.channels=\[12, 24\], got 5"),
        (lambda: ConvNet(IMAGES, 10, groups=-1), "model.groups must be at least 0, got -1"),
        (lambda: CharLSTM((1, 28, 28), 10), "model char_lstm needs sequences of token ids"),
        (lambda: CharLSTM((80,), 65, hidden=0), "model.hidden must be at least 1, got 0"),
        (lambda: MLP((4,), 2, hidden=64), "model.hidden must be a list of whole numbers, got 64"),
        (lambda: MLP((4,), 2, hidden=[8, -1]), r"model.hidden\[1\] must be at least 1, got -1"),
    ],
)
def test_input_or_option_that_does_not_fit_is_named(make, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_memory_format_is_a_setting_of_the_model_that_changes_no_weight():
    """The same numbers in another order in memory, for convolutions only."""
    tree = model_settings("lenet5")
    shapes = {"input_shape": (3, 28, 28), "num_classes": 10}
    built = {}
    for name in ("contiguous", "channels_last"):
        torch.manual_seed(1)
        built[name] = model_factory({"model": {**tree, "memory_format": name}})(**shapes)
        weight = built[name].get_parameter("body.3.weight")  # [16, 6, 5, 5]
        assert weight.is_contiguous() == (name == "contiguous")
        assert weight.is_contiguous(memory_format=torch.channels_last) == (name == "channels_last")
    assert tree["memory_format"] == "channels_last"
    plain, last = (model.state_dict() for model in built.values())
    assert all(torch.equal(plain[name], last[name]) for name in plain)
    assert "memory_format" not in model_settings("mlp")


def test_unknown_memory_format_is_refused_in_one_sentence():
    with pytest.raises(
        ConfigError, match=r"unknown value for model\.memory_format 'channel_last'; did you mean 'channels_last'"
    ):
        compose(["model=lenet5", "model.memory_format=channel_last", "workload=blobs"])
