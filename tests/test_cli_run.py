"""`fedsim run` as a user meets it: how settings are read, its run folder, what it prints, and sweeps."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import SHORT, Ended, assert_refused

from devices.profile import SHIPPED
from fedsim.report.place import WRITTEN
from fedsim.report.rounds import read_rounds
from fedsim.settings.compose import compose
from fedsim.settings.groups import options
from fedsim.settings.names import fleet_name, method_name, workload_name
from fedsim.settings.run_settings import RunSettings

pytestmark = pytest.mark.usefixtures("place")

# --- settings --------------------------------------------------------------------------------------------------------


def test_a_quoted_option_is_that_option():
    assert compose(['strategy="fedadam"'])["choices"]["strategy"] == "fedadam"


def test_giving_devices_replaces_the_mix_of_the_fleet():
    assert compose(["fleet=phones", "fleet.devices={pixel3: 2}"])["fleet"]["devices"] == {"pixel3": 2}
    assert set(compose(["fleet=uniform", "+fleet.devices.pixel3=2"])["fleet"]["devices"]) == {"reference", "pixel3"}


@pytest.mark.parametrize("fleet", options("fleet"))
def test_a_fleet_with_other_devices_than_its_option_is_named_by_them(fleet: str):
    def named(*overrides: str) -> str:
        return fleet_name(RunSettings.of(compose([f"fleet={fleet}", *overrides])))

    assert named("fleet.speed_sigma=0.5") == fleet
    assert named("fleet.devices={pixel3: 2}") == "pixel3"
    assert named("fleet.devices={pixel3: 2, my/board.yaml: 1}") == "pixel3, board"
    assert named("fleet.devices={pixel3: 2, pixel: 1, mi_9: 1}") == "3 devices of its own"


def test_what_took_the_place_of_an_option_gives_the_name():
    settings = RunSettings.of(compose(["strategy._target_=mine.FedNova", "workload=bundle", "workload.path=a/digits"]))
    assert (method_name(settings), workload_name(settings)) == ("FedNova", "digits")
    both = ["strategy._target_=mine.FedNova", "trainer._target_=mine.Normalised"]
    assert method_name(RunSettings.of(compose(both))) == "FedNova+Normalised"
    assert method_name(RunSettings.of(compose(["method=ditto", *both[:1]]))) == "ditto strategy=FedNova"
    inherited = compose(["method=ocs"])  # whose file names no class itself, perhaps
    assert method_name(RunSettings.of(inherited)) == "ocs"


@pytest.mark.parametrize(
    ("name", "shown", "label"),
    [
        ("my digits", "my digits", "my-digits"),
        ("../../a\nb", "../../a b", "a-b"),
        (None, "folder", "folder"),
        (7, "folder", "folder"),
        ("", "folder", "folder"),
    ],
)
def test_a_bundle_goes_by_its_own_name(
    name: Any, shown: str, label: str, place: Path, fedsim: Callable[..., Ended], tmp_path: Path
):
    folder = tmp_path / "folder"
    folder.mkdir()
    for part in ("train", "test"):
        np.savez(folder / f"{part}.npz", x=np.eye(8, 3, dtype=np.float32), y=np.arange(8) % 2)
    (folder / "meta.json").write_text(json.dumps({"name": name, "classes": ["a", "b"], "kind": "tabular"}))
    ended = fedsim("run", *SHORT, "workload=bundle", f"workload.path={folder}", "num_clients=2")
    assert f"fedavg on {shown}, fleet uniform" in ended.out
    (run,) = Path("runs").iterdir()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-fedavg-{label}", run.name)
    assert json.loads((run / "summary.json").read_text())["workload"] == shown
    assert f"<title>fedavg on {shown}, fleet uniform" in (run / "report.html").read_text()


def test_the_closing_line_names_a_fleet_of_own_devices(place: Path, fedsim: Callable[..., Ended]):
    ended = fedsim("run", *SHORT, "fleet.devices={pixel3: 1}", f"out={place}/out")
    assert "fleet pixel3: test accuracy" in ended.out
    assert "fleet pixel3" in (place / "out" / "report.html").read_text()


def test_the_last_of_two_equal_settings_counts(place: Path, fedsim: Callable[..., Ended]):
    assert fedsim("run", *SHORT, "rounds=1", "rounds=2", "out=out").code == 0
    assert read_rounds(Path("out"))[-1].round == 2


def test_printing_the_settings_runs_nothing(fedsim: Callable[..., Ended]):
    for arguments in (["rounds=3", "--cfg", "job"], ["--cfg", "job", "rounds=3"]):
        ended = fedsim("run", *arguments)
        assert (ended.code, ended.err) == (0, "")
        tree = yaml.safe_load(ended.out)
        assert (tree["rounds"], tree["trainer"]["lr"]) == (3, 0.1)
    assert fedsim("run", "--info", "defaults").code == 0
    assert list(Path().iterdir()) == []


# --- run folders -----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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


# --- sweeps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["-m", "seed=1,2"], ["seed=range(1,3)", "-m"]])
def test_a_sweep_makes_a_folder_per_run_and_a_table(arguments: list[str], fedsim: Callable[..., Ended]):
    ended = fedsim("run", *SHORT, *arguments, "out=sweep")
    assert (ended.code, ended.err) == (0, "")
    seeds = [json.loads(Path(f"sweep/{i}/summary.json").read_text())["seed"] for i in (0, 1)]
    assert seeds == [1, 2]
    assert "accuracy: of round 1" in ended.out  # one row: there is nothing to differ from
    assert "differences" not in ended.out
    assert "comparison: sweep (" in ended.out
    named = [line for line in ended.out.splitlines() if line.startswith(("run 0", "run 1"))]
    assert named == ["run 0: seed=1", "run 1: seed=2"]
    assert "┃ round ┃" not in ended.out  # the tables of single runs are in their folders


def test_what_a_run_is_called_is_printed_as_it_is(fedsim: Callable[..., Ended]):
    """A list in brackets is no markup."""
    ended = fedsim("run", "-m", *SHORT, "private=[head],[first]", "out=sweep")
    assert "fedavg private=[head] on digits" in ended.out
    table = ended.out[ended.out.rindex("arm") :]
    assert "private=[head]" in table
    assert "private=[first]" in table


def test_a_sweep_without_a_folder_goes_below_runs(fedsim: Callable[..., Ended]):
    assert fedsim("run", "-m", *SHORT, "trainer.lr=0.1,0.2").code == 0
    (sweep,) = Path("runs").iterdir()
    assert sweep.name.endswith("-sweep")
    comparison = {f"comparison.{end}" for end in ("csv", "html", "json", "md", "png")}
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "multirun.yaml", *comparison}


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


def few_rounds(fedsim: Callable[..., Ended], *overrides: str) -> Ended:
    return fedsim(
        "run", "workload=digits", "num_clients=6", "cohort=3", "rounds=2", "engine=local", "out=o", *overrides
    )


ASLEEP = ["fleet.availability._target_=devices.availability.Diurnal", "fleet.availability.hours=0.01"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["deadline_s=0.001"], ["6 came after deadline_s=0.001; raise it"]),
        (["fleet.devices={tiny.yaml: 1}"], ["6 lacked the memory, up to ", "fedsim devices fit", "again 60 s after"]),
        (ASLEEP, ["6 were offline", "again 60 s after"]),
    ],
)
def test_a_run_in_which_nobody_completed_says_so_once(
    overrides: list[str], words: list[str], fedsim: Callable[..., Ended]
):
    tree = yaml.safe_load((SHIPPED / "raspberry_pi_zero_w.yaml").read_text())
    tree["memory"] = {"ram_mb": 1, "usable_fraction": 0.6, "runtime_mb": 0.59}
    Path("tiny.yaml").write_text(yaml.safe_dump(tree))
    ended = few_rounds(fedsim, *overrides)
    warned = [text for text in json.loads(Path("o/summary.json").read_text())["warnings"] if "no client ever" in text]
    assert (ended.code, len(warned), ended.out.count("no client ever")) == (0, 1, 1)
    assert [word for word in words if word not in warned[0]] == []
    assert "no client ever completed" in Path("o/report.html").read_text()


@pytest.mark.parametrize("overrides", [[], ["deadline_s=1000"]])
def test_a_round_took_as_long_as_its_last_client_where_there_is_no_deadline(
    overrides: list[str], fedsim: Callable[..., Ended]
):
    ended, page = few_rounds(fedsim, *overrides), Path("o/report.html").read_text()
    assert "no client ever" not in ended.out
    assert "whose reply was taken" in page
    assert ("as long as they did" in page) == (not overrides)
