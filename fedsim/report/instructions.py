"""Writes and reads the instruction of a client that stopped a run, for `fedsim replay`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict

from devices.errors import FileError, one_line
from devices.reading import read_bytes
from devices.writing import write_atomic
from fedsim.errors import ConfigError
from fedsim.messages.records import arrays_in, from_array, record_of
from fedsim.messages.updates import Instruction
from fedsim.report.checksums import check_inside, read_signed_json, sha256_of, signed_json
from fedsim.report.place import FAILED_CLIENT, FAILED_CLIENT_ARRAYS
from fedsim.settings.forms import MAP, TEXT, WHOLE, Forms, check_tree, maps_of, optional

FACTS: Forms = {
    **{"round": WHOLE, "client": WHOLE, "phase": TEXT, "configs": maps_of(MAP)},
    **{"repeat": optional(WHOLE), "sha256": optional(TEXT)},
}
MAX_ARRAYS = 2**36  # bytes


def write_instruction(folder: Path, sent: Instruction) -> None:
    """Writes what one client was sent: its settings as JSON, its arrays as safetensors.

    Raises:
        OSError: if the disk does not take it.
    """
    from safetensors.torch import save

    arrays = save(
        {
            f"{name}/{key}": torch.from_numpy(from_array(array).copy())
            for name, record in arrays_in(sent.content).items()
            for key, array in record.items()
        }
    )
    configs = {name: dict(r) for name, r in sent.content.items() if isinstance(r, ConfigRecord)}
    facts = {"round": sent.round, "client": sent.client, "phase": sent.phase, "configs": configs}
    facts |= {"data": dict(sent.data), "repeat": sent.repeat}
    write_atomic(folder / FAILED_CLIENT_ARRAYS, arrays)
    write_atomic(folder / FAILED_CLIENT, signed_json({**facts, "sha256": sha256_of(arrays)}))


def read_instruction(folder: Path) -> Instruction | None:
    """Reads what the client was sent that stopped the run; None if no client did.

    Raises:
        ConfigError: if its files cannot be read, or are not what the run wrote.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not os.path.lexists(folder / FAILED_CLIENT):
        return None
    try:
        facts = read_signed_json(check_inside(folder, folder / FAILED_CLIENT))
        check_tree(facts, FACTS, FAILED_CLIENT)
        data = read_bytes(check_inside(folder, folder / FAILED_CLIENT_ARRAYS), MAX_ARRAYS)
        if facts.get("sha256", sha256_of(data)) != sha256_of(data):
            raise FileError(f"{FAILED_CLIENT_ARRAYS} is not what the run wrote")
        arrays = load(data)
        content: dict[str, Any] = {name: ConfigRecord(values) for name, values in facts["configs"].items()}
        for name in dict.fromkeys(key.partition("/")[0] for key in arrays):
            content[name] = record_of({k.partition("/")[2]: t for k, t in arrays.items() if k.startswith(f"{name}/")})
        sent_with = dict(facts.get("data", {}))  # not in version 0.1
        where = (facts["round"], facts["client"], facts["phase"])
        return Instruction(*where, RecordDict(content), sent_with, facts.get("repeat", 0))
    except (OSError, LookupError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        reason = one_line(error)
        raise ConfigError(f"{FAILED_CLIENT} and .safetensors in {folder} cannot be read: {reason}") from error
