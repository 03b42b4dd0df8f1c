"""Rehearsal: SGD on the current batch plus a share of a batch of kept examples, picked when a task has ended.

The base of all methods with a memory. Source: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019
(joint steps); the rules of `clients.trainers.rehearsal.selection`. State: memory_names, memory_phases [memory] int64;
candidate_names [candidates] int64, phase [] of the task that is being learned; those of `samples`. Nothing of it is
ever sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Interval, Le
from torch import Tensor, nn

from clients.trainers.base import ClientContext
from clients.trainers.rehearsal import samples
from clients.trainers.rehearsal.gradients import require_head
from clients.trainers.rehearsal.memory import CANDIDATES, NONE, PHASE, Memory, example_bytes, recall
from clients.trainers.rehearsal.selection import MODEL_FREE, RULES, Pool, balanced, pick
from clients.trainers.sgd import Objective, SGDRun, SGDTrainer
from devices.cost import ModelCost
from devices.errors import unknown
from devices.profile import BY_MEMORY
from fedsim.errors import ConfigError
from fedsim.exchanges.ocs import QUESTION as END_OF_TASK
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.seeding import generator
from fedsim.workloads.base import Tensors, Workload

PART = "part"
PICKING = ("selection", "candidate_size", "class_balanced")


@dataclass(frozen=True)
class StreamBatch:
    """What one step is taken on.

    Attributes:
        own: examples of the stream.
        names: theirs, [b] int64.
        kept: examples of the memory beside them, if any.
        is_last_pass: over the examples of the round.
    """

    own: Tensors
    names: Tensor
    kept: Tensors | None
    is_last_pass: bool


class Rehearsed(Objective):
    """loss(current batch) + weight * loss(memory batch), of one pass through the network with both."""

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, run: ReplayRun, batch: StreamBatch) -> Tensor:
        workload, model, own, kept = run.client.workload, run.client.model, batch.own, batch.kept
        if kept is None:
            return workload.loss(model, own)
        n, each = workload.batch_size_of(own), workload.losses(model, {k: torch.cat([own[k], kept[k]]) for k in own})
        return each[:n].mean() + self.weight * each[n:].mean()


class ReplayRun(SGDRun):
    """A round of a client with a memory: ends earlier tasks, then trains on the current one beside what is kept.

    Attributes:
        memory: what the client keeps of earlier tasks.
        used: names of the examples that the last pass trained on, by step.
    """

    trainer: ReplayTrainer

    def __init__(self, trainer: ReplayTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.memory = Memory(client, trainer.capacity(client))
        self.used: list[Tensor] = []

    def fit(self) -> ClientUpdate:
        self.trainer.check_settings(self.broadcast)
        self.advance_task()
        self.memory = Memory(self.client, self.trainer.capacity(self.client))
        self.reserve()
        self.before_training()
        train_loss = self.train(self.batches())
        self.collect(torch.cat(self.used))
        self.memory.save()
        self.store_kept(self.memory)
        self.report_storage(self.memory)
        return self.update(train_loss)

    def update(self, train_loss: float) -> ClientUpdate:
        used, client = sum(map(len, self.used)), self.client
        metrics = {"train_loss": train_loss, "memory_examples": float(len(self.memory))}
        return ClientUpdate(client.client_id, used, client.weights, metrics | self.measured())

    # --- the steps ----------------------------------------------------------------------------------------------

    def before_training(self) -> None:
        """Prepares what the steps need; here nothing."""

    def batches(self) -> Iterator[StreamBatch]:
        """Yields batches of the stream, each with some of the memory; `choose` may leave only the best of each."""
        past = self.memory.batches(self.trainer.replay_batch_size, self.client.stream("replay"))
        for is_last_pass, names, own in self.stream():
            places = next(past, None) if self.replays() else None
            kept = None if places is None else self.memory.batch(places)
            chosen = self.choose(own, kept)
            if chosen is not None:
                names, own = names[chosen.to(names.device)], {key: t[chosen] for key, t in own.items()}
            yield StreamBatch(own, names, kept, is_last_pass)

    def stream(self) -> Iterator[tuple[bool, Tensor, Tensors]]:
        """Yields, for each batch of the round, whether it is of the last pass, its examples' names [b], and it."""
        client, trainer = self.client, self.trainer
        names = client.workload.arrivals(client.client_id, client.workload.part(client.round))
        size, passes = trainer.stream_size_and_passes()
        per_pass = -(-len(client.data.train) // size)
        steps = trainer.local_steps or passes * per_pass
        for number, rows in enumerate(trainer.rows(client, size, passes)):
            yield number >= steps - per_pass, names[rows], client.data.train.gather(rows)

    def choose(self, own: Tensors, kept: Tensors | None) -> Tensor | None:
        """Returns places of the examples in the batch that are trained on, rising; None for all of them, as here."""
        return None

    def replays(self) -> bool:
        """Returns whether there is anything to replay."""
        return self.trainer.replay_weight > 0 and len(self.memory) > 0

    def size_of(self, batch: StreamBatch) -> int:
        return sum(self.client.workload.batch_size_of(part) for part in (batch.own, batch.kept) if part is not None)

    def after_step(self, batch: StreamBatch) -> None:
        """Notes what was trained on; nothing more is remembered before the task ends."""
        if batch.is_last_pass:
            self.used.append(batch.names)

    def measured(self) -> dict[str, float]:
        """Returns metrics of the round beside loss and memory: the same names from every client."""
        return {}

    def reserve(self) -> None:
        """Reserves the memory of a step on both batches."""
        client, trainer = self.client, self.trainer
        batch_size = min(trainer.stream_size_and_passes()[0], trainer.batch_size, len(client.data.train))
        batch_size += trainer.replay_batch_size if self.replays() else 0
        client.log.reserve(trainer.step_bytes(client.step_cost, batch_size, self.copies()))

    # --- what is kept -------------------------------------------------------------------------------------------

    def advance_task(self) -> None:
        """Ends the tasks before the one of this round, and makes room where candidates have to be stored."""
        client, trainer = self.client, self.trainer
        now = client.workload.phase(client.round)
        before = int(client.state.get(PHASE, torch.tensor(now)))
        if before < now:
            self.end_task(before)
        client.state[PHASE] = torch.tensor(now)
        memory = Memory(client, trainer.capacity(client))
        if (trainer.store == "samples" or in_chunks(client)) and len(memory):
            self.shrink(memory, memory.capacity // (len(memory.phases.unique()) + 1))
            memory.save()
        self.store_kept(memory)

    def end_task(self, phase: int) -> None:
        """Picks from the candidates of a task that has ended, with the weights that the model has now."""
        client = self.client
        candidates = client.state.pop(CANDIDATES, NONE)
        memory = Memory(client, self.trainer.capacity(client))
        if len(candidates) and memory.capacity:
            share = memory.capacity // (len(memory.phases.unique()) + 1)
            self.shrink(memory, share)
            pool = Pool(client.workload, client.model, recall(client, candidates))
            memory.add(candidates[self.pick(pool, share, phase)], phase)
            if pool.passed:
                client.log.add(client.step_cost, pool.passed, forwards=1)
            memory.save()
        self.report_storage(memory)

    def pick(self, pool: Pool, size: int, phase: int) -> Tensor:
        """Returns positions in the pool of what is kept of a task."""
        draw = self.client.stream("pick", phase)
        return pick(self.trainer.selection, pool, size, draw, self.trainer.class_balanced)

    def shrink(self, memory: Memory, share: int) -> None:
        """Cuts every task in the memory to its share; the first that were picked stay, as many of every class."""
        labels, places = memory.examples()["y"].cpu(), []
        labels = labels if labels.dim() == 1 else labels[:, 0]
        for phase in memory.phases.unique().tolist():
            own = torch.nonzero(memory.phases == phase).flatten()
            if len(own) > share:
                order = self.ranked(memory, own)
                own = own[balanced(labels[own], order, share) if self.trainer.class_balanced else order[:share]]
            places.append(own)
        if places:
            memory.keep(torch.cat(places))

    def ranked(self, memory: Memory, own: Tensor) -> Tensor:
        """Returns an order of one task's kept examples, best first; here that in which they were picked."""
        return torch.arange(len(own))

    def collect(self, names: Tensor) -> None:
        """Adds to the candidates; above their number, an even draw of all that came stays."""
        client, most = self.client, self.trainer.candidate_size
        names = torch.cat([client.state.get(CANDIDATES, NONE), names]).unique()
        most = len(names) if most is None else most
        if self.trainer.stores_candidates(client):
            most = min(most, self.memory.capacity - len(self.memory))
        if len(names) > most:
            phase = int(client.state[PHASE])
            # Of all names ever, those with the smallest numbers: the same draw whatever came first.
            numbers = generator(client.seed, "candidates", phase, client.client_id).random(int(names.max()) + 1)
            names = names[torch.from_numpy(numbers[names.numpy()].argsort()[:most])].sort().values
        client.state[CANDIDATES] = names

    def store_kept(self, memory: Memory) -> None:
        """Stores, with store=samples, what is kept in the client's state, and drops all else from it."""
        if self.trainer.store == "samples":
            kept = torch.cat([memory.names, self.client.state.get(CANDIDATES, NONE)])
            samples.store(self.client, kept, memory.capacity)

    def report_storage(self, memory: Memory) -> None:
        """Says what the device stores beside the client's state: kept examples and candidates that have to be."""
        client, trainer = self.client, self.trainer
        if trainer.store == "samples":  # they are in the state
            return
        candidates = len(client.state.get(CANDIDATES, NONE)) if trainer.stores_candidates(client) else 0
        client.log.store((len(memory) + candidates) * trainer.example_bytes(client))


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

    needs_classes = True
    run = ReplayRun

    def __init__(
        self,
        memory_size: Annotated[int, Ge(0)] | None = 200,
        budget_bytes: Annotated[int, Ge(0), Le(2**50)] | None = None,
        budget_share: Annotated[float, Interval(ge=0, le=1)] | None = None,
        input_bytes: Annotated[int, Interval(ge=1, le=8)] = 1,
        store: Literal["names", "samples"] = "names",
        replay_weight: Annotated[float, Ge(0)] = 1.0,
        replay_batch_size: Annotated[int, Ge(1)] | None = None,
        selection: str = "uniform",
        candidate_size: Annotated[int, Ge(1)] | None = 1000,
        class_balanced: bool = True,
        **sgd: Any,
    ):
        super().__init__(**sgd)
        if memory_size is None and budget_bytes is None and budget_share is None:
            raise ConfigError("one of trainer.memory_size, budget_bytes and budget_share must say how much to keep")
        if selection not in self.selections():
            raise ConfigError(unknown("value for trainer.selection", selection, self.selections()))
        if store == "samples" and input_bytes != 1:
            raise ConfigError(f"trainer.input_bytes must be 1 with trainer.store=samples, got {input_bytes}")
        self.store = store
        self.memory_size, self.budget_bytes, self.budget_share = memory_size, budget_bytes, budget_share
        self.input_bytes, self.replay_weight, self.selection = input_bytes, replay_weight, selection
        self.objective = Rehearsed(replay_weight)
        self.replay_batch_size = replay_batch_size or self.batch_size
        self.candidate_size, self.class_balanced = candidate_size, class_balanced

    def selections(self) -> tuple[str, ...]:
        """Returns what `selection` may be."""
        return tuple(RULES)

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
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

    def answer(self, client: ClientContext, question: str, broadcast: Broadcast) -> dict[str, Tensors]:
        """Picks, when asked END_OF_TASK, what is kept of the task before this round's; the answer is empty."""
        if question != END_OF_TASK:
            return super().answer(client, question, broadcast)
        run = self.run(self, client, broadcast)
        run.reserve()
        run.advance_task()
        return {}

    def stream_size_and_passes(self) -> tuple[int, int]:
        """Returns the size of the batches that come from the current task, and how many passes there are."""
        return self.batch_size, self.local_epochs

    @property
    def device_reads(self) -> Mapping[str, str]:
        """Returns the size of the buffer, where that is a share of the device's memory."""
        of_memory = {BY_MEMORY: "buffers are a share of the memory (trainer.budget_share)"}
        return {} if self.budget_share is None else of_memory

    def capacity(self, client: ClientContext) -> int:
        """Returns J_k, how many examples fit into the budget of this client's device."""
        limits = [] if self.memory_size is None else [self.memory_size]
        one = self.example_bytes(client)
        if self.budget_bytes is not None:
            limits.append(self.budget_bytes // one)
        if self.budget_share is not None:
            limits.append(int(self.budget_share * client.profile.memory_bytes) // one)
        return min(limits)

    def example_bytes(self, client: ClientContext) -> int:
        """Returns what one kept example takes on the device."""
        if self.store == "samples":
            return samples.example_bytes(client.workload.input_shape)
        return example_bytes(client, self.input_bytes)

    def stores_candidates(self, client: ClientContext) -> bool:
        """Returns whether the candidates of this round would be gone if they were not stored."""
        was_in_chunks = client.round > 1 and in_chunks(replace(client, round=client.round - 1))
        return self.store == "samples" or in_chunks(client) or was_in_chunks


def in_chunks(client: ClientContext) -> bool:
    """Returns whether examples of this round are gone in the next one of the same task."""
    workload, round = client.workload, client.round
    return workload.phase(round + 1) == workload.phase(round) and workload.part(round + 1) != workload.part(round)


class StreamReplayRun(ReplayRun):
    """A round in which the memory follows the stream: there are no candidates.

    Attributes:
        num_new: how many of the examples to come the client has not met before.
    """

    num_new = 0

    def before_training(self) -> None:
        """Counts what is new: a part that stays is new once. State: part [], the last that was met."""
        state = self.client.state
        part, before = torch.tensor(self.client.workload.part(self.client.round)), state.get(PART)
        state[PART] = part
        self.num_new = 0 if before is not None and torch.equal(before, part) else len(self.client.data.train)

    def advance_task(self) -> None:
        """Notes the task; there is nothing to pick."""
        self.client.state[PHASE] = torch.tensor(self.client.workload.phase(self.client.round))

    def collect(self, names: Tensor) -> None:
        """Collects nothing: there are no candidates."""

    def after_step(self, batch: StreamBatch) -> None:
        """Takes new examples into account; later passes over the same ones bring nothing new."""
        super().after_step(batch)
        self.num_new -= len(batch.names)
        if self.num_new >= 0:
            self.remember(batch)

    def remember(self, batch: StreamBatch) -> None:
        """Takes examples that were trained on for the first time into the memory, or not."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it keeps")


class StreamReplayTrainer(ReplayTrainer):
    """Replays from a memory that follows the stream: nothing is picked when a task has ended.

    Args:
        replay: arguments of ReplayTrainer, but for PICKING.

    Raises:
        ConfigError: for these.
    """

    run = StreamReplayRun

    def __init__(self, **replay: Any):
        for key in PICKING:
            if key in replay:
                raise ConfigError(
                    f"trainer.{key} has no meaning for {type(self).__name__}, whose memory follows the stream: nothing "
                    "is picked when a task has ended; leave it out"
                )
        super().__init__(**replay)
