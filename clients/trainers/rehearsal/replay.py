"""Rehearsal: SGD on the current batch plus a share of a batch of kept examples, picked when a task has ended.

The base of all methods with a memory. Source: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019
(joint steps); the rules of `clients.trainers.rehearsal.selection`. State: memory_names, memory_phases [memory] int64;
candidate_names [candidates] int64, phase [] of the task that is being learned; those of `samples`. Nothing of it is
ever sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Le
from torch import Tensor, nn

from clients.trainers.base import ClientContext, Gradients
from clients.trainers.rehearsal import samples
from clients.trainers.rehearsal.gradients import require_head
from clients.trainers.rehearsal.memory import CANDIDATES, NONE, PHASE, Memory, example_bytes, recall
from clients.trainers.rehearsal.selection import MODEL_FREE, RULES, Pool, balanced, pick
from clients.trainers.sgd import SGDTrainer
from devices.cost import NetworkCost
from devices.errors import unknown
from fedsim.errors import ConfigError
from fedsim.messages.records import Broadcast, ClientUpdate
from fedsim.seeding import generator
from fedsim.workloads.base import Tensors, Workload

PART = "part"
PICKING = ("selection", "candidate_size", "class_balanced")
END_OF_TASK = "end_of_task"  # the question that makes a client pick from the task that has ended


class ReplayTrainer(SGDTrainer):
    """Trains on loss(current batch) + replay_weight * loss(memory batch).

    While a task lasts, candidates are drawn evenly from the examples that were trained on. When it has ended, a rule
    picks the task's share of the memory from them: floor(memory / tasks so far), and every earlier task is cut to as
    much. That happens with the weights of the next broadcast: when the server asks (END_OF_TASK), else when the
    client next trains.

    Args:
        memory_size: J, examples that a client keeps at most; None: only the bytes count.
        budget_bytes: for the kept examples; None: no limit in bytes.
        budget_share: the same as a share of the device's memory; None: no such limit.
        input_bytes: for each number of a stored input; 1: quantised to eight bits.
        store: "names": the simulation fetches examples again as they were, and only counts their bytes; "samples": they
            are in the client's state, quantised to eight bits, and with them the candidates.
        replay_weight: lambda; 0 never touches the memory.
        replay_batch_size: of memory batches; None: as the batches of the current task.
        selection: one of the RULES.
        candidate_size: examples of a task that are picked from at most; None: all. Where a task comes in chunks, they
            are stored and count towards the memory, as they do with store=samples.
        class_balanced: pick as many of every class; public code does so for some rules only.
        sgd: arguments of SGDTrainer.

    Raises:
        ConfigError: for a setting that is not allowed.
    """

    pure_loss = False

    def __init__(
        self,
        memory_size: int | None = 200,
        budget_bytes: Annotated[int, Le(2**50)] | None = None,
        budget_share: float | None = None,
        input_bytes: int = 1,
        store: str = "names",
        replay_weight: float = 1.0,
        replay_batch_size: int | None = None,
        selection: str = "uniform",
        candidate_size: int | None = 1000,
        class_balanced: bool = True,
        **sgd: Any,
    ):
        super().__init__(**sgd)
        require = _require
        require("memory_size", memory_size, memory_size is None or memory_size >= 0, "null or at least 0")
        require("budget_bytes", budget_bytes, budget_bytes is None or budget_bytes >= 0, "null or at least 0")
        require("budget_share", budget_share, budget_share is None or 0 <= budget_share <= 1, "null or in [0, 1]")
        require("input_bytes", input_bytes, 1 <= input_bytes <= 8, "in 1..8")
        require("replay_weight", replay_weight, replay_weight >= 0, "at least 0")
        require("replay_batch_size", replay_batch_size, (replay_batch_size or 1) >= 1, "null or at least 1")
        require("candidate_size", candidate_size, candidate_size is None or candidate_size >= 1, "null or at least 1")
        if memory_size is None and budget_bytes is None and budget_share is None:
            raise ConfigError("one of trainer.memory_size, budget_bytes and budget_share must say how much to keep")
        if selection not in self.selections():
            raise ConfigError(unknown("value for trainer.selection", selection, self.selections()))
        if store not in ("names", "samples"):
            raise ConfigError(unknown("value for trainer.store", store, ("names", "samples")))
        if store == "samples" and input_bytes != 1:
            raise ConfigError(f"trainer.input_bytes must be 1 with trainer.store=samples, got {input_bytes}")
        self.store = store
        self.memory_size, self.budget_bytes, self.budget_share = memory_size, budget_bytes, budget_share
        self.input_bytes, self.replay_weight, self.selection = input_bytes, replay_weight, selection
        self.replay_batch_size = replay_batch_size or self.batch_size
        self.candidate_size, self.class_balanced = candidate_size, class_balanced

    def selections(self) -> tuple[str, ...]:
        """What `selection` may be."""
        return tuple(RULES)

    def setup(self, workload: Workload, model: nn.Module, network: NetworkCost) -> None:
        """Looks whether kept examples can be fetched again, and chosen by the rule.

        Raises:
            ConfigError: where the stream is endless and only names would be kept; for samples that are no numbers; for
                a model whose last layer the rule cannot find.
        """
        super().setup(workload, model, network)
        if self.selection in RULES and self.selection not in MODEL_FREE:
            require_head(workload, model)
        if workload.endless and self.store == "names":
            raise ConfigError(
                f"examples of {workload.name} are made anew as they arrive and cannot be fetched again: set "
                "trainer.store=samples"
            )
        if self.store == "samples" and not workload.sample(1)["x"].is_floating_point():
            raise ConfigError(f"trainer.store=samples quantises numbers, and {workload.name} feeds tokens: set names")

    # --- the local loop -----------------------------------------------------------------------------------------

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        """Ends earlier tasks, then trains on the current one beside the memory."""
        self.check_settings(task)
        self.turn(client)
        memory = Memory(client, self.capacity(client))
        self.reserve(client, task, memory)
        self.begin(client, task, memory)
        lr, velocity, losses, used, last_pass = self.learning_rate(client, task), None, [], 0, []
        past = memory.batches(self.replay_batch_size, client.stream("replay"))
        for is_last, names, batch in self.stream_batches(client):
            places = next(past, None) if self.replays(memory) else None
            kept = None if places is None else memory.batch(places)
            chosen = self.choose(client, batch, memory, kept)
            if chosen is not None:
                names, batch = names[chosen], {key: t[chosen] for key, t in batch.items()}
            gradients, loss = self.gradients(client, task, batch, kept)
            velocity = self.step(client.parameters, gradients, lr, velocity)
            del gradients
            losses.append(loss)
            self.learned(client, memory, names, batch)
            if is_last:
                used += len(names)
                last_pass.append(names)
        self.collect(client, memory, torch.cat(last_pass))
        memory.save()
        self.put_away(client, memory)
        self.declare(client, memory)
        metrics = {"train_loss": float(torch.stack(losses).mean()), "memory_examples": float(len(memory))}
        update = ClientUpdate(client.client_id, used, client.weights, metrics | self.measured())
        return self.finish(client, task, memory, update)

    def stream_batches(self, client: ClientContext) -> Iterator[tuple[bool, Tensor, Tensors]]:
        """Whether it is the last pass, the examples' names [b] and the batch itself, for each batch of the round."""
        names = client.workload.arrivals(client.client_id, client.workload.part(client.round))
        size, passes = self.stream_of(client)
        per_pass = -(-len(client.data.train) // size)
        steps = self.local_steps or passes * per_pass
        for number, rows in enumerate(self.rows(client, size, passes)):
            yield number >= steps - per_pass, names[rows], client.data.train.gather(rows)

    def stream_of(self, client: ClientContext) -> tuple[int, int]:
        """Size of the batches that come from the current task, and how many passes there are."""
        return self.batch_size, self.local_epochs

    def begin(self, client: ClientContext, task: Broadcast, memory: Memory) -> None:
        """Called before the first step; here nothing."""

    def choose(self, client: ClientContext, batch: Tensors, memory: Memory, kept: Tensors | None) -> Tensor | None:
        """Places of the examples in the batch that are trained on, rising; None for all of them, as here."""
        return None

    def replays(self, memory: Memory) -> bool:
        """Whether there is anything to replay."""
        return self.replay_weight > 0 and len(memory) > 0

    def gradients(
        self, client: ClientContext, task: Broadcast, batch: Tensors, kept: Tensors | None
    ) -> tuple[Gradients, Tensor]:
        """Direction of one step, and its loss: one pass through the network with both batches."""
        if kept is None:
            loss = self.loss(client, batch, task)
            self.log_step(client, client.workload.batch_size_of(batch))
        else:
            own = client.workload.batch_size_of(batch)
            each = client.workload.losses(client.model, {key: torch.cat([batch[key], kept[key]]) for key in batch})
            loss = each[:own].mean() + self.replay_weight * each[own:].mean()
            self.log_step(client, len(each))
        return torch.autograd.grad(loss, client.parameters, allow_unused=True), loss.detach()

    def learned(self, client: ClientContext, memory: Memory, names: Tensor, batch: Tensors) -> None:
        """Called after each step with what was trained on; here nothing is remembered before the task ends."""

    def new_here(self, client: ClientContext) -> int:
        """How many of the round's examples the client has not met before: a part that stays is new once.

        State: part [], the last that was met.
        """
        part = torch.tensor(client.workload.part(client.round))
        before = client.state.get(PART)
        client.state[PART] = part
        return 0 if before is not None and torch.equal(before, part) else len(client.data.train)

    def measured(self) -> dict[str, float]:
        """Metrics of the round beside loss and memory: the same names from every client."""
        return {}

    def finish(self, client: ClientContext, task: Broadcast, memory: Memory, update: ClientUpdate) -> ClientUpdate:
        """The update as it is sent; here as it is."""
        return update

    # --- what is kept -------------------------------------------------------------------------------------------

    def capacity(self, client: ClientContext) -> int:
        """J_k: examples that fit into the budget of this client's device."""
        limits = [] if self.memory_size is None else [self.memory_size]
        one = self.example_bytes(client)
        if self.budget_bytes is not None:
            limits.append(self.budget_bytes // one)
        if self.budget_share is not None:
            limits.append(int(self.budget_share * client.profile.memory_bytes) // one)
        return min(limits)

    def turn(self, client: ClientContext) -> None:
        """Ends the tasks before the one of this round, and makes room where candidates have to be stored."""
        now = client.workload.phase(client.round)
        before = int(client.state.get(PHASE, torch.tensor(now)))
        if before < now:
            self.end(client, before)
        client.state[PHASE] = torch.tensor(now)
        memory = Memory(client, self.capacity(client))
        if (self.store == "samples" or self.in_chunks(client)) and len(memory):
            self.shrink(client, memory, memory.capacity // (len(memory.phases.unique()) + 1))
            memory.save()
        self.put_away(client, memory)

    def in_chunks(self, client: ClientContext) -> bool:
        """Whether examples of this round are gone in the next one of the same task."""
        workload, round = client.workload, client.round
        return workload.phase(round + 1) == workload.phase(round) and workload.part(round + 1) != workload.part(round)

    def end(self, client: ClientContext, phase: int) -> None:
        """Picks from the candidates of a task that has ended, with the weights that the model has now."""
        candidates = client.state.pop(CANDIDATES, NONE)
        memory = Memory(client, self.capacity(client))
        if len(candidates) and memory.capacity:
            share = memory.capacity // (len(memory.phases.unique()) + 1)
            self.shrink(client, memory, share)
            pool = Pool(client.workload, client.model, recall(client, candidates))
            memory.add(candidates[self.pick(client, pool, share, phase)], phase)
            if pool.passed:
                client.log.add(client.network, pool.passed, forwards=1)
            memory.save()
        self.declare(client, memory)

    def pick(self, client: ClientContext, pool: Pool, size: int, phase: int) -> Tensor:
        """Positions in the pool of what is kept of a task."""
        return pick(self.selection, pool, size, client.stream("pick", phase), self.class_balanced)

    def shrink(self, client: ClientContext, memory: Memory, share: int) -> None:
        """Cuts every task in the memory to its share; the first that were picked stay, as many of every class."""
        labels, places = memory.examples()["y"].cpu(), []
        labels = labels if labels.dim() == 1 else labels[:, 0]
        for phase in memory.phases.unique().tolist():
            own = torch.nonzero(memory.phases == phase).flatten()
            if len(own) > share:
                order = self.ranked(client, memory, own)
                own = own[balanced(labels[own], order, share)] if self.class_balanced else own[order[:share]]
            places.append(own)
        if places:
            memory.keep(torch.cat(places))

    def ranked(self, client: ClientContext, memory: Memory, own: Tensor) -> Tensor:
        """An order of one task's kept examples, best first; here that in which they were picked."""
        return torch.arange(len(own))

    def collect(self, client: ClientContext, memory: Memory, names: Tensor) -> None:
        """Adds to the candidates; above their number, an even draw of all that came stays."""
        names = torch.cat([client.state.get(CANDIDATES, NONE), names]).unique()
        most = len(names) if self.candidate_size is None else self.candidate_size
        if self.stores_candidates(client):
            most = min(most, memory.capacity - len(memory))
        if len(names) > most:
            phase = int(client.state[PHASE])
            # Of all names ever, those with the smallest numbers: the same draw whatever came first.
            numbers = generator(client.seed, "candidates", phase, client.client_id).random(int(names.max()) + 1)
            names = names[torch.from_numpy(numbers[names.numpy()].argsort()[:most])].sort().values
        client.state[CANDIDATES] = names

    def stores_candidates(self, client: ClientContext) -> bool:
        """Whether the candidates of this round would be gone if they were not stored."""
        return self.store == "samples" or self.in_chunks(client) or self._was_in_chunks(client)

    def put_away(self, client: ClientContext, memory: Memory) -> None:
        """With store=samples, puts what is kept into the client's state and drops all else from it."""
        if self.store == "samples":
            held = torch.cat([memory.names, client.state.get(CANDIDATES, NONE)])
            samples.store(client, held, memory.capacity)

    def _was_in_chunks(self, client: ClientContext) -> bool:
        return client.round > 1 and self.in_chunks(replace(client, round=client.round - 1))

    # --- facts --------------------------------------------------------------------------------------------------

    def answer(self, client: ClientContext, question: str, task: Broadcast) -> dict[str, Tensors]:
        """END_OF_TASK picks what is kept of the task before this round's; the answer is empty."""
        if question != END_OF_TASK:
            return super().answer(client, question, task)
        self.reserve(client, task, Memory(client, self.capacity(client)))
        self.turn(client)
        return {}

    def declare(self, client: ClientContext, memory: Memory) -> None:
        """Says what the device stores beside the client's state: kept examples and candidates that have to be."""
        if self.store == "samples":  # they are in the state
            return
        stored = len(memory) + (len(client.state.get(CANDIDATES, NONE)) if self.stores_candidates(client) else 0)
        client.log.store(stored * self.example_bytes(client))

    def example_bytes(self, client: ClientContext) -> int:
        """What one kept example takes on the device."""
        if self.store == "samples":
            return samples.example_bytes(client.workload.input_shape)
        return example_bytes(client, self.input_bytes)

    def reserve(self, client: ClientContext, task: Broadcast, memory: Memory | None = None) -> None:
        """Declares the memory of a step on both batches."""
        batch_size = min(self.stream_of(client)[0], self.batch_size, len(client.data.train))
        batch_size += self.replay_batch_size if memory is not None and self.replays(memory) else 0
        client.log.reserve(self.step_bytes(client.network, batch_size, self.copies(client, task)))


class StreamReplayTrainer(ReplayTrainer):
    """Replays from a memory that follows the stream: nothing is picked when a task has ended.

    Args:
        replay: arguments of ReplayTrainer, but for PICKING.

    Raises:
        ConfigError: for these.
    """

    def __init__(self, **replay: Any):
        for key in PICKING:
            if key in replay:
                raise ConfigError(
                    f"trainer.{key} has no meaning for {type(self).__name__}, whose memory follows the stream: nothing "
                    "is picked when a task has ended; leave it out"
                )
        super().__init__(**replay)


def _require(key: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"trainer.{key} must be {allowed}, got {value!r}")
