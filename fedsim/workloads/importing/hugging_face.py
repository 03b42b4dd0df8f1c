"""Data sets of Hugging Face that lie on this disk: what `save_to_disk` wrote, or Parquet files.

Both are read as tables by pyarrow: no script of a data set runs, and the library `datasets` is not needed.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from devices.errors import FileError, one_line, unknown
from devices.reading import open_file, read_json, read_parquet
from fedsim.errors import DataError
from fedsim.workloads.arrays import Kind
from fedsim.workloads.host_memory import check_fits
from fedsim.workloads.importing.found import Found, Track, check_names, ids, number_labels, untracked
from fedsim.workloads.importing.pictures import Pictures, open_image
from fedsim.workloads.importing.sounds import Sounds

TRAIN, TEST = "train", "test"
OTHER_SPLITS = ("val", "valid", "validation", "dev")
INPUTS = ("image", "img", "audio", "features", "x", "pixels")  # columns that are taken where none is named


class Tables(NamedTuple):
    """The files of both parts.

    Attributes:
        files: with whether each is of the test part.
        has_test: whether there is one.
        notes: sentences on what was left out.
    """

    files: list[tuple[Path, bool]]
    has_test: bool
    notes: list[str]


def import_hugging_face(
    path: Path,
    label: str = "label",
    column: str | None = None,
    user: str | None = None,
    pictures: Pictures | None = None,
    sounds: Sounds | None = None,
    track: Track = untracked,
) -> Found:
    """Reads images or sounds that are stored in the table, or lists of numbers of one length.

    Args:
        path: a folder of `save_to_disk` (with train/ and test/, or one table), or of Parquet files, or one such file.
        label: column of the class.
        column: of the example; None: the first of INPUTS that is there.
        user: column of who made an example.
        pictures: makes arrays of images; None: they are taken as they are.
        sounds: makes arrays of sounds; None: they are taken as they are.
        track: draws a bar.

    Raises:
        ConfigError: if an argument is wrong.
        DataError, FileError: naming the file that cannot be used.
    """
    tables = _tables(path)
    pieces: list[Any] = []
    tested: list[bool] = []
    for file, test in tables.files:
        table = _read(file)
        column = column or next((name for name in INPUTS if name in table.column_names), None)
        for option, name in (("--input", column), ("--label", label), ("--user", user)):
            if name is None and option == "--input":
                raise DataError(
                    f"{file} has columns {', '.join(table.column_names)}; name the one to learn from: --input"
                )
            if name is not None and name not in table.column_names:
                raise DataError(f"{file}: {unknown(f'column of {option}', name, table.column_names)}")
        pieces.append((file, table.select([n for n in dict.fromkeys((column, label, user)) if n is not None])))
        tested += [test] * len(table)
    if not tested:
        raise DataError(f"{path} has no rows")
    assert column is not None
    y, classes = _labels(pieces, label, str(path))
    owners = (
        None if user is None else ids([_text(v, user, f) for f, t in pieces for v in t[user].to_pylist()], str(path))
    )
    reader = _Reader(pictures or Pictures(None, None), sounds or Sounds(None, None))
    x = reader.read(pieces, column, len(tested), track)
    notes = [*tables.notes, *reader.notes()]
    in_test = np.array(tested) if tables.has_test else None
    return Found(x, y, classes, reader.kind, owners, in_test, meta=reader.meta(), notes=notes)


class _Reader:
    """Makes an array of a column, and knows afterwards what it held."""

    def __init__(self, pictures: Pictures, sounds: Sounds):
        self.pictures, self.sounds = pictures, sounds
        self.kind: Kind = "tabular"
        self.described = ""  # what the tables say of the column

    def read(self, pieces: list[Any], column: str, count: int, track: Track) -> np.ndarray:
        self.described = str(_described(pieces[0][1], column).get("_type", ""))
        x: np.ndarray = np.empty(0)
        first = ""
        rows = [(file, table, row) for file, table in pieces for row in range(len(table))]
        for at, (file, table, row) in enumerate(track(rows, "reading rows")):
            name = f"{file}, row {row + 1}, column {column!r}"
            one = self._array(table[column][row].as_py(), name, column)
            if not at:
                check_fits(f"{count} rows like the first of {file}", 2 * count * one.nbytes)
                x, first = np.empty((count, *one.shape), one.dtype), name
            if one.shape != x.shape[1:]:
                raise DataError(f"{name} has shape {list(one.shape)}, and {first} {list(x.shape[1:])}; make all alike")
            x[at] = one
        return x

    def _array(self, value: Any, name: str, column: str) -> np.ndarray:
        if isinstance(value, dict) and "bytes" in value:
            if not value["bytes"]:
                raise DataError(
                    f"{name} holds the path of a file, not its bytes; save the data set with the files in it"
                )
            file = io.BytesIO(value["bytes"])
            if self.described == "Audio" or column == "audio" or _is_sound(value["bytes"]):
                self.kind = "audio"
                return self.sounds.array(file, name)
            self.kind = "image"
            with open_image(file, name) as image:
                return self.pictures.array(image, name)
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
                one: np.ndarray = np.asarray(value, np.float32) if isinstance(value, list) else np.empty((0, 0))
        except (ValueError, TypeError):
            one = np.empty((0, 0))
        if one.ndim != 1 or not one.size or not np.isfinite(one).all():
            raise DataError(f"{name} must be an image, a sound or a list of numbers, got {type(value).__name__}")
        return one

    def notes(self) -> list[str]:
        return [*self.pictures.notes(), *self.sounds.notes()]

    def meta(self) -> dict[str, Any]:
        return {"sample_rate_hz": self.sounds.rate} if self.kind == "audio" else {}


def _is_sound(data: bytes) -> bool:
    return data[:4] in (b"RIFF", b"fLaC", b"OggS") and data[8:12] != b"WEBP"


def _tables(path: Path) -> Tables:
    """Finds the files of a data set.

    Raises:
        DataError: if there are none, or some need the library.
    """
    if path.is_file():
        return Tables([(path, False)], False, [])
    if not path.is_dir():
        raise DataError(f"there is no {path}; name a folder of datasets' save_to_disk, or one with Parquet files")
    saved = [(name, path / name) for name in (TRAIN, TEST) if (path / name / "state.json").is_file()]
    if (path / "state.json").is_file():
        saved = [(TRAIN, path)]
    if saved:
        files = [(file, name == TEST) for name, folder in saved for file in _arrow_files(folder)]
        others = [p.parent.name for p in sorted(path.glob("*/state.json")) if p.parent.name not in (TRAIN, TEST)]
    else:
        found = sorted(file for pattern in ("*.parquet", "*/*.parquet") for file in path.glob(pattern))
        parts = {file: _part(file, path) for file in found}
        files = [(file, part == TEST) for part in (TRAIN, TEST) for file in found if parts[file] == part]
        others = [file.name for file in found if parts[file] not in (TRAIN, TEST)]
    if not any(not test for _, test in files):
        raise DataError(
            f"{path} has no training part, neither a train/ of datasets' save_to_disk nor Parquet files; what is in "
            "another form has to be loaded with the library and saved with save_to_disk first"
        )
    notes = [f"left out, neither train nor test: {', '.join(others)}"] if others else []
    return Tables(files, any(test for _, test in files), notes)


def _part(file: Path, path: Path) -> str:
    """Returns the part that a Parquet file is of, by its own or its folder's name; "train" where neither says."""
    names = [file.stem.lower(), *([file.parent.name.lower()] if file.parent != path else [])]
    for name in names:
        begin = name.replace(".", "-").replace("_", "-").partition("-")[0]
        if begin in (TRAIN, TEST, *OTHER_SPLITS):
            return begin
    return TRAIN


def _arrow_files(folder: Path) -> list[Path]:
    """Returns the files of a table that `save_to_disk` wrote, in order.

    Raises:
        DataError, FileError: if its list of files cannot be read.
    """
    state = read_json(folder / "state.json")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    entries: list[Any] = listed if isinstance(listed, list) else []
    names: list[Any] = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(
            f"{folder / 'state.json'} does not list the files of a data set; save it with save_to_disk again"
        )
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(f"{folder} holds a selection of rows; save it again with flatten_indices() before save_to_disk")
    return [folder / name for name in names]


def _read(file: Path) -> Any:
    """Reads a Parquet file or an Arrow stream as a table."""
    import pyarrow as pa

    if file.suffix == ".parquet":
        return read_parquet(file)
    with open_file(file) as opened:
        try:
            data = opened.read()  # the table shares this memory
            if data[:4] == b"PAR1":
                return read_parquet(file)
            table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
            table.validate(full=True)  # a damaged file could point outside its own memory
            return table
        except FileError:
            raise
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise FileError(f"{file} is neither a Parquet file nor an Arrow stream: {one_line(error)}") from None


def _labels(pieces: list[Any], label: str, where: str) -> tuple[np.ndarray, list[str]]:
    """Returns labels and the names of classes: those that the table's own description has, else its values."""
    values = [(value, file) for file, table in pieces for value in table[label].to_pylist()]
    names = _described(pieces[0][1], label).get("names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return number_labels([_text(value, label, file) for value, file in values], where)
    check_names("class", names, where)
    for row, (value, file) in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise DataError(
                f"{file} has label {value!r} (example {row + 1}), and it describes classes 0..{len(names) - 1}"
            )
    return np.array([value for value, _ in values], np.int64), names


def _described(table: Any, column: str) -> dict[str, Any]:
    """Returns what the description that Hugging Face keeps in a table's schema says of a column; {} for nothing."""
    try:
        described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"][column]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return described if isinstance(described, dict) else {}


def _text(value: Any, column: str, file: Path) -> str:
    if not isinstance(value, str | int) or value == "":
        raise DataError(f"{file} holds {value!r} in column {column!r}, which must be texts or whole numbers")
    return str(value).lower() if isinstance(value, bool) else str(value)
