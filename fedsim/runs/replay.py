"""One client of one round again, by itself and in this process, so that a debugger can look at it.

When a client stops a run, what it was sent is kept beside the reports; any other client is reached by running the
rounds before it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedsim.errors import ConfigError
from fedsim.messages.records import STATE, Instruction, pack_cohort, unpack_cohort
from fedsim.report.instructions import kept_instruction
from fedsim.runs.federation import Federation
from fedsim.runs.recorded import settings_of_run
from fedsim.runs.recorded_data import recorded
from fedsim.settings.build import build_world
from fedsim.settings.compose import on_engine
from fedsim.settings.groups import Settings
from fedsim.workloads.fingerprint import check_same


@dataclass(frozen=True)
class Replayed:
    """What became of the client this time: its outcome, and its metrics or the traceback."""

    outcome: str
    reason: str
    traceback: str
    metrics: dict[str, float]


def settings_of(folder: Path) -> Settings:
    """The settings of an earlier run, with every client in this process.

    Raises:
        ConfigError: if the folder holds no run or its settings are wrong.
    """
    return on_engine(settings_of_run(folder), ["engine=local"])


def instruction_of(
    settings: Settings, engine: Any, folder: Path, round: int, client: int, watch: Callable[[int], object]
) -> Instruction:
    """What the client was sent in that round: kept in the run folder, or made again by the rounds before.

    Args:
        settings: of `settings_of`.
        engine: for the rounds before.
        folder: of the run.
        round: from 1.
        client: its id.
        watch: called with the number of each round that was run again.

    Raises:
        ConfigError: if the run has no such round, or the client was not asked in it.
        DataError: if the data are others than those of the run.
    """
    kept, world = kept_instruction(folder), build_world(json.dumps(settings))
    check_same((kept.data if kept is not None else None) or recorded(folder), settings, world.workload, folder)
    if kept is not None and (kept.round, kept.client) == (round, client):
        return kept
    if not 1 <= round <= settings["rounds"]:
        raise ConfigError(f"--round must be in 1..{settings['rounds']}, got {round}")
    federation = Federation(world, engine)
    for report, _ in federation.rounds():
        watch(report.round)
        if report.round == round - 1:
            break
    else:
        raise ConfigError(f"the run ended in round {report.round}, before round {round}")
    asked = {message.metadata.dst_node_id: message for message in federation.instructions(round)}
    if client not in asked:
        raise ConfigError(f"client {client} was not asked in round {round}; asked were {sorted(asked)}")
    message = asked[client]
    content, state = message.content, federation.grid.store.get(client)
    whole = content if state is None else RecordDict({**content, STATE: state})
    return Instruction(round, client, message.metadata.message_type, whole)


def replay(settings: Settings, engine: Any, instruction: Instruction) -> Replayed:
    """Runs just that client in this process."""
    header = {"round": instruction.round, "phase": instruction.phase, "clients": [instruction.client]}
    content = pack_cohort(header, [instruction.content], ConfigRecord({"json": json.dumps(settings)}))
    kind = instruction.phase.partition(".")[0]
    (node,) = engine.get_node_ids()
    (reply,) = engine.send_and_receive([Message(content, node, kind)])
    answered, parts = unpack_cohort(reply.content)
    (facts,) = answered["clients"]
    numbers = [record for record in parts[0].values() if not isinstance(record, ArrayRecord)]
    metrics = {key: value for record in numbers for key, value in record.items() if isinstance(value, int | float)}
    return Replayed(facts["outcome"], facts["reason"], facts["traceback"], metrics)
