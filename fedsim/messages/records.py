"""What server and clients say to each other, and how a strategy packs it in Flower records.

`Broadcast` and `ClientUpdate` are what methods see.

Record names (per client): `arrays` weights, `config` settings, `metrics` numbers, `state` what the client keeps (never
counted as traffic), and any further ArrayRecord is an extra of the method. What `state` names with OF_REPLY before it
belongs to the exchange with the server, all else to the client alone.
"""

from __future__ import annotations

import cmath
from collections.abc import Iterable, Mapping
from functools import lru_cache
from io import BytesIO
from math import prod
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors

ARRAYS, CONFIG, METRICS, STATE = "arrays", "config", "metrics", "state"
OF_REPLY = "reply."  # state that holds only if the server takes the reply that it was made with
NUM_EXAMPLES = "num-examples"


# --- tensors and Flower arrays -----------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def to_array(values: np.ndarray) -> Array:
    """The same Flower Array that `Array(values)` makes, in a tenth of its time: npy headers are cached."""
    values = np.ascontiguousarray(values).reshape(values.shape)
    data = b"".join((_npy_header(values.dtype, values.shape), values.data if values.size else b""))
    return Array(str(values.dtype), tuple(values.shape), "numpy.ndarray", data)


def from_array(array: Array) -> np.ndarray:
    """A read-only view of a Flower Array's numbers, without the copies of `Array.numpy()`."""
    data = array.data
    # npy 1.0: six magic bytes, two of version, two of header length; other versions take the general path.
    if array.stype != "numpy.ndarray" or data[:8] != b"\x93NUMPY\x01\x00":
        return array.numpy()
    start = 10 + int.from_bytes(data[8:10], "little")
    if data[:start] != _npy_header(np.dtype(array.dtype), tuple(array.shape)):
        return array.numpy()
    return np.frombuffer(data, np.dtype(array.dtype), prod(array.shape), start).reshape(array.shape)


def array_record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """The record of these arrays; `ArrayRecord(arrays)` would build each of them a second time."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = array
    return record


def record_of(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Packs named tensors; they are copied, so the originals may change afterwards."""
    return array_record({name: to_array(t.detach().cpu().numpy()) for name, t in tensors.items()})


def tensors_of(record: ArrayRecord, device: torch.device | str = "cpu") -> Tensors:
    """Unpacks an ArrayRecord into tensors of their own."""
    return {name: torch.from_numpy(from_array(array).copy()).to(device) for name, array in record.items()}


def arrays_in(content: RecordDict) -> dict[str, ArrayRecord]:
    """The ArrayRecords of a content by name; Flower's own property checks and copies them all at every call."""
    return {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}


def payload_bytes(content: RecordDict) -> int:
    """Bytes of numbers that cross the network: itemsize x elements of every array but the client's own state.

    Flower's npy headers (128 bytes per tensor) and the few scalars of config and metrics are not counted: a deployment
    chooses its own envelope.
    """
    return sum(record_bytes(record) for name, record in arrays_in(content).items() if name != STATE)


def record_bytes(record: ArrayRecord) -> int:
    """Bytes of numbers in one ArrayRecord."""
    return sum(np.dtype(array.dtype).itemsize * prod(array.shape) for array in record.values())


def in_float64(replies: Iterable[Message]) -> list[Message]:
    """Replies whose floats are float64, for strategies that compute in the precision of what they are given.

    Flower's Krum takes |a - b|^2 as |a|^2 + |b|^2 - 2 ab: in float32 that knows distances to about 1e-6 |a|^2, and
    clients of one round are closer to each other than that.
    """
    widened = list(replies)
    for reply in widened:
        reply.content = RecordDict(
            {
                name: array_record({key: _wide(array) for key, array in record.items()})
                if isinstance(record, ArrayRecord)
                else record
                for name, record in reply.content.items()
            }
        )
    return widened


def _wide(array: Array) -> Array:
    return to_array(from_array(array).astype(np.float64)) if np.dtype(array.dtype).kind == "f" else array


def all_finite(record: ArrayRecord) -> bool:
    """Whether there is no NaN and no infinity, as `are_finite` finds it."""
    with np.errstate(over="ignore", invalid="ignore"):
        arrays = (from_array(array) for array in record.values())
        return all(cmath.isfinite(a.sum(dtype=np.promote_types(a.dtype, np.float32))) for a in arrays)


def like(record: ArrayRecord, model: ArrayRecord) -> ArrayRecord:
    """`record` with the names' order and dtypes of `model`: FedOpt strategies return float64; integers are rounded.

    Raises:
        ValueError: if names or shapes differ.
    """
    if set(record) != set(model):
        raise ValueError(f"the strategy returned weights named {sorted(record)}, the model has {sorted(model)}")
    arrays = {}
    for name, array in model.items():
        if tuple(record[name].shape) != tuple(array.shape):
            shapes = f"{tuple(record[name].shape)}, the model has {tuple(array.shape)}"
            raise ValueError(f"the strategy returned {name} as {shapes}")
        same = record[name].dtype == array.dtype
        arrays[name] = record[name] if same else to_array(cast_to(from_array(record[name]), array.dtype))
    return array_record(arrays)


def cast_to(values: np.ndarray, dtype: str | np.dtype) -> np.ndarray:
    """The values in another dtype; integers and flags are rounded, not cut off."""
    dtype = np.dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # whoever takes the result looks whether it is finite
        return (np.rint(values) if dtype.kind in "iub" else values).astype(dtype)


# --- broadcast and update, one client ----------------------------------------------------------------------------


class Instructions:
    """Reads the instructions of an exchange; records and contents that several clients share are unpacked once."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[ArrayRecord, Tensors]] = {}  # held, so that ids stay
        self._broadcasts: dict[int, tuple[RecordDict, Broadcast]] = {}

    def broadcast(self, content: RecordDict, round_number: int) -> Broadcast:
        """What a content sends, without the client's own state."""
        if id(content) not in self._broadcasts:
            self._broadcasts[id(content)] = (content, self._read(content, round_number))
        return self._broadcasts[id(content)][1]

    def _read(self, content: RecordDict, round_number: int) -> Broadcast:
        tensors = {name: self._of(record) for name, record in arrays_in(content).items() if name != STATE}
        configs = [record for record in content.values() if isinstance(record, ConfigRecord)]
        settings = {key: value for record in configs for key, value in record.items()}
        return Broadcast(round_number, tensors.pop(ARRAYS, {}), tensors, settings)  # type: ignore[arg-type]

    def _of(self, record: ArrayRecord) -> Tensors:
        if id(record) not in self._tensors:
            self._tensors[id(record)] = (record, tensors_of(record))
        return self._tensors[id(record)][1]


def content_of(
    broadcast: Broadcast, weights: ArrayRecord, extras: Mapping[str, ArrayRecord] | None = None
) -> RecordDict:
    """Packs an instruction; `weights` and `extras` are packed forms that the caller has made once for several clients.

    Args:
        broadcast: to one client.
        weights: its weights.
        extras: its extras; None: they are packed here.
    """
    settings = {**broadcast.settings, "server-round": broadcast.round}
    content: dict[str, Any] = {ARRAYS: weights, CONFIG: ConfigRecord(settings)}  # type: ignore[arg-type]
    check_extra_names(broadcast.extras)
    if extras is None:
        extras = {name: record_of(tensors) for name, tensors in broadcast.extras.items()}
    return RecordDict(content | dict(extras))


def check_extra_names(names: Iterable[str]) -> None:
    """Refuses names of extra records that mean something else.

    Raises:
        ValueError: names the first.
    """
    for name in names:
        if name in (ARRAYS, CONFIG, METRICS, STATE):
            raise ValueError(f"an extra record may not be called {name!r}; that name is taken")


def update_of(content: RecordDict, client_id: int) -> ClientUpdate:
    """Reads what a client answered."""
    metrics = {key: value for record in content.metric_records.values() for key, value in record.items()}
    num_examples = int(metrics.pop(NUM_EXAMPLES, 0))  # type: ignore[arg-type]
    extras = {name: tensors_of(r) for name, r in arrays_in(content).items() if name not in (ARRAYS, STATE)}
    weights = tensors_of(content.array_records[ARRAYS])
    return ClientUpdate(client_id, num_examples, weights, metrics, extras)  # type: ignore[arg-type]
