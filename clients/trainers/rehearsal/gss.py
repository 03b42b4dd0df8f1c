"""Gradient-based sample selection (GSS-greedy): a memory of examples whose gradients point in different directions.

Source: Aljundi et al., "Gradient based sample selection for online continual learning", NeurIPS 2019, algorithm 2.
Gradients are those of the last layer. State: gss_scores [memory] float32; see ReplayTrainer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.trainers.rehearsal.gradients import require_head
from clients.trainers.rehearsal.memory import PHASE
from clients.trainers.rehearsal.replay import StreamBatch, StreamReplayRun, StreamReplayTrainer
from clients.trainers.rehearsal.selection import Pool
from devices.cost import ModelCost
from devices.meter import matrix_product
from fedsim.workloads.base import Tensors, Workload

SCORES, COMPARED = "gss_scores", 10


def replaced(score: float, held: Tensor, draw: torch.Generator) -> int | None:
    """Returns which of a full memory a new example replaces, if any.

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


class GSSRun(StreamReplayRun):
    """Compares each new example with some of the memory, as it is before the batch.

    Attributes:
        scores: of the memory, [m].
    """

    def before_training(self) -> None:
        super().before_training()
        self.scores, self.draw = self.client.state.get(SCORES, torch.empty(0)).clone(), self.client.stream("gss")

    def remember(self, batch: StreamBatch) -> None:
        memory, phase = self.memory, int(self.client.state[PHASE])
        if not memory.capacity:
            return
        scores = self.compared(batch.own)
        for i, name in enumerate(batch.names):
            example, score = {key: t[i] for key, t in batch.own.items()}, float(scores[i])
            if len(memory) < memory.capacity:
                memory.replace(len(memory), name, phase, example)
                self.scores = torch.cat([self.scores, scores[i : i + 1]])
                continue
            place = replaced(score, self.scores, self.draw)
            if place is not None:
                memory.replace(place, name, phase, example)
                self.scores[place] = score
        self.client.state[SCORES] = self.scores

    def compared(self, own: Tensors) -> Tensor:
        """Scores of new examples: the largest cosine with COMPARED of the memory plus 1; .1 where there is nothing."""
        client, memory, n = self.client, self.memory, self.client.workload.batch_size_of(own)
        some = torch.randperm(len(memory), generator=self.draw)[:COMPARED]
        kept = memory.batch(some) if len(some) else {key: t[:0] for key, t in own.items()}
        pool = Pool(client.workload, client.model, {key: torch.cat([own[key], kept[key]]) for key in own})
        directions = F.normalize(pool.gradients, dim=1, eps=torch.finfo(pool.gradients.dtype).tiny)
        new, old = directions[:n], directions[n:]
        client.log.add(client.step_cost, len(pool), forwards=1)
        error = pool.outputs[0]
        if error.dim() == 3:  # sums over steps; a single outer product is no matrix product
            inner, outer = error[0].numel(), new.shape[1] // error.shape[-1]
            client.log.add(matrix_product(inner, outer), len(pool), forwards=1)
        if not len(some):
            return torch.full((n,), 0.1)
        client.log.add(matrix_product(new.shape[1], len(some)), n, forwards=1)
        return ((new @ old.T).amax(1) + 1).clamp(min=0).cpu()


class GSSTrainer(StreamReplayTrainer):
    """Replays from a memory that every new example may enter in the place of a less diverse one.

    Args:
        replay: arguments of StreamReplayTrainer.
    """

    run = GSSRun

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Looks whether the gradients of the last layer can be had, beside what `ReplayTrainer` looks for."""
        super().setup(workload, model, network)
        require_head(workload, model)
