"""What runs beside a process ends with it, and only its own user can look into it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedsim.engines.leash import TIED
from fedsim.engines.session_folder import HELD, UNBORN_S, SessionFolder, private_files, sweep, token_file, usual_files

OWNER = """
import subprocess, sys, time
from fedsim.engines.session_folder import SessionFolder
folder = SessionFolder("fedsim-test-", sys.argv[1], group=sys.argv[2] == "group")
told = [str(folder.path)] if sys.argv[2] == "alone" else []
beside = {"process_group": folder.leash.pid} if sys.argv[2] == "group" else {}
wait = "import time; time.sleep(99)"
run = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {wait!r}]); {wait}"
started = subprocess.Popen([sys.executable, "-c", run, *told], **beside)
print(folder.path, folder.leash.pid, started.pid, flush=True)
time.sleep(99)
"""


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


@pytest.mark.parametrize("how", ["alone", "group"])
def test_kill_9_takes_along_what_was_started_its_children_and_the_folder(tmp_path: Path, how: str):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path), how], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder, leash, started = owner.stdout.readline().split()
    assert within(20, lambda: len(psutil.Process(int(started)).children()) == 1)
    below = [psutil.Process(int(started)), *psutil.Process(int(started)).children(), psutil.Process(int(leash))]
    owner.kill()
    owner.communicate()
    assert within(30, lambda: not Path(folder).exists())
    assert within(30, lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below))


def test_folder_and_files_are_the_users_alone(tmp_path: Path):
    folder = SessionFolder("fedsim-test-", str(tmp_path))
    try:
        token = token_file(folder.path)
        with private_files():
            subprocess.run([sys.executable, "-c", f"open({str(folder.path / 'made')!r}, 'w')"], check=True)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder.path, *folder.path.iterdir())}
        assert modes == {folder.path.name: 0o700, HELD: 0o600, "token": 0o600, "made": 0o600}
        assert len(token.read_text()) == 64
    finally:
        folder.remove()
    assert not folder.path.exists()
    assert folder.leash.poll() is not None


def test_files_of_the_users_own_are_made_as_usual(monkeypatch):
    before = os.umask(0o022)
    try:
        with private_files():
            assert os.umask(0o077) == 0o077
            usual_files()
            assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_the_next_session_sweeps_what_nobody_holds(tmp_path: Path):
    """A folder of a dead owner and leash, one of a living owner, one that is about to be held, an old one, a link."""
    held = SessionFolder("fedsim-test-", str(tmp_path))
    dead, young, old = (tmp_path / f"fedsim-test-{name}" for name in ("dead", "young", "old"))
    for folder in (dead, young, old):
        folder.mkdir()
    (dead / HELD).touch()
    os.utime(old, (time.time() - 2 * UNBORN_S,) * 2)
    (tmp_path / "fedsim-test-link").symlink_to(tmp_path)
    sweep("fedsim-test-", str(tmp_path))
    left = {path.name.removeprefix("fedsim-test-") for path in tmp_path.iterdir()}
    assert left == {held.path.name.removeprefix("fedsim-test-"), "young", "link"}
    held.remove()


TIED_CHILD = """
import signal, sys, time
from fedsim.engines.leash import tie
def closing(*_):
    print("closed", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, closing)
tie()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("already", [False, True], ids=["later", "before it watched"])
def test_a_tied_process_closes_when_its_starter_is_gone(already: bool):
    child = subprocess.Popen(
        [sys.executable, "-c", TIED_CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, TIED: "1"},
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    if not already:
        assert child.stdout.readline() == "ready\n"
    child.stdin.close()
    assert child.wait(30) == 3
    assert child.stdout.read().endswith("closed\n")


def test_a_process_of_its_own_is_not_tied():
    child = subprocess.run(
        [sys.executable, "-c", TIED_CHILD.replace("60", "0.2")], stdin=subprocess.DEVNULL, timeout=30
    )
    assert child.returncode == 0
