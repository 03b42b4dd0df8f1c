"""Whatever a file holds, a reader gives its content or one sentence, at once, and runs nothing from it."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from devices.availability import Trace
from devices.errors import DeviceError, FileError, UserError
from devices.latency.help.weights import load_weights, read_training
from devices.latency.spaces import load_space
from devices.profile import load_profile
from devices.reading import read_json, read_json_lines, read_npz, read_parquet, read_yaml
from fedsim.errors import ConfigError, DataError
from fedsim.meta.complexity import Complexity
from fedsim.meta.metad2a import MetaD2A
from fedsim.meta.tans import Tans
from fedsim.meta.trained_cells import TrainedCells
from fedsim.meta.zoo import Zoo
from fedsim.study.spec import read_study
from fedsim.workloads.bundle import read_bundle

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npz_saying(header: str, data: bytes = b"\0" * 8) -> bytes:
    """An archive whose array x has this header."""
    text = header.encode() + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data)
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def parquet() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pa.table({"round": [1, 2], "device": ["a", "b"]}), buffer)
    return buffer.getvalue()


CONTENTS = {
    "empty": b"",
    "garbage": bytes(range(256)) * 20,
    "text": b"nothing of the kind",
    "a number": b"7",
    "not UTF-8": b"\xff\xfe{}",
    "deep JSON": b"[" * 100_000,
    "deep, and closed": b"[" * 900 + b"]" * 900,
    "5,000 digits": b"[" + b"9" * 5000 + b"]",
    "5,000 digits below a name": b"name: " + b"9" * 5000,
    "6,000 hexadecimal digits": b"name: 0x" + b"f" * 6000,
    "a key of 5,000 digits": b"9" * 5000 + b": 1",
    "alias bomb": BOMB.encode(),
    "itself": b"&a [*a]",
    "a key twice": b"a: 1\na: 2\n",
    "an object": b"!!python/object/apply:os.getcwd []",
    "an impossible date": b"a: 2001-99-99",
    "no archive": array(),
    "truncated archive": npz(x=np.zeros(1000))[:300],
    "an archive of 7 PiB": npz_saying("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,)}"),
    "a negative shape": npz_saying("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}"),
    "a header that is none": npz_saying("__import__('os').getcwd()"),
    "objects": npz(x=np.array([{}], dtype=object)),
    "other arrays": npz(z=np.zeros(3)),
    "texts for numbers": npz(x=np.array(["a"]), devices=np.array(["a"]), latency_ms=np.array([["a"]])),
    "truncated Parquet": parquet()[:-20],
    "damaged Parquet": parquet()[:60] + bytes(40) + parquet()[100:],
}


def place_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


PLACES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nowhere": place_link,
}

# What reads files that a user names, and a file that it would read; each refuses what is not its own.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "JSON": ("x.json", read_json),
    "lines": ("x.jsonl", read_json_lines),
    "YAML": ("x.yaml", read_yaml),
    "npz": ("x.npz", lambda path: read_npz(path, ("x",))),
    "Parquet": ("x.parquet", read_parquet),
    "latency table": ("x.npz", lambda path: load_space("nb201", path)),
    "weights": ("x.npz", lambda path: load_weights(path, "nb201")),
    "our weights": ("x.safetensors", lambda path: load_weights(path, "nb201")),
    "training": ("x.safetensors", read_training),
    "MetaD2A": ("x.safetensors", MetaD2A.load),
    "complexity": ("x.safetensors", Complexity.load),
    "tasks": ("tasks.json", lambda path: TrainedCells.open(path.parent)),
    "TANS": ("x.safetensors", Tans.load),
    "zoo": ("zoo.json", lambda path: Zoo.open(path.parent)),
    "device": ("x.yaml", load_profile),
    "trace": ("x.json", lambda path: Trace(num_clients=2, seed=0, path=str(path))),
    "study": ("x.yaml", lambda path: read_study(str(path))),
    "bundle's train": ("bundle/train.npz", lambda path: read_bundle(path.parent)),
    "bundle's meta": ("bundle/meta.json", lambda path: read_bundle(path.parent)),
}
PLAIN = ("JSON", "lines", "YAML", "npz", "Parquet")  # of which each reads what is well formed, whatever it says


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_answers_any_content_with_one_sentence(reader: str, content: str, tmp_path: Path):
    name, read = READERS[reader]
    write(tmp_path / name, CONTENTS[content])
    try:
        read(tmp_path / name)
        sentence = ""
    except UserError as error:
        sentence = str(error)
    assert "set_int_max_str_digits" not in sentence  # Python's own advice
    assert (Path(name).name in sentence and len(sentence) < 600) if sentence else reader in PLAIN


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_what_is_no_file(reader: str, place: str, tmp_path: Path):
    name, read = READERS[reader]
    write(tmp_path / name, b"")
    (tmp_path / name).unlink()
    PLACES[place](tmp_path / name)
    with pytest.raises((DeviceError, DataError, ConfigError), match=Path(name).name.replace(".", r"\.")):
        read(tmp_path / name)


def write(path: Path, content: bytes) -> None:
    """The file, and the rest of a bundle where it is part of one."""
    path.parent.mkdir(exist_ok=True)
    if path.parent.name == "bundle":
        for part in ("train", "test"):
            (path.parent / f"{part}.npz").write_bytes(npz(x=np.zeros((4, 2), np.float32), y=np.arange(4) % 2))
        (path.parent / "meta.json").write_text(json.dumps({"classes": ["a", "b"], "kind": "tabular"}))
    path.write_bytes(content)


def test_a_map_that_is_named_twice_is_read_as_two(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("a: &one {b: 1}\nc: *one\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_last_line_without_an_end_is_left_out(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n[2]\n{"b')
    assert read_json_lines(tmp_path / "a.jsonl") == [{"a": 1}, [2]]


def test_a_wrong_line_is_named_by_its_number(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("1\n2\nx\n4\n")
    with pytest.raises(FileError, match=r"a\.jsonl, line 3 is not readable JSON"):
        read_json_lines(tmp_path / "a.jsonl")


def test_a_parquet_file_in_a_folder_with_a_colon_is_no_address(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("exp:1").mkdir()
    Path("exp:1/a.parquet").write_bytes(parquet())
    assert read_parquet(Path("exp:1/a.parquet"), ["round"]).to_pydict() == {"round": [1, 2]}


def test_a_parquet_file_that_stands_for_too_many_values_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("devices.reading.MAX_CELLS", 3)
    (tmp_path / "a.parquet").write_bytes(parquet())
    with pytest.raises(FileError, match=r"a\.parquet is too large: 2 rows of 2 columns"):
        read_parquet(tmp_path / "a.parquet")
