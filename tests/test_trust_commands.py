"""No command calls what a folder that it was given names or holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import TINY
from sent_folder import DOORS, write_module

from fedsim.settings.compose import compose


@pytest.mark.parametrize("door", [*DOORS, "config dir", "rows"])
def test_no_command_calls_what_lies_beside_the_folder_that_it_was_given(here, sent, fedsim, door: str):
    sent("trainer", "sent.evil.Mine")
    for name, place in {"config.yaml": "run", "rounds.jsonl": "run", "study.yaml": "s"}.items():
        (here / "sent" / place).mkdir(exist_ok=True)
        (here / "sent" / name).rename(here / "sent" / place / name)
    (here / "sent" / "s" / "mine.csv").write_text("network,input,batch,phase,ms\nsent/evil.py:Mine,4,1,forward,3.0\n")
    option = here / "sent" / "dir" / "trainer" / "theirs.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("_target_: sent.evil.Mine\nlr: 0.1\nbatch_size: 4\nlocal_epochs: 1\n")
    more = {
        "config dir": ["run", *TINY, "--config-dir", "sent/dir", "trainer=theirs", "out=again"],
        "rows": ["devices", "calibrate", "raspberry_pi_4", "--rows", "sent/s/mine.csv"],
    }
    folder = "sent/s" if door == "study" else here / "sent" / "run"
    code, _, err = fedsim(*(part.format(run=folder) for part in (DOORS | more)[door]))
    assert (code, err.count("\n")) == (2, 1)
    assert "--allow-target sent" in err
    assert not (here / "sent" / "evil.ran").exists()
    assert not (here / "again").exists()


NAMED = [
    ("trainer", "sent.evil.Mine", {}),
    ("uplink", "numpy.savetxt", {"fname": "written", "X": [1]}),
    ("workload", "pathlib.Path", {}),
    ("engine", "sent.evil.Mine", {}),
]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("group", "target", "settings"), NAMED)
def test_no_command_calls_what_a_folder_names(here, sent, fedsim, door: str, group: str, target: str, settings: dict):
    folder = sent(group, target, **settings)
    before = {path for path in here.rglob("*") if path.name != "__pycache__"}
    if (group, door) == ("engine", "replay"):
        pytest.skip("every client in this process: its engine is not taken")
    code, _, err = fedsim(*(part.format(run=folder) for part in DOORS[door]))
    assert code == 2
    assert f"{group}._target_={target!r}" in err
    assert err.rstrip().partition("; in ")[0].endswith(f"--allow-target {target}")
    assert err.count("\n") == 1
    assert {path for path in here.rglob("*") if path.name != "__pycache__"} == before


@pytest.mark.parametrize("command", [["reprice", "sent", "fleet=sbc", "out=again"], ["resume", "sent", "rounds=5"]])
@pytest.mark.parametrize(("group", "target", "more"), [*NAMED, ("fleet", "sent.evil.Mine", {})])
def test_no_command_calls_what_a_finished_run_names(here, run, fedsim, command, group, target, more):
    """Its fleet is not named any more where another one takes its place, but the run's own is made, too."""
    run("rounds=1", out=here / "sent")
    tree = yaml.safe_load((here / "sent" / "config.yaml").read_text())
    tree[group] = {**tree[group], "_target_": target, **more}
    (here / "sent" / "config.yaml").write_text(yaml.safe_dump(tree))
    write_module(here / "sent" / "evil.py")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    code, _, err = fedsim(*command)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{group}._target_={target!r}" in err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file() and path.suffix != ".pyc"} == before


@pytest.mark.parametrize("door", [*DOORS, "command line"])
@pytest.mark.parametrize(
    ("group", "odd"),
    [("trainer", {"_target_": [1]}), ("strategy", {"_partial_": True}), ("stream", {"_args_": [1]})],
)
def test_no_command_shows_a_traceback_for_an_odd_target(here, sent, fedsim, door: str, group: str, odd: dict):
    usual = compose(TINY)[group]
    folder = sent(group, usual["_target_"])
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree[group] |= odd
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    [(key, value)] = odd.items()
    override = f"++{group}.{key}={str(value).lower()}"
    (folder / "study.yaml").write_text(yaml.safe_dump({"title": "T", "arms": {"A": [*TINY, override]}}))
    before = {path for path in here.rglob("*") if path.name != "__pycache__"}
    command = (DOORS | {"command line": ["run", *TINY, override, "out=again"]})[door]
    code, _, err = fedsim(*(part.format(run=folder) for part in command))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"fedsim: {group}.{key} ")
    assert {path for path in here.rglob("*") if path.name != "__pycache__"} == before


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ("{workload: null}", "choices: workload must be text"),
        ("[1]", "choices must be a map"),
        ("{workload: a, fleet: a, strategy: a, trainer: a}", "choices lacks 'engine'"),
        (
            "{workload: a, fleet: a, strategy: a, trainer: a, engine: a, model: [1]}",
            "choices: model must be text or null",
        ),
        (
            "{workload: a, fleet: a, strategy: a, trainer: a, engine: a, method: ../x}",
            "unknown method in choices '../x'",
        ),
    ],
)
@pytest.mark.parametrize("door", ["command line", "repeat", "resume"])
def test_the_names_of_options_have_their_form_wherever_they_come_from(here, sent, fedsim, door, choices, words):
    folder = sent("trainer", "clients.trainers.sgd.SGDTrainer")
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**tree, "choices": yaml.safe_load(choices)}))
    command = [part.format(run=folder) for part in DOORS.get(door, ["run", *TINY, "out=again"])]
    code, _, err = fedsim(*command, *([] if door in DOORS else [f"++choices={choices}"]))
    assert (code, err.count("\n")) == (2, 1)
    assert words in err or "choices must be " in err or (choices, door) == ("[1]", "command line")
    assert not (here / "again").exists()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("torch.nn.LazyLinear", "missing a required argument: 'out_features'"),
        ("torch.nn.Linear", "missing a required argument: 'in_features'"),
        ("torch.nn.Module", "unexpected keyword argument 'input_shape'"),
        ("torch.nn.Sequential", "makes a network without weights to train"),
        ("torch.nn.Identity", "makes a network without weights to train"),
    ],
)
def test_a_network_that_does_not_take_the_shapes_is_refused_before_anything_is_written(here, fedsim, network, words):
    model = f"+model={{_target_: {network}, _partial_: true}}"
    code, _, err = fedsim("run", *TINY, "~model", model, "out=again")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"fedsim: model._target_={network!r} makes ")
    assert words in err
    assert "without weights" in err or "name a function that takes both and returns the network" in err
    assert not (here / "again").exists()


def test_the_command_line_can_allow_a_name(here, sent, fedsim):
    folder = sent("trainer", "sent.evil.Mine")
    code, _, err = fedsim("resume", str(folder), "--allow-target", "sent.evil.Mine")
    assert (code, err) == (0, "")
    assert (folder / "evil.ran").exists()
    assert fedsim("resume", str(folder), "--allow-target").code == 2


@pytest.mark.parametrize(
    "command",
    [
        ["resume", "loop"],
        ["replay", "loop", "--round", "1", "--client", "0"],
        ["report", "loop"],
        ["compare", "loop"],
        ["reprice", "loop", "fleet=sbc"],
        ["study", "loop"],
        ["study", "loop.yaml"],
        ["run", "--config-dir", "loop"],
        ["run", "out=loop"],
        ["devices", "calibrate", "raspberry_pi_4", "--rows", "loop"],
        ["devices", "predict", "--model", "loop.py:Net", "--device", "pixel3"],
        ["devices", "predict", "--model", "lenet5", "--device", "loop.yaml"],
    ],
)
def test_a_link_loop_is_one_sentence_in_every_command(here, fedsim, command: list[str]):
    for name in ("loop", "loop.py", "loop.yaml"):
        (here / name).symlink_to(name)
    code, _, err = fedsim(*command)
    assert (code, err.count("\n")) == (2, 1), err
    assert "loop" in err


def test_reading_commands_make_nothing(here, run, sent, fedsim, monkeypatch):
    """`report` and `paired` read a run whose settings name what must not be called."""
    import hydra.utils

    run("rounds=1", out=here / "sent")
    monkeypatch.setattr(hydra.utils, "instantiate", lambda *a, **k: pytest.fail("something was made"))
    settings = yaml.safe_load((here / "sent" / "config.yaml").read_text())
    settings["trainer"]["_target_"] = settings["workload"]["_target_"] = "sent.evil.Mine"
    write_module(here / "sent" / "evil.py")
    (here / "sent" / "config.yaml").write_text(yaml.safe_dump(settings))
    code, _, err = fedsim("report", str(here / "sent"))
    assert (code, err) == (0, "")
    assert "How the data are split" in (here / "sent" / "report.html").read_text()
    assert fedsim("paired", str(here / "sent")).code == 0
    arms = {"A": [*TINY, "trainer._target_=sent.evil.Mine"]}
    Path("s.yaml").write_text(yaml.safe_dump({"title": "T", "arms": arms}))
    code, _, err = fedsim("study", "s.yaml", "--report", "--out", "studied")
    assert (code, "no run of study s is finished" in err) == (2, True)
    assert not (here / "sent" / "evil.ran").exists()


# --- other doors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["resume", "repeat", "study"])
def test_a_cluster_that_only_a_file_names_is_not_joined(here, fedsim, sent, door: str):
    """Whatever its workers answer is unpickled, and the user's token would be shown to it."""
    folder = sent("engine", "fedsim.engines.ray.grid.RayGrid", address="203.0.113.1:6379")
    code, _, err = fedsim(*(part.format(run=folder) for part in DOORS[door]))
    assert (code, err.count("\n")) == (2, 1)
    assert "engine.address='203.0.113.1:6379' comes from " in err


def test_rows_name_only_files_of_the_working_folder(here, fedsim):
    (here / "sent").mkdir()
    (here / "sent" / "net.py").write_text(f"open({str(here / 'ran')!r}, 'w')\n")
    (here / "sent" / "mine.csv").write_text("network,input,batch,phase,ms\nsent/net.py:Net,4,1,forward,3.0\n")
    code, _, err = fedsim("devices", "calibrate", "raspberry_pi_4", "--rows", "sent/mine.csv")
    assert (code, err.count("\n")) == (2, 1)
    assert "--allow-target sent/net.py:Net" in err
    assert not (here / "ran").exists()


def test_a_model_file_in_a_run_folder_is_not_run(here, fedsim, sent):
    sent("trainer", "clients.trainers.sgd.SGDTrainer")
    code, _, err = fedsim("devices", "predict", "--model", "sent/evil.py:Net", "--device", "pixel3")
    assert (code, err.count("\n")) == (2, 1)
    assert "--allow-target sent/evil.py:Net" in err
    assert not (here / "sent" / "evil.ran").exists()
