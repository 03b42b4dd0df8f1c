"""Weights of HELP: their names and shapes, and the files they are read from and written to.

Names are those of the authors' checkpoints (github.com/HayeonLee/HELP), so that theirs and ours are read by one
function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from devices.errors import DeviceError, unknown
from devices.latency.help.encodings import ENCODINGS
from devices.reading import open_file, read_npz
from devices.tensor_files import read_tensors, write_tensors

Params = dict[str, Tensor]

REFERENCES = 10  # networks whose latencies describe a device
WIDTH = 100
HEAD = ("fc3", "fc4", "fc5")  # the layers that the modulator gates
GATES = len(HEAD) * (2 * WIDTH + 1)  # a gate per input feature of each layer, and one shift of its bias

TRAINING = "training."  # arrays of a checkpoint that are no weights for use
DEVICES = "devices"  # the fact that says what a training saw
HEADER = "help"  # of the files' metadata


@dataclass(frozen=True)
class HelpWeights:
    """Meta-trained weights for one search space; names and shapes are those of the authors' checkpoints.

    Attributes:
        space: "nb201", "fbnet" or "ofa".
        model: the predictor, by layer: gc1..gc4 (graphs) or fc1, fc2 (vectors), fc_hw1, fc_hw2, fc3, fc4, fc5.
        modulator: hardware embedding to mean and spread of the gates, z_encoder.0 and z_encoder.2.
        rates: step size of the inner loop for every number of `model`; some are below zero.
        devices: whose latencies the training saw; empty where the file does not say, as the authors' do not.
    """

    space: str
    model: Params
    modulator: Params
    rates: Params
    devices: tuple[str, ...] = ()


def weight_shapes(space: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shapes of `HelpWeights` by part; linear weights are [out, in], graph weights [in, out]."""
    if space not in ENCODINGS:
        raise DeviceError(unknown("space", space, ENCODINGS))
    columns = ENCODINGS[space].shape[-1]
    sizes = [(f"gc{i}", columns if i == 1 else WIDTH, WIDTH) for i in range(1, 5)] if space == "nb201" else []
    sizes += [] if sizes else [("fc1", columns, WIDTH), ("fc2", WIDTH, WIDTH)]
    sizes += [("fc_hw1", REFERENCES, WIDTH), ("fc_hw2", WIDTH, WIDTH)]
    sizes += [("fc3", 2 * WIDTH, 2 * WIDTH), ("fc4", 2 * WIDTH, 2 * WIDTH), ("fc5", 2 * WIDTH, 1)]
    model: dict[str, tuple[int, ...]] = {}
    for name, inputs, outputs in sizes:
        model[f"{name}.weight"] = (inputs, outputs) if name.startswith("gc") else (outputs, inputs)
        model[f"{name}.bias"] = (outputs,)
    modulator = {"z_encoder.0.weight": (10, REFERENCES), "z_encoder.0.bias": (10,)}
    modulator |= {"z_encoder.2.weight": (2 * GATES, 10), "z_encoder.2.bias": (2 * GATES,)}
    return {"model": model, "modulator": modulator, "rates": dict(model)}


_PREFIX = {"model": "model.meta_learner.", "modulator": "inference_network.", "rates": "task_lr.meta_learner."}


def flatten_weights(weights: HelpWeights) -> Params:
    """Returns all tensors under the names of the authors' checkpoints, as they stand in files."""
    return {prefix + name: t for part, prefix in _PREFIX.items() for name, t in getattr(weights, part).items()}


def map_weights(weights: HelpWeights, change: Callable[[Tensor], Tensor]) -> HelpWeights:
    """Returns the same weights with every tensor changed."""
    parts = (weights.model, weights.modulator, weights.rates)
    model, modulator, rates = ({name: change(tensor) for name, tensor in part.items()} for part in parts)
    return replace(weights, model=model, modulator=modulator, rates=rates)


def load_weights(path: str | Path, space: str) -> HelpWeights:
    """Reads meta-trained weights: the authors' as npz (never unpickled), ours as safetensors.

    Args:
        path: file; what ends in .safetensors is read as such, also a checkpoint of an unfinished training (its best).
        space: the search space that the weights are for.

    Raises:
        DeviceError: for a file that cannot be read, a missing, unknown or non-finite array, or a wrong shape.
    """
    devices: list[str] = []
    try:
        if str(path).endswith(".safetensors"):
            open_file(Path(path)).close()  # no pipe, no folder
            with safe_open(str(path), framework="pt") as file:
                devices = json.loads((file.metadata() or {}).get(HEADER, "{}")).get(DEVICES, [])
                arrays = {k: file.get_tensor(k) for k in file.keys() if not k.startswith(TRAINING)}  # noqa: SIM118
        else:
            arrays = {key: torch.from_numpy(array) for key, array in read_npz(Path(path)).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise DeviceError(f"{path}: cannot be read as HELP weights (npz or safetensors): {error}") from None
    return unflatten_weights(arrays, space, str(path), tuple(devices))


def unflatten_weights(
    arrays: Mapping[str, Tensor], space: str, where: str, devices: tuple[str, ...] = ()
) -> HelpWeights:
    """Reads what `flatten_weights` made; `where` names the source in errors.

    Raises:
        DeviceError: for a missing, unknown or non-finite array, or a wrong shape.
    """
    parts: dict[str, Params] = {}
    wanted: set[str] = set()
    for part, shapes in weight_shapes(space).items():
        parts[part] = {}
        for name, shape in shapes.items():
            key = _PREFIX[part] + name
            wanted.add(key)
            if key not in arrays:
                raise DeviceError(f"{where}: has no array {key!r}; HELP weights of space {space} need it")
            if tuple(arrays[key].shape) != shape:
                raise DeviceError(f"{where}: {key} must be {shape} for space {space}, got {tuple(arrays[key].shape)}")
            if not arrays[key].is_floating_point() or not bool(arrays[key].isfinite().all()):
                raise DeviceError(f"{where}: {key} must hold finite floats")
            parts[part][name] = arrays[key].float()
    if extra := sorted(set(arrays) - wanted):
        raise DeviceError(f"{where}: {extra[0]!r} is no array of HELP weights of space {space}")
    return HelpWeights(space, **parts, devices=devices)


def save_weights(weights: HelpWeights, path: str | Path, facts: dict[str, Any] | None = None) -> None:
    """Writes weights as safetensors for `load_weights`, with `facts` (JSON types) in the header."""
    known = {"space": weights.space, DEVICES: list(weights.devices)}
    write_tensors(path, flatten_weights(weights), {**known, **(facts or {})}, HEADER)


def read_training(path: str | Path) -> tuple[Params, dict[str, Any]]:
    """Reads the tensors and facts of an unfinished training.

    Raises:
        DeviceError: for a file of something else.
    """
    return read_tensors(path, HEADER, "a file of HELP training")
