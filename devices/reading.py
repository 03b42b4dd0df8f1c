"""Reads files that somebody else may have written: JSON, JSON lines, YAML, NumPy archives and Parquet.

Whatever the file holds, the answer is its content or a `FileError` of one sentence: nothing is unpickled, no pipe or
device is opened, and sizes, depths and YAML aliases are bounded before they cost memory.
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.lib import format as npy

from devices.errors import FileError, one_line

MEGABYTE = 2**20
MAX_JSON, MAX_LINE, MAX_YAML = 512 * MEGABYTE, 64 * MEGABYTE, 2 * MEGABYTE  # bytes of a text
MAX_DEPTH = 200  # of maps and lists within each other
MAX_NODES = 300_000  # of a YAML tree with its aliases written out
MAX_DIGITS = 1000  # of a whole number; Python neither reads nor writes those of more than 4300
MAX_CELLS = 10**9  # of a Parquet file: a few bytes can stand for any number of equal rows
UNREADABLE = (OSError, EOFError, ValueError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def open_file(path: Path) -> Any:
    """Opens a regular file to read its bytes; never waits, as opening a pipe would.

    Raises:
        FileError: if there is none, it cannot be opened, or it is a folder, a pipe or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise FileError(f"{path} cannot be read: {_short(error)}") from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = next((name for test, name in KINDS if test(mode)), "a device")
    raise FileError(f"{path} is {kind}, and must be a file")


def read_bytes(path: Path, at_most: int = MAX_JSON) -> bytes:
    """Reads the bytes of a file.

    Raises:
        FileError: as `open_file`, or if it is larger than `at_most` bytes.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > at_most:
            raise FileError(f"{path} is too large: {size} bytes, and {at_most} are the most that is read")
        try:
            data: bytes = file.read(size)
        except OSError as error:
            raise FileError(f"{path} cannot be read: {_short(error)}") from error
        return data


def read_text(path: Path, at_most: int = MAX_JSON) -> str:
    """Reads the text of a file in UTF-8.

    Raises:
        FileError: as `read_bytes`, or if it is no text.
    """
    try:
        return read_bytes(path, at_most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} cannot be read as a text file: byte {error.start} is not UTF-8") from error


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_json(path: Path, at_most: int = MAX_JSON) -> Any:
    """Reads a JSON file.

    Raises:
        FileError: if it cannot be read, is no JSON, or nests more than MAX_DEPTH maps and lists.
    """
    return parse_json(read_text(path, at_most), str(path))


def read_json_lines(path: Path) -> list[Any]:
    """Reads each line of a file as JSON; a last line without its end, cut short by a crash, is left out.

    Raises:
        FileError: as `read_json`, naming the line.
    """
    *lines, _ = read_text(path).split("\n")
    return [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def parse_json(text: str, where: str) -> Any:
    """Parses a JSON text; `where` names it in the sentence.

    Raises:
        FileError: if it is no JSON or nests too deeply.
    """
    try:
        tree = json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise FileError(f"{where} is not readable JSON: it nests too deeply") from error
    except ValueError as error:
        raise FileError(f"{where} is not readable JSON: {_short(error)}") from error
    level = [tree]
    for _ in range(MAX_DEPTH):
        if not level:
            return tree
        inner = (e.values() if isinstance(e, dict) else e for e in level if isinstance(e, dict | list))
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    raise FileError(f"{where} is not readable JSON: it nests more than {MAX_DEPTH} maps and lists")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number in it has {len(digits)} digits, and {MAX_DIGITS} are the most that is read")
    return int(digits)


# --- YAML ------------------------------------------------------------------------------------------------------------


WHOLE = "tag:yaml.org,2002:int"


class UniqueKeys(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # in C where there is libyaml
    """Refuses a key that stands twice in one map; YAML itself would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Makes the map of a node, with its keys checked."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen = set()
        for key in keys:
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", node.start_mark)
            seen.add(key)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def read_yaml(path: Path, at_most: int = MAX_YAML, max_nodes: int = MAX_NODES) -> Any:
    """Reads a YAML file: maps, lists, texts, numbers, dates.

    Args:
        path: of the file.
        at_most: bytes.
        max_nodes: values, with aliases written out.

    Raises:
        FileError: if it cannot be read, is no YAML, gives a key twice, or is larger than it looks by its aliases.
    """
    return parse_yaml(read_text(path, at_most), str(path), max_nodes)


def parse_yaml(text: str, where: str, max_nodes: int = MAX_NODES) -> Any:
    """Parses a YAML text; `where` names it in the sentence.

    Raises:
        FileError: as `read_yaml`.
    """
    loader: UniqueKeys | None = None
    try:
        _check_depth(text, where)
        loader = UniqueKeys(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, where, max_nodes)
        return loader.construct_document(node)
    except FileError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # ValueError: an impossible date
        raise FileError(f"{where} is not valid YAML: {_short(error)}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_depth(text: str, where: str) -> None:
    """Refuses what nests too deeply, one mark after the other: libyaml's nodes are made by recursion without an end."""
    depth = 0
    for event in yaml.parse(text, UniqueKeys):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise FileError(f"{where} is not valid YAML: it nests more than {MAX_DEPTH} maps and lists")


def _measure(root: yaml.Node, where: str, max_nodes: int) -> None:
    """Refuses a tree that is too deep, holds itself or a number without end, or is too large, aliases written out."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: tuple[int, ...]) -> int:
        if id(node) in above:
            raise FileError(f"{where} is not valid YAML: a list or map in it contains itself")
        if len(above) > MAX_DEPTH:
            raise FileError(f"{where} is not valid YAML: it nests more than {MAX_DEPTH} maps and lists")
        if id(node) not in sizes:
            if node.tag == WHOLE and len(node.value) > MAX_DIGITS:
                raise FileError(f"{where} is not valid YAML: a whole number in it has more than {MAX_DIGITS} digits")
            inner: Sequence[Any] = () if isinstance(node, yaml.ScalarNode) else node.value
            flat = [one for entry in inner for one in (entry if isinstance(entry, tuple) else (entry,))]
            sizes[id(node)] = 1 + sum(size(one, (*above, id(node))) for one in flat)
            if sizes[id(node)] > max_nodes:
                raise FileError(f"{where} is too large: more than {max_nodes} values, aliases written out")
        return sizes[id(node)]

    size(root, ())


# --- arrays and tables ----------------------------------------------------------------------------------------------


def read_npz(
    path: Path, needed: Collection[str] = (), optional: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads arrays of a NumPy archive, never unpickled.

    Args:
        path: of the file.
        needed: arrays that must be in it.
        optional: arrays that are read too where they are in it; None takes all there are.

    Raises:
        FileError: if it cannot be read, lacks an array, or one holds Python objects or less than its header says.
    """
    with open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                there = {name.removesuffix(".npy"): archive.getinfo(name) for name in archive.namelist()}
                for name in needed:
                    if name not in there:
                        held = ", ".join(there) or "nothing"
                        raise FileError(f"{path} has no array {name!r} (it holds: {held})")
                wanted = list(there) if optional is None else [*needed, *(n for n in optional if n in there)]
                return {name: _array(archive, there[name], path, name) for name in wanted}
        except FileError:
            raise
        except UNREADABLE as error:
            raise FileError(f"{path} is not a readable npz file: {_short(error)}") from error
        except (
            TypeError,
            AttributeError,
            SyntaxError,
            RecursionError,
        ) as error:  # a header that is no dict of its kind
            raise FileError(f"{path} is not a readable npz file: a header is damaged") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, name: str) -> np.ndarray:
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise FileError(
                f"{path} holds an array of Python objects ({name}), which would have to be unpickled and may run any "
                "code; save plain numbers or strings"
            )
        wanted = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
        left = member.file_size - file.tell()
        if wanted != left:
            said = f"the header of {name} says {wanted} bytes, and {left} are there"
            raise FileError(f"{path} is not a readable npz file: {said}")
    with archive.open(member) as file:
        array: np.ndarray = npy.read_array(file, allow_pickle=False)
        return array


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Any:
    """Reads a Parquet file as a pyarrow Table, also where its name looks like an address.

    Args:
        path: of the file.
        columns: to read; None: all.

    Raises:
        FileError: if it cannot be read, lacks a column, or stands for more than MAX_CELLS values.
    """
    import pyarrow as pa
    from pyarrow import parquet

    with open_file(path) as file:
        try:
            held = parquet.ParquetFile(file)
            facts = held.metadata
            if facts.num_rows * facts.num_columns > MAX_CELLS:
                raise FileError(f"{path} is too large: {facts.num_rows} rows of {facts.num_columns} columns")
            names = facts.schema.to_arrow_schema().names
            for name in columns or ():
                if name not in names:
                    raise FileError(f"{path} has no column {name!r} (it has: {', '.join(names) or 'none'})")
            return held.read(None if columns is None else list(columns))  # `read_table` would import pandas
        except FileError:
            raise
        except (pa.ArrowException, *UNREADABLE, TypeError) as error:
            raise FileError(f"{path} is not a readable Parquet file: {_short(error)}") from error


def _short(error: BaseException) -> str:
    """Returns the reason in a few words: Python's errors of a file say its name and number too."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    text = one_line(error) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
