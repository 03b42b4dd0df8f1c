"""A run's folder is its own: made where its name is chosen, and nothing in it that fedsim did not write is touched."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import TINY, Ended
from cut_short import comparable

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.report import folder as folders
from fedsim.report import place as run_place
from fedsim.report.place import check_free, new_folder, new_run_folder, remove_unfinished
from fedsim.runs import writer
from fedsim.settings.compose import compose
from fedsim.settings.run_settings import RunSettings

FEDSIM = str(Path(sys.executable).parent / "fedsim")
SMALL = (*TINY, "model.hidden=[8]")


# --- names -----------------------------------------------------------------------------------------------------------


def test_runs_that_begin_in_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run_place.time, "strftime", lambda form: "20250102-030405")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_folder(tmp_path / "runs", "fedavg", []), range(16)))
    assert len(set(made)) == 16
    assert {path.name for path in made} >= {"20250102-030405-fedavg", "20250102-030405-fedavg-16"}


def test_sweeps_that_begin_in_one_second_do_not_meet(tmp_path: Path, monkeypatch, fedsim: Callable[..., Ended]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_place.time, "strftime", lambda form: "20250102-030405")
    for _ in range(2):
        assert fedsim("run", "-m", "seed=1", *SMALL).code == 0
    assert sorted(os.listdir("runs")) == ["20250102-030405-sweep", "20250102-030405-sweep-2"]


def test_what_was_made_for_a_run_that_is_refused_goes_again(tmp_path: Path, monkeypatch, fedsim: Callable[..., Ended]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for out in ("out=a/b/c", "out=mine", "name=x"):
        assert fedsim("run", *SMALL, "cohort=99", out).code == 2
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("out", ["exp:1", "s3://bucket/a", "a b'c\"d ü%20#?*"])
def test_any_character_may_be_in_a_name(out: str, tmp_path: Path, monkeypatch, fedsim: Callable[..., Ended]):
    monkeypatch.chdir(tmp_path)
    chosen = compose(list(SMALL))
    writer.run(chosen, LocalEngine(serve), Path(out))
    assert fedsim("report", out).code == 0
    assert fedsim("paired", out).code == 0
    assert comparable(tmp_path / out)[2]["rounds"] == 2


# --- what is in it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["notes.txt", ".hidden", "clients/notes.txt", "rounds.jsonl", "report.html", "-x", "a/"]
)
def test_a_folder_that_holds_anything_is_refused(name: str, tmp_path: Path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"holds (another run|something else) .*; name a new folder"):
        check_free(tmp_path)


def test_what_a_run_leaves_in_its_first_instant_is_free_again(tmp_path: Path):
    (tmp_path / "clients").mkdir()
    for name in ("rounds.jsonl", ".reserved", ".config.yaml.123.part", ".config.yaml.part"):
        (tmp_path / name).touch()
    writer.run(compose(list(SMALL)), LocalEngine(serve), tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_files_of_the_user_stay_when_a_run_goes_on(tmp_path: Path):
    chosen = compose([*SMALL, "checkpoint_s=0"])
    writer.run(chosen, LocalEngine(serve), tmp_path)
    (tmp_path / "summary.json").unlink()
    mine = ["clients/notes.txt", "clients/notes.parquet", "checkpoint/mine/a", "pictures/own.part", "x.part"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "clients" / "old").mkdir()
    ours = (".summary.json.99999999.part", "clients/.rounds-000001-000002.parquet.99999999.part", "report.html")
    for name in ours[:2]:
        (tmp_path / name).touch()
    writer.run(chosen, LocalEngine(serve), tmp_path, resume=True)
    assert [(tmp_path / name).read_text() for name in mine] == ["mine"] * len(mine)
    assert (tmp_path / "clients" / "old").is_dir()
    assert not any((tmp_path / name).exists() for name in ours)


def test_what_another_process_is_writing_stays(tmp_path: Path):
    (tmp_path / f".report.html.{os.getppid()}.part").touch()
    (tmp_path / ".report.html.99999999.part").touch()
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == [f".report.html.{os.getppid()}.part"]


@pytest.mark.parametrize(
    "name", ["rounds.jsonl", "clients", "checkpoint", "config.yaml", "tensorboard", "failure.json"]
)
def test_a_run_goes_on_through_no_link_to_elsewhere(name: str, tmp_path: Path, fedsim: Callable[..., Ended]):
    writer.run(compose([*SMALL, "checkpoint_s=0"]), LocalEngine(serve), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    if not (tmp_path / "run" / name).exists():
        (tmp_path / "run" / name).write_text("{}")
    shutil.move(tmp_path / "run" / name, tmp_path / "other")
    (tmp_path / "run" / name).symlink_to(tmp_path / "other")
    before = sorted((path, path.stat().st_size) for path in (tmp_path / "other").rglob("*"))
    ended = fedsim("resume", str(tmp_path / "run"))
    assert ended.code == 2, ended.err
    assert before == sorted((path, path.stat().st_size) for path in (tmp_path / "other").rglob("*"))


# --- the last steps --------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_before_its_page_gets_it(tmp_path: Path, fedsim: Callable[..., Ended]):
    chosen = compose(list(SMALL))
    writer.run(chosen, LocalEngine(serve), tmp_path)
    (tmp_path / "report.html").write_text("of the run when it was not finished")
    assert "only its page was missing" in fedsim("resume", str(tmp_path)).out
    page = (tmp_path / "report.html").read_text()
    assert "nothing is left to do" in fedsim("resume", str(tmp_path)).out
    assert (tmp_path / "report.html").read_text() == page


def test_a_picture_that_is_a_link_to_elsewhere_is_not_shown(tmp_path: Path, fedsim: Callable[..., Ended]):
    writer.run(compose(list(SMALL)), LocalEngine(serve), tmp_path / "run")
    (tmp_path / "run" / "pictures").mkdir()
    (tmp_path / "secret").write_bytes(b"\x89PNG\r\n\x1a\nSECRET")
    (tmp_path / "run" / "pictures" / "a.png").symlink_to(tmp_path / "secret")
    assert fedsim("report", str(tmp_path / "run")).code == 0
    import base64

    secret = base64.b64encode(b"\x89PNG\r\n\x1a\nSECRET").decode()[:16]
    assert secret not in (tmp_path / "run" / "report.html").read_text()


# --- disks and pipes -------------------------------------------------------------------------------------------------


class FullDisk:
    """Lets so many writes to the disk through, then none; a note of a failure fits where something was given back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, writes: int, room: bool):
        self.left, self.room, real = writes, room, os.fsync

        def fsync(descriptor: int) -> None:
            self.left -= 1
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if self.left < 0 and not (self.room and ("failure.json" in name or os.path.isdir(name))):
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(("writes", "room"), [(1, True), (4, True), (9, False), (20, True)])
def test_a_full_disk_ends_in_one_sentence_and_goes_on_with_room(
    writes: int, room: bool, tmp_path: Path, monkeypatch, fedsim: Callable[..., Ended]
):
    given = ("run", *SMALL, "checkpoint_s=0", f"out={tmp_path / 'run'}")
    with monkeypatch.context() as patch:
        FullDisk(patch, writes, room)
        ended = fedsim(*given)
    assert ended.code in (1, 2)
    assert len(ended.err.splitlines()) == 1
    assert "No space left on device" in ended.err
    begun = (tmp_path / "run" / "config.yaml").exists()
    if begun:
        assert (tmp_path / "run" / "failure.json").exists() == room
        assert ("failure.json could not be written" in ended.err) != room
        assert not list((tmp_path / "run").rglob(".*"))
    assert fedsim(*(("resume", str(tmp_path / "run")) if begun else given)).code == 0


@pytest.mark.parametrize("gone", ["run", "run/clients", "run/tensorboard", "run/checkpoint"])
def test_a_folder_that_vanishes_ends_in_a_sentence_or_not_at_all(
    gone: str, tmp_path: Path, monkeypatch, fedsim: Callable[..., Ended]
):
    real = folders.RunFolder.add

    def add(self, report, clients):
        real(self, report, clients)
        if report.round == 1:
            shutil.rmtree(tmp_path / gone)

    monkeypatch.setattr(folders.RunFolder, "add", add)
    ended = fedsim("run", *SMALL, "rounds=3", "checkpoint_s=0", f"out={tmp_path / 'run'}")
    assert ended.code in (0, 1)
    assert len(ended.err.splitlines()) == (ended.code == 1)
    assert (ended.code == 1) == (gone in ("run", "run/clients"))


def test_a_closed_pipe_ends_it_without_a_word_and_the_run_stays(tmp_path: Path):
    read, write = os.pipe()
    os.close(read)
    command = [FEDSIM, "run", *SMALL, f"out={tmp_path / 'run'}"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "run" / "report.html").exists()


def test_a_name_is_given_back_when_nothing_came_into_its_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError), new_run_folder(RunSettings.of(compose(list(SMALL)))):
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("inner", ["in", "checkpoint/round-000001", "clients/a/b"])
def test_no_run_goes_into_the_folder_of_another(tmp_path, inner: str):
    outer = tmp_path / "outer"
    outer.mkdir()
    (outer / "config.yaml").touch()
    check_free(outer / inner)  # a config alone is no run
    (outer / "rounds.jsonl").touch()
    with pytest.raises(ConfigError, match=r"lies in the folder of another run, .*outer; name a folder outside of it"):
        check_free(outer / inner)


def test_folders_in_each_other_are_not_endless(settings):
    for out in ("x/" * 1900, "y" * 300):
        with pytest.raises(ConfigError, match=r"^out (must be at most 100 folders|has a part that is longer)"):
            settings(f"out={out}")


@pytest.mark.parametrize(
    "command",
    [
        "resume PATH",
        "replay PATH --round 1 --client 0",
        "report PATH",
        "paired PATH",
        "study PATH.yaml",
        "study PATH/s.yaml",
        "run --config-path PATH",
        "run --config-dir=PATH",
        "run --config-name PATH",
        "devices predict --model PATH.py:Net --device pixel3",
        "devices show pixel3 --picture PATH.png",
        "devices calibrate pixel3 --rows PATH",
        "flwr --app PATH",
    ],
)
def test_a_path_that_no_system_takes_is_told_apart_from_a_fault(fedsim, command: str):
    code, _, err = fedsim(*command.replace("PATH", "x" * 300).split())
    assert (code, err.count("\n")) == (2, 1)
    assert "xxx" in err
    option = next((part.partition("=")[0] for part in command.split() if part.startswith("--")), "")
    assert option in err or option == "--round" or "--rows" in command
