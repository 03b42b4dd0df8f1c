"""Options and code of the working folder and of `--config-dir`: every command finds them, and none in a run folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import TINY
from sent_folder import write_module

import fedsim as door
from fedsim.errors import ConfigError
from fedsim.settings import permissions
from fedsim.settings.compose import compose
from fedsim.settings.groups import config_dir, config_folders, options
from fedsim.study.spec import read_study

SHORT = (*TINY[:-1], "rounds=1", "checkpoint_s=0")
OPTIONS = {
    "engine/mine": "defaults: [local, _self_]\n",
    "fleet/mine": "defaults: [uniform, _self_]\n",
    "method/mine": "# @package _global_\ndefaults: [{override /strategy: mine}]\n",
    "model/mine": "_target_: mine_a.Net\n_partial_: true\nhidden: 3\n",
    "strategy/mine": "_target_: mine_a.Server\n",
    "study/mine": f"title: Of my own\nbase: [{', '.join(SHORT)}]\narms: {{A: [method=mine]}}\n",
    "workload/mine": "defaults: [blobs, _self_]\nexamples_per_client: 9\n",
}
CODE = """
from torch import nn
from strategies.edge import EdgeStrategy

class Server(EdgeStrategy):
    pass

class Net(nn.Sequential):
    def __init__(self, input_shape, num_classes, hidden):
        super().__init__(nn.Flatten(), nn.LazyLinear(hidden), nn.Linear(hidden, num_classes))
        self(__import__("torch").zeros(1, *input_shape))
"""


def write_options(folder: Path) -> Path:
    """Writes an option of every group into a folder."""
    for name, text in OPTIONS.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def own(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a module, and options in its `configs`."""
    monkeypatch.setenv("COLUMNS", "200")
    (here / "mine_a.py").write_text(CODE)
    yield write_options(here / "configs")
    sys.modules.pop("mine_a", None)


@pytest.fixture
def finished(own: Path, fedsim: Callable, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of the user's own method and model, made once and copied."""
    kept = tmp_path_factory.getbasetemp() / "finished of ones own"
    if not kept.exists():
        assert fedsim("run", *SHORT, "method=mine", "model=mine", "out=A").code == 0
        shutil.copytree("A", kept)
    else:
        shutil.copytree(kept, "A")
    return "A"


COMMANDS = {
    "run": (["run", *SHORT, "method=mine", "model=mine", "workload=mine", "fleet=mine", "out=B"], "mine on mine"),
    "sweep": (["run", "-m", *SHORT, "method=mine,fedavg", "out=B"], "mine"),
    "help": (["run", "--help"], " mine"),
    "study": (["study", "mine", "--jobs", "1"], "Of my own"),
    "study by path": (["study", "{configs}/study/mine.yaml", "--dry-run"], "method=mine"),
    "studies": (["study", "--list"], "Of my own"),
    "data list": (["data", "list"], "mine"),
    "data describe": (["data", "describe", "workload=mine", "num_clients=4"], "blobs"),
    "data averages": (["data", "averages", "workload=mine", "num_clients=4", "--sizes", "1"], "4 clients"),
    "devices predict": (["devices", "predict", "--model", "mine", "--device", "pixel3"], "mine: "),
    "devices fit": (["devices", "fit", "--model", "mine", "--device", "pixel3"], "mine"),
}


@pytest.mark.parametrize("place", ["working folder", "config dir"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_finds_options_of_ones_own(own: Path, fedsim: Callable, command: str, place: str):
    arguments, shown = COMMANDS[command]
    if place == "config dir":
        if command == "study":
            pytest.skip("its runs are processes: seen in the working folder's")
        own = own.rename("conf").absolute()
    more = ["--config-dir", "conf"] if place == "config dir" else []
    code, out, err = fedsim(*(part.format(configs=own) for part in arguments), *more)
    assert (code, err) == (0, "")
    assert shown in out


@pytest.mark.parametrize("place", ["working folder", "config dir"])
def test_commands_on_a_finished_run_find_them_too(own: Path, finished: str, fedsim: Callable, place: str):
    if place == "config dir":
        own.rename("conf")
    more = ["--config-dir=conf"] if place == "config dir" else []
    code, out, err = fedsim("reprice", finished, "fleet=mine", "out=C", *more)
    assert (code, err, "mine" in out) == (0, "", True)
    (Path(finished) / "summary.json").unlink()
    assert fedsim("resume", finished, "engine=mine", *more).code == 0
    code, _, err = fedsim("flwr", "method=mine", "engine=ray", *more)
    assert (code, "leave out engine=ray" in err) == (2, True)  # composed, and then refused


def test_python_finds_them(own: Path):
    assert door.compose(method="mine", model={"hidden": 5}, engine="mine")["strategy"]["_target_"] == "mine_a.Server"
    assert door.run(*SHORT, method="mine", model="mine", out="A", progress=False).settings["choices"]["model"] == "mine"


def test_a_run_of_ones_own_method_is_read_where_that_is_not(own: Path, finished: str, fedsim: Callable, tmp_path: Path):
    own.rename(tmp_path / "away")
    code, out, err = fedsim("compare", finished, "--out", "compared")
    assert (code, err, "mine" in out) == (0, "", True)


# --- equal names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["method/fedprox", "model/lenet5", "study/mafl_digits", "run"])
def test_an_option_whose_name_fedsim_has_is_refused(own: Path, fedsim: Callable, group: str):
    file = own / f"{group}.yaml"
    file.write_text("{}")
    for arguments in (["run", *SHORT, "out=B"], ["study", "mine"], ["data", "list"], ["run", "--help"]):
        code, _, err = fedsim(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(f"fedsim: {file} has the name of {config_dir() / group}.yaml")
    assert not Path("B").exists()


def test_an_option_that_two_folders_of_the_users_have_is_refused(own: Path, fedsim: Callable):
    other = write_options(own.parent / "other")
    code, _, err = fedsim("run", *SHORT, "--config-dir", "other", "out=B")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{own / 'workload' / 'mine.yaml'} has the name of {other / 'workload' / 'mine.yaml'}" in err


def test_an_option_whose_name_a_plug_in_has_is_refused(own: Path, monkeypatch: pytest.MonkeyPatch):
    plugged = write_options(own.parent.parent / "plugged")
    monkeypatch.setattr("fedsim.settings.groups.plugin_folders", lambda: [plugged])
    with pytest.raises(ConfigError, match=f"mine.yaml has the name of {plugged}/workload/mine.yaml"):
        compose([])


def test_a_checkout_of_fedsim_has_no_configs_of_the_users(here: Path, monkeypatch: pytest.MonkeyPatch):
    usual = config_folders()
    monkeypatch.chdir(config_dir().parent)
    assert config_folders() == usual
    monkeypatch.chdir(here)
    (here / "configs").mkdir()
    assert config_folders() == [usual[0], here / "configs", *usual[1:]]
    for name in ("__init__.py", "run.yaml"):
        (here / "configs" / name).touch()
    assert config_folders() == usual


# --- what came from elsewhere ----------------------------------------------------------------------------------------


SENT = {
    "resume A engine=mine": "unknown engine 'mine'",
    "reprice A fleet=mine": "unknown fleet 'mine'",
    "compare A --out D": "",
    "replay A --round 1 --client {client}": "",
}


@pytest.mark.parametrize("command", SENT)
def test_a_run_folder_brings_neither_options_nor_code(own: Path, finished: str, fedsim: Callable, command: str):
    """There are `configs` with equal names in it, and a module: neither is looked at."""
    away = own.rename("A/configs")
    (away / "method" / "fedprox.yaml").write_text("{}")
    mark = write_module(Path("A") / "net.py")
    rounds = [json.loads(line) for line in (Path("A") / "rounds.jsonl").read_text().splitlines()]
    code, _, err = fedsim(*command.format(client=rounds[-1]["outcomes"]["completed"][0]).split())
    assert (code, SENT[command] in err) == (2 if SENT[command] else 0, True), err
    assert options("fleet") == [path.stem for path in sorted((config_dir() / "fleet").glob("*.yaml"))]
    assert not mark.exists()


@pytest.mark.parametrize("marker", ["rounds.jsonl", "study.json"])
@pytest.mark.parametrize("depth", ["", "deeper"])
def test_a_working_folder_in_a_run_folder_has_no_options(own: Path, monkeypatch, marker: str, depth: str):
    (own.parent / "config.yaml").touch()
    (own.parent / marker).touch()
    if depth:
        (own.parent / depth).mkdir()
        own.rename(own.parent / depth / "configs")
        monkeypatch.chdir(own.parent / depth)
    with pytest.warns(UserWarning, match="no option is looked up in .*: it lies in the folder of a run or study"):
        assert "mine" not in options("method")
    with pytest.raises(ConfigError, match="unknown method 'mine'"), pytest.warns(UserWarning, match="no option"):
        compose(["method=mine"])


@pytest.mark.parametrize("kind", ["a group that is a run", "a link to a file", "a link to a group"])
def test_options_of_a_run_folder_are_refused(own: Path, kind: str):
    sent = own.parent / "sent"
    sent.mkdir()
    for name in ("config.yaml", "rounds.jsonl"):
        (sent / name).touch()
    if kind == "a group that is a run":
        for name in ("config.yaml", "rounds.jsonl"):
            (own / "method" / name).touch()
    elif kind == "a link to a file":
        (sent / "x.yaml").write_text("{}")
        (own / "method" / "x.yaml").symlink_to(sent / "x.yaml")
    else:
        (own / "method").rename(sent / "method")
        (own / "method").symlink_to(sent / "method")
    with pytest.raises(ConfigError, match=r"method/.*yaml lies in the folder of a run or study"):
        compose([])


def test_a_link_out_of_the_working_folder_is_not_its_configs(own: Path, tmp_path: Path):
    own.rename(tmp_path / "away")
    own.symlink_to(tmp_path / "away")
    assert "mine" not in options("method")


def test_options_of_ones_own_set_nothing_of_hydras(own: Path, fedsim: Callable):
    (own / "method" / "odd.yaml").write_text("# @package _global_\nhydra: {callbacks: {a: {_target_: os.getcwd}}}\n")
    code, _, err = fedsim("run", *SHORT, "method=odd", "out=B")
    assert (code, err.count("\n")) == (2, 1)
    assert "sets hydra" in err
    assert not Path("B").exists()


OF_HYDRA = {
    "launcher/basic": "_target_: evil.L\n",
    "sweeper/basic": "_target_: evil.L\n",
    "config": "no_such_key: 1\n",
    "launcher/mine": "- no map\n",
}
COMPOSING = (["run", *SHORT], ["run", "-m", *SHORT, "seed=1,2"], ["explain", "method", "fedavg"], ["study", "s.yaml"])


@pytest.mark.parametrize("name", OF_HYDRA)
@pytest.mark.parametrize("command", COMPOSING, ids=["run", "sweep", "explain", "study"])
def test_a_folder_of_options_has_none_of_hydras(own: Path, fedsim: Callable, name: str, command: list[str]):
    Path("s.yaml").write_text(yaml.safe_dump({"title": "T", "arms": {"A": [*SHORT]}}))
    file = own / "hydra" / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(OF_HYDRA[name])
    code, _, err = fedsim(*command)
    assert (code, err.count("\n")) == (2, 1), err
    assert f"hydra/{name}.yaml sets hydra" in err
    own.rename("theirs")
    if command[0] == "run":
        code, _, err = fedsim(*command, "--config-dir", "theirs")
        assert (code, err.count("\n")) == (2, 1), err
        assert f"theirs/hydra/{name}.yaml sets hydra" in err


@pytest.mark.parametrize("group", ["method", "experiment"])
@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty; it begins with the line"), ("defaults: [{override /strategy: mine}]\n", "lacks the line")],
)
def test_a_preset_that_hydra_would_take_for_a_setting_is_named(own: Path, fedsim: Callable, group, text, words):
    (own / group).mkdir(exist_ok=True)
    (own / group / "bare.yaml").write_text(text)
    for command in (["run", *SHORT, f"{group}=bare"], ["explain", group, "bare"]):
        code, _, err = fedsim(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{group}/bare.yaml {words} # @package _global_" in err


def test_a_link_to_a_file_of_no_settings_does_not_tell_what_is_in_it(own: Path, fedsim: Callable):
    (own.parent / "secret").write_text("root:x:0:0:root\nother:y:1:1\n")
    (own / "trainer").mkdir()
    (own / "trainer" / "odd.yaml").symlink_to(own.parent / "secret")
    code, _, err = fedsim("run", *SHORT, "trainer=odd")
    assert code == 2
    assert "odd.yaml must be a map of settings" in err
    assert "root" not in err.replace(str(own.parent), "")


def test_a_study_of_the_users_configs_goes_with_their_options_and_another_folders_does_not(own: Path):
    read_study(str(own / "study" / "mine.yaml"))
    assert "mine" in options("method")
    of_file = read_study(str(own / "study" / "mine.yaml"))
    assert read_study("mine") == replace(of_file, given="mine")
    (own / "sub").mkdir()
    (own / "study" / "mine.yaml").rename(own / "sub" / "mine.yaml")
    read_study(str(own / "sub" / "mine.yaml"))
    assert "mine" not in options("method")
    permissions.reset()
    assert "mine" in options("method")


def test_a_file_of_the_working_folder_hides_no_library(own: Path, fedsim: Callable):
    mark = write_module(own.parent / "queue.py")
    assert fedsim("run", *SHORT, "method=mine", "out=B").code == 0
    assert sys.path[-1] == str(own.parent)
    assert not mark.exists()
