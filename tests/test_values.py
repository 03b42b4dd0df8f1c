"""Bounds: a number that is absurd is refused in one sentence when a run is composed, whatever setting it is given to.

The walk goes over every setting of every option of every group; a setting of a new yaml is covered by being there.
"""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import click
import pytest
import typer
from conftest import TINY
from test_methods import for_case

from devices.availability import Trace
from devices.errors import DeviceError, UserError
from fedsim.cli.main import app
from fedsim.errors import ConfigError
from fedsim.settings.build import build_strategy, build_world
from fedsim.settings.check import check
from fedsim.settings.compose import compose
from fedsim.settings.groups import GROUPS, Settings, options
from fedsim.settings.parameters import check_parameters
from fedsim.settings.run_settings import TEXTS
from fedsim.workloads import host_memory as host

ODD: dict[str, Any] = {
    "huge whole": 10**18,
    "400 digits": 10**400,
    "400 digits below 0": -(10**400),
    "huge": 1e308,
    "1e30": 1e30,
    "tiny": 1e-320,
    "negative": -3,
    "negative fraction": -0.5,
    "nan": float("nan"),
    "infinite": float("inf"),
    "null": None,
    "true": True,
    "text": "[/red]$\\frac{$",
    "long text": "x" * 20_000,
    "empty text": "",
    "empty list": [],
    "empty map": {},
    "odd list": [[], [float("nan")], "x", -(10**400)],
    "odd map": {"": -1, "phone": 1e308},
}
# What an option needs beside it; the data are blobs, so that nothing is read.
IMAGES = ("workload.input_shape=[1,28,28]",)
NEEDED = {
    "model": IMAGES,
    "model=mlp": (),
    "attack=backdoor": IMAGES,
    "model=bcresnet": ("workload.input_shape=[1,40,7]",),
    "model=bcresnet_asc": ("workload.input_shape=[1,32,7]",),
    "stream": (*IMAGES, "rounds=4", "stream.tasks=2", "partition=iid"),
    "stream=none": (),
    "workload=blobs": (),
}
# They need files, or token sequences.
LEFT_OUT = {
    "workload": set(options("workload")) - {"blobs"},
    "model": {"char_lstm"},
    "architecture": {"query"},
    "stream": {"domains"},
    "latency": {"help"},
}


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The places of all settings below a tree, `_target_`s left out."""
    for key, value in tree.items():
        if isinstance(value, dict) and value and "_target_" in value:
            yield from leaves(value, (*path, key))
        elif not key.startswith("_"):
            yield (*path, key)


def changed(settings: Settings, path: tuple[str, ...], value: Any) -> Settings:
    """The same settings with another value at one place."""
    if not path:
        return value
    return {**settings, path[0]: changed(settings[path[0]], path[1:], value)}


def try_to_build(settings: Settings) -> str:
    """Builds data, fleet, model and strategy as a run does before its first round; the sentence of what is refused."""
    try:
        world = build_world(json.dumps(check(settings)))
        check_parameters("engine", settings["engine"], ["serve"])
        build_strategy(world.settings, world.workload.num_clients)
        world.workload.build_model()
    except UserError as error:
        return str(error)
    finally:
        build_world.cache_clear()
    return ""


def settings_of(group: str, option: str) -> Settings:
    return compose(
        [
            *for_case(TINY, f"{group}={option}"),
            f"{group}={option}",
            *NEEDED.get(f"{group}={option}", NEEDED.get(group, ())),
        ]
    )


def places() -> list[tuple[str, str]]:
    groups = [group for group in GROUPS if group not in ("method", "experiment")]
    return [(g, o) for g in groups for o in options(g) if o not in LEFT_OUT.get(g, ())]


def tries(chosen: list[tuple[str, str]]) -> list[tuple[str, str, tuple[str, ...], str]]:
    """Every setting of constructors with every odd value: group, option, place, what."""
    found, seen = [], set()
    for group, option in chosen:
        base = settings_of(group, option)
        for path in leaves(base[group], (group,)):
            key = (base[group]["_target_"], path)
            found += [(group, option, path, what) for what in ODD if key not in seen]
            seen.add(key)
    return found + [("engine", "local", (key,), what) for key in AT_THE_TOP for what in ODD]


AT_THE_TOP = ("rounds", "seed", "cohort", "num_clients", "over_selection", "deadline_s", "round_every_s")
AT_THE_TOP += ("target_accuracy", "max_simulated_s", "evaluate_every", "evaluate_clients", "private", "checkpoint_s")
AT_THE_TOP += ("on_client_error", "out", "name")


def walk(chosen: list[tuple[str, str, tuple[str, ...], str]]) -> int:
    """Tries settings; how many of them were refused."""
    bases: dict[tuple[str, str], Settings] = {}
    refused = 0
    for group, option, path, what in chosen:
        if (group, option) not in bases:
            bases[group, option] = settings_of(group, option)
        base = bases[group, option]
        started = time.process_time()
        sentence = try_to_build(changed(base, path, ODD[what]))
        where = f"{group}={option} {'.'.join(path)}: {what}"
        assert "\n" not in sentence, where
        assert len(sentence) < 3000, where
        assert time.process_time() - started < 10, where
        large = isinstance(ODD[what], int | float) and ODD[what] == ODD[what] and abs(ODD[what]) > 1e17
        # A seed may be any whole number, a name any word, and a learning rate anything: where it leads to NaN, the run
        # says so.
        if large and path[-1] not in ("lr", "seed", *TEXTS):
            assert sentence, f"{where} was taken"
        refused += bool(sentence)
    return refused


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_every_setting_takes_or_refuses_every_odd_value_in_a_sentence():
    chosen = tries(places())
    assert walk(chosen) > len(chosen) / 2


def test_some_settings_take_or_refuse_some_odd_values_in_a_sentence():
    drawn = random.Random(20261126)
    chosen = drawn.sample(tries(drawn.sample(places(), 12)), 150)
    assert walk(chosen) > len(chosen) / 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hidden=[1000000000]", "model.hidden=[1000000000] needs"),
        ("workload.num_classes=1000000000", "workload.num_classes=1000000000 needs"),
        ("workload.examples_per_client=2000000000", "workload.examples_per_client=2000000000 needs"),
        ("num_clients=1000000000", "num_clients=1000000000 needs"),
    ],
)
def test_what_this_host_cannot_hold_is_refused_before_it_is_made(override, words, monkeypatch):
    monkeypatch.setattr(host, "host_bytes", lambda: 24 * 10**9)
    sentence = try_to_build(compose([*TINY, override]))
    assert sentence.startswith(words)
    assert sentence.endswith("of memory, and this host has 24 GB; take less")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("method=fedadam strategy.tau=0", "strategy.tau"),
        ("method=fedadam strategy.beta_1=1", "strategy.beta_1"),
        ("method=fedyogi strategy.beta_2=1.5", "strategy.beta_2"),
        ("method=fedadagrad strategy.eta=-1", "strategy.eta"),
        ("method=fedavgm strategy.server_momentum=2", "strategy.server_momentum"),
        ("method=fedavgm strategy.server_learning_rate=0", "strategy.server_learning_rate"),
        ("method=qfedavg strategy.q=-1", "strategy.q"),
        ("method=fedtrimmedavg strategy.beta=0.5", "strategy.beta"),
        ("strategy=fedprox strategy.proximal_mu=-1", "strategy.proximal_mu"),
        ("method=krum strategy.num_malicious_nodes=-3", "strategy.num_malicious_nodes"),
        ("method=krum strategy.num_malicious_nodes=50", "strategy.num_malicious_nodes=50 needs"),
        ("method=krum strategy.num_malicious_nodes=1 cohort=4", "strategy.num_malicious_nodes=1 needs"),
    ],
)
def test_a_stock_strategy_refuses_what_its_paper_excludes(override, key):
    assert try_to_build(compose([*TINY, *override.split()])).startswith(key)


def test_a_fleet_wants_an_availability():
    base = settings_of("fleet", "uniform")
    for value in (3, "x", [], {"_target_": "collections.Counter", "_partial_": True}):
        assert "availability" in try_to_build(changed(base, ("fleet", "availability"), value))


@pytest.mark.parametrize("finish", [1e-300, 0, -1, 1e30, 10**400])
def test_a_trace_has_a_length_in_seconds(finish, tmp_path):
    (tmp_path / "trace.json").write_text(json.dumps({"1": {"active": [0], "inactive": [5], "finish_time": finish}}))
    with pytest.raises(DeviceError, match="finish_time must be a number in"):
        Trace(path=str(tmp_path / "trace.json"), num_clients=2, seed=1)


TRIED = ("--limit", "--limit-ms", "--margin")


def numeric_options() -> list[Any]:
    def walk(command: click.Command, path: str) -> Iterator[Any]:
        for name, below in getattr(command, "commands", {}).items():
            yield from walk(below, f"{path} {name}")
        for option in command.params:
            if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType):
                yield pytest.param(option, id=f"{path} {option.opts[0]}")

    return list(walk(typer.main.get_command(app), "fedsim"))


@pytest.mark.parametrize("option", numeric_options())
def test_every_number_of_a_command_has_bounds(option):
    if isinstance(option.type, click.FloatRange):
        assert None not in (option.type.min, option.type.max)
        return
    if isinstance(option.type, click.types.FloatParamType):
        assert option.opts[0] in ("--down-mbps", "--up-mbps", "--rtt-ms", "--watts", *TRIED)  # below
        return
    assert isinstance(option.type, click.IntRange)
    assert option.type.min is not None
    assert option.type.max <= 10**9


ENROLL = ("devices", "enroll", "--name", "mine")
SHOW = ("devices", "show", "reference")
SEARCH = ("devices", "search", "--space", "nb201", "--device", "pixel2", "--data", "x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*ENROLL, "--down-mbps", "-1"), "--down-mbps must be a number from 0.001 to 100000 (Mbit/s to the device)"),
        ((*ENROLL, "--up-mbps", "nan"), "--up-mbps must be"),
        ((*ENROLL, "--rtt-ms", "1e30"), "--rtt-ms must be a number from 0 to 10000 (ms"),
        ((*ENROLL, "--watts", "1e300"), "--watts must be a number from 0 to 2000 (W"),
        ((*ENROLL, "--limit", "nan"), "--limit must be"),
        ((*ENROLL, "--out", "/nope/x.yaml"), "--out='/nope/x.yaml' cannot be written: there is no folder"),
        ((*ENROLL, "--out", "x.txt"), "--out must end in .yaml or .yml"),
        (("devices", "enroll", "--name", "../x"), "--name must be letters"),
        (("devices", "enroll", "--name", ""), "--name must be letters"),
        (("devices", "enroll", "--name", "a" * 300), "--name must be letters"),
        (("devices", "enroll", "--name", "CON"), "--name must be letters"),
        (("devices", "new", "CON", "--like", "reference"), "NAME must be letters"),
        (("devices", "new", "x", "--like", "reference", "--out", "/nope/x.yaml"), "--out='/nope/x.yaml' cannot"),
        ((*SHOW, "--picture", "x.nope"), "--picture must end in .png or .svg or .pdf"),
        ((*SHOW, "--picture", "/nope/x.png"), "--picture='/nope/x.png' cannot be written: there is no folder"),
        ((*SHOW, "--picture", "."), "--picture='.' is a folder"),
        ((*SHOW, "--picture", "a" * 300), "cannot be written: File name too long"),
        ((*SHOW, "--batch", "1" + "0" * 30), "--batch"),
        (("data", "describe", "--picture", "x.nope"), "--picture must end in"),
        (("data", "averages", "--picture", "/nope/x.png"), "--picture='/nope/x.png' cannot"),
        (("devices", "compare", "--space", "nb201", "--data", "x", "--picture", "x.nope"), "--picture must end in"),
        (("devices", "train-help", "--space", "nb201", "--data", "x", "--out", "/nope/x"), "--out='/nope/x' cannot"),
        ((*SEARCH, "--limit-ms", "inf"), "--limit-ms must be a number above 0, got inf"),
        ((*SEARCH, "--limit-ms", "1", "--margin", "nan"), "--margin must be a number above -1"),
        (("devices", "evaluate-search", "--data", "x", "--margin", "-1"), "--margin must be a number above -1"),
        (("devices", "population", "--data", "x", "--out", "/nope/x"), "--out='/nope/x' cannot"),
        (("devices", "fit", "--model", "mlp", "--device", "reference", "--batch", "9" * 400), "--batch takes whole"),
    ],
)
def test_a_place_or_number_is_refused_before_the_work(arguments, words, fedsim, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = fedsim(*arguments)
    assert ended.code == 2
    assert words in ended.err
    assert ended.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_hint_for_a_text_with_special_characters_works_in_a_shell(fedsim):
    ended = fedsim("run", "out=a/lr=0.1/run")
    assert ended.code == 2
    assert """out='"a/lr=0.1/run"'""" in ended.err or """'out="a/lr=0.1/run"'""" in ended.err
    typed = shlex.split(ended.err.strip().rpartition("alone: ")[2])
    assert compose(typed)["out"] == "a/lr=0.1/run"


def test_a_name_keeps_its_text():
    assert str(compose(["name=1e-3"])["name"]) == "1e-3"


def test_the_package_is_a_command():
    ended = subprocess.run([sys.executable, "-m", "fedsim", "--help"], capture_output=True, text=True, check=True)
    assert "fedsim" in ended.stdout


@pytest.mark.parametrize("key", ["threads", "batch_clients", "device"])
def test_a_foreign_configuration_that_lacks_a_setting_gets_a_sentence(key: str):
    settings = compose([])
    del settings["engine"][key]
    with pytest.raises(ConfigError, match=f"^the setting engine.{key} is missing"):
        check(settings)
