"""Another `_target_` on the command line: what only the old class takes goes, what was given stays and is checked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY, assert_refused

from fedsim.errors import ConfigError
from fedsim.settings.build import instantiate, model_factory
from fedsim.settings.check import try_out
from fedsim.settings.compose import compose, on_devices

CODE = """
import math
from torch import nn
from strategies.edge import EdgeStrategy

class Net(nn.Sequential):
    def __init__(self, input_shape, num_classes, width: int = 4, dropout: float = 0.5):
        layers = nn.Linear(math.prod(input_shape), width), nn.Dropout(dropout), nn.Linear(width, num_classes)
        super().__init__(nn.Flatten(), *layers)

class Shorter(Net):
    def __init__(self, input_shape, **settings):
        super().__init__(input_shape, **settings)

class Server(EdgeStrategy):
    def __init__(self, pull: float = 1.0, **sampling):
        super().__init__(**sampling)
"""
ALWAYS, DIURNAL = "devices.availability.Always", "devices.availability.Diurnal"


@pytest.fixture(autouse=True)
def mine(here: Path) -> Iterator[None]:
    (here / "mine_a.py").write_text(CODE)
    (here / "configs" / "fleet").mkdir(parents=True)
    daily = f"{{_target_: {DIURNAL}, _partial_: true, hours: 16}}"
    (here / "configs" / "fleet" / "mine.yaml").write_text(f"defaults: [uniform, _self_]\navailability: {daily}\n")
    yield
    sys.modules.pop("mine_a", None)


SWITCHES = {
    "the class alone": (["model._target_=mine_a.Net"], "model", {"dropout": 0.0}),
    "a setting of the new class": (
        ["model._target_=mine_a.Net", "model.width=3"],
        "model",
        {"dropout": 0.0, "width": 3},
    ),
    "with a plus": (["+model.width=3", "model._target_=mine_a.Net"], "model", {"dropout": 0.0, "width": 3}),
    "what is handed on": (["model._target_=mine_a.Shorter", "model.width=3"], "model", {"dropout": 0.0, "width": 3}),
    "a map": (["model={_target_: mine_a.Net, width: 3}"], "model", {"dropout": 0.0, "width": 3}),
    "another option": (["model=lenet5", "model._target_=mine_a.Net"], "model", {"memory_format": "channels_last"}),
    "one that is null": (["~model.norm", "~model.hidden"], "model", {"dropout": 0.0}),
    "deleted and switched": (["~model.norm", "model._target_=mine_a.Net", "~model.dropout"], "model", {}),
    "the same class": (["model._target_=fedsim.models.mlp.MLP"], "model", None),
    "a strategy": (["strategy=fedadam", "strategy._target_=mine_a.Server", "strategy.pull=2"], "strategy", None),
}


@pytest.mark.parametrize("case", SWITCHES)
def test_what_only_the_old_class_takes_goes(case: str):
    overrides, group, left = SWITCHES[case]
    settings = compose([*TINY, *overrides])
    own = {key: value for key, value in settings[group].items() if not key.startswith("_")}
    if left is None:
        left = {"a strategy": {"pull": 2}, "the same class": compose(TINY)["model"] | own}[case]
        left.pop("_target_", None), left.pop("_partial_", None)
    assert own == left
    try_out(settings) if case != "one that is null" else None


FLEETS = {
    "by name": [f"fleet.availability._target_={ALWAYS}"],
    "by a map": [f"fleet.availability={{_target_: {ALWAYS}}}"],
}


@pytest.mark.parametrize("case", FLEETS)
def test_nested_classes_are_switched_for_a_run_and_for_a_repriced_one(case: str):
    usual = compose(["fleet=mine"])
    assert usual["fleet"]["availability"]["hours"] == 16
    for settings in (compose(["fleet=mine", *FLEETS[case]]), on_devices(usual, FLEETS[case])):
        assert settings["fleet"] == {**usual["fleet"], "availability": {"_target_": ALWAYS, "_partial_": True}}
        instantiate(settings, "fleet", num_clients=2, seed=1)
    back = ["fleet=uniform", "fleet.availability.hours=16", f"fleet.availability._target_={DIURNAL}"]
    assert compose(back)["fleet"] == on_devices(usual, back)["fleet"] == usual["fleet"]


def test_what_was_given_stays_and_is_checked(fedsim: Callable):
    settings = compose([*TINY, "model._target_=mine_a.Net", "model.depth=3"])
    assert settings["model"]["depth"] == 3
    with pytest.raises(ConfigError, match=r"unknown setting for Net 'model\.depth'"):
        model_factory(settings)
    code, _, err = fedsim("run", *TINY, "model._target_=mine_a.Net", "model.widht=3", "out=A")
    assert (code, err.count("\n"), Path("A").exists()) == (2, 1, False)
    assert "unknown setting for Net 'model.widht'; did you mean 'model.width'?" in err


def test_a_run_and_a_sweep_switch_as_composing_does(fedsim: Callable):
    switch = ["model._target_=mine_a.Net", "model.width=3"]
    assert fedsim("run", *TINY, "rounds=1", *switch, "~trainer.momentum", "out=A").code == 0
    swept = ["model._target_=mine_a.Net,mine_a.Shorter", "model.width=3"]
    assert fedsim("run", "-m", *TINY, "rounds=1", *swept, "out=B").code == 0


@pytest.mark.parametrize("override", ["~model.nrom", "~model.norm.x", "model.depth=3"])
def test_settings_that_are_not_there_are_told_as_before(fedsim: Callable, override: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert_refused(fedsim("run", *TINY, override), "unknown setting 'model.", cwd=tmp_path / "empty")


def test_a_class_that_may_not_be_named_keeps_its_settings_and_is_refused(here: Path):
    settings = compose([*TINY, "trainer._target_=os.system"])
    assert "lr" in settings["trainer"]
    with pytest.raises(ConfigError, match=r"--allow-target os\.system"):
        try_out(settings)
