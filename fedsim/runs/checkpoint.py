"""The state of a run between two rounds, on disk, so that a run that was cut short goes on to the same bytes.

One folder per checkpoint, `checkpoint/round-000010/`, there whole or not at all: weights.safetensors (the global model,
as any library reads it), tensors.safetensors (what clients and strategy keep), state.json (everything else),
checksums.json (of these and of all else that a run goes on from). The last two are kept. Nothing in them can run code.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from devices.errors import FileError, one_line
from devices.reading import open_file, read_json
from devices.writing import PART, sync_folder, write_new
from fedsim.errors import ConfigError
from fedsim.grid.memory import memory_of
from fedsim.grid.server_half import ServerContext
from fedsim.messages.records import array_record, from_array, to_array
from fedsim.report import checksums
from fedsim.report.checksums import Checksums, check_inside, sha256_of
from fedsim.runs.price_models import FROM_THE_START, History

FOLDER, WEIGHTS, TENSORS, STATE = "checkpoint", "weights.safetensors", "tensors.safetensors", "state.json"
SUMS = checksums.FILE
FIRST_FORMAT, FORMAT = 1, 2  # the first had no checksums
FORMATS = (FIRST_FORMAT, FORMAT)
ASIDE = ".old"  # how the name of one ends that is just being replaced
NAME = re.compile(r"round-(\d{6,})(\.old)?")
SHARE = 0.02  # of the host time may go into checkpoints
FACTORIES: dict[str, Callable[[], Any]] = {kind.__name__: kind for kind in (int, float, str, bool, list, dict, set)}
Arrays = dict[str, np.ndarray]


class NotKeptError(Exception):
    """Something in a run's state cannot be written down; the message names it."""


@dataclass(frozen=True)
class Saved:
    """The contents of a checkpoint.

    Attributes:
        round: the last one that is in it.
        weights: the global model, in its order.
        state: a tree of dicts, lists, numbers, texts, tensors and records.
        versions: of the libraries that made it.
        priced: which price model priced its rounds.
        sums: of all that it goes on from, when it was read; None: it is of fedsim 0.1, which wrote none.
        point: its folder, when it was read.
        damaged: when it was read, why newer ones were left out.
    """

    round: int
    weights: ArrayRecord
    state: dict[str, Any]
    versions: dict[str, str]
    priced: History = FROM_THE_START
    sums: Checksums | None = None
    point: Path | None = None
    damaged: tuple[str, ...] = ()


class Checkpoints:
    """Decides when a run writes a checkpoint, and keeps the newest two.

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
        """Returns whether it is time for a checkpoint."""
        return self.every_s is not None and time.monotonic() >= self._next

    def write(self, saved: Saved, run_sums: Callable[[], Checksums]) -> None:
        """Writes a checkpoint to the disk, then removes all but it and the one before; nothing without `every_s`.

        Args:
            saved: what it holds.
            run_sums: brings the rest of the run folder to the disk, and says what that holds.

        Raises:
            NotKeptError: if the state holds something else than numbers, texts and tensors.
            OSError: if the disk does not take it; what was there before is there still.
        """
        if self.every_s is None:
            return
        from safetensors.numpy import save

        began = time.monotonic()
        arrays: Arrays = {}
        state = encode(saved.state, arrays, "state")
        facts = {"format": FORMAT, "round": saved.round, "weights": list(saved.weights), "versions": saved.versions}
        text = json.dumps({**facts, "priced": saved.priced, "state": state}) + "\n"
        files = {
            WEIGHTS: save({name: _contiguous(from_array(a)) for name, a in saved.weights.items()}),
            TENSORS: save({name: _contiguous(a) for name, a in arrays.items()}),
            STATE: text.encode(),
        }
        sums = replace(run_sums(), own={name: sha256_of(data) for name, data in files.items()})
        self._place(f"round-{saved.round:06d}", {**files, SUMS: sums.to_text().encode()})
        self.keep(2)
        now = time.monotonic()
        self._next = now + max(self.every_s, (now - began) / SHARE if self.every_s else 0.0)

    def _place(self, name: str, files: dict[str, bytes]) -> None:
        """Makes a checkpoint of files: at every instant, it or the one it replaces is there whole."""
        target, part = self.folder / name, self.folder / f".{name}.{os.getpid()}{PART}"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for file, data in files.items():
                write_new(part / file, data)
            sync_folder(part)
            if target.name.endswith(ASIDE):
                shutil.rmtree(target, ignore_errors=True)
            elif target.exists():  # the last round, with all that its run needed to go on
                aside = self.folder / f"{name}{ASIDE}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(target, aside)
            os.rename(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        sync_folder(self.folder)
        sync_folder(self.folder.parent)

    def put_beside(self, saved: Saved, sums: Checksums) -> None:
        """Writes a checkpoint again, for a run folder with other checksums, beside the one that belongs to this folder.

        Args:
            saved: the checkpoint, as it was read.
            sums: of the run folder as it will be.
        """
        assert saved.point is not None
        files = {name: (saved.point / name).read_bytes() for name in (WEIGHTS, TENSORS, STATE)}
        self._place(f"round-{saved.round:06d}{ASIDE}", {**files, SUMS: sums.to_text().encode()})

    def take_beside(self, number: int) -> None:
        """Removes all checkpoints but the one of this round that was put beside."""
        beside = self.folder / f"round-{number:06d}{ASIDE}"
        for _, point in points(self.folder):
            if point != beside:
                shutil.rmtree(point, ignore_errors=True)
        os.rename(beside, self.folder / f"round-{number:06d}")
        sync_folder(self.folder)

    def forget_after(self, saved: Saved) -> None:
        """Removes those that are newer than the one that a run goes on from: they are damaged."""
        for _, point in points(self.folder):
            if point == saved.point:
                break
            shutil.rmtree(point, ignore_errors=True)

    def keep(self, count: int) -> None:
        """Removes all but those of the newest rounds."""
        newest: dict[int, Path] = {}
        for number, point in points(self.folder):
            newest.setdefault(number, point)
        kept = list(newest.values())[:count]
        for _, point in points(self.folder):
            if point not in kept:
                shutil.rmtree(point, ignore_errors=True)


def points(folder: Path) -> list[tuple[int, Path]]:
    """Lists the checkpoints below a folder with their rounds, the newest first."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.glob("round-*") if path.is_dir()]
    named = [(int(match[1]), not match[2], path) for match, path in found if match]
    return [(number, path) for number, _, path in sorted(named, reverse=True)]


def load(run: Path, going_on: bool = False) -> Saved | None:
    """Reads the newest whole checkpoint of a run folder; None where there is none at all.

    Args:
        run: its folder.
        going_on: leave out the end of a run, from which no round follows.

    Raises:
        ConfigError: if there are some, and none is whole, or what is there is none.
    """
    folder = run / FOLDER
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is no folder of checkpoints; remove it, and the run starts anew")
    damaged: list[str] = []
    for number, point in points(folder):
        try:
            saved = replace(_read(run, point, number), damaged=tuple(damaged))
            if not going_on or "federation" in saved.state:
                return saved
        except FileError as error:
            damaged.append(str(error))
    if not damaged:
        return None
    whole = "no checkpoint is whole" if len(damaged) > 1 else "there is no other checkpoint"
    reasons = "; ".join(dict.fromkeys(damaged))  # what all of them build on is named once
    raise ConfigError(f"{reasons}; {whole}: remove {folder}, and the run starts anew")


def _read(run: Path, point: Path, number: int) -> Saved:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    sums = Checksums.read(check_inside(run, point / SUMS)) if os.path.lexists(point / SUMS) else None
    if sums is not None:
        sums.check(run, point)
    facts = read_json(check_inside(run, point / STATE))
    try:
        if facts["format"] not in FORMATS:
            raise ValueError(f"it has format {facts['format']}, this version reads {FORMAT}")
        if (facts["format"] == FIRST_FORMAT) != (sums is None) or facts["round"] != number:
            raise ValueError(f"{SUMS if sums is None else STATE} does not belong to it")
        for file in (WEIGHTS, TENSORS):
            open_file(check_inside(run, point / file)).close()
        weights, tensors = load_file(point / WEIGHTS), load_file(point / TENSORS)
        record = array_record({name: to_array(weights[name]) for name in facts["weights"]})
        priced = [(int(since), model) for since, model in facts.get("priced", [(0, None)])]
        return Saved(number, record, decode(facts["state"], tensors), dict(facts["versions"]), priced, sums, point)
    except FileError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        reason = one_line(error) or type(error).__name__
        raise FileError(f"{point} cannot be read: {type(error).__name__}: {reason}") from error


# --- strategies ----------------------------------------------------------------------------------------------------


def strategy_state(strategy: Strategy) -> dict[str, Any]:
    """Returns what a strategy keeps between rounds: its attributes, see `memory_of`.

    Flower's strategies have no other state than that; a strategy inside another one is taken with it. What it was told
    of the run it is told again.
    """
    kept = {key: value for key, value in memory_of(strategy).items() if not isinstance(value, ServerContext)}
    return {key: strategy_state(v) if isinstance(v, Strategy) else v for key, v in kept.items()}


def restore_strategy(strategy: Strategy, state: dict[str, Any]) -> None:
    """Gives a new strategy what an equal one had kept."""
    for key, value in state.items():
        inner = vars(strategy).get(key)
        if isinstance(inner, Strategy):
            restore_strategy(inner, value)
        else:
            setattr(strategy, key, value)


# --- trees as JSON and arrays --------------------------------------------------------------------------------------


def encode(value: Any, arrays: Arrays, where: str) -> Any:
    """Returns the tree as what JSON can hold; its arrays go into `arrays`, under the numbers by which it names them.

    Raises:
        NotKeptError: naming the place and type of something else.
    """
    if type(value) is float and not math.isfinite(value):
        return {"float": str(value)}
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
    if type(value) is dict:
        return {"dict": [[encode(k, arrays, where), encode(v, arrays, f"{where}.{k}")] for k, v in value.items()]}
    if type(value) is defaultdict:
        for name, factory in FACTORIES.items():
            if value.default_factory is factory:
                return {"defaultdict": [name, encode(dict(value), arrays, where)]}
    if type(value) is deque:
        return {"deque": [value.maxlen, encode(list(value), arrays, where)]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    raise NotKeptError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}")


def decode(coded: Any, arrays: Arrays) -> Any:
    """Returns the tree that `encode` was given.

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
    if kind == "float":
        return float(inner)
    if kind == "defaultdict":
        name, entries = inner
        return defaultdict(FACTORIES[name], decode(entries, arrays))
    if kind == "deque":
        most, entries = inner
        return deque(decode(entries, arrays), most)
    if kind == "bytes":
        return base64.b64decode(inner)
    made: dict[str, Callable[[Any], Any]] = {kind: holds for kind, holds, _ in _KINDS}
    return made[kind](decode(inner, arrays))


def _in_order(values: Collection[Any]) -> list[Any]:
    """Returns the entries of a set in one order, whatever they are."""
    try:
        return sorted(values)
    except TypeError:
        return sorted(values, key=repr)


_KINDS: tuple[tuple[str, Callable[[Any], Any], Callable[[Any], Any]], ...] = (
    ("tuple", tuple, list),
    ("set", set, _in_order),
    ("frozenset", frozenset, _in_order),
    ("counter", Counter, dict),
    ("ordered", OrderedDict, dict),
    ("config", ConfigRecord, dict),
    ("metrics", MetricRecord, dict),
)


def _contiguous(array: np.ndarray) -> np.ndarray:
    """Returns the array as safetensors wants it; numpy alone would make a vector of a single number."""
    return np.ascontiguousarray(array).reshape(array.shape)


def _put(array: np.ndarray, arrays: Arrays) -> str:
    arrays[str(len(arrays))] = array
    return str(len(arrays) - 1)
