"""What server and clients say to each other, and how it travels in Flower records.

`Broadcast` and `ClientUpdate` are what methods see. A *cohort message* carries many clients at once: records that
several clients share travel once, each client's own beside them.

Record names on the wire (per client): `arrays` weights, `config` settings, `metrics` numbers, `state` what
the client keeps (never counted as traffic), and any further ArrayRecord is an extra of the method. What `state` names
with OF_REPLY before it belongs to the exchange with the server, all else to the client alone.
"""

from __future__ import annotations

import json
from cmath import isfinite
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from math import prod
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedsim.workloads.base import Tensors

Scalar = int | float | bool | str
ARRAYS, CONFIG, METRICS, STATE = "arrays", "config", "metrics", "state"
COHORT, SETTINGS = "cohort", "settings"
OF_REPLY = "reply."  # state that holds only if the server takes the reply that it was made with
PACKED = "packed"  # the one key of an ArrayRecord whose tensors were joined
PACKED_LAST = "packed-channels-last"  # the same, with every tensor of four dimensions as [n, h, w, c]
NUM_EXAMPLES = "num-examples"


def _extra(owner: Broadcast | ClientUpdate, who: str, name: str) -> Tensors:
    if name not in owner.extras:
        raise KeyError(
            f"{who} brought no {name!r} (only {sorted(owner.extras)}); use a pair of strategy and trainer that sends it"
        )
    return owner.extras[name]


@dataclass(frozen=True)
class Broadcast:
    """What one client gets: the weights, and whatever a method sends beside them."""

    round: int
    weights: Tensors
    extras: dict[str, Tensors] = field(default_factory=dict)
    settings: dict[str, Scalar] = field(default_factory=dict)

    def extra(self, name: str) -> Tensors:
        """The extra record `name`; KeyError names what did come when it is missing."""
        return _extra(self, f"round {self.round}", name)


@dataclass(frozen=True)
class ClientUpdate:
    """What one client answers. `weights` may be the live model's: they are packed before the next client."""

    client_id: int
    num_examples: int
    weights: Tensors
    metrics: dict[str, float] = field(default_factory=dict)
    extras: dict[str, Tensors] = field(default_factory=dict)

    def extra(self, name: str) -> Tensors:
        """The extra record `name`; KeyError names what did come when it is missing."""
        return _extra(self, f"client {self.client_id}", name)


@dataclass(frozen=True)
class Instruction:
    """What one client was sent.

    Attributes:
        phase: "train", "evaluate" or "query.<question>".
        content: its records, with what the client kept from earlier rounds under `state`.
        data: fingerprint of the run's data, where it is kept for later.
    """

    round: int
    client: int
    phase: str
    content: RecordDict
    data: Mapping[str, str] = field(default_factory=dict)


_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


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


def record_like(tensors: Mapping[str, torch.Tensor], model: ArrayRecord, channels_last: bool = False) -> ArrayRecord:
    """Packs tensors that have the names, shapes and one dtype of `model` as a single array; others one by one.

    One array instead of one per tensor takes a tenth of the time to pack, to unpack and to add up.
    """
    if not _same_layout(tensors, model):
        return record_of(tensors)
    every = (t.permute(0, 2, 3, 1) if channels_last and t.dim() == 4 else t for t in tensors.values())
    return packed_record(torch.cat([t.detach().reshape(-1) for t in every]), channels_last)


def packed_record(flat: torch.Tensor, channels_last: bool = False) -> ArrayRecord:
    """The record of weights that `lay_out` has joined, in the order of the model."""
    return array_record({PACKED_LAST if channels_last else PACKED: to_array(flat.cpu().numpy())})


def lay_out(tensors: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """Moves tensors one behind the other into one buffer, in place, so that they can be copied as one.

    Each keeps its memory format: contiguous or, with four dimensions, channels last.

    Returns:
        The buffer, [sum of sizes]; None, and nothing moved, when they differ in dtype or lie in memory otherwise.
    """
    every = list(tensors)
    alike = all(t.is_contiguous() for t in every) or all(
        _is_last(t) if t.dim() == 4 else t.is_contiguous() for t in every
    )
    if len({(t.dtype, t.device) for t in every}) != 1 or not alike:
        return None
    buffer, start = every[0].new_empty(sum(t.numel() for t in every)).detach(), 0
    for t in every:
        part = buffer.as_strided(t.shape, t.stride(), start)
        part.copy_(t.detach())
        t.data = part
        start += t.numel()
    return buffer


def is_channels_last(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether tensors that `lay_out` takes lie channels last: what `packed_record` must know of them."""
    return any(not t.is_contiguous() for t in tensors)


def _is_last(t: torch.Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def unpacked(record: ArrayRecord, model: ArrayRecord) -> ArrayRecord:
    """One array per tensor again, as Flower's strategies want them; `model` gives names and shapes."""
    key = next((key for key in (PACKED, PACKED_LAST) if key in record), None)
    if key is None:
        return record
    flat = from_array(record[key])
    arrays, start = {}, 0
    for name, array in model.items():
        end, shape = start + prod(array.shape), tuple(array.shape)
        if key == PACKED_LAST and len(shape) == 4:
            n, c, h, w = shape
            arrays[name] = to_array(flat[start:end].reshape(n, h, w, c).transpose(0, 3, 1, 2))
        else:
            arrays[name] = to_array(flat[start:end].reshape(shape))
        start = end
    return array_record(arrays)


def _same_layout(tensors: Mapping[str, torch.Tensor], model: ArrayRecord) -> bool:
    dtype = next((array.dtype for array in model.values()), "")
    return len(tensors) == len(model) and all(
        name == other and t.shape == array.shape and array.dtype == dtype and t.dtype is _DTYPES.get(dtype)
        for (name, t), (other, array) in zip(tensors.items(), model.items(), strict=True)
    )


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
    """Whether there is no NaN and no infinity: one sum over everything finds them without a test per element."""
    arrays = [from_array(array) for array in record.values()]
    with np.errstate(over="ignore", invalid="ignore"):
        # float16 overflows at 65504
        total = sum(complex(a.sum(dtype=np.promote_types(a.dtype, np.float32))) for a in arrays)
    return isfinite(total)


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


def broadcast_of(content: RecordDict, weights: Tensors, round: int) -> Broadcast:
    """Reads one client's instruction; `weights` are its `arrays`, unpacked by the caller (a cohort shares them)."""
    extras = {name: tensors_of(r) for name, r in arrays_in(content).items() if name not in (ARRAYS, STATE)}
    configs = [record for record in content.values() if isinstance(record, ConfigRecord)]
    settings = {key: value for record in configs for key, value in record.items()}
    return Broadcast(round, weights, extras, settings)  # type: ignore[arg-type]


def content_of(broadcast: Broadcast, weights: ArrayRecord) -> RecordDict:
    """Packs an instruction; `weights` is the packed form of `broadcast.weights`, made once per round by the caller."""
    settings = {**broadcast.settings, "server-round": broadcast.round}
    content: dict[str, Any] = {ARRAYS: weights, CONFIG: ConfigRecord(settings)}  # type: ignore[arg-type]
    return RecordDict(content | _extra_records(broadcast.extras))


def content_of_update(update: ClientUpdate, weights: ArrayRecord) -> RecordDict:
    """Packs what a client answers; `weights` is the packed form of `update.weights`."""
    metrics = {NUM_EXAMPLES: int(update.num_examples), **{k: float(v) for k, v in update.metrics.items()}}
    content: dict[str, Any] = {ARRAYS: weights, METRICS: MetricRecord(metrics)}  # type: ignore[arg-type]
    return RecordDict(content | _extra_records(update.extras))


def _extra_records(extras: Mapping[str, Tensors]) -> dict[str, ArrayRecord]:
    for name in extras:
        if name in (ARRAYS, CONFIG, METRICS, STATE):
            raise ValueError(f"an extra record may not be called {name!r}; that name is taken")
    return {name: record_of(tensors) for name, tensors in extras.items()}


def update_of(content: RecordDict, client_id: int) -> ClientUpdate:
    """Reads what a client answered."""
    metrics = {key: value for record in content.metric_records.values() for key, value in record.items()}
    num_examples = int(metrics.pop(NUM_EXAMPLES, 0))  # type: ignore[arg-type]
    extras = {name: tensors_of(r) for name, r in arrays_in(content).items() if name not in (ARRAYS, STATE)}
    weights = tensors_of(content.array_records[ARRAYS])
    return ClientUpdate(client_id, num_examples, weights, metrics, extras)  # type: ignore[arg-type]


# --- many clients in one message ---------------------------------------------------------------------------------


def pack_cohort(
    header: Mapping[str, Any], parts: Iterable[RecordDict], settings: ConfigRecord | None = None
) -> RecordDict:
    """One content for many clients: a record that several parts share (the same object) travels once.

    Args:
        header: JSON-able facts about the whole message.
        parts: one RecordDict per client, in order.
        settings: the run's settings, for the worker to build its world from.
    """
    names: dict[int, str] = {}
    content: dict[str, Any] = {} if settings is None else {SETTINGS: settings}
    layout = []
    for part in parts:
        refs = {}
        for name, record in part.items():
            key = names.setdefault(id(record), f"r{len(names)}")
            content[key] = record
            refs[name] = key
        layout.append(refs)
    content[COHORT] = ConfigRecord({"header": json.dumps(header), "layout": json.dumps(layout)})
    return RecordDict(content)


def unpack_cohort(content: RecordDict) -> tuple[dict[str, Any], list[RecordDict]]:
    """The inverse of `pack_cohort`; shared records are shared objects again."""
    header = cohort_header(content)
    layout = json.loads(content[COHORT]["layout"])  # type: ignore[arg-type]
    return header, [RecordDict({name: content[key] for name, key in refs.items()}) for refs in layout]


def cohort_header(content: RecordDict) -> dict[str, Any]:
    """The facts of a cohort message, without touching its records.

    Raises:
        ValueError: if it is not a cohort message.
    """
    if COHORT not in content:
        raise ValueError(f"not a cohort message: no {COHORT!r} record among {sorted(content)}")
    header: dict[str, Any] = json.loads(content[COHORT]["header"])  # type: ignore[arg-type]
    return header


def split_cohort(content: RecordDict) -> list[RecordDict]:
    """One cohort message per client, for finding out which of them its worker cannot survive.

    `header["each"]` names the entries that hold one value per client; a part of a block cannot be summed up by its
    worker, so each answers with its own update.
    """
    header, parts = unpack_cohort(content)
    settings = content.config_records.get(SETTINGS)
    alone = []
    for number, part in enumerate(parts):
        own = {key: [header[key][number]] for key in header.get("each", ["clients"])}
        alone.append(pack_cohort({**header, **own, "separate": True}, [part], settings))
    return alone
