"""Experience replay with a reservoir: every example seen so far is in the memory with the same probability.

Source: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019; Vitter, "Random Sampling with a
Reservoir", 1985. State: reservoir_seen [], part []; see ReplayTrainer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clients.trainers.base import ClientContext
from clients.trainers.rehearsal.memory import Memory
from clients.trainers.rehearsal.replay import StreamReplayTrainer
from fedsim.messages.records import Broadcast
from fedsim.workloads.base import Tensors

SEEN = "reservoir_seen"


class ReservoirTrainer(StreamReplayTrainer):
    """After n examples, a new one enters with probability J / n at a random place; tasks need not be told apart.

    Args:
        replay: arguments of StreamReplayTrainer.
    """

    def begin(self, client: ClientContext, task: Broadcast, memory: Memory) -> None:
        self.left = self.new_here(client)
        self.seen, self.draw = int(client.state.get(SEEN, torch.tensor(0))), client.stream("reservoir")

    def learned(self, client: ClientContext, memory: Memory, names: Tensor, batch: Tensors) -> None:
        """Vitter's algorithm R, one draw per example; later passes over the same examples bring nothing new."""
        self.left -= len(names)
        if self.left < 0:
            return
        draws = torch.rand(len(names), generator=self.draw, dtype=torch.float64)
        for i, name in enumerate(names):
            self.seen += 1
            place = int(draws[i] * self.seen) if len(memory) >= memory.capacity else len(memory)
            if place < memory.capacity:
                phase = int(client.state["phase"])
                memory.replace(place, name, phase, {key: t[i] for key, t in batch.items()})
        client.state[SEEN] = torch.tensor(self.seen)

    def collect(self, client: ClientContext, memory: Memory, names: Tensor) -> None:
        """There are no candidates: the memory follows the stream."""

    def turn(self, client: ClientContext) -> None:
        client.state["phase"] = torch.tensor(client.workload.phase(client.round))
