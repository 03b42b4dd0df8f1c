"""What is written is there whole or not at all, and only where the user said: full disks, bad places, links, pipes."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Ended

from clients.app import serve
from devices import build, writing
from devices.tensor_files import write_tensors
from devices.writing import open_lock, write_atomic
from fedsim.engines.local import LocalEngine
from fedsim.errors import RunError
from fedsim.runs import writer

SPLIT = ("data", "describe", *TINY, "--picture")
AVERAGES = ("data", "averages", "workload=digits", "cohort=3", "--sizes", "5", "--picture")


@contextmanager
def full_disk(size: int = 256) -> Iterator[None]:
    """No file grows beyond so many bytes: the system itself refuses, in the middle of a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# --- full disks ------------------------------------------------------------------------------------------------------


def test_a_file_that_the_disk_does_not_take_leaves_the_one_before(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_atomic(path, "good")
    with full_disk(), pytest.raises(OSError) as caught:
        write_atomic(path, "x" * 1000)
    assert (caught.value.filename, path.read_text()) == (str(path), "good")
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "command",
    [
        ("devices", "show", "pixel3", "--picture", "a.png"),
        (*SPLIT, "a.svg"),
        (*AVERAGES, "a.pdf"),
        ("devices", "new", "mine", "--like", "pixel3", "--out", "a.yaml"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_command_on_a_full_disk_names_its_file_and_leaves_none(command, tmp_path, monkeypatch, fedsim):
    monkeypatch.chdir(tmp_path)
    name = command[-1]
    if "new" not in command:
        Path(name).write_text("good")
    before = os.listdir()
    with full_disk():
        ended: Ended = fedsim(*command)
    assert (ended.code, ended.err) == (1, f"fedsim: File too large: {name}\n")
    assert os.listdir() == before
    assert "new" in command or Path(name).read_text() == "good"
    assert fedsim(*command).code == 0
    assert Path(name).stat().st_size > 256


def test_weights_of_help_that_the_disk_does_not_take_are_not_there(tmp_path: Path):
    import torch

    with full_disk(), pytest.raises(OSError, match=r"File too large: .*h\.safetensors"):
        write_tensors(tmp_path / "h.safetensors", {"a": torch.zeros(1000)}, {}, "help")
    assert os.listdir(tmp_path) == []


def test_profiles_that_the_disk_does_not_take_are_whole_or_not_there(tmp_path: Path):
    class Nothing:
        priors: dict[str, Any] = {}
        catalogue: dict[str, Any] = {"devices": {}}

        def trees(self) -> dict[str, Any]:
            return {}

    with full_disk(), pytest.raises(OSError, match=r"File too large: .*profiles/reference\.yaml"):
        build.write_all(Nothing(), tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["priors.yaml", "profiles"]


def test_output_that_is_not_taken_is_told_apart_from_a_file_and_the_run_is_whole(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has /dev/full")
    command = [sys.executable, "-m", "fedsim.cli.main", "run", *TINY, f"out={tmp_path / 'run'}"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "fedsim: standard output cannot be written: No space left on device; everything written so far stays\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert (tmp_path / "run" / "report.html").exists()


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("devices", "show", "pixel3", "--picture", "pipe"), "--picture='pipe' is no file; name one"),
        (("devices", "new", "mine", "--like", "pixel3", "--out", "pipe.yaml"), "--out='pipe.yaml' is no file"),
        (("devices", "new", "mine", "--like", "pixel3", "--out", "lost.yaml"), "lost.yaml is there already"),
        (("devices", "build", "--data", ".", "--out", "file"), "--out='file' cannot be made: 'file' is no folder"),
        (("devices", "build", "--data", ".", "--out", "file/in"), "--out='file/in' cannot be made: 'file' is no"),
        (("devices", "build", "--data", ".", "--out", "."), "--out='.' cannot be made: 'profiles' is no folder"),
        (("devices", "build", "--data", ".", "--out", "/proc/x/y"), "--out='/proc/x/y' cannot be written: "),
        (("run", "-m", "seed=1,2", *TINY, "out=file"), "out=file cannot be made: File exists"),
        (("run", "-m", "seed=1,2", *TINY, "out=linked"), "out=linked holds multirun.yaml, which is no file"),
    ],
    ids=lambda value: " ".join(value[:2] + value[-1:]) if isinstance(value, tuple) else "",
)
def test_a_place_for_no_file_or_folder_is_refused_before_the_work(command, words, tmp_path, monkeypatch, fedsim):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe", "pipe.yaml"):
        os.mkfifo(name)
    for name in ("file", "profiles", "victim"):
        Path(name).write_text("mine")
    Path("linked").mkdir()
    for link in ("lost.yaml", "linked/multirun.yaml"):
        Path(link).symlink_to(tmp_path / ("victim" if "linked" in link else "nowhere"))
    before = sorted(tmp_path.rglob("*"))
    ended: Ended = fedsim(*command)
    assert (ended.code, ended.err.count("\n"), ended.err.startswith(f"fedsim: {words}")) == (2, 1, True), ended.err
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("victim").read_text() == "mine"


@pytest.mark.parametrize(
    "command",
    [
        ("devices", "show", "pixel3", "--picture=a.png"),
        (*SPLIT, "a.png"),
        ("devices", "new", "mine", "--like", "pixel3", "--out=a.yaml"),
        ("devices", "population", "--data", ".", "--out=a.yaml"),
        ("devices", "build", "--data", ".", "--out=built"),
        ("run", "-m", "seed=1,2", *TINY, "out=sweep"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_disk_that_can_only_be_read_is_named_with_its_key(command, tmp_path, monkeypatch, fedsim):
    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writing, "open_new", refuse)
    ended: Ended = fedsim(*command)
    key = next(text.partition("=")[0] for text in reversed(command) if text.startswith(("--", "out=")))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith(f"fedsim: {key}=")
    assert "cannot be written: Read-only file system" in ended.err
    assert os.listdir() == []


def test_a_lock_is_neither_emptied_nor_taken_through_a_link(tmp_path: Path):
    (tmp_path / "lock").write_text("mine")
    open_lock(tmp_path / "lock").close()
    (tmp_path / "link").symlink_to(tmp_path / "lock")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=f"it is (a link|no file): .*{name}"):
            open_lock(tmp_path / name)
    assert (tmp_path / "lock").read_text() == "mine"


def test_an_engine_that_cannot_be_started_leaves_no_folder(settings, tmp_path: Path):
    class Broken(LocalEngine):
        def start(self) -> None:
            raise RunError("nobody answers")

    with pytest.raises(RunError, match="nobody answers"):
        writer.run(settings(), Broken(serve), tmp_path / "run")
    assert os.listdir(tmp_path) == []
    writer.run(settings(), LocalEngine(serve), tmp_path / "run")
