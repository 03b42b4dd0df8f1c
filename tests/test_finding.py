"""`fedsim list` and `fedsim explain`: every option has a line, and what is said of it is what it takes."""

import json
import re
import shlex
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path

import pytest
from conftest import Ended, assert_refused
from omegaconf import OmegaConf

from clients.app import serve
from fedsim.cli.explain import facts
from fedsim.cli.listing import KINDS, line_of, names_of
from fedsim.engines.local import LocalEngine
from fedsim.runs.federation import Federation
from fedsim.runs.pairs import try_out
from fedsim.settings.build import build_world
from fedsim.settings.compose import _composed, compose
from fedsim.settings.config_files import check_before_hydra
from fedsim.settings.described import PRESETS, Setting, all_chosen, describe, settings_of_top
from fedsim.settings.docstrings import _tree
from fedsim.settings.groups import GROUPS, options, preset

pytestmark = pytest.mark.usefixtures("place")
slowly = partial(pytest.param, marks=pytest.mark.slow)
WITH_SETTINGS = [group for group in GROUPS if group not in PRESETS]


@pytest.mark.parametrize("kind", KINDS.values())
def test_everything_has_a_line_of_its_own(kind: str):
    lines = {name: line_of(kind, name) for name in names_of(kind)}
    assert all(20 < len(line) < 200 and line.isprintable() for line in lines.values()), lines
    assert kind == "device" or len(set(lines.values())) == len(lines)
    if kind in GROUPS:
        assert [line for line in lines.values() if not re.match(r"[A-Z].*\.$", line) or " et al.," in line[:25]] == []


@pytest.mark.parametrize("method", options("method"))
def test_what_is_explained_of_a_method_is_what_it_takes(method: str):
    """Its settings are those of a composed run, each with its default and a word on it; its commands are commands."""
    said = facts("method", method)
    assert said["source"]
    composed = compose([f"method={method}"])
    halves = {half["half"]: half["name"] for half in said["halves"]}
    assert halves == {group: composed["choices"][group] for group in ("strategy", "trainer")}
    keys = {setting["key"] for setting in said["settings"]}
    groups = [*halves, *preset(method).keys() & {"architecture", "loop", "participants"}]
    own = {f"{group}.{key}" for group in groups for key in composed[group] if not key.startswith("_")}
    assert {".".join(key.split(".")[:2]) for key in keys - {"private"}} == own
    assert ("private" in keys) == bool(composed["private"])
    assert [setting["key"] for setting in said["settings"] if not setting["meaning"]] == []
    for text in said["examples"]:
        assert method in text
        program, command, *overrides = shlex.split(text)
        assert (program, command) == ("fedsim", "run")
        assert compose(overrides)["choices"]["method"] == method


@pytest.mark.parametrize("group", ["loop", "participants", "attack", *map(slowly, ("method", "strategy", "uplink"))])
def test_commands_that_are_shown_are_not_refused(group: str):
    """Neither by their parts nor, where everybody has the data, by what a run finds before its first round."""
    examples = {text for name in options(group) for text in facts(group, name)["examples"]}
    shown = [text for text in sorted(examples) if text.startswith("fedsim run") and " -m " not in text]
    assert len(shown) >= len(options(group)) / 2
    for text in shown:
        settings = compose(shlex.split(text)[2:])
        try_out(settings)
        if settings["choices"]["workload"] in ("digits", "blobs"):
            Federation(build_world(json.dumps(settings)), LocalEngine(serve))


@pytest.mark.parametrize("names", list(zip_longest(*map(options, WITH_SETTINGS)))[::2])
def test_what_is_explained_of_an_option_is_what_it_takes(names: tuple[str | None, ...]):
    """One of each group at a time, and every other row: those between are composed with the methods."""
    chosen = {group: name for group, name in zip(WITH_SETTINGS, names, strict=True) if name}
    check_before_hydra()
    tree = OmegaConf.to_container(_composed([f"{group}={name}" for group, name in chosen.items()]), resolve=False)
    for group, name in chosen.items():
        said = describe(group, name)
        assert {s.key.split(".")[1] for s in said.settings} == {key for key in tree[group] if not key.startswith("_")}
        assert [s for s in said.settings if not s.meaning] == []
        for s in said.settings:
            if s.key.count(".") == 1 and not s.default.startswith("as ") and s.key != "strategy.server":
                given = tree[group][s.key.split(".")[1]]
                assert compose_value(s.default) == (None if given == "???" else given), s


def compose_value(text: str) -> object:
    """What a default stands for, read as an override is."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    value = None if text == "???" else OverridesParser.create().parse_override(f"a={text}").value()
    return str(value) if type(value).__name__ == "QuotedString" else value


def test_an_option_of_a_group_within_another_is_not_taken_for_one_of_that():
    assert all_chosen("experiment", "mafl_cifar10")["workload"] == "bundle"  # it takes workload/augment=crop_flip, too


def test_settings_of_the_top_have_a_word_each():
    said = settings_of_top()
    assert {s.key for s in said} == {key for key in compose([]) if key not in (*GROUPS, "choices")}
    assert [s for s in said if not s.meaning] == []


def test_a_method_is_explained_by_paper_halves_records_settings_command_and_study(fedsim: Callable[..., Ended]):
    ended = fedsim("explain", "method", "ditto")
    assert (ended.code, ended.err) == (0, "")
    for text in (
        "method ditto: Beside the global model each client trains one of its own",
        "Paper: Li et al., ICML 2021.",
        "on the server: strategy=fedavg",
        "on the client: trainer=ditto",
        "the weights, both ways; nothing else",
        "trainer.pull=1.0            lambda: how much the personal model is drawn to the received weights",
        "trainer.lr=0.1              learning rate of round 1",
        "fedsim run method=ditto",
        "fedsim study personal_digits",
    ):
        assert text in ended.out
    assert fedsim("explain", "ditto") == ended


@pytest.mark.parametrize(
    "method, sent",
    [
        ("ewc", "fisher, up, once per task"),  # said in exchanges/
        ("fedmix", "averages, up, once for each version"),
        ("fjord", "arrays, down and up: the tensors of the part"),  # by a class above
        ("fedbn", "but those of private=[norm]; nothing else"),
        ("dp_fedavg", "the weights, both ways; nothing else"),  # "Records: none of its own."
    ],
)
def test_what_a_method_sends_is_said(method: str, sent: str):
    assert sent in facts("method", method)["sends"]


def test_json_has_the_same(fedsim: Callable[..., Ended]):
    said = json.loads(fedsim("explain", "method", "fedmix", "--json").out)
    assert said == facts("method", "fedmix")
    listed = json.loads(fedsim("list", "models", "--json").out)
    assert [row["name"] for row in listed] == options("model")
    assert set(json.loads(fedsim("list", "--json").out)) == set(KINDS)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("list metods", ["unknown kind 'metods'; did you mean 'methods'?"]),
        ("explain method dito", ["unknown method 'dito'; did you mean 'ditto'?"]),
        ("explain methd ditto", ["unknown kind 'methd'; did you mean 'method'?"]),
        ("explain model ditto", ["unknown model 'ditto'; did you mean: fedsim explain method ditto"]),
        ("explain dito", ["unknown name 'dito'; did you mean 'ditto'?"]),
        ("explain device pixl2", ["unknown device 'pixl2'; did you mean 'pixel2'?"]),
        ("explain methods", ["name the method to explain, e.g. fedsim explain method agem"]),
    ],
)
def test_a_wrong_name_gets_the_nearest_right_one(fedsim: Callable[..., Ended], arguments: str, words: list[str]):
    assert_refused(fedsim(*arguments.split()), *words)


def test_a_default_that_a_preset_changes_is_said_once(place: Path):
    """Of an own method in the working folder: the preset's value, with what its trainer says of the setting."""
    Path("configs/method").mkdir(parents=True)
    preset = "# @package _global_\n# Mine.\ndefaults:\n  - override /strategy: fedavg\n  - override /trainer: ditto\n"
    Path("configs/method/mine.yaml").write_text(f"{preset}trainer:\n  pull: 3.0\n")
    pulls = [s for s in facts("method", "mine")["settings"] if s["key"] == "trainer.pull"]
    meaning = "lambda: how much the personal model is drawn to the received weights"
    assert pulls == [{"key": "trainer.pull", "default": "3.0", "meaning": meaning}]


def test_options_of_a_plug_in_are_listed_and_explained(
    fedsim: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its class is not imported: what is said of it is read from its source, and its file's comment comes first."""
    (tmp_path / "site" / "plugged").mkdir(parents=True)
    (tmp_path / "site" / "plugged" / "own.py").write_text(
        'raise RuntimeError("imported")\nclass Own:\n    """Trains in a way of its own.\n\n'
        '    Args:\n        pull: how much it is drawn.\n    """\n'
    )
    (tmp_path / "configs" / "trainer").mkdir(parents=True)
    (tmp_path / "configs" / "trainer" / "mine.yaml").write_text("_target_: plugged.own.Own\npull: 2.0\n")
    monkeypatch.setattr("fedsim.settings.groups.plugin_folders", lambda: [tmp_path / "configs"])
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert re.search(r"^mine +Trains in a way of its own\.$", fedsim("list", "trainers").out, re.MULTILINE)
    said = describe("trainer", "mine")
    assert (said.sentence, said.settings) == (
        "Trains in a way of its own.",
        (Setting("trainer.pull", "2.0", "how much it is drawn"),),
    )


@pytest.mark.parametrize(
    "docstring, sent",
    [
        ("", "what else is not said: no line `Records:` in the docstring of mine.Drifting"),
        ("Corrects drift.\n\nRecords: none.", "the weights, both ways; nothing else"),
        ("Corrects drift.\n\nRecords: control, both ways.", "beside them:\ncontrol, both ways."),
    ],
)
@pytest.mark.parametrize("of_class", [False, True])
def test_what_an_own_strategy_sends_is_said_only_where_its_docstring_says_it(
    place: Path, fedsim: Callable[..., Ended], monkeypatch, docstring: str, sent: str, of_class: bool
):
    monkeypatch.syspath_prepend(str(place / "cwd"))
    _tree.cache_clear()
    heads = ("", docstring) if of_class else (docstring, "")
    module, own = (f'"""{text}"""' if text else "" for text in heads)
    Path("mine.py").write_text(
        f"{module}\nfrom strategies.edge import EdgeStrategy\n\nclass Drifting(EdgeStrategy):\n    {own or 'pass'}\n"
    )
    Path("configs/strategy").mkdir(parents=True)
    Path("configs/strategy/drifting.yaml").write_text("_target_: mine.Drifting\n")
    assert sent in facts("strategy", "drifting")["sends"]
    assert fedsim("explain", "strategy", "drifting").out.splitlines()[0].rstrip() in (
        "strategy drifting",
        "strategy drifting: Corrects drift.",
    )
