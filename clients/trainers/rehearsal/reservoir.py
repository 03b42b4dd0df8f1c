"""Experience replay with a reservoir: every example seen so far is in the memory with the same probability.

Source: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019; Vitter, "Random Sampling with a
Reservoir", 1985. State: reservoir_seen [], part []; see ReplayTrainer.
"""

from __future__ import annotations

import torch

from clients.trainers.rehearsal.memory import PHASE
from clients.trainers.rehearsal.replay import StreamBatch, StreamReplayRun, StreamReplayTrainer

SEEN = "reservoir_seen"


class ReservoirRun(StreamReplayRun):
    """Vitter's algorithm R, one draw per example.

    Attributes:
        seen: how many examples have come so far.
    """

    def before_training(self) -> None:
        super().before_training()
        self.seen, self.draw = int(self.client.state.get(SEEN, torch.tensor(0))), self.client.stream("reservoir")

    def remember(self, batch: StreamBatch) -> None:
        memory, phase = self.memory, int(self.client.state[PHASE])
        draws = torch.rand(len(batch.names), generator=self.draw, dtype=torch.float64)
        for i, name in enumerate(batch.names):
            self.seen += 1
            place = int(draws[i] * self.seen) if len(memory) >= memory.capacity else len(memory)
            if place < memory.capacity:
                memory.replace(place, name, phase, {key: t[i] for key, t in batch.own.items()})
        self.client.state[SEEN] = torch.tensor(self.seen)


class ReservoirTrainer(StreamReplayTrainer):
    """After n examples, a new one enters with probability J / n at a random place; tasks need not be told apart.

    Args:
        replay: arguments of StreamReplayTrainer.
    """

    run = ReservoirRun
