"""Config files of somebody else's tree or plug-in: whatever they hold, the answer is settings or one sentence."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

from fedsim.errors import ConfigError
from fedsim.settings import config_files, permissions
from fedsim.settings.compose import compose, one_sentence
from fedsim.settings.groups import options
from fedsim.settings.overrides import check_overrides

SGD = "_target_: clients.trainers.sgd.SGDTrainer\nlr: 0.1\nbatch_size: 4\nlocal_epochs: 1\n"
BOMB = SGD + "a: &a [" + "1, " * 30 + "]\nb: &b [" + "*a, " * 30 + "]\nc: [" + "*b, " * 100 + "]\n"
FILES: dict[str, bytes] = {
    "open flow": b"a: [",
    "tab": b"a:\n\tb: 1",
    "same key twice": f"{SGD}lr: 0.2\n".encode(),
    "key that is a list": b"? [a]\n: 1",
    "no key": b"~: 1",
    "UTF-16": SGD.encode("utf-16"),
    "binary": bytes(range(256)),
    "5,000 levels": b"a: " + b"[" * 5000 + b"]" * 5000,
    "6,000 levels of maps": b"".join(b" " * n + b"a:\n" for n in range(1000)),
    "6,000 digits": f"{SGD}seed: {'1' * 6000}\n".encode(),
    "6,000 hexadecimal digits": f"{SGD}seed: 0x{'f' * 6000}\n".encode(),
    "unknown tag": b"a: !unknown 1",
    "tag of Python": b"a: !!python/object/apply:os.system ['true']",
    "tag of Hydra's reader": b"a: !!python/object/apply:pathlib.Path ['x']",
    "bytes": f"{SGD}a: !!binary aGk=\n".encode(),
    "a set": b"a: !!set {x, y}",
    "itself": b"a: &a [*a]",
    "alias bomb": BOMB.encode(),
    "no interpolation": f"{SGD}a: ${{oc.decode:${{\n".encode(),
    "interpolation of itself": f"{SGD}a: ${{trainer.a}}\n".encode(),
    "a list": b"[a]",
    "a text": b"a",
    "empty": b"",
    "no target": b"lr: 0.1\n",
    "odd header": b"# @package a b c\n" + SGD.encode(),
    "odd defaults": b"defaults: 5\n" + SGD.encode(),
    "odd default": b"defaults: [[5]]\n" + SGD.encode(),
    "defaults of itself": b"defaults: [odd]\n" + SGD.encode(),
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config tree of somebody else's, beside an empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "tree" / "trainer").mkdir(parents=True)
    return tmp_path / "tree"


@pytest.fixture
def plug_in(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as what an installed plug-in brings."""
    monkeypatch.setattr("fedsim.settings.groups.plugin_folders", lambda: [tree])
    return tree


@pytest.mark.parametrize("kind", FILES)
def test_an_odd_group_file_of_another_tree_is_one_sentence(tree: Path, fedsim: Callable, kind: str):
    (tree / "trainer" / "odd.yaml").write_bytes(FILES[kind])
    began = time.monotonic()
    code, _, err = fedsim("run", "--config-dir", str(tree), *TINY[:5], "rounds=1", "trainer=odd", "out=A")
    assert (code, err.count("\n")) == (2, 1), err
    assert "trainer" in err or "defaults" in err
    assert err.removeprefix("fedsim:").strip()
    assert not Path("A").exists()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("kind", FILES)
def test_an_odd_group_file_of_a_plug_in_is_one_sentence(plug_in: Path, kind: str):
    (plug_in / "trainer" / "odd.yaml").write_bytes(FILES[kind])
    with pytest.raises(ValueError, match=r"trainer|defaults") as caught:
        compose(["trainer=odd"])
    assert type(caught.value).__module__ in ("fedsim.errors", "devices.errors")


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind not in ("empty", "no target", "defaults of itself")])
def test_an_odd_primary_file_is_one_sentence(tree: Path, fedsim: Callable, kind: str):
    (tree / "run.yaml").write_bytes(FILES[kind])
    code, _, err = fedsim("run", "--config-path", str(tree), "out=A")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.removeprefix("fedsim:").strip()


def test_a_good_file_of_another_tree_is_taken_as_before(tree: Path, fedsim: Callable):
    (tree / "trainer" / "mine.yaml").write_text(SGD)
    assert fedsim("run", "--config-dir", str(tree), *TINY[:5], "num_clients=6", "cohort=2", "trainer=mine").code == 0


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "link to nothing"])
def test_only_files_are_offered_as_options(plug_in: Path, fedsim: Callable, kind: str):
    path = plug_in / "trainer" / "odd.yaml"
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path),
        "link to nothing": lambda: path.symlink_to("nothing"),
    }[kind]()
    assert "odd" not in options("trainer")
    with pytest.raises(ConfigError, match=r"unknown trainer 'odd'.* \(") as caught:
        compose(["trainer=odd"])
    assert "odd" not in str(caught.value).replace("unknown trainer 'odd'", "")
    permissions.reset()
    code, _, err = fedsim("run", "--config-dir", str(plug_in), "trainer=odd")
    assert code == 2
    assert "odd" not in err.replace("unknown trainer 'odd'", "")


@pytest.mark.parametrize("error", [UnicodeError("x"), RecursionError("x"), ValueError("x"), OverflowError("x")])
def test_whatever_composing_raises_is_one_sentence(error: Exception):
    with (
        pytest.raises(ConfigError, match=r"^these settings cannot be put together: \w+: x(; do the defaults of .*)?$"),
        one_sentence(),
    ):
        raise error


def test_a_number_of_thousands_of_digits_on_the_command_line_is_one_sentence():
    with pytest.raises(ConfigError, match=r"^cannot read the setting 'seed=1"):
        check_overrides([f"seed={'1' * 6000}"])


def test_shipped_files_are_not_read_twice(monkeypatch: pytest.MonkeyPatch):
    looked: list[Path] = []
    monkeypatch.setattr(config_files, "check", looked.append)
    compose(["method=fedprox"])
    assert looked == []
