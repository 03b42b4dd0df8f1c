"""What a reader of a page has on the disk: the files that it shows, and those that its commands begin."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from fedsim.cli.templates import PARTS, files_of

BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"(?:# @[^\n]*\n)?# ([\w./-]+\.(?:py|yaml))\n")
COMMAND = re.compile(r"^((?:fedsim|python) .*?)(?:  +#.*)?$", re.MULTILINE)


def steps(page: Path) -> list[tuple[str, str]]:
    """Returns in order the files of a page, as (path, text), and its commands, as ("", command)."""
    found: list[tuple[str, str]] = []
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if named := FILE.match(block):
            found.append((named[1], block))
        else:
            found += [("", command) for command in COMMAND.findall(block)]
    return found


def write(folder: Path, path: str, text: str) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(text)


def write_all(page: Path, folder: Path) -> None:
    """Writes all files of a page, and what its `fedsim new` writes, into a folder."""
    for path, text in steps(page):
        if path:
            write(folder, path, text)
        elif text.startswith("fedsim new "):
            name, *flags = shlex.split(text)[2:]
            parts = [part for part in PARTS if f"--{part}" in flags] or ["strategy", "trainer"]
            for new, content in files_of(name, parts).items():
                write(folder, new, content)
