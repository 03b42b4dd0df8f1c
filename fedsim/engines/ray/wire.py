"""How the contents of messages cross process borders without copies: large arrays travel beside the pickle.

Flower's records would be pickled with all their bytes inside. Here an array's bytes become a `PickleBuffer`, which Ray
lays into shared memory as it is and hands out as a view; the rest of a record is small.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pickle import PickleBuffer
from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict

OUT_OF_BAND_BYTES = 2**14  # below it a copy costs less than keeping track of a buffer

Packed = Any  # a record ready for pickling: a list of arrays, or a small record as it is
Letter = list[tuple[str, int | Packed]]  # a content, by name; a number stands for a record that travels by itself


def pack(record: Any) -> Packed:
    """A record ready for pickling with protocol 5; its bytes are not copied."""
    if not isinstance(record, ArrayRecord):
        return record
    return [(name, a.dtype, tuple(a.shape), a.stype, _sendable(a.data)) for name, a in record.items()]


def unpack(packed: Packed) -> Any:
    """The inverse of `pack`; arrays that travelled out of band are views of the memory they arrived in."""
    if not isinstance(packed, list):
        return packed
    record = ArrayRecord()
    for name, dtype, shape, stype, data in packed:
        array = Array(dtype, shape, stype, b"")
        array.data = data if isinstance(data, bytes) else memoryview(data).toreadonly()  # type: ignore[assignment]
        record[name] = array
    return record


def _sendable(data: bytes | memoryview) -> bytes | PickleBuffer:
    return PickleBuffer(data) if len(data) >= OUT_OF_BAND_BYTES else bytes(data)


def letter_of(content: RecordDict, elsewhere: Mapping[int, int] | None = None) -> Letter:
    """Packs a content.

    Args:
        content: may share records with other contents.
        elsewhere: by `id` of a record, its number among those that travel by themselves.
    """
    elsewhere = elsewhere or {}
    return [(name, elsewhere[id(r)] if id(r) in elsewhere else pack(r)) for name, r in content.items()]


def content_of(letter: Letter, shared: Sequence[Any] = ()) -> RecordDict:
    """Unpacks a content; `shared` are the records that its numbers stand for, the same objects every time."""
    return RecordDict({name: shared[r] if isinstance(r, int) else unpack(r) for name, r in letter})


def records_in_common(contents: Iterable[RecordDict]) -> list[Any]:
    """The records that several contents hold (the same object), in the order in which they first appear."""
    counts: Counter[int] = Counter()
    first: dict[int, Any] = {}
    for content in contents:
        for key, record in {id(record): record for record in content.values()}.items():
            counts[key] += 1
            first.setdefault(key, record)
    return [record for key, record in first.items() if counts[key] > 1]


class Loan:
    """Remembers which arrays of a content are views of memory that belongs to somebody else."""

    def __init__(self, content: RecordDict):
        self._arrays = [
            weakref.ref(array)
            for record in content.values()
            if isinstance(record, ArrayRecord)
            for array in record.values()
            if not isinstance(array.data, bytes)
        ]

    def end(self) -> None:
        """Gives the arrays that are still in use bytes of their own: Flower's own code takes nothing else."""
        for ref in self._arrays:
            array = ref()
            if array is not None:
                array.data = bytes(array.data)
