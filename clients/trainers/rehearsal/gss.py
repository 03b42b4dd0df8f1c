"""Gradient-based sample selection (GSS-greedy): a memory of examples whose gradients point in different directions.

Source: Aljundi et al., "Gradient based sample selection for online continual learning", NeurIPS 2019, algorithm 2.
Gradients are those of the last layer. State: gss_scores [memory] float32; see ReplayTrainer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.trainers.base import ClientContext
from clients.trainers.rehearsal.gradients import matrix_product, require_head
from clients.trainers.rehearsal.memory import Memory
from clients.trainers.rehearsal.replay import StreamReplayTrainer
from clients.trainers.rehearsal.selection import Pool
from devices.cost import NetworkCost
from fedsim.messages.records import Broadcast
from fedsim.workloads.base import Tensors, Workload

SCORES, COMPARED = "gss_scores", 10


def replaced(score: float, held: Tensor, draw: torch.Generator) -> int | None:
    """Which of a full memory a new example replaces, if any.

    Args:
        score: of the new one, its largest cosine with some of the memory plus 1, in [0, 2].
        held: scores of the memory, [m].
        draw: random numbers.

    Returns:
        A place i, drawn with probability C_i / sum C, that is taken with probability C_i / (C_i + score); None if the
        new example is too much like the others (score of 1 or more), or is not taken.
    """
    if score >= 1 or not float(held.sum()) > 0:
        return None
    place = int(torch.multinomial(held, 1, generator=draw))
    taken = float(torch.rand((), generator=draw)) < float(held[place]) / (float(held[place]) + score)
    return place if taken else None


class GSSTrainer(StreamReplayTrainer):
    """Replays from a memory that every new example may enter in the place of a less diverse one.

    Args:
        replay: arguments of StreamReplayTrainer.
    """

    def setup(self, workload: Workload, model: nn.Module, network: NetworkCost) -> None:
        """Looks whether the gradients of the last layer can be had, beside what `ReplayTrainer` looks for."""
        super().setup(workload, model, network)
        require_head(workload, model)

    def begin(self, client: ClientContext, task: Broadcast, memory: Memory) -> None:
        self.scores = client.state.get(SCORES, torch.empty(0)).clone()
        self.left, self.draw = self.new_here(client), client.stream("gss")

    def learned(self, client: ClientContext, memory: Memory, names: Tensor, batch: Tensors) -> None:
        """Compares each example with COMPARED of the memory, as it is before the batch."""
        self.left -= len(names)
        if self.left < 0 or not memory.capacity:  # later passes bring nothing new
            return
        some = torch.randperm(len(memory), generator=self.draw)[:COMPARED]
        pool = Pool(client.workload, client.model, self._with(batch, memory, some))
        directions = F.normalize(pool.gradients, dim=1, eps=torch.finfo(pool.gradients.dtype).tiny)
        new, old = directions[: len(names)], directions[len(names) :]
        client.log.add(client.network, len(pool), forwards=1)
        error = pool.outputs[0]
        if error.dim() == 3:  # sums over steps; a single outer product is no matrix product
            inner, outer = error[0].numel(), new.shape[1] // error.shape[-1]
            client.log.add(matrix_product(inner, outer), len(pool), forwards=1)
        if len(some):
            client.log.add(matrix_product(new.shape[1], len(some)), len(new), forwards=1)
        scores = ((new @ old.T).amax(1) + 1).clamp(min=0).cpu() if len(some) else torch.full((len(names),), 0.1)
        phase = int(client.state["phase"])
        for i, name in enumerate(names):
            example, score = {key: t[i] for key, t in batch.items()}, float(scores[i])
            if len(memory) < memory.capacity:
                memory.replace(len(memory), name, phase, example)
                self.scores = torch.cat([self.scores, scores[i : i + 1]])
                continue
            place = replaced(score, self.scores, self.draw)
            if place is not None:
                memory.replace(place, name, phase, example)
                self.scores[place] = score
        client.state[SCORES] = self.scores

    @staticmethod
    def _with(batch: Tensors, memory: Memory, places: Tensor) -> Tensors:
        if not len(places):
            return batch
        kept = memory.batch(places)
        return {key: torch.cat([batch[key], kept[key]]) for key in batch}

    def collect(self, client: ClientContext, memory: Memory, names: Tensor) -> None:
        """There are no candidates: the memory follows the stream."""

    def turn(self, client: ClientContext) -> None:
        client.state["phase"] = torch.tensor(client.workload.phase(client.round))
