"""An edge grid over clients that answer as told, so that seconds, joules and bytes are known by hand.

On the reference device (1e10 FLOPs/s; 1e7 bytes/s down, 5e6 up, 0.02 s before each; 10 W computing, 2 W on the radio,
1 W idle) a client that gets and sends `WEIGHTS` (1e6 bytes) takes 0.12 s down and 0.22 s up; client c computes
(c + 1) * 3e9 FLOPs in 0.3 * (c + 1) s. So the replies of clients 0..3 arrive after 0.64, 0.94, 1.24 and 1.54 s, and
client 0 spends 0.24 + 3.0 + 0.44 = 3.68 J.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict

from devices.availability import Always, Availability
from devices.cost import FlopsLatency, ModelCost, Passes, Work
from devices.fleet import Fleet
from fedsim.engines.base import Engine, assume_task_identity
from fedsim.grid.edge import EdgeGrid
from fedsim.grid.exchange import ClientReport
from fedsim.messages.cohort import PLAN, ClientAnswer, ClientTask, CohortAnswer, CohortTask
from fedsim.messages.records import to_array
from fedsim.messages.weights import named

WEIGHTS = ArrayRecord({"w": to_array(np.zeros(250_000, np.float32))})
NETWORK = ModelCost("net", 1e6, 2e6, 0, 0)

Answer = Callable[[ClientTask], ClientAnswer]


def computing(client: int) -> Work:
    return Work((Passes(NETWORK, 10 * (client + 1), 100, 100),), peak_memory_bytes=1000 + client)


def update(task: ClientTask) -> ClientAnswer:
    """Sends the weights back with client + 1 examples, and counts its rounds in its state."""
    return ClientAnswer(
        task.client,
        work=replace(computing(task.client), up_bytes=1_000_000),
        num_examples=task.client + 1,
        metrics={"train_loss": float(task.client)},
        weights=named(task.broadcast.weights),
        state={"rounds": task.state.get("rounds", torch.tensor(0)) + 1},
    )


def one_fails(task: ClientTask) -> ClientAnswer:
    if task.client == 2:
        return ClientAnswer(2, "failed", "as told", "TRACE", computing(2))
    return update(task)


class Told(Engine):
    """Clients that answer as told, without a worker."""

    def __init__(self, answer: Answer):
        assume_task_identity()
        self.answer, self.phases, self.can_tell = answer, [], False

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        if task.phase == PLAN and not self.can_tell:
            yield CohortAnswer(tuple(ClientAnswer(one.client, "failed") for one in task.clients))
            return
        self.phases.append(task.phase)
        for one in task.clients:
            told = self.answer(one)
            yield CohortAnswer((replace(told, work=replace(told.work, down_bytes=one.down_bytes)),))


def edge(
    clients: int = 4,
    answer: Answer = update,
    availability: Callable[..., Availability] = Always,
    device: str = "reference",
    **options,
) -> EdgeGrid:
    """An edge grid over `clients` equal devices whose clients answer as told."""
    fleet = Fleet("toy", {device: 1}, clients, 1, availability, speed_sigma=0, network_sigma=0)
    grid = EdgeGrid(Told(answer), fleet, FlopsLatency(), "{}", seed=1, **options)
    grid.round = 1
    return grid


def exchange(grid: EdgeGrid, clients=range(4), phase: str = "train") -> tuple[list[int], dict[int, ClientReport]]:
    """Sends the weights to `clients`: who was accepted, and the report of each."""
    messages = [Message(RecordDict({"arrays": WEIGHTS}), client, phase) for client in clients]
    replies = grid.send_and_receive(messages)
    return [reply.metadata.src_node_id for reply in replies], {r.client: r for r in grid.take_reports()}


def rounds_kept(grid: EdgeGrid) -> dict[int, int]:
    """How many rounds each client remembers."""
    states = {client: grid.store.get(client) for client in grid.get_node_ids()}
    return {client: int(state["rounds"]) for client, state in states.items() if state}


class Windows(Availability):
    """Client c is online during the c-th of `spells`, always when there is none."""

    def __init__(self, num_clients: int, seed: int, spells: dict[int, tuple[float, float]]):
        super().__init__(num_clients, seed)
        self.spells = spells

    def _end_s(self, client_id: int, now_s: float) -> float | None:
        opens_s, closes_s = self.spells.get(client_id, (0.0, math.inf))
        return closes_s if opens_s <= now_s < closes_s else None


def windows(spells: dict[int, tuple[float, float]]):
    return lambda num_clients, seed: Windows(num_clients, seed, spells)
