"""`model=` names code in the place of an option: a file, a module of the working folder, torchvision; one reader."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import TINY

import fedsim as door
from fedsim.errors import ConfigError
from fedsim.settings.build import model_factory
from fedsim.settings.check import try_out
from fedsim.settings.compose import compose

SHORT = (*TINY[:-1], "rounds=1")
NET = """
import math
from torch import nn
from beside import WIDTH

class Net(nn.Sequential):
    def __init__(self, input_shape, num_classes, width: int = WIDTH):
        super().__init__(nn.Flatten(), nn.Linear(math.prod(input_shape), width), nn.Linear(width, num_classes))

class Fixed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(16, 10))

def made(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))

def wrong():
    return 5

network = Fixed()
"""


@pytest.fixture(autouse=True)
def files(here: Path) -> Iterator[Path]:
    for name in ("net.py", "mine_a.py"):
        (here / name).write_text(NET)
    (here / "beside.py").write_text("WIDTH = 5\n")
    yield here
    for name in ("mine_a", "beside"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name",
    ["net.py:Net", "net.py:Fixed", "net.py:made", "{here}/net.py:Net", "mine_a:Net", "mine_a.Net", "mine_a.Fixed"],
)
def test_a_network_of_ones_own_runs_and_the_run_goes_on(files: Path, fedsim: Callable, name: str):
    name = name.format(here=files)
    assert fedsim("run", *SHORT, f"model={name}", "out=A").code == 0
    config = yaml.safe_load(Path("A/config.yaml").read_text())
    assert config["choices"]["model"] == name
    before = Path("A/rounds.jsonl").read_text()
    assert fedsim("resume", "A", "rounds=2").code == 0
    assert Path("A/rounds.jsonl").read_text().startswith(before.partition("\n")[0][:40])


def test_all_ways_to_name_a_network_make_the_same_and_take_its_settings(fedsim: Callable):
    ways = ("net.py:Net", "mine_a:Net", "mine_a.Net")
    assert fedsim("run", "-m", *SHORT, f"model=mlp,{','.join(ways)}", "out=A").code == 0
    hashes = [door.load(Path("A") / str(number)).summary["weights_sha256"] for number in range(4)]
    assert len(set(hashes[1:])) == 1 != len(set(hashes))
    for way in ways:
        tree = compose([*TINY, f"model={way}", "model.width=3"])
        assert model_factory(tree)(input_shape=(16,), num_classes=10)[1].out_features == 3
    assert door.run(*SHORT, model="net.py:Net", out="B", progress=False).summary["weights_sha256"] == hashes[1]


def test_devices_read_the_same_names(fedsim: Callable):
    for name in ("net.py:Net", "mine_a:Net", "torchvision.models.squeezenet1_1"):
        code, out, err = fedsim("devices", "predict", "--model", name, "--device", "pixel3")
        assert (code, err) == (0, ""), err
        assert f"{name}: " in out


def test_an_option_of_ones_own_and_a_study_may_name_one(files: Path, fedsim: Callable):
    (files / "configs" / "method").mkdir(parents=True)
    (files / "configs" / "method" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [{override /model: 'net.py:Net'}]\n"
    )
    assert compose(["method=mine"])["model"]["source"] == "net.py:Net"
    (files / "s.yaml").write_text(yaml.safe_dump({"title": "T", "arms": {"A": [*TINY, "model=net.py:Net"]}}))
    code, _, err = fedsim("study", "s.yaml", "--dry-run")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision.models.mobilenet_v3_small", "cannot take an example of workload blobs, ["),
        ("torchvision.models.mobilenet_v3_smal", "torchvision.models.mobilenet_v3_smal"),
        ("mlpp", "did you mean 'mlp'? (allowed: "),
        ("mlpp", "; a class of your own is FILE.py:CLASS or MODULE:CLASS"),
        ("nett.py:Net", "there is no file"),
        ("net.py", "net.py holds models, and none is named; write"),
        ("net.py:Nat", "did you mean 'Net'? (allowed: "),
        ("net.py:wrong", "must make a torch.nn.Module, got int"),
        ("net.py:network", "must be a class or a function that makes a network"),
        ("mine_a:Nat", "mine_a"),
        ("nothing:Net", "there is no module 'nothing' here"),
        ("net.py:Net model.widht=3", "unknown setting for Net 'model.widht'; did you mean 'model.width'?"),
        ("os:system", "--allow-target os.system"),
    ],
)
def test_a_name_that_makes_no_network_is_one_sentence(fedsim: Callable, name: str, words: str):
    code, _, err = fedsim("run", *SHORT, *f"model={name}".split(), "out=A")
    assert (code, err.count("\n"), Path("A").exists()) == (2, 1, False), err
    assert words in err


# --- trust -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def marked(files: Path) -> Callable[[str], Path]:
    """Writes a file with a network that leaves a mark where it is run; returns the mark."""

    def write(name: str) -> Path:
        path = files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(path.with_suffix('.ran'))!r}, 'w')\n{NET}")
        return path.with_suffix(".ran")

    return write


def test_a_file_elsewhere_is_run_where_the_user_typed_it_and_not_where_a_file_names_it(marked, fedsim: Callable):
    mark, name = marked("../away/net.py"), "../away/net.py:Net"
    Path("../away/beside.py").write_text("WIDTH = 5\n")
    Path("s.yaml").write_text(yaml.safe_dump({"title": "T", "arms": {"A": [*TINY, f"model={name}"]}}))
    code, _, err = fedsim("study", "s.yaml", "--dry-run")
    assert (code, err.count("\n"), mark.exists()) == (2, 1, False)
    assert f"--allow-target {name}" in err
    assert fedsim("run", *SHORT, f"model={name}", "out=A").code == 0
    assert mark.exists()
    mark.unlink()
    code, _, err = fedsim("resume", "A", "rounds=2")
    assert (code, err.count("\n"), f"--allow-target {name}" in err) == (2, 1, True)
    assert not mark.exists()
    assert fedsim("resume", "A", "rounds=2", "--allow-target", name).code == 0


@pytest.mark.parametrize("command", ["resume sent", "reprice sent fleet=sbc", "replay sent --round 1 --client 0"])
@pytest.mark.parametrize("source", ["sent/net.py:Net", "{here}/sent/net.py:Net", "../away/net.py:Net"])
def test_a_run_folder_has_no_file_run_that_is_not_the_users(marked, fedsim: Callable, files, command: str, source: str):
    assert fedsim("run", *SHORT, "model=net.py:Net", "out=sent").code == 0
    config = yaml.safe_load(Path("sent/config.yaml").read_text())
    config["model"]["source"] = source.format(here=files)
    Path("sent/config.yaml").write_text(yaml.safe_dump(config))
    marks = [marked("sent/net.py"), marked("../away/net.py")]
    if not command.startswith("reprice"):
        Path("sent/summary.json").unlink()
    code, _, err = fedsim(*command.split())
    assert (code, err.count("\n")) == (2, 1), err
    assert "--allow-target" in err or "checksum" in err
    assert not any(mark.exists() for mark in marks)


def test_a_file_in_a_run_folder_is_not_run_even_where_it_is_typed(marked, fedsim: Callable):
    assert fedsim("run", *SHORT, "out=sent").code == 0
    mark = marked("sent/net.py")
    code, _, err = fedsim("run", *SHORT, "model=sent/net.py:Net", "out=A")
    assert (code, err.count("\n"), mark.exists()) == (2, 1, False)
    assert "--allow-target sent/net.py:Net" in err
    with pytest.raises(ConfigError, match="--allow-target sent/net"):
        door.compose(model="sent/net.py:Net")
    with pytest.raises(ConfigError, match="--allow-target sent/net"):
        try_out(compose([*TINY, "model=sent/net.py:Net"]))
