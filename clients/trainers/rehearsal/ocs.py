"""Online coreset selection (OCS): trains on the most useful examples of every batch, and keeps some of them.

Source: Yoon et al., "Online Coreset Selection for Rehearsal-based Continual Learning", ICLR 2022, sections 3 and 4, and
the details of its public code. Differs: every kept example is scored under the mask of its own task; examples are
always scored in evaluation mode, as in the public code for CIFAR, where that for MNIST leaves dropout on. `warm_start`
counts batches: shorten it with the tasks, or all of a first pass is drawn at random (public code: 100 of 600 on MNIST,
100 of 125 on CIFAR). What tau does is told beside `configs/study/ocs_rotated_mnist.yaml`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from clients.trainers.base import Gradients
from clients.trainers.rehearsal.gradients import scoring
from clients.trainers.rehearsal.memory import PHASE, Memory
from clients.trainers.rehearsal.recalled import Recalled
from clients.trainers.rehearsal.replay import ReplayRun, ReplayTrainer, StreamBatch
from clients.trainers.rehearsal.selection import Pool, balanced
from clients.trainers.rehearsal.spaces import WITHOUT_BACKWARD, Features, Mode, Products, Space, space_of
from devices.cost import ModelCost
from devices.meter import inference_memory_bytes
from fedsim.errors import ConfigError
from fedsim.exchanges.ocs import REFERENCE
from fedsim.messages.updates import ClientUpdate
from fedsim.workloads.base import Tensors, Workload
from fedsim.workloads.classification import classification

FLOOR = 1e-6  # of products of norms, relative to the largest: a perfectly fitted example scores 0
SEEN = "ocs_batches"  # stream batches of the phase so far, for the warm start


def scores(of: Products, tau: float, diversity: str = "exclude_self") -> tuple[Tensor, Tensor, Tensor]:
    """Returns S, V and A of n examples, each [n]; the total is S + V + tau A.

    Args:
        of: the dot products of their gradients; without a reference, A is 0.
        tau: 0 leaves A out.
        diversity: "exclude_self": V(n) = -mean over p != n of cos(g_n, g_p); "code": minus the mean of the whole row,
            the 1 of p = n included.

    Source: equations 3 to 6; S(n) = cos(g_n, mean g), A(n) = cos(g_n, reference).
    """
    norms = of.own.diagonal().clamp(min=0).sqrt()
    n = len(norms)
    length = of.own.mean().clamp(min=0).sqrt()  # |mean g|^2 is the mean of all products
    similarity = of.own.mean(1) / _above_zero(norms * length)
    cosines = of.own / _above_zero(norms[:, None] * norms[None, :])
    if diversity == "code":
        apart = -cosines.mean(1)
    else:
        others = cosines - torch.diag(cosines.diagonal())
        apart = -others.sum(1) / max(1, n - 1)
    affinity = torch.zeros_like(norms)
    if of.past is not None and of.past_norm is not None and tau:
        affinity = of.past / _above_zero(norms * of.past_norm)
    return similarity, apart, affinity


def _above_zero(products: Tensor) -> Tensor:
    """Makes products of norms fit to divide by: those far below the largest count as a little more, and none is 0."""
    return products.maximum(FLOOR * products.amax()).clamp(min=torch.finfo(products.dtype).tiny)


def best(total: Tensor, size: int) -> Tensor:
    """Returns the places of the `size` largest, rising; ties to the smaller place."""
    return total.argsort(descending=True, stable=True)[:size].sort().values


class OCSRun(ReplayRun):
    """A round of algorithm 1: scores the batches of the stream, trains on the best of each beside the coreset.

    Attributes:
        seen: stream batches of the task so far.
        per_pass: stream batches until the end of the first pass.
        reference: the coreset's gradient as the server sent it, if it did.
        recalled: what the network last made of the coreset, with ref_source=replayed.
        terms: mean S, V and A of what was chosen, by step.
    """

    trainer: OCSTrainer

    def before_training(self) -> None:
        trainer, client = self.trainer, self.client
        sent = trainer.ref_scope == "global" and REFERENCE in self.broadcast.extras
        self.reference = self.broadcast.extra(REFERENCE)["direction"].to(client.device) if sent else None
        self.seen = int(client.state.get(SEEN, torch.tensor(0)))
        self.per_pass = self.seen + -(-len(client.data.train) // trainer.stream_size)
        self.terms: list[Tensor] = []
        self.draw = client.stream("warm-start")
        self.recalled: Recalled | None = None
        if trainer.ref_source == "replayed" and self.compares():
            assert isinstance(trainer.space, Features)
            self.recalled = Recalled(trainer.space, client.workload, client.model, self.memory)
            client.log.add(client.step_cost, len(self.memory), forwards=1)

    def compares(self) -> bool:
        """Returns whether batches are compared with the client's own coreset."""
        return bool(self.trainer.tau) and len(self.memory) > 0 and self.trainer.ref_scope == "local"

    # --- selection while training -------------------------------------------------------------------------------

    def choose(self, own: Tensors, kept: Tensors | None) -> Tensor | None:
        """Chooses by algorithm 1, lines 5 to 8: at random while the task is new, else those with the highest score."""
        trainer, size, first_pass = self.trainer, self.client.workload.batch_size_of(own), self.seen < self.per_pass
        self.seen += 1
        if size <= trainer.batch_size:
            return None
        if first_pass and self.seen <= trainer.warm_start:
            return torch.randperm(size, generator=self.draw)[: trainer.batch_size].sort().values
        terms = scores(self.products(own, kept), trainer.tau, trainer.diversity)
        chosen = best(terms[0] + terms[1] + trainer.tau * terms[2], trainer.batch_size)
        self.terms.append(torch.stack(terms)[:, chosen].mean(1))
        return chosen

    def products(self, own: Tensors, kept: Tensors | None) -> Products:
        """Compares a stream batch, with the coreset's gradient at the current weights as the reference."""
        trainer, client, space = self.trainer, self.client, self.trainer.space
        workload, model, log, cost = client.workload, client.model, client.log, client.step_cost
        with scoring(model):
            reference = self.reference if trainer.tau else None
            if self.recalled is not None:
                reference = self.recalled.mean_gradient()
                self.recalled.space.log_mean_of_outputs(log, len(self.memory))
            elif reference is None and self.compares():
                past = kept if trainer.ref_source == "batch" and kept is not None else self.memory.examples()
                reference = space.mean_gradient(workload, model, past)
                space.log_mean_gradient(log, cost, workload.batch_size_of(past))
            found = space.products(workload, model, own, reference)
        space.log_products(log, cost, workload.batch_size_of(own), reference is not None)
        return found

    def gradients(self, batch: StreamBatch) -> tuple[Gradients, Tensor]:
        """Takes a step with replay; with ref_source=replayed, keeps what the network makes of the replayed part."""
        if self.recalled is None or batch.kept is None:
            return super().gradients(batch)
        with self.recalled.watching():
            return super().gradients(batch)

    def measured(self) -> dict[str, float]:
        means = torch.stack(self.terms).mean(0).tolist() if self.terms else [0.0, 0.0, 0.0]
        return dict(zip(("similarity", "diversity", "affinity"), means, strict=True))

    def update(self, train_loss: float) -> ClientUpdate:
        """Sends, with ref_scope=global, the direction of the coreset's gradient, of length 1, beside the update."""
        update, trainer, client = super().update(train_loss), self.trainer, self.client
        client.state[SEEN] = torch.tensor(self.seen)
        if trainer.ref_scope == "local" or not len(self.memory):
            return update
        with scoring(client.model):
            own = trainer.space.mean_gradient(client.workload, client.model, self.memory.examples())
        trainer.space.log_mean_gradient(client.log, client.step_cost, len(self.memory))
        direction = own / torch.linalg.vector_norm(own).clamp(min=torch.finfo(own.dtype).tiny)
        record = {"direction": direction, "examples": torch.tensor(len(self.memory))}
        return replace(update, extras={REFERENCE: record})

    # --- the coreset --------------------------------------------------------------------------------------------

    def advance_task(self) -> None:
        before = self.client.state.get(PHASE)
        super().advance_task()
        if before is None or not torch.equal(before, self.client.state[PHASE]):
            self.client.state[SEEN] = torch.tensor(0)

    def pick(self, pool: Pool, size: int, phase: int) -> Tensor:
        """Picks class by class, at random among the candidates, which were chosen by score, or again by S + V."""
        if self.trainer.final_pick == "random":
            order = torch.randperm(len(pool), generator=self.client.stream("pick", phase))
        else:
            order = self.by_score(pool.batch)
        return balanced(pool.labels.cpu(), order, size) if self.trainer.class_balanced else order[:size]

    def ranked(self, memory: Memory, own: Tensor) -> Tensor:
        return super().ranked(memory, own) if self.trainer.shrink_pick == "random" else self.by_score(memory.batch(own))

    def by_score(self, batch: Tensors) -> Tensor:
        """Returns all examples by S + V under the current weights, best first."""
        trainer, client, n = self.trainer, self.client, self.client.workload.batch_size_of(batch)
        with scoring(client.model):
            found = trainer.space.products(client.workload, client.model, batch)
        trainer.space.log_products(client.log, client.step_cost, n, False)
        similarity, apart, _ = scores(found, 0.0, trainer.diversity)
        return (similarity + apart).argsort(descending=True, stable=True).cpu()

    def reserve(self) -> None:
        """Reserves the largest of a step, of the coreset's gradient, and of scoring a stream batch against it."""
        super().reserve()
        trainer, client, backward = self.trainer, self.client, False
        cost, n, copies = client.step_cost, min(trainer.stream_size, len(client.data.train)), self.copies()
        compared = len(self.memory) if trainer.tau else 0
        if compared:
            backward = trainer.grad_mode not in WITHOUT_BACKWARD
            past = min(compared, trainer.replay_batch_size) if trainer.ref_source == "batch" else compared
            flat = trainer.step_bytes(cost, past, copies + 1.0)  # beside the gradients by layer
            client.log.reserve(flat if backward else inference_memory_bytes(cost, past))
        if n > trainer.batch_size:
            step = trainer.step_bytes(cost, n, copies + (1.0 if backward else 0.0))
            recalled = len(self.memory) if trainer.ref_source == "replayed" else 0
            outputs = 4 * recalled * (trainer.space.sizes.classes + trainer.space.sizes.features)
            client.log.reserve(step + trainer.space.held_bytes(n) + outputs)


class OCSTrainer(ReplayTrainer):
    """Of every `stream_size` examples, trains on the `batch_size` with the highest score; these are the candidates.

    Passes over the examples are local_epochs * stream_size / batch_size, so that as many examples are trained on as
    in plain SGD.

    Args:
        tau: weight of the agreement with the coreset.
        stream_size: N, examples that are scored at once; batch_size is kappa.
        grad_mode: a spaces.Mode.
        chunk: examples per chunk of "chunked".
        diversity: see `scores`.
        warm_start: r2c; in the first pass, as many batches of a task are drawn at random instead.
        ref_source: "all": the coreset's gradient is that of all of it, anew for every batch; "batch": of the batch
            that is replayed just then; "replayed": of all of it, each example as it was when it was last replayed,
            which costs no pass (grad_mode last_layer and features only).
        ref_scope: "local"; "global": of the federation's coresets, which the server sends (strategy=ocs).
        final_pick: how candidates become the coreset: "random" (public code) or "score" (S + V).
        shrink_pick: how an old coreset is cut: "score" (S + V under the new weights, public code) or "random".
        replay: arguments of ReplayTrainer.
    """

    run = OCSRun
    space: Space

    def __init__(
        self,
        tau: Annotated[float, Ge(0)] = 1000.0,
        stream_size: int = 20,
        grad_mode: Mode = "full",
        chunk: Annotated[int, Ge(1)] = 8,
        diversity: Literal["exclude_self", "code"] = "exclude_self",
        warm_start: Annotated[int, Ge(0)] = 100,
        ref_source: Literal["all", "batch", "replayed"] = "all",
        ref_scope: Literal["local", "global"] = "local",
        final_pick: Literal["random", "score"] = "random",
        shrink_pick: Literal["score", "random"] = "score",
        **replay: Any,
    ):
        super().__init__(**replay)
        if stream_size < self.batch_size:
            raise ConfigError(
                f"trainer.stream_size must be at least trainer.batch_size={self.batch_size}, got {stream_size}"
            )
        if ref_source == "replayed" and (grad_mode not in WITHOUT_BACKWARD or not self.replay_weight):
            raise ConfigError(
                "trainer.ref_source=replayed needs the outputs of replay steps alone: trainer.grad_mode=last_layer or "
                f"features, and trainer.replay_weight above 0; got {grad_mode} and {self.replay_weight}"
            )
        self.tau, self.stream_size, self.grad_mode, self.chunk = tau, stream_size, grad_mode, chunk
        self.diversity, self.warm_start = diversity, warm_start
        self.ref_source, self.ref_scope = ref_source, ref_scope
        self.final_pick, self.shrink_pick = final_pick, shrink_pick

    def selections(self) -> tuple[str, ...]:
        return ("ocs",)

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds the space in which gradients are compared.

        Raises:
            ConfigError: where the affinity could only be 0.
        """
        if self.grad_mode == "last_layer" and self.tau and classification(workload).own_outputs:
            raise ConfigError(
                "trainer.grad_mode=last_layer cannot compare tasks that have their own outputs: with "
                "stream.incremental=task their gradients are orthogonal; take features or full, or trainer.tau=0"
            )
        super().setup(workload, model, network)
        self.space = space_of(self.grad_mode, workload, model, self.chunk)

    def stream_size_and_passes(self) -> tuple[int, int]:
        return self.stream_size, max(1, round(self.local_epochs * self.stream_size / self.batch_size))

    def ends_in_one(self, examples: int) -> bool:
        return self.batch_size == 1 or self.leaves_one(examples, self.stream_size)
