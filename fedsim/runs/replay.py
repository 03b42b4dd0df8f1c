"""Runs one client of one round again, alone and in this process, so that a debugger can look at it.

When a client stops a run, what it was sent is kept beside the reports; any other client is reached by running the
rounds before it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, Message

from fedsim.engines.base import Engine
from fedsim.errors import ConfigError
from fedsim.messages.cohort import ClientTask, CohortTask
from fedsim.messages.records import NUM_EXAMPLES, STATE, Instructions, tensors_of
from fedsim.messages.updates import Instruction
from fedsim.report.instructions import read_instruction
from fedsim.runs.federation import Federation
from fedsim.runs.recorded import data_of_run, settings_of_run
from fedsim.settings.build import World, build_world
from fedsim.settings.compose import on_engine
from fedsim.settings.groups import Settings
from fedsim.workloads.fingerprint import check_same


class _ReachedError(Exception):
    """Clients are about to be sent out, and nothing more is to be known."""


class _Until(Federation):
    """A federation that goes on until a client is sent out in a round, or nobody can be any more.

    Args:
        world: data, fleet and latency model.
        engine: where clients run.
        round: the one in which the client is looked for.
        client: its id.

    Attributes:
        asked: what the clients of that round were sent.
    """

    def __init__(self, world: World, engine: Engine, round: int, client: int):
        super().__init__(world, engine)
        self.round, self.client = round, client
        self.asked: dict[int, Instruction] = {}

    def instructions(self, number: int, clients: Sequence[int] | None = None, repeat: int = 0) -> list[Message]:
        """Returns what the strategy sends; ends the run with `_ReachedError`."""
        messages = super().instructions(number, clients, repeat)
        if number == self.round:
            for message in messages:
                self.asked.setdefault(message.metadata.dst_node_id, self.grid.instruction(message))
            if self.client in self.asked or not self.loop.is_buffered:
                raise _ReachedError
        return messages


@dataclass(frozen=True)
class Replayed:
    """The result of a replayed client: its outcome, and its metrics or the traceback."""

    outcome: str
    reason: str
    traceback: str
    metrics: dict[str, float]


def settings_of(folder: Path) -> Settings:
    """Returns the settings of an earlier run, with every client in this process.

    Raises:
        ConfigError: if the folder holds no run or its settings are wrong.
    """
    return on_engine(settings_of_run(folder), ["engine=local"])


def instruction_of(
    settings: Settings, engine: Engine, folder: Path, round: int, client: int, watch: Callable[[int], object]
) -> Instruction:
    """Returns what a client was sent in a round: as the run folder has it, or made again by the rounds before.

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
    kept, world = read_instruction(folder), build_world(json.dumps(settings))
    check_same((kept.data if kept is not None else None) or data_of_run(folder), settings, world.workload, folder)
    if kept is not None and (kept.round, kept.client) == (round, client):
        return kept
    if not 1 <= round <= world.settings.rounds:
        raise ConfigError(f"--round must be in 1..{world.settings.rounds}, got {round}")
    federation = _Until(world, engine, round, client)
    with suppress(_ReachedError):
        for report, _ in federation.rounds():
            if report.round == round:
                break
            watch(report.round)
        else:
            raise ConfigError(f"the run ended in round {report.round}, before round {round}")
    if client not in federation.asked:
        raise ConfigError(f"client {client} was not asked in round {round}; asked were {sorted(federation.asked)}")
    return federation.asked[client]


def replay(settings: Settings, engine: Engine, instruction: Instruction) -> Replayed:
    """Runs one client alone in this process."""
    state = instruction.content.get(STATE)
    task = ClientTask(
        instruction.client,
        Instructions().broadcast(instruction.content, instruction.round),
        tensors_of(state) if isinstance(state, ArrayRecord) else {},
        repeat=instruction.repeat,
    )
    cohort = CohortTask(instruction.round, instruction.phase, (task,), json.dumps(settings))
    ((answer,),) = (answers.clients for answers in engine.run(cohort))
    metrics = {NUM_EXAMPLES: answer.num_examples, **answer.metrics} if answer.outcome == "completed" else {}
    return Replayed(answer.outcome, answer.reason, answer.traceback, metrics)
