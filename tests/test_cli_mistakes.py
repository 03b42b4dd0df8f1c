"""A mistake at the command line: one sentence that says what to do, an exit code, and nothing written."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import SHORT, Ended, assert_refused

from devices.profile import SHIPPED

pytestmark = pytest.mark.usefixtures("place")

# --- settings --------------------------------------------------------------------------------------------------------

DAILY = "fleet.availability._target_=devices.availability.Diurnal +fleet.availability.hours"
MISTAKES = {
    "unknown setting": ("cohrt=5", "unknown setting 'cohrt'", "did you mean 'cohort'?"),
    "unknown nested setting": ("trainer.lrr=1", "unknown setting 'trainer.lrr'", "did you mean 'trainer.lr'?"),
    "nested setting of another option": (
        "strategy=fedavgm strategy.server_momentumm=1",
        "did you mean 'strategy.server_momentum'?",
    ),
    "setting below a number": ("rounds.x=1", "rounds has no settings below it"),
    "setting without its group": ("lr=0.1", "unknown setting 'lr'; did you mean 'trainer.lr'?"),
    "added setting without its group": ("+lr=0.1", "unknown setting 'lr'; did you mean 'trainer.lr'?"),
    "removed setting without its group": ("~lr", "unknown setting 'lr'; did you mean 'trainer.lr'?"),
    "setting without its group in a sweep": ("-m lr=1,2", "unknown setting 'lr'; did you mean 'trainer.lr'?"),
    "setting two levels below a group": ("availability.hours=3", "did you mean 'fleet.availability'?"),
    "setting of an option that was not chosen": (
        "alpha=0.1",
        "did you mean 'workload.alpha' (with workload=blobs) or 'partition.alpha' (with partition=dirichlet)",
    ),
    "setting of the other engine": ("engine.workers=2", "unknown setting 'engine.workers'; it goes with engine=ray"),
    "setting of some trainers": ("memory_siz=5", "'trainer.memory_size' (with trainer=agem, trainer=coreset, "),
    "unknown group": ("wokload=digits", "did you mean 'workload'?"),
    "added setting that nobody reads": ("+foo=3", "unknown setting 'foo'"),
    "added setting that no constructor takes": ("+trainer.foo=3", "'trainer.foo'", "allowed: trainer.batch_size"),
    "removed setting": ("~rounds", "rounds is missing"),
    "removed group": ("~trainer", "trainer is missing"),
    "removed constructor argument": ("~trainer.lr", "trainer.lr must be given"),
    "removing what is not there": ("~trainer.lrr", "did you mean 'trainer.lr'?"),
    "unknown strategy": ("strategy=fedavgg", "unknown strategy 'fedavgg'", "did you mean 'fedavg'?"),
    "unknown workload": ("workload=digts", "did you mean 'digits'?", "blobs"),
    "group without option": ("trainer=null", "unknown trainer 'null'", "sgd"),
    "group as number": ("trainer=5", "unknown trainer '5'"),
    "missing mandatory": ("workload=bundle", "workload.path must be given", "workload.path=..."),
    "nothing but equals": ("=", "cannot read the setting '='"),
    "no value": ("seed", "cannot read the setting 'seed'", "KEY=VALUE"),
    "open bracket": ("trainer.lr=[1", "cannot read the setting 'trainer.lr=[1'"),
    "dangling interpolation": ("seed=${nothing}", "seed: Interpolation key 'nothing' not found"),
    "missing environment variable": ("out=${oc.env:FEDSIM_NOPE}", "out:", "FEDSIM_NOPE"),
    "sweep without -m": ("seed=1,2", "seed=1,2", "--multirun"),
    "rounds in words": ("rounds=abc", "rounds must be a whole number of at least 1, got 'abc'"),
    "negative seed": ("seed=-1", "seed must be from 0 to 9223372036854775807, got -1"),
    "no rounds": ("rounds=0", "rounds must be at least 1, got 0"),
    "half a client": ("cohort=2.5", "cohort must be a whole number", "2.5"),
    "true rounds": ("rounds=true", "rounds must be a whole number", "got true"),
    "accuracy above one": ("target_accuracy=2", "target_accuracy must be null or in (0, 1], got 2"),
    "deadline in the past": ("deadline_s=-1", "deadline_s must be null or greater than 0, got -1"),
    "rounds without an end": ("round_every_s=0", "round_every_s must be null or greater than 0, got 0"),
    "infinite deadline": ("deadline_s=inf", "deadline_s must be a finite number greater than 0 or null, got inf"),
    "cohort above population": ("cohort=1000", "cohort must be at most the 20 clients there are, got 1000"),
    "buffer above population": (
        "method=fedbuff loop.concurrency=50",
        "loop.concurrency must be at most the 20 clients",
    ),
    "nobody at work": ("method=fedbuff loop.concurrency=0", "loop.concurrency must be at least 1, got 0"),
    "no buffer in a sweep": ("-m method=fedbuff loop.buffer_size=5,0", "loop.buffer_size must be at least 1, got 0"),
    "unknown rule setting in a sweep": ("-m participants=tifl participants.tiers=5,0", "tiers must be at least 1"),
    "judges above population": ("evaluate_clients=21", "evaluate_clients must be at most the 20 clients"),
    "asking too few": ("over_selection=0.5", "over_selection must be at least 1, got 0.5"),
    "unknown reaction": ("on_client_error=stopp", "on_client_error", "did you mean 'stop'?"),
    "more clients than examples": ("num_clients=100000", "1438 training examples are too few for 100000 clients"),
    "unknown device": ("fleet.devices={pixell3: 1}", "unknown device 'pixell3'", "did you mean 'pixel3'?"),
    "negative share": ("fleet.devices={pixel3: -1}", "fleet.devices.pixel3 must be greater than 0, got -1"),
    "fleet as number": ("fleet.devices=3", "fleet.devices must be a map, got 3"),
    "hours of no day": (f"{DAILY}=30", "fleet.availability.hours must be in (0, 24], got 30"),
    "hours in words": (f"{DAILY}=x", "fleet.availability.hours must be a finite number in (0, 24], got 'x'"),
    "images too small": ("model=lenet5", "model lenet5 needs images", "12x12", "try model=mlp"),
    "numbers for words": ("model=char_lstm", "model char_lstm needs sequences of token ids"),
    "empty layer": ("model.hidden=[0]", "model.hidden[0] must be at least 1, got 0"),
    "learning rate zero": ("trainer.lr=0", "trainer.lr must be greater than 0, got 0"),
    "learning rate in words": ("trainer.lr=fast", "trainer.lr must be a finite number greater than 0, got 'fast'"),
    "no learning rate": ("trainer.lr=null", "trainer.lr must be a finite number greater than 0, got null"),
    "learning rate nan": ("trainer.lr=nan", "trainer.lr must be a finite number greater than 0, got nan"),
    "momentum one": ("trainer.momentum=1", "trainer.momentum must be in [0, 1), got 1"),
    "half an epoch": ("trainer.local_epochs=1.5", "trainer.local_epochs must be a whole number of at least 1, got 1.5"),
    "strategy in words": ("strategy=fedavgm strategy.server_momentum=x", "strategy.server_momentum must be a finite"),
    "refused by Flower": ("strategy=fedtrimmedavg strategy.beta=0.7", "strategy.beta must be in [0, 0.5), got 0.7"),
    "unknown torch device": ("engine.device=tpu", "engine.device", "'tpu'", "auto, cpu, cuda"),
    "short multiplications on a CPU": ("engine.device=cpu engine.tf32=true", "engine.tf32=true is for a GPU"),
    "no threads": ("engine.threads=0", "engine.threads must be at least 1, got 0"),
    "unknown engine": ("engine=rayy", "unknown engine 'rayy'", "local"),
    "unknown class": ("strategy._target_=nope.Nope", "strategy._target_='nope.Nope' cannot be used", "nope"),
    "class of another kind": (
        "model._target_=torch.nn.Linear",
        "model._target_='torch.nn.Linear' makes no network",
        "'in_features'",
    ),
    "name with slash": ("name=a/b", "name", "'a/b'", "use out="),
    "name that climbs": ("name=..", "name", "'..'"),
    "name as list": ("name=[1]", "name must be text, or null, got [1]"),
    "empty out": ("out=", "out must be text, or null, got ''"),
    "out as list": ("out=[1,2]", "out must be text"),
    "official data absent": ("workload=cifar10", "official files of cifar10 are not here", "workload.download=true"),
    "unknown flag": ("--nope", "--nope", "fedsim run --help"),
    "unknown print": ("--cfg nope", "--cfg", "'nope'"),
    "two commands at once": ("--cfg job -m", "only one of --cfg and --multirun"),
    "unknown config file": ("--config-name nope", "'nope'"),
    "unknown config folder": ("--config-path /nope --config-name config", "/nope"),
    "bad value late in a sweep": ("-m seed=1,2,-3", "seed must be", "got -3", "run 2 of the sweep: seed=-3"),
    "bad part late in a sweep": ("-m trainer.lr=0.1,0", "trainer.lr must be greater than 0", "run 1 of the sweep"),
    "pair late in a sweep": ("-m method=fedbuff participants=oort,power_of_choice", "asks clients before", "run 1"),
    "loop late in a sweep": ("-m loop=buffer method=fedbuff,scaffold", "Scaffold takes all replies for fresh", "run 1"),
    "unknown setting in a sweep": ("-m cohrt=1,2", "did you mean 'cohort'?"),
    "unknown option in a sweep": ("-m strategy=fedavg,fedavgg", "did you mean 'fedavg'?", "run 1"),
    "sweep over what has no steps": ("-m trainer.lr=interval(0,1)", "INTERVAL"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(case: str, fedsim: Callable[..., Ended]):
    line, *words = MISTAKES[case]
    quoted = [line] if ": " in line else line.split(" ")  # a map holds a blank
    assert_refused(fedsim("run", *quoted), *words)


def test_a_pair_that_does_not_belong_together_says_which_setting(place: Path, fedsim: Callable[..., Ended]):
    ended = fedsim("run", "strategy=fedprox", "trainer=sgd", *SHORT, "out=out")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "'proximal-mu'" in ended.err
    assert "SGDTrainer" in ended.err
    assert not (place / "out").exists()
    assert fedsim("run", "strategy=fedprox", *SHORT, "out=good").code == 0  # it brings its own trainer


# --- files of devices ------------------------------------------------------------------------------------------------


def broken_device(text: str) -> bytes:
    tree = yaml.safe_load((SHIPPED / "reference.yaml").read_text())
    if text == "negative power":
        tree["power"]["compute_w"]["value"] = -3
    elif text == "unknown key":
        tree["power"]["compute_watts"] = tree["power"].pop("compute_w")
    elif text == "no source":
        del tree["power"]["compute_w"]["source"]
    return {
        "no yaml": b"name: [\n",
        "latin": b"name: caf\xe9\n",
        "empty": b"",
        "twice": (SHIPPED / "reference.yaml").read_bytes() + b"\nkind: sbc\n",
        "code": b"name: !!python/object/apply:os.system ['true']\n",
    }.get(text, yaml.safe_dump(tree).encode())


@pytest.mark.parametrize(
    "text, word",
    [
        ("negative power", "key 'power.compute_w.value' must be a number from 0 to 2000 (W of the whole device"),
        ("unknown key", "did you mean 'power.compute_w'?"),
        ("no source", "key 'power.compute_w.source' is missing"),
        ("no yaml", "is not valid YAML"),
        ("latin", "cannot be read as a text file"),
        ("empty", "must be a map"),
        ("twice", "key 'kind' is there twice"),
        ("code", "is not valid YAML"),
    ],
)
def test_a_broken_device_file_is_one_sentence(text: str, word: str, place: Path, fedsim: Callable[..., Ended]):
    path = place / "mine.yaml"
    path.write_bytes(broken_device(text))
    assert_refused(fedsim("run", f"fleet.devices={{{path}: 1}}"), str(path), word)


def test_a_missing_device_file_is_named(place: Path, fedsim: Callable[..., Ended]):
    assert_refused(
        fedsim("run", f"fleet.devices={{{place}/none.yaml: 1}}"), "none.yaml", "there is no such device file"
    )


# --- whatever is typed -----------------------------------------------------------------------------------------------


LONG = "a" * 20_000
VERBOSE = {
    "command": ([LONG], "No such command"),
    "option": (["devices", f"--{LONG}"], "No such option"),
    "number": (["devices", "show", "pixel3", "--batch", LONG], "is not a valid"),
    "number after =": (["devices", "show", "pixel3", f"--batch={LONG}"], "is not a valid"),
    "quotes": (["devices", "show", "pixel3", "--batch", "'\n" * 10_000], "is not a valid"),
    "flag of Hydra": (["run", f"--{LONG}"], "unrecognized arguments"),
    "choice of Hydra": (["run", "--cfg", LONG], "choose from"),
    "no setting": (["run", LONG], "write KEY=VALUE"),
    "open bracket": (["run", f"trainer.lr=[{LONG}"], "write KEY=VALUE"),
    "key": (["run", f"{LONG}=3"], "did you mean|allowed"),
    "key below a group": (["run", f"trainer.{LONG}=3"], "did you mean|allowed"),
    "key below a number": (["run", f"rounds.{'a' * 100}.{'b' * 100}=3"], "has no settings below it"),
    "value": (["run", f"seed={LONG}"], "seed must be"),
}


@pytest.mark.parametrize("case", VERBOSE)
def test_whatever_is_typed_its_sentence_is_whole(case: str, fedsim: Callable[..., Ended]):
    """It says what was wrong and what to do in at most a few lines."""
    arguments, words = VERBOSE[case]
    ended = fedsim(*arguments)
    assert_refused(ended)
    assert re.search(words, ended.err), ended.err
    assert len(ended.err) < 900


def test_unknown_commands_are_one_sentence(fedsim: Callable[..., Ended]):
    assert_refused(fedsim("rnu"), "'rnu'", "fedsim --help")
    assert_refused(fedsim("data", "nope"), "'nope'", "fedsim data --help")


# --- where it happened -----------------------------------------------------------------------------------------------


def test_traceback_is_shown_when_asked_for(fedsim: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEDSIM_TRACEBACK", "1")
    ended = fedsim("run", "rounds=0")
    assert ended.code == 2
    assert "Traceback (most recent call last)" in ended.err
    assert ended.err.endswith("fedsim: rounds must be at least 1, got 0\n")


def test_a_failing_client_ends_with_code_1_and_shows_where_when_asked(
    place: Path, fedsim: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
):
    overrides = [*SHORT, "trainer.lr=1e30", "rounds=3"]
    ended = fedsim("run", *overrides, "out=a")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert "NaN or infinite" in ended.err
    assert "lower trainer.lr" in ended.err
    assert json.loads(Path("a/failure.json").read_text())["error"] == "ClientError"
    monkeypatch.setenv("FEDSIM_TRACEBACK", "1")
    assert "clients/worker.py" in fedsim("run", *overrides, "out=b").err
