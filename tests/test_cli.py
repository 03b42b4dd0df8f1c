"""The `fedsim` command as a user meets it: what it prints, its exit codes, and that a mistake leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from conftest import Ended

from devices.profile import SHIPPED
from fedsim.cli import main as cli
from fedsim.report.place import WRITTEN
from fedsim.report.rounds import read_rounds
from fedsim.runs.summary import fleet_name
from fedsim.settings.compose import compose
from fedsim.settings.groups import options
from fedsim.settings.run_settings import RunSettings

FEDSIM = Path(sys.executable).with_name("fedsim")
DEVICES = ["list", "show", "predict", "fit", "new", "calibrate", "links", "population", "build"]
DEVICES += ["enroll", "evaluate", "compare", "train-help"]
DAILY = "fleet.availability._target_=devices.availability.Diurnal +fleet.availability.hours"
SHORT = ["rounds=1", "cohort=2", "trainer.local_epochs=1", "fleet=uniform"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with bundles in a sibling."""
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "bundles"))
    monkeypatch.delenv("FEDSIM_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.fixture
def fedsim(place: Path, fedsim: Callable[..., Ended]) -> Callable[..., Ended]:
    """Runs the command in an empty folder of `place`."""
    return fedsim


def bundle(folder: Path, n: int = 30, **arrays: Any) -> Path:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, 4)).astype(np.float32), np.arange(n) % 3
    train = {k: v for k, v in {"x": x, "y": y, **arrays}.items() if v is not None}
    folder.mkdir(parents=True)
    np.savez(folder / "train.npz", **train)
    np.savez(folder / "test.npz", x=x, y=y)
    (folder / "meta.json").write_text(json.dumps({"classes": ["a", "b", "c"], "kind": "tabular"}))
    return folder


def assert_refused(ended: Ended, *words: str, cwd: Path | None = None) -> None:
    """Exit code 2, one sentence on stderr that has the words, nothing on stdout and nothing written."""
    assert ended.code == 2, ended
    assert ended.err.startswith("fedsim: ")
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.endswith("\n")
    assert "Traceback" not in ended.err
    assert ended.out == ""
    for word in words:
        assert word in ended.err, f"{word!r} is not in {ended.err!r}"
    assert list((cwd or Path()).iterdir()) == []


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
    "empty layer": ("model.hidden=[0]", "model.hidden[0] of model mlp must be a whole number of at least 1, got 0"),
    "learning rate zero": ("trainer.lr=0", "trainer.lr must be greater than 0, got 0"),
    "learning rate in words": ("trainer.lr=fast", "trainer.lr must be a finite number greater than 0, got 'fast'"),
    "no learning rate": ("trainer.lr=null", "trainer.lr must be a finite number greater than 0, got null"),
    "learning rate nan": ("trainer.lr=nan", "trainer.lr must be a finite number greater than 0, got nan"),
    "momentum one": ("trainer.momentum=1", "trainer.momentum must be in [0, 1), got 1"),
    "half an epoch": ("trainer.local_epochs=1.5", "trainer.local_epochs must be a whole number of at least 1, got 1.5"),
    "strategy in words": ("strategy=fedavgm strategy.server_momentum=x", "strategy.server_momentum must be a finite"),
    "refused by Flower": ("strategy=fedtrimmedavg strategy.beta=0.7", "strategy.beta must be in [0, 0.5), got 0.7"),
    "unknown torch device": ("engine.device=tpu", "engine.device", "'tpu'", "auto, cpu, cuda"),
    "no threads": ("engine.threads=0", "engine.threads must be at least 1, got 0"),
    "unknown engine": ("engine=rayy", "unknown engine 'rayy'", "local"),
    "unknown class": ("strategy._target_=nope.Nope", "strategy._target_='nope.Nope' cannot be used", "nope"),
    "class of another kind": ("model._target_=torch.nn.Linear", "unknown setting for Linear 'model.hidden'"),
    "name with slash": ("name=a/b", "name", "'a/b'", "use out="),
    "name that climbs": ("name=..", "name", "'..'"),
    "name as list": ("name=[1]", "name must be text, or null, got [1]"),
    "empty out": ("out=", "out must be text, or null, got ''"),
    "out as list": ("out=[1,2]", "out must be text"),
    "official data absent": ("workload=cifar10", "cifar10 is not here", "workload.download=true"),
    "unknown flag": ("--nope", "--nope", "fedsim run --help"),
    "unknown print": ("--cfg nope", "--cfg", "'nope'"),
    "two commands at once": ("--cfg job -m", "only one of --cfg and --multirun"),
    "unknown config file": ("--config-name nope", "'nope'"),
    "unknown config folder": ("--config-path /nope --config-name config", "/nope"),
    "bad value late in a sweep": ("-m seed=1,2,-3", "seed must be", "got -3", "run 2 of the sweep: seed=-3"),
    "bad part late in a sweep": ("-m trainer.lr=0.1,0", "trainer.lr must be greater than 0", "run 1 of the sweep"),
    "unknown setting in a sweep": ("-m cohrt=1,2", "did you mean 'cohort'?"),
    "unknown option in a sweep": ("-m strategy=fedavg,fedavgg", "did you mean 'fedavg'?", "run 1"),
    "sweep over what has no steps": ("-m trainer.lr=interval(0,1)", "INTERVAL"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(case: str, fedsim: Callable[..., Ended]):
    line, *words = MISTAKES[case]
    quoted = [line] if ": " in line else line.split(" ")  # a map holds a blank
    assert_refused(fedsim("run", *quoted), *words)


BAD_BUNDLES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no labels": ({"y": None}, "has no array 'y' (it holds: x)", ""),
    "float labels": ({"y": np.arange(30) % 3 * 1.0}, "labels must be integers, got float64", ""),
    "nan": ({"x": np.where(np.arange(120).reshape(30, 4) == 7, np.nan, 1.0)}, "NaN or infinite", "1 of 30"),
    "label too large": ({"y": np.arange(30) % 4}, "labels must be in 0..2", "got 0..3"),
    "objects": ({"x": np.array([{}] * 30, dtype=object)}, "Python objects", "plain"),
    "few examples": ({}, "30 training examples are too few for 100 clients", "at most 30"),
}


@pytest.mark.parametrize("case", BAD_BUNDLES)
def test_a_bad_bundle_is_one_sentence_and_leaves_nothing(case: str, place: Path, fedsim: Callable[..., Ended]):
    arrays, *words = BAD_BUNDLES[case]
    bundle(place / "bundles" / "mine", **arrays)
    assert_refused(fedsim("run", "workload=bundle", "workload.path=mine"), *words)


def test_a_missing_bundle_is_named_with_the_nearest_one(place: Path, fedsim: Callable[..., Ended]):
    bundle(place / "bundles" / "flowers")
    assert_refused(fedsim("run", "workload=bundle", "workload.path=flower"), "no bundle 'flower'", "'flowers'")
    assert_refused(fedsim("run", "workload=bundle", f"workload.path={place}/nope"), f"'{place}/nope'")


def test_a_bundle_with_a_number_for_a_name_has_to_be_quoted(place: Path, fedsim: Callable[..., Ended]):
    bundle(place / "bundles" / "2024")
    assert_refused(fedsim("run", "workload=bundle", "workload.path=2024"), "must be text", "workload.path='\"2024\"'")
    ended = fedsim("run", "workload=bundle", 'workload.path="2024"', "num_clients=5", *SHORT, f"out={place}/out")
    assert ended.code == 0


# --- devices --------------------------------------------------------------------------------------------------------


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


def test_a_quoted_option_is_that_option():
    assert compose(['strategy="fedadam"'])["choices"]["strategy"] == "fedadam"


def test_giving_devices_replaces_the_mix_of_the_fleet():
    assert compose(["fleet=phones", "fleet.devices={pixel3: 2}"])["fleet"]["devices"] == {"pixel3": 2}
    assert set(compose(["fleet=uniform", "+fleet.devices.pixel3=2"])["fleet"]["devices"]) == {"reference", "pixel3"}


# --- run folders ----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("fleet", options("fleet"))
def test_a_fleet_with_other_devices_than_its_option_says_so(fleet: str):
    assert fleet_name(RunSettings.of(compose([f"fleet={fleet}", "fleet.speed_sigma=0.5"]))) == fleet
    for own in ("fleet.devices={pixel3: 2}", "++fleet.devices.pixel=7"):
        assert fleet_name(RunSettings.of(compose([f"fleet={fleet}", own]))) == f"{fleet}, own devices"


def test_the_closing_line_names_a_fleet_of_own_devices(place: Path, fedsim: Callable[..., Ended]):
    ended = fedsim("run", *SHORT, "fleet.devices={pixel3: 1}", f"out={place}/out")
    assert "fleet uniform, own devices: test accuracy" in ended.out
    assert "fleet uniform, own devices" in (place / "out" / "report.html").read_text()


def test_a_run_writes_its_folder_and_nothing_else(place: Path, fedsim: Callable[..., Ended]):
    ended = fedsim("run", *SHORT, "out=my runs/a b")
    assert (ended.code, ended.err) == (0, "")
    assert [path.name for path in Path().iterdir()] == ["my runs"]
    written = {path.name for path in Path("my runs/a b").iterdir()}
    assert {"config.yaml", "rounds.jsonl", "clients", "tensorboard", "summary.json"} <= written <= set(WRITTEN)
    assert "my runs/a b" in ended.out
    assert [r.round for r in read_rounds(Path("my runs/a b"))] == [0, 1]


@pytest.mark.parametrize("command", ["seed=1", "seed=2"])
def test_a_folder_with_another_run_is_left_alone(command: str, place: Path, fedsim: Callable[..., Ended]):
    out = place / "out"
    assert fedsim("run", *SHORT, f"out={out}").code == 0
    before = contents(out)
    assert_refused(fedsim("run", *SHORT, command, f"out={out}"), f"out={out} holds another run", "config.yaml")
    assert contents(out) == before


def test_a_file_is_no_run_folder(place: Path, fedsim: Callable[..., Ended]):
    (place / "file").write_text("mine")
    assert_refused(fedsim("run", f"out={place}/file"), "is a file")
    assert_refused(fedsim("run", f"out={place}/file/below"), "out=", "Not a directory")
    assert (place / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written_is_one_sentence(
    place: Path, fedsim: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
):
    mkdir = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.is_relative_to(place / "out"):
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)  # a mode would not stop root
    assert_refused(fedsim("run", *SHORT, f"out={place}/out"), f"out={place}/out", "Permission denied")


def test_a_full_disk_ends_in_one_sentence(place: Path, fedsim: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch):
    from fedsim.report.folder import RunFolder

    def full(self: Any, *_: Any) -> None:
        raise OSError(28, "No space left on device", "rounds.jsonl")

    monkeypatch.setattr(RunFolder, "add", full)
    ended = fedsim("run", *SHORT, f"out={place}/out")
    stays = f"everything written so far stays; go on with: fedsim resume {place}/out"
    assert (ended.code, ended.err) == (1, f"fedsim: No space left on device: rounds.jsonl; {stays}\n")


def test_a_folder_name_that_is_no_utf8_still_works(place: Path, fedsim: Callable[..., Ended]):
    odd = os.fsdecode(b"caf\xe9")
    (place / "cwd" / odd).mkdir()
    os.chdir(place / "cwd" / odd)
    assert fedsim("run", *SHORT, "out=here").code == 0
    assert Path("here/summary.json").exists()


def test_the_last_of_two_equal_settings_counts(place: Path, fedsim: Callable[..., Ended]):
    assert fedsim("run", *SHORT, "rounds=1", "rounds=2", "out=out").code == 0
    assert read_rounds(Path("out"))[-1].round == 2


def test_a_run_is_repeated_from_its_own_folder(place: Path, fedsim: Callable[..., Ended]):
    a, b = place / "A", place / "B"
    overrides = ["method=fedprox", "strategy=fedadam", "rounds=2", "cohort=3", "seed=4", "trainer.local_epochs=1"]
    assert fedsim("run", *overrides, f"out={a}").code == 0
    ended = fedsim("run", "--config-path", str(a), "--config-name", "config", f"out={b}")
    assert ended.code == 0, ended
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (a, b))
    assert one.pop("host_s") > 0
    assert two.pop("host_s") > 0
    assert one == two
    assert one["method"] == "fedprox strategy=fedadam"
    assert (a / "config.yaml").read_bytes() == (b / "config.yaml").read_bytes()


def test_a_pair_that_does_not_belong_together_says_which_setting(place: Path, fedsim: Callable[..., Ended]):
    ended = fedsim("run", "strategy=fedprox", "trainer=sgd", *SHORT, "out=out")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "'proximal-mu'" in ended.err
    assert "SGDTrainer" in ended.err
    assert not (place / "out").exists()
    assert fedsim("run", "strategy=fedprox", *SHORT, "out=good").code == 0  # it brings its own trainer


def test_printing_the_settings_runs_nothing(fedsim: Callable[..., Ended]):
    for arguments in (["rounds=3", "--cfg", "job"], ["--cfg", "job", "rounds=3"]):
        ended = fedsim("run", *arguments)
        assert (ended.code, ended.err) == (0, "")
        tree = yaml.safe_load(ended.out)
        assert (tree["rounds"], tree["trainer"]["lr"]) == (3, 0.1)
    assert fedsim("run", "--info", "defaults").code == 0
    assert list(Path().iterdir()) == []


# --- sweeps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["-m", "seed=1,2"], ["seed=range(1,3)", "-m"]])
def test_a_sweep_makes_a_folder_per_run_and_a_table(arguments: list[str], fedsim: Callable[..., Ended]):
    ended = fedsim("run", *SHORT, *arguments, "out=sweep")
    assert (ended.code, ended.err) == (0, "")
    seeds = [json.loads(Path(f"sweep/{i}/summary.json").read_text())["seed"] for i in (0, 1)]
    assert seeds == [1, 2]
    assert "overrides" in ended.out
    assert "seed=2" in ended.out


def test_what_a_run_is_called_is_printed_as_it_is(fedsim: Callable[..., Ended]):
    """A list in brackets is no markup."""
    ended = fedsim("run", "-m", *SHORT, "private=[head],[first]", "out=sweep")
    assert "fedavg private=[head] on digits" in ended.out
    table = ended.out[ended.out.rindex("overrides") :]
    assert "private=[head]" in table
    assert "private=[first]" in table


def test_a_sweep_without_a_folder_goes_below_runs(fedsim: Callable[..., Ended]):
    assert fedsim("run", "-m", *SHORT, "trainer.lr=0.1,0.2").code == 0
    (sweep,) = Path("runs").iterdir()
    assert sweep.name.endswith("-sweep")
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "multirun.yaml"}


def test_a_sweep_that_fails_midway_says_where_and_keeps_what_it_has(fedsim: Callable[..., Ended]):
    ended = fedsim("run", "-m", *SHORT, "workload=digits,blobs", "cohort=19,50", "out=sweep")
    assert ended.code == 2
    assert ended.err == (
        "fedsim: cohort must be at most the 20 clients there are, got 50; in run 2 of the sweep: rounds=1 cohort=50 "
        "trainer.local_epochs=1 fleet=uniform workload=digits out=sweep\n"
    )
    assert Path("sweep/0/summary.json").exists()
    assert Path("sweep/1/summary.json").exists()
    assert not Path("sweep/2").exists()


# --- the other commands ---------------------------------------------------------------------------------------------


def test_data_describe_draws_the_split(fedsim: Callable[..., Ended]):
    ended = fedsim("data", "describe", "num_clients=5", "--picture", "split.png", "--limit", "3")
    assert (ended.code, ended.err) == (0, "")
    assert "the first 3 of 5 clients" in ended.out
    assert Path("split.png").read_bytes().startswith(b"\x89PNG")


def test_data_describe_refuses_like_run(place: Path, fedsim: Callable[..., Ended]):
    assert_refused(fedsim("data", "describe", "workload=digts"), "did you mean 'digits'?")
    assert_refused(fedsim("data", "describe", "--picture", "/nope/x.png"), "--picture='/nope/x.png'", "is no folder")
    assert_refused(fedsim("data", "describe", "--limit", "0"), "'--limit'", "1<=x")


def test_data_list_says_what_is_here(place: Path, fedsim: Callable[..., Ended]):
    bundle(place / "bundles" / "mnist")
    ended = fedsim("data", "list")
    assert ended.code == 0
    rows = {line.split()[1]: line for line in ended.out.splitlines() if line.startswith("│")}
    assert " yes " in rows["mnist_writers"]
    assert " no " in rows["cifar10"]
    assert "mnist" in rows["bundle"]


def test_doctor_finds_this_installation_well_and_writes_nothing(fedsim: Callable[..., Ended]):
    ended = fedsim("doctor")
    assert (ended.code, ended.err) == (0, "")
    assert "FAILED" not in ended.out
    assert "3 rounds in" in ended.out
    assert list(Path().iterdir()) == []


def test_doctor_says_when_something_is_wrong(fedsim: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedsim.cli.doctor.PACKAGES", ("fedsim-edge", "no-such-package"))

    def broken(*_: Any) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr("fedsim.runs.writer.run", broken)
    ended = fedsim("doctor")
    assert ended.code == 1
    assert "not installed" in ended.out
    assert "it broke" in ended.out


def test_bench_prints_what_a_script_needs(fedsim: Callable[..., Ended]):
    sweep = ["--population", "20,30", "--cohort", "5"]
    ended = fedsim("bench", "--model", "mlp", "--rounds", "2", "--engines", "local", *sweep, "--json")
    assert (ended.code, ended.err) == (0, "")
    result = json.loads(ended.out)
    assert result["plain_updates_per_s"] > 0
    assert result["plain_channels_last_updates_per_s"] > 0
    local = result["engines"]["local"]
    assert set(local) >= {"updates_per_s", "ratio", "start_s", "peak_rss_bytes", "cpu_ms_per_update"}
    assert all(value > 0 for key, value in local.items() if not key.startswith("cpu"))  # it may tick too seldom
    assert [(row["clients"], row["cohort"]) for row in result["sweep"]] == [(20, 5), (30, 5)]
    assert all(row["round_s"] > 0 for row in result["sweep"])
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--population", "1,x"], ["--population", "'x'"]),
        (["--population", ","], ["--population", "''"]),
        (["--population", "0"], ["--population", "at least 1", "'0'"]),
        (["--population", "100,5"], ["--population takes numbers of at least 10", "got 5"]),
        (["--rounds", "1"], ["'--rounds'", "2<=x"]),
        (["--rounds", "x"], ["'--rounds'", "'x'"]),
        (["--model", "nope"], ["unknown model 'nope'", "lenet5"]),
        (["--model", "char_lstm"], ["model char_lstm needs sequences"]),
        (["--engines", "lokal"], ["unknown engine 'lokal'", "'local'"]),
        (["--engines", ","], ["unknown engine ','"]),
        (["--cohort", "20", "--population", "10"], ["--population takes numbers of at least 20", "got 10"]),
        (["--nope"], ["--nope"]),
        (["extra"], ["extra"]),
    ],
)
def test_bench_refuses_in_one_sentence(arguments: list[str], words: list[str], fedsim: Callable[..., Ended]):
    assert_refused(fedsim("bench", *([] if "--engines" in arguments else ["--engines", "local"]), *arguments), *words)


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


@pytest.mark.parametrize(
    "command",
    [
        ["run"],
        ["bench"],
        ["replay"],
        ["resume"],
        ["report"],
        ["study"],
        ["doctor"],
        ["data", "list"],
        ["data", "averages"],
        ["data", "describe"],
        *[["devices", name] for name in DEVICES],
    ],
    ids=lambda c: " ".join(c),
)
def test_every_help_has_an_example(command: list[str], fedsim: Callable[..., Ended]):
    ended = fedsim(*command, "--help")
    assert (ended.code, ended.err) == (0, "")
    lines = [line.strip(" │") for line in ended.out.splitlines()]
    examples = [line for line in lines if f"fedsim {' '.join(command)}" in line and not line.startswith("Usage")]
    assert examples


def test_every_command_is_covered_by_the_help_test():
    import typer

    group = typer.main.get_command(cli.app)
    commands = {"run", "flwr", "paired", "study", "bench", "replay", "resume", "report", "doctor", "data", "devices"}
    assert set(group.commands) == commands  # type: ignore[attr-defined]
    assert set(group.commands["data"].commands) == {"list", "describe", "averages"}  # type: ignore[attr-defined]
    assert set(group.commands["devices"].commands) == set(DEVICES)  # type: ignore[attr-defined]


def test_help_of_run_lists_every_group_and_option(fedsim: Callable[..., Ended]):
    from fedsim.settings.groups import GROUPS, options

    shown = fedsim("run", "--help").out
    assert all(f"{group}=" in shown and name in shown for group in GROUPS for name in options(group))


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


# --- real processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_leads_nowhere(closed: str, place: Path):
    """Also for what a run opens: its files do not get the numbers of the streams."""
    command = f"exec {FEDSIM} run workload=blobs rounds=1 cohort=2 num_clients=6 fleet=uniform out=here {closed}"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ("run folder: here" in ended.stdout) == (">" not in closed.replace("2>", ""))
    assert {path.name for path in Path("here").iterdir()} >= {"summary.json", "report.html"}
    assert [report.round for report in read_rounds(Path("here"))] == [0, 1]


@pytest.mark.parametrize(
    "command",
    ["run", "resume x", "report x", "doctor", "data list", "data describe", "devices list", "study --list", "paired x"],
)
def test_a_working_folder_that_was_removed_is_one_sentence(command: str, place: Path, fedsim: Callable[..., Ended]):
    folder = place / "gone"
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    assert_refused(fedsim(*command.split(" ")), "the working folder is not there any more", cwd=place / "cwd")


def test_the_installed_command_in_a_folder_that_was_removed(place: Path):
    command = f"mkdir gone && cd gone && rmdir ../gone && exec {FEDSIM} devices list"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert_refused(Ended(ended.returncode, ended.stdout, ended.stderr), "the working folder is not there any more")


def test_the_installed_command_refuses_in_one_sentence(place: Path):
    done = subprocess.run([FEDSIM, "run", "cohrt=5"], capture_output=True, text=True, timeout=60)
    assert_refused(Ended(done.returncode, done.stdout, done.stderr), "did you mean 'cohort'?")


@pytest.mark.parametrize(
    ("sent", "code", "sentence", "error"),
    [
        (signal.SIGINT, 130, "interrupted", "KeyboardInterrupt"),
        (signal.SIGTERM, 143, "terminated", "Terminated"),
        (signal.SIGHUP, 129, "the terminal was closed", "Terminated"),
    ],
    ids=["ctrl-c", "sigterm", "sighup"],
)
@pytest.mark.parametrize(
    "engine", ["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.xdist_group("ray")])]
)
def test_a_signal_ends_the_run_within_five_seconds_and_keeps_what_is_written(
    place: Path, engine: str, sent: signal.Signals, code: int, sentence: str, error: str
):
    """Ctrl-C reaches every process of the terminal, SIGTERM and SIGHUP the command alone."""
    run = subprocess.Popen(
        [FEDSIM, "run", "rounds=100000", "out=out", f"engine={engine}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        rounds, end = Path("out/rounds.jsonl"), time.monotonic() + 60
        while not (rounds.exists() and rounds.read_text().count("\n") > 2) and time.monotonic() < end:
            assert run.poll() is None, run.communicate()
            time.sleep(0.05)
        family = psutil.Process(run.pid).children(recursive=True)
        assert bool(family) == (engine == "ray")
        started = time.monotonic()
        (os.killpg if sent == signal.SIGINT else os.kill)(run.pid, sent)
        out, err = run.communicate(timeout=30)
        assert time.monotonic() - started < 5
    finally:
        run.kill()
        run.wait()
    _, alive = psutil.wait_procs(family, timeout=0.5)
    assert not alive
    assert run.returncode == code
    assert re.fullmatch(r"roughly \S+ (d|h) of training on one core lie ahead; .*\n", out)
    assert err == f"fedsim: {sentence}; everything written so far stays; go on with: fedsim resume out\n"
    assert [r.round for r in read_rounds(Path("out"))][:3] == [0, 1, 2]
    assert json.loads(Path("out/failure.json").read_text())["error"] == error
    assert not Path("out/summary.json").exists()
    assert list(Path("out/clients").glob("*.parquet"))
