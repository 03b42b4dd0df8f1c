"""What a client that stopped a run was sent, kept beside the run's reports for `fedsim replay`.

May import: flwr, torch, safetensors (lazily), fedsim.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict

from fedsim.durable import write_atomic
from fedsim.errors import ConfigError
from fedsim.messages import Instruction, arrays_in, from_array, record_of

FAILED_CLIENT, ITS_ARRAYS = "failed-client.json", "failed-client.safetensors"


def keep_instruction(folder: Path, sent: Instruction) -> None:
    """Writes what one client was sent: its settings as JSON, its arrays as safetensors."""
    from safetensors.torch import save_file

    arrays = {
        f"{name}/{key}": torch.from_numpy(from_array(array).copy())
        for name, record in arrays_in(sent.content).items()
        for key, array in record.items()
    }
    configs = {name: dict(r) for name, r in sent.content.items() if isinstance(r, ConfigRecord)}
    facts = {"round": sent.round, "client": sent.client, "phase": sent.phase, "configs": configs}
    save_file(arrays, folder / ITS_ARRAYS)
    write_atomic(folder / FAILED_CLIENT, json.dumps(facts, default=str) + "\n")


def kept_instruction(folder: Path) -> Instruction | None:
    """What the client was sent that stopped the run, if one did.

    Raises:
        ConfigError: if its files cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / FAILED_CLIENT).exists():
        return None
    try:
        facts = json.loads((folder / FAILED_CLIENT).read_text())
        arrays = load_file(folder / ITS_ARRAYS)
        content: dict[str, Any] = {name: ConfigRecord(values) for name, values in facts["configs"].items()}
        for name in dict.fromkeys(key.partition("/")[0] for key in arrays):
            content[name] = record_of({k.partition("/")[2]: t for k, t in arrays.items() if k.startswith(f"{name}/")})
        return Instruction(facts["round"], facts["client"], facts["phase"], RecordDict(content))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{FAILED_CLIENT} and .safetensors in {folder} cannot be read: {reason}") from error
