"""Online coreset selection (OCS): trains on the most useful examples of every batch, and keeps some of them.

Source: Yoon et al., "Online Coreset Selection for Rehearsal-based Continual Learning", ICLR 2022, sections 3 and 4, and
the details of its public code. With tau = 1000, as published, S and V decide almost nothing once there is a coreset:
the ranking is that of A alone in 99.8 percent of random batches. S prefers examples with large gradients, A those that
the network fits already: on Rotated MNIST in small (configs/study/ocs_rotated_mnist.yaml; tasks 2 to 4 of one run with
tau = 1) the best tenth of a batch had 1.3 to 4 times its mean loss with tau = 1, and 0.3 to 1.3 times with 10 and 1000,
which learned and forgot less. In tasks of two classes, whose gradients point in opposite directions, S outweighs V, and
most chosen batches hold one class. Differs: every kept example is scored under the mask of its own task; examples are
always scored in evaluation mode, as in the public code for CIFAR, where that for MNIST leaves dropout on. `warm_start`
counts batches: shorten it with the tasks, or all of a first pass is drawn at random (public code: 100 of 600 on MNIST,
100 of 125 on CIFAR).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clients.trainers.base import ClientContext, Gradients
from clients.trainers.rehearsal.gradients import (
    MODES,
    WITHOUT_BACKWARD,
    Outputs,
    Products,
    log_mean_gradient,
    log_mean_of_outputs,
    log_products,
    mean_gradient,
    outputs_of,
    products,
    require_head,
    scoring,
)
from clients.trainers.rehearsal.memory import Memory
from clients.trainers.rehearsal.recalled import Recalled
from clients.trainers.rehearsal.replay import ReplayTrainer
from clients.trainers.rehearsal.selection import Pool, balanced
from devices.cost import NetworkCost
from devices.errors import unknown
from devices.meter import inference_memory_bytes
from fedsim.errors import ConfigError
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload

FLOOR = 1e-6  # of products of norms, relative to the largest: a perfectly fitted example scores 0
SEEN = "ocs_batches"  # stream batches of the phase so far, for the warm start
REFERENCE = "reference"  # extra record: direction [weights], examples []


def scores(of: Products, tau: float, diversity: str = "exclude_self") -> tuple[Tensor, Tensor, Tensor]:
    """S, V and A of n examples, each [n]; the total is S + V + tau A.

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
    """Products of norms to divide by: those far below the largest count as a little more, and none is 0."""
    return products.maximum(FLOOR * products.amax()).clamp(min=torch.finfo(products.dtype).tiny)


def best(total: Tensor, size: int) -> Tensor:
    """The places of the `size` largest, rising; ties to the smaller place."""
    return total.argsort(descending=True, stable=True)[:size].sort().values


class OCSTrainer(ReplayTrainer):
    """Of every `stream_size` examples, trains on the `batch_size` with the highest score; these are the candidates.

    Passes over the examples are local_epochs * stream_size / batch_size, so that as many examples are trained on as
    in plain SGD.

    Args:
        tau: weight of the agreement with the coreset.
        stream_size: N, examples that are scored at once; batch_size is kappa.
        grad_mode: one of gradients.MODES.
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

    def __init__(
        self,
        tau: float = 1000.0,
        stream_size: int = 20,
        grad_mode: str = "full",
        chunk: int = 8,
        diversity: str = "exclude_self",
        warm_start: int = 100,
        ref_source: str = "all",
        ref_scope: str = "local",
        final_pick: str = "random",
        shrink_pick: str = "score",
        **replay: Any,
    ):
        super().__init__(**replay)
        for key, value, allowed in (
            ("grad_mode", grad_mode, MODES),
            ("diversity", diversity, ("exclude_self", "code")),
            ("ref_source", ref_source, ("all", "batch", "replayed")),
            ("ref_scope", ref_scope, ("local", "global")),
            ("final_pick", final_pick, ("random", "score")),
            ("shrink_pick", shrink_pick, ("score", "random")),
        ):
            if value not in allowed:
                raise ConfigError(unknown(f"value for trainer.{key}", value, allowed))
        if tau < 0 or chunk < 1 or warm_start < 0:
            raise ConfigError(
                f"trainer.tau, chunk and warm_start are at least 0, 1 and 0, got {tau}, {chunk}, {warm_start}"
            )
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
        self.outputs = Outputs(0, 0, 0, 0)
        self.reference: Tensor | None = None  # what the server sent to the client that trains just now
        self.recalled: Recalled | None = None
        self.seen = self.per_pass = 0
        self.terms: list[Tensor] = []
        self.draw = torch.Generator()

    def selections(self) -> tuple[str, ...]:
        return ("ocs",)

    def setup(self, workload: Workload, model: nn.Module, network: NetworkCost) -> None:
        """Looks at the sizes that scoring costs depend on.

        Raises:
            ConfigError: where the affinity could only be 0.
        """
        if self.grad_mode == "last_layer" and self.tau and getattr(workload, "incremental", "") == "task":
            raise ConfigError(
                "trainer.grad_mode=last_layer cannot compare tasks that have their own outputs: with "
                "stream.incremental=task their gradients are orthogonal; take features or full, or trainer.tau=0"
            )
        super().setup(workload, model, network)
        self.outputs = outputs_of(workload, model)
        if self.grad_mode in WITHOUT_BACKWARD:
            require_head(workload, model)

    # --- selection while training ---------------------------------------------------------------------------------

    def stream_of(self, client: ClientContext) -> tuple[int, int]:
        return self.stream_size, max(1, round(self.local_epochs * self.stream_size / self.batch_size))

    def ends_in_one(self, examples: int) -> bool:
        return self.batch_size == 1 or self.leaves_one(examples, self.stream_size)

    def begin(self, client: ClientContext, task: Broadcast, memory: Memory) -> None:
        if self.ref_scope == "global" and REFERENCE in task.extras:
            self.reference = task.extra(REFERENCE)["direction"].to(client.device)
        else:
            self.reference = None
        self.seen = int(client.state.get(SEEN, torch.tensor(0)))
        self.per_pass = self.seen + -(-len(client.data.train) // self.stream_size)
        self.terms, self.draw = [], client.stream("warm-start")
        self.recalled = None
        if self.ref_source == "replayed" and self.tau and len(memory) and self.ref_scope == "local":
            self.recalled = Recalled(client.workload, client.model, memory)
            client.log.add(client.network, len(memory), forwards=1)

    def choose(self, client: ClientContext, batch: Tensors, memory: Memory, kept: Tensors | None) -> Tensor | None:
        """Algorithm 1, lines 5 to 8: kappa at random while the task is new, else those with the highest score."""
        size, first_pass = client.workload.batch_size_of(batch), self.seen < self.per_pass
        self.seen += 1
        if size <= self.batch_size:
            return None
        if first_pass and self.seen <= self.warm_start:
            return torch.randperm(size, generator=self.draw)[: self.batch_size].sort().values
        terms = scores(self.products(client, batch, memory, kept), self.tau, self.diversity)
        chosen = best(terms[0] + terms[1] + self.tau * terms[2], self.batch_size)
        self.terms.append(torch.stack(terms)[:, chosen].mean(1))
        return chosen

    def products(self, client: ClientContext, batch: Tensors, memory: Memory, kept: Tensors | None) -> Products:
        """Of a stream batch, with the coreset's gradient at the current weights as the reference."""
        n, mode, workload, model = client.workload.batch_size_of(batch), self.grad_mode, client.workload, client.model
        with scoring(model):
            reference = self.reference if self.tau else None
            if self.recalled is not None:
                reference = self.recalled.mean_gradient(mode)
                log_mean_of_outputs(client.log, self.outputs, len(memory))
            elif reference is None and self.tau and len(memory) and self.ref_scope == "local":
                past = kept if self.ref_source == "batch" and kept is not None else memory.examples()
                reference = mean_gradient(mode, workload, model, past)
                log_mean_gradient(client.log, client.network, mode, self.outputs, len(past["y"]))
            found = products(mode, workload, model, batch, reference, self.chunk)
        log_products(client.log, client.network, mode, self.outputs, n, reference is not None, self.chunk)
        return found

    def gradients(
        self, client: ClientContext, task: Broadcast, batch: Tensors, kept: Tensors | None
    ) -> tuple[Gradients, Tensor]:
        """A step with replay; with ref_source=replayed, what the network makes of the replayed part is kept."""
        if self.recalled is None or kept is None:
            return super().gradients(client, task, batch, kept)
        with self.recalled.watching():
            return super().gradients(client, task, batch, kept)

    def turn(self, client: ClientContext) -> None:
        before = client.state.get("phase")
        super().turn(client)
        if before is None or not torch.equal(before, client.state["phase"]):
            client.state[SEEN] = torch.tensor(0)

    def measured(self) -> dict[str, float]:
        means = torch.stack(self.terms).mean(0).tolist() if self.terms else [0.0, 0.0, 0.0]
        return dict(zip(("similarity", "diversity", "affinity"), means, strict=True))

    def finish(self, client: ClientContext, task: Broadcast, memory: Memory, update: ClientUpdate) -> ClientUpdate:
        """Beside the update, with ref_scope=global: the direction of the coreset's gradient, of length 1."""
        client.state[SEEN] = torch.tensor(self.seen)
        if self.ref_scope == "local" or not len(memory):
            return update
        with scoring(client.model):
            own = mean_gradient(self.grad_mode, client.workload, client.model, memory.examples())
        log_mean_gradient(client.log, client.network, self.grad_mode, self.outputs, len(memory))
        direction = own / torch.linalg.vector_norm(own).clamp(min=torch.finfo(own.dtype).tiny)
        return replace(update, extras={REFERENCE: {"direction": direction, "examples": torch.tensor(len(memory))}})

    # --- the coreset ------------------------------------------------------------------------------------------------

    def pick(self, client: ClientContext, pool: Pool, size: int, phase: int) -> Tensor:
        """Class-balanced: at random among the candidates, which were chosen by score, or again by S + V."""
        if self.final_pick == "random":
            order = torch.randperm(len(pool), generator=client.stream("pick", phase))
        else:
            order = self.by_score(client, pool.batch)
        return balanced(pool.labels.cpu(), order, size) if self.class_balanced else order[:size]

    def ranked(self, client: ClientContext, memory: Memory, own: Tensor) -> Tensor:
        if self.shrink_pick == "random":
            return super().ranked(client, memory, own)
        return self.by_score(client, memory.batch(own))

    def by_score(self, client: ClientContext, batch: Tensors) -> Tensor:
        """All examples by S + V under the current weights, best first."""
        n = client.workload.batch_size_of(batch)
        with scoring(client.model):
            found = products(self.grad_mode, client.workload, client.model, batch, None, self.chunk)
        log_products(client.log, client.network, self.grad_mode, self.outputs, n, False, self.chunk)
        similarity, apart, _ = scores(found, 0.0, self.diversity)
        return (similarity + apart).argsort(descending=True, stable=True).cpu()

    def reserve(self, client: ClientContext, task: Broadcast, memory: Memory | None = None) -> None:
        """The largest of a step, of the coreset's gradient, and of scoring a stream batch against it."""
        super().reserve(client, task, memory)
        network, n, backward = client.network, min(self.stream_size, len(client.data.train)), False
        copies, compared = self.copies(client, task), len(memory) if memory is not None and self.tau else 0
        if compared:
            backward = self.grad_mode not in WITHOUT_BACKWARD
            past = min(compared, self.replay_batch_size) if self.ref_source == "batch" else compared
            flat = self.step_bytes(network, past, copies + 1.0)  # beside the gradients by layer
            client.log.reserve(flat if backward else inference_memory_bytes(network, past))
        if n > self.batch_size:
            step = self.step_bytes(network, n, copies + (1.0 if backward else 0.0))
            recalled = len(memory) if memory is not None and self.ref_source == "replayed" else 0
            outputs = 4 * recalled * (self.outputs.classes + self.outputs.features)
            client.log.reserve(step + self.outputs.held(self.grad_mode, n, self.chunk) + outputs)
