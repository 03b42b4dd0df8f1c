"""Checksums of a run folder's files: what a run goes on from is compared with what was written.

A checkpoint's `checksums.json` names every file that a resumed run builds on; `config.yaml` ends with its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from devices.errors import FileError, one_line
from devices.reading import open_file, read_json
from fedsim.report import strict_json

FILE, ROUNDS, CHECKPOINT = "checksums.json", "rounds.jsonl", "checkpoint"
CHECKSUM = "checksum"  # the entry of a JSON file
FIRST_LINE = "# Settings of a run, with their checksum in the last line.\n"
LAST_LINE = "# sha256 of the lines above: "  # of config.yaml
BLOCK = 2**20


@dataclass
class Beginning:
    """The first bytes of a file that grows: how many they are, and their SHA-256."""

    bytes: int = 0
    sha256: str = field(default_factory=lambda: sha256().hexdigest())


@dataclass
class Checksums:
    """Fingerprints of the files of a run when a checkpoint was written.

    Attributes:
        rounds: of `rounds.jsonl`, as far as it went.
        files: SHA-256 of every other file of the run that a checkpoint goes on from, by its path in the run folder.
        own: SHA-256 of the checkpoint's own files, by their names.
    """

    rounds: Beginning
    files: dict[str, str]
    own: dict[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """Returns JSON with its own checksum."""
        return signed_json({"rounds": vars(self.rounds), "files": self.files, "own": self.own})

    @classmethod
    def read(cls, path: Path) -> Checksums:
        """Reads what `to_text` made.

        Raises:
            FileError: if the file is missing or damaged.
        """
        tree = read_signed_json(path, needed=True)
        try:
            rounds = Beginning(int(tree["rounds"]["bytes"]), str(tree["rounds"]["sha256"]))
            return cls(rounds, dict(tree["files"]), dict(tree["own"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path} holds no checksums") from error

    def check(self, folder: Path, point: Path) -> None:
        """Compares what a run folder and one of its checkpoints hold.

        Raises:
            FileError: naming the first file that is missing or not what the run wrote.
        """
        named = {point / name: expected for name, expected in self.own.items()}
        for path, expected in (named | {folder / name: expected for name, expected in self.files.items()}).items():
            if sha256_of_file(check_inside(folder, path)) != expected:
                raise FileError(f"{path} is damaged: it is not what the run wrote")
        self.check_rounds(folder)

    def check_rounds(self, folder: Path) -> None:
        """Compares the rounds that a run folder holds.

        Raises:
            FileError: if they are not what the run wrote.
        """
        check_inside(folder, folder / ROUNDS)
        if sha256_of_file(folder / ROUNDS, self.rounds.bytes) != self.rounds.sha256:
            raise FileError(f"{folder / ROUNDS} is damaged: its beginning is not what the run wrote")


def check_rounds(folder: Path) -> None:
    """Compares the rounds of a run with what its newest checkpoint says of them; of a run without one, nothing.

    Raises:
        FileError: if they are not what the run wrote.
    """
    newest = max((folder / CHECKPOINT).glob(f"round-*/{FILE}"), default=None)
    if newest is not None:
        Checksums.read(check_inside(folder, newest)).check_rounds(folder)


def sha256_of(data: bytes) -> str:
    """Returns the SHA-256 in hexadecimal digits."""
    return sha256(data).hexdigest()


def sha256_of_file(path: Path, size: int | None = None) -> str:
    """Returns the SHA-256 of a file, or of its first `size` bytes.

    Raises:
        FileError: if it cannot be read.
    """
    digest, left = sha256(), size
    with open_file(path) as file:
        try:
            while block := file.read(BLOCK if left is None else min(BLOCK, left)):
                digest.update(block)
                left = None if left is None else left - len(block)
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def check_inside(folder: Path, path: Path) -> Path:
    """Returns the path, if what it stands for lies in the folder.

    Raises:
        FileError: for a link that leads elsewhere: a run folder may come from somebody else.
    """
    try:
        lies_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a loop
        raise FileError(f"{path} cannot be read: {one_line(error)}") from error
    if not lies_inside:
        raise FileError(f"{path} is a link to something outside of {folder}, which is neither read nor written")
    return path


def signed(text: str) -> str:
    """Returns a text with its checksum as a last line, and a first one that says so: comments in YAML."""
    text = FIRST_LINE + text
    return f"{text}{LAST_LINE}{sha256_of(text.encode())}\n"


def check_signed(text: str, path: Path) -> bool:
    """Refuses a text of `signed` that has not its checksum; runs of fedsim 0.1 have none.

    Raises:
        FileError: if it is not what was written.
    """
    body, mark, own = text.rpartition(LAST_LINE)
    if (mark or text.startswith(FIRST_LINE)) and own != f"{sha256_of(body.encode())}\n":
        raise FileError(f"{path} is damaged or was changed: it is not what the run wrote")
    return bool(mark)


def signed_json(tree: dict[str, Any]) -> str:
    """Returns a line of JSON with a checksum of all else in it as its last entry."""
    line = strict_json.dumps(tree, default=str)
    return strict_json.dumps({**json.loads(line), CHECKSUM: sha256_of(line.encode())}) + "\n"


def read_signed_json(path: Path, needed: bool = False) -> dict[str, Any]:
    """Reads what `signed_json` made; a file of fedsim 0.1 has no checksum, and is taken unless one is `needed`.

    Raises:
        FileError: if it is missing or not what was written.
    """
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise FileError(f"{path} must be a map")
    own = tree.pop(CHECKSUM, None)
    if (own is not None or needed) and own != sha256_of(strict_json.dumps(tree).encode()):
        raise FileError(f"{path} is damaged: it is not what the run wrote")
    return tree
