"""Every command answers every damage of every file of a run folder with one sentence, or without that file."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from conftest import TINY

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import RunError
from fedsim.report.page import write_page
from fedsim.runs import writer
from fedsim.settings.compose import compose

SETTINGS = (*TINY, "model.hidden=[8]", "rounds=3", "checkpoint_s=0")
STUDY = f"title: t\narms: {{one: []}}\nbase: {json.dumps(SETTINGS)}\nseeds: [1]\n"


class CutError(Exception):
    """The run ends here."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A finished run, one that was interrupted and one that a client has stopped, to be copied."""
    place = tmp_path_factory.mktemp("runs")
    for name in ("finished", "interrupted", "failed"):

        def watch(report, name=name) -> None:
            if name == "interrupted" and report.round == 2:
                raise CutError

        broken = ["trainer._target_=test_report.FailsLater"] if name == "failed" else []
        settings = compose([*SETTINGS, *broken])
        try:
            writer.run(settings, LocalEngine(serve), place / name, watch)
            write_page(place / name)
        except (CutError, RunError):
            pass
    return {path.name: path for path in place.iterdir()}


def bits(data: bytes) -> bytes:
    """Every seventh byte is another one."""
    return bytes(b ^ 255 if i % 7 == 3 else b for i, b in enumerate(data))


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "garbage": lambda data: bytes(range(256)) * 4,
    "flipped": bits,
    "half": lambda data: data[: len(data) // 2],
    "other JSON": lambda data: b'{"a": {"b": [1, 2]}}\n',
    "a list": lambda data: b"[1, 2]\n",
    "null": lambda data: b"null\n",
    "deep": lambda data: b"[" * 5000 + b"]" * 5000 + b"\n",
    "a bomb": lambda data: (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(9))
    ),
    "texts for numbers": lambda data: data.replace(b": 1", b": oh").replace(b'"round"', b'"rounds"'),
}


def elsewhere(path: Path) -> None:
    other = Path.cwd() / f"elsewhere-{path.name}"
    shutil.rmtree(other, ignore_errors=True)
    shutil.move(path, other)
    path.symlink_to(other)


PLACES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None if not path.exists() else path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link elsewhere": elsewhere,
    "a loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
}
FILES = {
    "finished": ("config.yaml", "rounds.jsonl", "summary.json", "clients/*.parquet"),
    "interrupted": (
        *("config.yaml", "rounds.jsonl", "clients/*.parquet", "failure.json", "checkpoint/*/state.json"),
        *("checkpoint/*/weights.safetensors", "checkpoint/*/tensors.safetensors", "checkpoint/*/checksums.json"),
    ),
    "failed": ("config.yaml", "failed-client.json", "failed-client.safetensors"),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "report": ("report", "run"),
    "compare": ("compare", "run", "--out", "compared"),
    "reprice": ("reprice", "run", "fleet=sbc", "out=again"),
    "resume": ("resume", "run"),
    "replay": ("replay", "run", "--round", "2", "--client"),
    "study": ("study", "st.yaml", "--out", "st", "--report"),
}
# Which kind of run each command is tried on, and the files that it reads there.
READS = {
    "report": {"finished": (*FILES["finished"], "split.json"), "interrupted": ("failure.json",)},
    "compare": {"finished": ("config.yaml", "rounds.jsonl", "summary.json")},
    "reprice": {"finished": (*FILES["finished"], "checkpoint/*/weights.safetensors")},
    "resume": {"finished": ("config.yaml", "summary.json"), "interrupted": FILES["interrupted"]},
    "replay": {"failed": FILES["failed"]},
    "study": {"finished": ("config.yaml", "rounds.jsonl", "summary.json")},
}
NOT_NEEDED = ("failure.json", "summary.json", "split.json", "failed-client.json")  # without them there is less to read
TRIED = [(command, kind, file) for command, kinds in READS.items() for kind, files in kinds.items() for file in files]
DAMAGES = (*CONTENTS, *PLACES)
TAKEN = 4  # of so many damages, one is tried on a file: each damage on seven files or eight


def cases() -> list[Any]:
    """A share of the damages for each file, other ones for the next; all of them for each are left to slow."""
    few, slow = [], []
    for number, tried in enumerate(TRIED):
        name = "-".join(tried).replace("/", "-")
        few.append(pytest.param(*tried, DAMAGES[number % TAKEN :: TAKEN], id=name))
        slow.append(pytest.param(*tried, DAMAGES, id=f"{name}-all", marks=pytest.mark.slow))
    return [*few, *slow]


@pytest.mark.filterwarnings("always:.*; this run goes on from round ")
@pytest.mark.parametrize(("command", "kind", "file", "damages"), cases())
def test_every_command_answers_every_damage_with_a_sentence(
    command: str, kind: str, file: str, damages: tuple[str, ...], runs, tmp_path: Path, monkeypatch, fedsim
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / ("st/one/seed-1" if command == "study" else "run")
    (tmp_path / "st.yaml").write_text(STUDY)
    client = [str(json.loads((runs["failed"] / "failed-client.json").read_text())["client"])]
    if command in ("resume", "reprice"):  # pages are for `report`
        monkeypatch.setattr("fedsim.report.page.write_page", lambda *_: run / "report.html")
    wrong = []
    for damage in damages:
        for folder in (run, tmp_path / "again"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs[kind], run)
        unchanged = False
        for path in sorted(run.glob(file)):  # of checkpoints both: none is left to go back to
            if damage in PLACES:
                PLACES[damage](path)
            else:
                whole = path.read_bytes()
                path.write_bytes(CONTENTS[damage](whole))
                unchanged = path.read_bytes() == whole
        ended = fedsim(*COMMANDS[command], *(client if command == "replay" else ()))
        lines = [line for line in ended.err.splitlines() if not line.startswith("fedsim: warning: ")]
        sentence = ended.code == 2 and len(lines) == 1 and lines[0].startswith("fedsim: ") and len(lines[0]) < 1500
        if unchanged:
            continue
        went_back = command == "resume" and ended.code == 0 and "; this run goes on from round " in ended.err
        harmless = went_back or (
            ended.code == (1 if command == "replay" else 0) and may_be_taken(command, kind, file, damage)
        )
        if not sentence and not harmless:
            wrong.append((damage, ended.code, ended.err[-300:]))
    assert not wrong


def may_be_taken(command: str, kind: str, file: str, damage: str) -> bool:
    """What costs nothing: a note that a resumed run replaces, or files that are only there at times."""
    if command == "resume" and file == "failure.json":
        return True
    if damage == "missing":
        return file in NOT_NEEDED or (command == "report" and file.startswith("clients"))
    return file == "rounds.jsonl" and damage in ("empty", "half")  # a line without its end is one cut short by a crash


ODD = (None, {}, [], "x", -1, 1e308, {"x": 1}, True)


def places(tree: dict) -> list[tuple[str, ...]]:
    """Keys of a summary, and of the maps in it."""
    return [(k,) for k in tree] + [(k, inner) for k, v in tree.items() if isinstance(v, dict) for inner in v]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("number", [25, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_summary_with_an_odd_value_makes_a_page_or_a_sentence(number: int, runs, tmp_path, fedsim):
    """Each place of a foreign summary, left out or with another value."""
    shutil.copytree(runs["finished"], tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    whole = json.loads(path.read_text())
    tries = [(place, value) for place in places(whole) for value in ("left out", *ODD)]
    wrong = []
    for place, value in random.Random(20261127).sample(tries, min(number, len(tries))):
        tree = json.loads(json.dumps(whole))
        last = tree if len(place) == 1 else tree[place[0]]
        last.pop(place[-1])
        if value != "left out":
            last[place[-1]] = value
        path.write_text(json.dumps(tree))
        ended = fedsim("report", str(tmp_path / "run"))
        if ended.code not in (0, 2) or ended.err.count("\n") > 1:
            wrong.append(f"{place} {value!r}: {ended.err[-200:]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kept", [b"{}", b"{not json", b'{"index_columns": ["client"], "columns": []}'])
def test_what_pandas_has_kept_in_client_rows_does_not_matter(kept: bytes, runs, tmp_path, fedsim):
    shutil.copytree(runs["finished"], tmp_path / "run")
    path = next((tmp_path / "run" / "clients").glob("*.parquet"))
    parquet.write_table(parquet.read_table(path).replace_schema_metadata({b"pandas": kept}), path)
    assert fedsim("report", str(tmp_path / "run")).code == 0
