"""A run notes the user's files that it is made of, and is not taken up with changed ones unless that was said."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY

import fedsim as door
from fedsim.runs.own_code import ChangedCodeError, own_code
from fedsim.settings.compose import compose

SHORT = (*TINY[:-1], "rounds=1")
FILES = {
    "net.py": "import math\nimport json\nfrom beside import WIDTH\nfrom torch import nn\n\n\n"
    "class Net(nn.Sequential):\n"
    "    def __init__(self, input_shape, num_classes):\n"
    "        layers = nn.Linear(math.prod(input_shape), WIDTH), nn.Linear(WIDTH, num_classes)\n"
    "        super().__init__(nn.Flatten(), *layers)\n",
    "beside.py": "WIDTH = 5\n",
    "nets/__init__.py": "",
    "nets/server.py": "from strategies.edge import EdgeStrategy\nfrom .deep import part\n\n\n"
    "class Server(EdgeStrategy):\n"
    "    def combine(self, number, updates):\n        import lazy_a\n        return super().combine(number, updates)\n",
    "nets/deep/__init__.py": "from ..up import x\n",
    "nets/deep/part.py": "",
    "nets/up.py": "x = 1\n",
    "nets/unused.py": "",
    "lazy_a.py": "import queue\n",
    "queue.py": "raise RuntimeError\n",
    "main_a.py": "",
}
OWN = ("model=net.py:Net", "strategy._target_=nets.server.Server")
USED = set(FILES) - {"nets/unused.py", "queue.py", "main_a.py"}


@pytest.fixture(autouse=True)
def files(here: Path) -> Iterator[Path]:
    for name, text in FILES.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    yield here
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nets", "beside", "lazy_a")]:
        del sys.modules[name]


def noted(folder: str = "A") -> dict[str, str]:
    files: dict[str, str] = json.loads((Path(folder) / "code.json").read_text())["files"]
    return files


def test_a_run_notes_the_files_that_it_is_made_of_and_no_others(fedsim: Callable):
    assert fedsim("run", *SHORT, *OWN, "out=A").code == 0
    assert noted() == {name: hashlib.sha256(FILES[name].encode()).hexdigest() for name in USED}
    assert fedsim("run", *SHORT, "out=B").code == 0
    assert not Path("B/code.json").exists()


def test_nothing_is_imported_to_say_what_a_run_is_made_of(files: Path):
    before = set(sys.modules)
    tree = compose([*TINY, "model=net.py:Net"])
    tree["strategy"] = {"_target_": "nets.server.Server"}
    assert set(own_code(tree)) == USED
    assert "nets" not in set(sys.modules) - before


@pytest.mark.parametrize("name", sorted(USED))
def test_a_run_is_not_taken_up_with_changed_code_unless_that_is_said(fedsim: Callable, name: str):
    assert fedsim("run", *SHORT, *OWN, "out=A").code == 0
    before = {path: path.read_bytes() for path in Path("A").rglob("*") if path.is_file()}
    Path(name).write_text(FILES[name] + "# changed\n")
    commands = ["resume A rounds=2", "replay A --round 1 --client 0"]
    for command in commands if name == "net.py" else commands[:1]:
        code, out, err = fedsim(*command.split())
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"other code than that here: {name} changed" in err
        assert "--changed-code" in err
    assert {path: path.read_bytes() for path in Path("A").rglob("*") if path.is_file()} == before
    if name == "net.py":
        assert fedsim("resume", "A").code == 0  # nothing is left to do, and nothing run
        assert fedsim("resume", "A", "rounds=2", "--changed-code").code == 0
        assert noted()[name] == hashlib.sha256(Path(name).read_bytes()).hexdigest()


@pytest.mark.parametrize("answer", ["y\n", "n\n"])
def test_a_terminal_is_asked(fedsim: Callable, monkeypatch: pytest.MonkeyPatch, answer: str):
    asked = []
    assert fedsim("run", *SHORT, *OWN, "out=A").code == 0
    Path("beside.py").write_text("WIDTH = 5  # as before\n")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: asked.append(text) or answer.strip())
    code = fedsim("resume", "A", "rounds=2").code
    assert code == (0 if answer == "y\n" else 130)
    assert json.loads(Path("A/summary.json").read_text())["rounds"] == (2 if answer == "y\n" else 1)


def test_an_interrupted_run_asks_too_and_python_says_it_by_name(fedsim: Callable):
    run = door.run(*SHORT, *OWN, "checkpoint_s=0", "rounds=2", out="A", progress=False)
    (run.folder / "summary.json").unlink()
    Path("nets/up.py").unlink()
    Path("nets/deep/__init__.py").write_text("")
    with pytest.raises(ChangedCodeError, match=r"nets/deep/__init__\.py, nets/up\.py changed"):
        door.resume("A", progress=False)
    assert door.resume("A", progress=False, changed_code=True).summary["rounds"] == 2
    assert set(noted()) == USED - {"nets/up.py"}


def test_a_note_that_was_changed_or_names_files_elsewhere_has_none_read(fedsim: Callable, files: Path):
    assert fedsim("run", *SHORT, *OWN, "out=A").code == 0
    note = Path("A/code.json")
    note.write_text(note.read_text().replace("beside.py", "/etc/passwd"))
    code, _, err = fedsim("resume", "A", "rounds=2")
    assert (code, err.count("\n")) == (2, 1)
    note.unlink()
    note.symlink_to("/etc/passwd")
    code, _, err = fedsim("resume", "A", "rounds=2")
    assert (code, err.count("\n")) == (2, 1)
    note.unlink()  # a run of an earlier version says nothing
    assert fedsim("resume", "A", "rounds=2").code == 0
