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

from clients.app import app
from devices import build, writing
from devices.help_weights import write_arrays
from devices.writing import open_lock, write_atomic
from fedsim import federation
from fedsim.engines.local import LocalGrid
from fedsim.errors import RunError

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
        write_arrays(tmp_path / "h.safetensors", {"a": torch.zeros(1000)}, {})
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
