"""The state of a run between two rounds, on disk, so that a run that was cut short goes on to the same bytes.

One folder per checkpoint, `checkpoint/round-000010/`, there whole or not at all: weights.safetensors (the global
model, as any library reads it), tensors.safetensors (what clients and strategy keep), state.json (everything else).
Nothing in it can run code. May import: flwr, torch, numpy, safetensors, fedsim.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedsim.errors import ConfigError
from fedsim.messages import array_record, from_array, to_array

FOLDER, WEIGHTS, TENSORS, STATE = "checkpoint", "weights.safetensors", "tensors.safetensors", "state.json"
FORMAT = 1
SHARE = 0.02  # of the host time may go into checkpoints
Arrays = dict[str, np.ndarray]


class NotKeptError(Exception):
    """Something in a run's state cannot be written down; the message names it."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        round: the last one that is in it.
        weights: the global model, in its order.
        state: a tree of dicts, lists, numbers, texts, tensors and records.
        versions: of the libraries that made it.
    """

    round: int
    weights: ArrayRecord
    state: dict[str, Any]
    versions: dict[str, str]


class Checkpoints:
    """Decides when a run writes a checkpoint, and keeps the newest.

    Args:
        run: the run folder.
        every_s: host seconds between two checkpoints at least, and more where writing one takes long; 0 writes one
            after each round, None none at all.
    """

    def __init__(self, run: Path, every_s: float | None):
        self.folder, self.every_s = run / FOLDER, every_s
        self._next = time.monotonic() + (every_s or 0.0)

    @property
    def due(self) -> bool:
        """Whether it is time for one."""
        return self.every_s is not None and time.monotonic() >= self._next

    def write(self, saved: Saved) -> None:
        """Writes a checkpoint, then removes the one before; nothing where `every_s` is None.

        Raises:
            NotKeptError: if the state holds something else than numbers, texts and tensors.
        """
        if self.every_s is None:
            return
        from safetensors.numpy import save_file

        began = time.monotonic()
        arrays: Arrays = {}
        state = encode(saved.state, arrays, "state")
        facts = {"format": FORMAT, "round": saved.round, "weights": list(saved.weights), "versions": saved.versions}
        target = self.folder / f"round-{saved.round:06d}"
        part = self.folder / f".{target.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file({name: _contiguous(from_array(a)) for name, a in saved.weights.items()}, part / WEIGHTS)
        save_file({name: _contiguous(a) for name, a in arrays.items()}, part / TENSORS)
        (part / STATE).write_text(json.dumps({**facts, "state": state}) + "\n")
        if target.exists():  # the last round of a run that was resumed behind it
            shutil.rmtree(target)
        os.rename(part, target)
        for old in self.folder.iterdir():
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
        now = time.monotonic()
        self._next = now + max(self.every_s, (now - began) / SHARE if self.every_s else 0.0)


def load(run: Path) -> Saved | None:
    """The newest checkpoint of a run folder; None where there is none.

    Raises:
        ConfigError: if it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    whole = sorted(path for path in (run / FOLDER).glob("round-*") if path.is_dir())
    if not whole:
        return None
    try:
        facts = json.loads((whole[-1] / STATE).read_text())
        if facts["format"] != FORMAT:
            raise ValueError(f"it has format {facts['format']}, this version reads {FORMAT}")
        weights, tensors = load_file(whole[-1] / WEIGHTS), load_file(whole[-1] / TENSORS)
        record = array_record({name: to_array(weights[name]) for name in facts["weights"]})
        return Saved(int(facts["round"]), record, decode(facts["state"], tensors), dict(facts["versions"]))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{whole[-1]} cannot be read: {type(error).__name__}: {reason}; remove it, and the run starts anew"
        ) from error


# --- strategies ----------------------------------------------------------------------------------------------------


def strategy_state(strategy: Strategy) -> dict[str, Any]:
    """What a strategy keeps between rounds: its attributes, but for functions and those that it names as `derived`.

    Flower's strategies have no other state than that; a strategy inside another one is taken with it.
    """
    derived: frozenset[str] = getattr(type(strategy), "derived", frozenset())
    kept = {key: value for key, value in vars(strategy).items() if key not in derived and not callable(value)}
    return {key: strategy_state(v) if isinstance(v, Strategy) else v for key, v in kept.items()}


def restore_strategy(strategy: Strategy, state: dict[str, Any]) -> None:
    """Gives a new strategy what an equal one had kept."""
    for key, value in state.items():
        inner = getattr(strategy, key, None)
        if isinstance(inner, Strategy):
            restore_strategy(inner, value)
        else:
            setattr(strategy, key, value)


# --- trees as JSON and arrays --------------------------------------------------------------------------------------


def encode(value: Any, arrays: Arrays, where: str) -> Any:
    """The tree as what JSON can hold; its arrays go into `arrays`, under the numbers by which the tree names them.

    Raises:
        NotKeptError: naming the place and type of something else.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [encode(v, arrays, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, torch.Tensor) and type(value) is torch.Tensor and value.dtype != torch.bfloat16:
        return {"tensor": _put(value.detach().cpu().numpy(), arrays)}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        kind = "ndarray" if isinstance(value, np.ndarray) else "number"
        return {kind: _put(np.asarray(value), arrays)}
    if isinstance(value, ArrayRecord):
        return {"arrays": [[name, _put(from_array(a), arrays)] for name, a in value.items()]}
    for kind, holds, entries in _KINDS:
        if type(value) is holds:
            return {kind: encode(entries(value), arrays, where)}
    if isinstance(value, dict):
        return {"dict": [[encode(k, arrays, where), encode(v, arrays, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    raise NotKeptError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}")


def decode(coded: Any, arrays: Arrays) -> Any:
    """The inverse of `encode`; mappings become dicts.

    Raises:
        KeyError, TypeError, ValueError: for what `encode` has not made.
    """
    if isinstance(coded, list):
        return [decode(v, arrays) for v in coded]
    if not isinstance(coded, dict):
        return coded
    ((kind, inner),) = coded.items()
    if kind == "tensor":
        return torch.from_numpy(arrays[inner].copy())
    if kind in ("ndarray", "number"):
        return arrays[inner].copy() if kind == "ndarray" else arrays[inner][()]
    if kind == "arrays":
        return array_record({name: to_array(arrays[number]) for name, number in inner})
    if kind == "dict":
        return {decode(k, arrays): decode(v, arrays) for k, v in inner}
    if kind == "bytes":
        return base64.b64decode(inner)
    made: dict[str, Callable[[Any], Any]] = {kind: holds for kind, holds, _ in _KINDS}
    return made[kind](decode(inner, arrays))


_KINDS: tuple[tuple[str, Callable[[Any], Any], Callable[[Any], Any]], ...] = (
    ("tuple", tuple, list),
    ("set", set, sorted),
    ("frozenset", frozenset, sorted),
    ("counter", Counter, dict),
    ("config", ConfigRecord, dict),
    ("metrics", MetricRecord, dict),
)


def _contiguous(array: np.ndarray) -> np.ndarray:
    """The array as safetensors wants it; numpy alone would make a vector of a single number."""
    return np.ascontiguousarray(array).reshape(array.shape)


def _put(array: np.ndarray, arrays: Arrays) -> str:
    arrays[str(len(arrays))] = array
    return str(len(arrays) - 1)
