"""Kills a small run before each of its file operations in turn, and lets what it left go on: for test_crashes.py.

A program of its own: it imports everything once, then gives each point a forked process, which an audit hook kills.
Prints one line per point: its number, and `same`, `new` (a free folder, used anew) or what was wrong.

    python crash_points.py FOLDER POINTS RESUMED [OVERRIDE ...]
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def below(folder: Path, event: str, args: tuple) -> bool:
    """Whether an operation changes something below the folder; reading does not."""
    if event not in OPERATIONS or not isinstance(args[0], str | os.PathLike):
        return False
    if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        return False
    return os.path.abspath(args[0]).startswith(str(folder))


def counted(folder: Path, die_at: int) -> list[int]:
    """Counts operations below the folder from now on, and dies before one of them."""
    seen = [0]

    def hook(event: str, args: tuple) -> None:
        if args and below(folder, event, args):
            seen[0] += 1
            if seen[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def command(*arguments: str) -> int:
    """`fedsim ARGUMENTS` in this process, quietly; its exit code, or 99 with a traceback."""
    from fedsim.cli import main as cli

    sys.argv = ["fedsim", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


def forked(work, *args) -> tuple[int, str]:
    """Does work in a process of its own; its exit code (negative: the signal), and what it said on stderr."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(write, 2)
        os._exit(work(*args))
    os.close(write)
    with open(read) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def dies(folder: Path, at: int, *arguments: str) -> int:
    """A command that is killed before an operation; tells on stderr how many there were where it was not."""
    seen = counted(folder, at)
    code = command(*arguments)
    print(f"COUNT {seen[0]}", file=sys.stderr)
    return code


def said(folder: Path) -> tuple:
    """Everything that a finished run folder says, but for host times; and what should not be in it."""
    import pandas

    rounds = [{**json.loads(line), "host_s": 0} for line in (folder / "rounds.jsonl").read_text().splitlines()]
    tables = [pandas.read_parquet(path) for path in sorted((folder / "clients").iterdir())]
    summary = {**json.loads((folder / "summary.json").read_text()), "host_s": 0}
    stray = sorted(path.name for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".old"))
    points = sorted(path.name for path in (folder / "checkpoint").iterdir())
    return rounds, pandas.concat(tables).to_csv(index=False), summary, (folder / "report.html").exists(), stray, points


def verdict(cut: Path, whole: tuple, settings: list[str]) -> str:
    """What became of a run that was killed."""
    how, code, text = "same", *forked(command, "resume", str(cut))
    if code == 2 and "holds no run" in text:
        how, code, text = "new", *forked(command, "run", *settings, f"out={cut}")
    if code != 0:
        return f"code {code}: {text[-300:]!r}"
    found = said(cut)
    names = ("rounds", "client rows", "summary", "page", "stray files", "checkpoints")
    wrong = [name for name, a, b in zip(names, found, whole, strict=True) if a != b]
    return f"differs in {', '.join(wrong)}: {found[3:]}" if wrong else how


def main(place: Path, points: str, resumed: bool, overrides: list[str]) -> None:
    """Tries the points (`all`, or `every N`) of a run, or of the resume of one that was killed in its middle."""
    import torch

    torch.set_num_threads(1)
    assert command("run", *overrides, f"out={place / 'whole'}") == 0  # in this process: it imports all there is
    whole, begun, cut = said(place / "whole"), place / "begun", place / "cut"
    start = ["run", *overrides, f"out={cut}"]
    if resumed:
        _, text = forked(dies, begun, -1, "run", *overrides, f"out={begun}")
        total = int(text.split("COUNT ")[1])
        shutil.rmtree(begun)
        forked(dies, begun, total // 2, "run", *overrides, f"out={begun}")
        start = ["resume", str(cut)]

    def prepare() -> None:
        shutil.rmtree(cut, ignore_errors=True)
        if resumed:
            shutil.copytree(begun, cut)

    prepare()
    _, text = forked(dies, cut, -1, *start)
    total, step = int(text.split("COUNT ")[1]), 1 if points == "all" else int(points.split()[1])
    for number in range(1, total + 1, step):
        prepare()
        code, text = forked(dies, cut, number, *start)
        assert code == -signal.SIGKILL, (code, text)
        print(number, total, verdict(cut, whole, overrides) if cut.exists() else "new", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3] == "resumed", sys.argv[4:])
