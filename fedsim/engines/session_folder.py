"""A private folder for what runs beside this process, and a leash that ends it all when this process is gone.

The leash is a process of its own, started before anything else: however this process ends, and be it by kill -9 in the
middle of a start, what belongs to the folder is killed and the folder removed. Should both be killed, the next session
sweeps what they left.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsim.engines.locks import hold

HELD = ".held"  # locked by the owner as long as it lives
TOKEN = "token"  # file's name
UMASK = "FEDSIM_UMASK"  # the user's own, in octal
UNBORN_S = 60.0  # host seconds within which a folder that nobody holds may be about to be held
# Arguments: the folder; "group" where what it started is in the leash's own process group. It does nothing when it is
# told so before the pipe closes. Ray's workers and agents overwrite their command lines, and the raylet above them may
# be gone first: they are known by their logs.
LEASH = """\
import os, shutil, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
folder, group = sys.argv[1], sys.argv[2] == "group"
import psutil
if sys.stdin.buffer.read():
    sys.exit()
def of_folder(process):
    said = process.cmdline()
    if any(folder in part for part in said):
        return True
    return bool(said) and said[0].startswith("ray::") and any(f.path.startswith(folder) for f in process.open_files())
below, quiet, end = set(), 0, time.monotonic() + 20
while quiet < 10 and time.monotonic() < end:
    alive = False
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and (
                process in below
                or of_folder(process)
                or (group and os.getpgid(process.pid) == os.getpid())
            )
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                below.update(process.children(recursive=True))
                process.kill()
                alive = True
        except (psutil.Error, OSError):
            pass
    quiet = 0 if alive else quiet + 1
    time.sleep(0.05)
shutil.rmtree(folder, ignore_errors=True)
"""


class SessionFolder:
    """A folder that only this user can look into, for as long as this process lives.

    Args:
        prefix: of its name; folders of that prefix whose owner is gone are removed.
        parent: where it is made.
        group: whether what is started joins the leash's process group, `leash.pid`.

    Attributes:
        path: the folder, with mode 0700.
        leash: the process that ends what is left.
    """

    def __init__(self, prefix: str, parent: str, group: bool = False):
        sweep(prefix, parent)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # Open, and so locked, until `remove` or the end of this process.
        self._held = os.fdopen(os.open(self.path / HELD, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        hold(self._held)
        self.leash = subprocess.Popen(
            [sys.executable, "-I", "-c", LEASH, str(self.path), "group" if group else "alone"],
            stdin=subprocess.PIPE,
            cwd="/",
            start_new_session=not group,
            process_group=0 if group else None,
        )

    def remove(self) -> None:
        """Removes the folder and ends the leash, when nothing is left to be ended."""
        with suppress(OSError):
            self.leash.communicate(b".")
        self.leash.wait()
        self._held.close()
        shutil.rmtree(self.path, ignore_errors=True)


def token_file(folder: Path) -> Path:
    """Makes a file with a fresh random token that only this user can read."""
    file = folder / TOKEN
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as written:
        written.write(secrets.token_hex(32))
    return file


@contextmanager
def private_files() -> Iterator[None]:
    """What processes that are started in the meantime make can be read by this user alone."""
    before = os.umask(0o077)
    os.environ[UMASK] = f"{before:o}"
    try:
        yield
    finally:
        os.umask(before)
        del os.environ[UMASK]


def usual_files() -> None:
    """Undoes that in a process that was started so, before it makes files of the user's own."""
    if UMASK in os.environ:
        os.umask(int(os.environ[UMASK], 8))


def sweep(prefix: str, parent: str) -> None:
    """Removes this user's folders of that prefix that no living process holds."""
    for folder in Path(parent).glob(f"{prefix}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            held = folder / HELD
            if not held.exists():
                if time.time() - folder.stat().st_mtime > UNBORN_S:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            with held.open("r+") as file:
                hold(file)  # raises where somebody holds it
                shutil.rmtree(folder, ignore_errors=True)
