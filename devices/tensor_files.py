"""Tensors with facts beside them, as safetensors: written whole or not at all, and never unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from devices.errors import DeviceError
from devices.reading import open_file
from devices.writing import write_atomic


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], header: str) -> None:
    """Writes tensors and facts whole or not at all: a reader never sees half a file.

    Args:
        path: file; its folder is made.
        tensors: by name.
        facts: JSON types.
        header: name of the only entry of the file's metadata; several would be written in any order.

    Raises:
        OSError: naming the file, if the disk does not take it.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomic(Path(path), save(kept, metadata={header: json.dumps(facts, sort_keys=True)}))


def read_tensors(path: str | Path, header: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and facts that `write_tensors` wrote.

    Args:
        path: file.
        header: as it was written with.
        what: what the error calls such files, e.g. "a file of HELP training".

    Raises:
        DeviceError: for a file that `write_tensors` did not write.
    """
    try:
        open_file(Path(path)).close()  # no pipe, no folder
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {})[header])
            if not isinstance(facts, dict):
                raise ValueError("what stands beside its tensors is no map")
            return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise DeviceError(f"{path}: cannot be read as {what}: {error}") from None
