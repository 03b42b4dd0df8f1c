"""Networks that a user names on the command line, and the sentence for those that cannot be had."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from devices.errors import FileError
from fedsim.cli.devices.own_model import labels, loss, measure_cost, named_model, outputs, trace_cost
from fedsim.errors import ConfigError
from fedsim.settings.build import model_factory

FILE = """
import torch
from torch import nn
from beside import WIDTH

class Net(nn.Module):
    def __init__(self, num_classes=3, input_shape=(1, 4, 4)):
        super().__init__()
        self.fc = nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], num_classes)
    def forward(self, x):
        return self.fc(x.flatten(1))

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.aux = nn.Linear(16, WIDTH), nn.Linear(16, WIDTH)
    def forward(self, x):
        x = x.flatten(1)
        return {"aux": self.aux(x), "out": self.main(x)} if self.training else self.main(x)

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 5)
    def forward(self, x):
        return self.head(self.embed(x).mean(1))

class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()

def make():
    return Net(num_classes=7)

def number():
    return 3

def broken():
    raise RuntimeError("no such thing")

class Own(nn.Module):
    def __init__(self, num_classes=3, input_shape=(1, 4, 4)):
        super().__init__()
        self.fc, self.again = nn.Linear(16, num_classes), self

class InItsChild(Net):
    def __init__(self, num_classes=3, input_shape=(1, 4, 4)):
        super().__init__(num_classes, input_shape)
        self.fc.above = self

def deep(num_classes=3, input_shape=(1, 4, 4)):
    net = nn.Linear(16, num_classes)
    for _ in range(3000):
        net = nn.Sequential(net)
    return net
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with networks, and one beside it that it imports."""
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    (tmp_path / "net.py").write_text(FILE)
    return tmp_path / "net.py"


def test_class_of_a_file_gets_the_arguments_that_it_has(file: Path):
    """16 inputs x 10 outputs are 160 multiply-adds; 170 parameters of 4 bytes are 680."""
    model = named_model(f"{file}:Net", (1, 4, 4), 10)
    cost = measure_cost(model)
    assert (cost.forward_flops, cost.parameter_bytes) == (320, 680)
    assert cost.step_bytes


def test_function_of_a_file_is_called_without_arguments(file: Path):
    assert named_model(f"{file}:make", (1, 4, 4)).module.fc.out_features == 7


def test_auxiliary_output_counts_in_training_only(file: Path):
    """Both heads have 16 x 4 weights, and gradients for both are there: 2 x 2 x 68 x 4 bytes and what a batch takes."""
    model = named_model(f"{file}:TwoHeads", (1, 4, 4))
    cost = measure_cost(model)
    assert cost.forward_flops == 2 * 64
    assert max(fixed for fixed, _ in cost.step_bytes) >= 2 * 2 * 68 * 4


def test_model_of_token_ids_is_fed_them(file: Path):
    assert measure_cost(named_model(f"{file}:Words", tokens=12)).forward_flops == 2 * 8 * 5
    assert named_model("char_lstm", tokens=20).examples(2).dtype == torch.long
    assert named_model("lstm-32").shape == (40,)


def test_torchvision_is_built_without_weights_and_auxiliary_heads():
    """A MobileNetV3 small has 2.54 million parameters and 56.5 million multiply-adds (torchvision's own figures)."""
    cost = trace_cost(named_model("torchvision.models.mobilenet_v3_small"))
    assert cost.forward_flops / 2 == pytest.approx(56.5e6, rel=0.02)
    assert isinstance(
        named_model("torchvision.models.googlenet", (3, 64, 64), 5).module(torch.zeros(1, 3, 64, 64)), torch.Tensor
    )


def test_outputs_are_found_in_tuples_and_maps():
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert outputs({"aux": b, "logits": a})[0] is a
    assert [x is y for x, y in zip(outputs((a, [b])), (a, b), strict=True)] == [True, True]
    assert labels(torch.zeros(2, 5, 4, 4)).shape == (2, 4, 4)
    assert loss(nn.Identity(), {"x": a, "y": labels(a)}).item() == pytest.approx(1.0986, abs=1e-4)  # log 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lenet55", ["unknown model 'lenet55'", "did you mean 'lenet5'", "FILE.py:CLASS"]),
        ("torchvision.models.resnt18", ["did you mean 'torchvision.models.resnet18'"]),
        ("char_lstm", ["char_lstm takes token ids", "--tokens 80"]),
        ("{folder}/nett.py:Net", ["there is no file", "did you mean", "net.py"]),
        ("{folder}/net.py", ["none is named", "net.py:NAME", "Net, TwoHeads"]),
        ("{folder}/net.py:Nett", ["unknown model in", "did you mean 'Net'"]),
        ("{folder}/net.py:Wide", ["needs width", "it a default"]),
        ("{folder}/net.py:number", ["must be a torch.nn.Module", "got int"]),
        ("{folder}/net.py:broken", ["cannot be built: RuntimeError: no such thing"]),
    ],
)
def test_a_wrong_name_is_one_sentence(file: Path, name: str, words: list[str]):
    with pytest.raises(ConfigError) as caught:
        named_model(name.format(folder=file.parent))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_file_that_fails_and_wrong_shape_say_so(file: Path):
    file.with_name("bad.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ConfigError, match=r"bad\.py cannot be run: ModuleNotFoundError"):
        named_model(f"{file.with_name('bad.py')}:Net")
    with pytest.raises(ConfigError, match=r"--input-shape 1,5,5 right"):
        measure_cost(named_model(f"{file}:make", (1, 5, 5)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"name": "torchvision.models.alexnet", "num_classes": 10**6},
            "model torchvision.models.alexnet with --num-cl",
        ),
        ({"name": "lenet5", "input_shape": (1, 10**6, 10**6)}, "--input-shape 1,1000000,1000000 needs 32 TB of memory"),
        ({"name": "mlp", "input_shape": (1, 4000, 4000), "num_classes": 10}, "model mlp with --num-classes 10 needs"),
    ],
)
def test_a_network_that_this_host_cannot_hold_is_refused_before_it_is_made(arguments, words, monkeypatch):
    monkeypatch.setattr("fedsim.workloads.host_memory.host_bytes", lambda: 8 * 10**9)
    with pytest.raises(ConfigError, match=re.escape(words)):
        named_model(**arguments)


@pytest.mark.parametrize("name", ["Own", "InItsChild", "deep"])
def test_a_network_without_an_end_is_one_sentence_behind_both_doors(file: Path, name: str, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.syspath_prepend(file.parent)
    monkeypatch.setenv("FEDSIM_ALLOW_TARGET", f"net.{name}")
    target = {"_target_": f"net.{name}", "_partial_": True}
    with pytest.raises(ConfigError, match=r"net\.py:\w+ contains itself, or nests deeper"):
        named_model(f"{file}:{name}", (1, 4, 4))
    with pytest.raises(ConfigError, match=rf"model\._target_='net\.{name}' makes a network that contains itself"):
        model_factory({"model": target})(input_shape=(1, 4, 4), num_classes=3)


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device", "a loop", "a link to nothing"])
def test_a_model_file_that_is_no_file_is_called_what_it_is(tmp_path: Path, kind: str):
    path = tmp_path / "net.py"
    {
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a device": lambda: path.symlink_to("/dev/null"),
        "a loop": lambda: path.symlink_to(path),
        "a link to nothing": lambda: path.symlink_to("nothing"),
    }[kind]()
    words = f"is {kind}, and must be a file" if " to " not in kind and "loop" not in kind else "cannot be read: "
    with pytest.raises(FileError, match=rf"^{re.escape(str(path))} {words}"):
        named_model(f"{path}:Net")
