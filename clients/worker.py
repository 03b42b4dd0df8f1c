"""One process's worker: lets the trainer work for each client of a cohort, and copies what they answer.

It builds its world (data, model, trainer) once per process from the settings that come with a task. Nothing here knows
a method.
"""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, islice
from typing import cast

import torch

from clients.answers import check_metrics, check_records, check_tensors, check_update
from clients.clipping import clipped
from clients.data_cache import DataCache
from clients.front_end import FrontEnd
from clients.judging import Judge
from clients.live_model import LiveModel
from clients.lone_examples import INSTEAD_OF_ONE, check_batches
from clients.slots.cohort import InSlots, make_slots
from clients.slots.slot import Slot
from clients.state import ClientState
from clients.trainers.base import RECEIVED, ClientContext, ClientWorkload, LocalTrainer, OutOfMemoryError, WorkLog
from clients.trainers.sgd import SGDRun, SGDTrainer
from devices.compression.plan import CompressionPlan
from devices.cost import Work
from devices.errors import one_line
from devices.meter import matrix_product
from fedsim.engines.memory import host_lacks_memory, keep_freed_memory
from fedsim.errors import ConfigError, in_words, no_exit
from fedsim.exchanges.clipping import ASKED, BIT_BYTES, CLIPPED_RATE, CLIPPING_NORM, NORM_BIT
from fedsim.exchanges.slices import KEPT, model_cost
from fedsim.grid.participants import EXAMPLES, LOSS, QUESTION, TOLD
from fedsim.grid.round_sum import BlockSums
from fedsim.messages.cohort import PLAN, ClientAnswer, ClientTask, CohortAnswer, CohortTask
from fedsim.messages.records import check_extra_names
from fedsim.messages.secagg import SecureAggregation
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.messages.uplink import compressed
from fedsim.messages.weights import SentWeights, bytes_of, own_copies, own_copy
from fedsim.models.roles import TensorRoles
from fedsim.seeding import seed_torch, torch_generator
from fedsim.settings.build import WORLD_CACHE_SIZE, World, build_world, instantiate, memory_format, pick_device
from fedsim.workloads.base import Tensors, Workload

NOT_FINITE = "its update holds NaN or infinite weights; lower trainer.lr or set trainer.clip_norm"
PRIVATE = "private"  # group of a client's state
ROOM = 0.25  # of a card's memory, that stays free of what clients keep


def prepare_process(threads: int) -> None:
    """Sets this process up for training: torch's threads, memory that is kept, fewer objects to look through."""
    keep_freed_memory()
    gc.collect()
    gc.freeze()  # the half million objects of the imports: looking through them again takes 3 % of small steps
    torch.set_num_threads(threads)


@lru_cache(maxsize=WORLD_CACHE_SIZE)
def worker_for(settings: str) -> Worker:
    """The worker of this process for these settings; built at the first task of a run."""
    return Worker(build_world(settings))


class Worker:
    """Serves the clients of a run, one after the other, or in groups where they train at once."""

    def __init__(self, world: World):
        self.world, self.workload, self.fleet = world, world.workload, world.fleet
        settings = world.settings
        prepare_process(settings.engine.threads)
        self.seed, self.device = settings.seed, pick_device(settings.engine.device, settings.engine.tf32)
        self.trainer: LocalTrainer = instantiate(settings.groups, "trainer")
        self.uplink = instantiate(settings.groups, "uplink")
        compression: CompressionPlan = instantiate(settings.groups, "compression")
        if compression.active and self.trainer.own_network:
            name = type(self.trainer).__name__
            raise ConfigError(f"{name} gives each device a network of its own already; set compression=none")
        self.live = LiveModel(self.workload.build_model(), self.device)
        self.model = self.live.model
        self.roles = TensorRoles.of(self.model, settings.private)
        if settings.engine.batch_clients > 1:
            self._check_together()
        count = min(settings.engine.slots or 0, settings.num_asked)
        self.slots = make_slots(count, self.workload.build_model, self.live)
        self.network = model_cost(self.workload, self.model, "dense", self.device)
        self.refusal_of_one = check_batches(settings, self.workload, self.model, self.trainer, self.device)
        self.trainer.private = self.roles.private
        self.initial = {n: t.detach().clone() for n, t in self.live.weights.items() if n in self.trainer.private}
        self.trainer.setup(cast(Workload, ClientWorkload(self.workload, None, 0)), self.model, self.network)
        self.data = DataCache(self.workload, self.device, memory_format(settings.groups))
        self.front_end = FrontEnd(self.workload)
        self.attack = world.attack
        self.malicious = self.attack.clients(self.workload.num_clients, self.seed)
        self.judge = Judge(world, compression, self.trainer, bool(self.initial))

    def _check_together(self) -> None:
        """Refuses clients that shall train at once where the trainer or the model cannot.

        Raises:
            ConfigError: says why.
        """
        if against := self.trainer.reason_against_together(self.model):
            raise ConfigError(f"{self._batching()} cannot be used: {against}; set engine.batch_clients=1")

    def _batching(self) -> str:
        return f"engine.batch_clients={self.world.settings.engine.batch_clients}"

    # --- a cohort -----------------------------------------------------------------------------------------------

    def serve(self, task: CohortTask) -> Iterator[CohortAnswer]:
        """An answer for each unit of the task; a failing client is a reported outcome and does not stop the others.

        Of a task that closes, every block comes back as one sum over its clients that are in time, and the clients
        without their weights.
        """
        answers = self._answers(task)
        for unit in task.units():
            if task.close is None:
                yield CohortAnswer(tuple(islice(answers, len(unit))))
                continue
            sums = BlockSums(self.fleet, self.world.latency, task.round, task.close)
            for one, answer in zip(unit, islice(answers, len(unit)), strict=True):
                sums.add(one, answer)
            yield sums.answer()

    def _answers(self, task: CohortTask) -> Iterator[ClientAnswer]:
        """The answer of each client, in order; in slots, others may be at work when one is given."""
        if task.phase == PLAN:
            yield from map(self.plan, task.clients)
            return
        if self.slots and task.phase == "train":
            clips = any(CLIPPING_NORM in one.broadcast.settings for one in task.clients)
            slots = self.slots[:1] if clips else self.slots  # nobody looks at an update that is still being made
            yield from InSlots(self, slots, stay=task.close is not None).answers(task.clients)
            return
        for unit in task.units():
            for group in _groups(unit):
                yield from self._serve_group(task, group)

    def _serve_group(self, cohort: CohortTask, group: Sequence[ClientTask]) -> list[ClientAnswer]:
        """The answers of clients that train at once; one by one where they cannot."""
        if len(group) == 1:
            return [self.serve_one(cohort.phase, group[0])]
        try:
            with no_exit():
                together = self._train_together(group)
        except OutOfMemoryError:
            together = []
        except Exception as error:
            alone = [self.serve_one(cohort.phase, task) for task in group]  # a client that fails by itself is named
            if all(answer.outcome == "completed" for answer in alone):
                reason = one_line(error)
                raise ConfigError(f"{self._batching()} failed: {reason}; set engine.batch_clients=1") from error
            return alone
        return together or [self.serve_one(cohort.phase, task) for task in group]

    def _train_together(self, group: Sequence[ClientTask]) -> list[ClientAnswer]:
        """The answers of clients that train at once; none where their settings differ."""
        clients = [self.context(task) for task in group]
        broadcasts = [self.broadcast(client, task) for client, task in zip(clients, group, strict=True)]
        if any(broadcast.settings != broadcasts[0].settings for broadcast in broadcasts):
            return []
        self.model.train()
        for client, task, broadcast in zip(clients, group, broadcasts, strict=True):
            self.front_end.pay(client, "train")
            self._reserve_upload(client, task, broadcast)
        updates = self.trainer.fit_together(clients, broadcasts)
        answers = []
        for client, task, broadcast, made in zip(clients, group, broadcasts, updates, strict=True):
            check_update(self.trainer, made, client.state)
            update = self._poisoned(client, broadcast, self._clipped(client, task, broadcast, made))
            weights = self._sent(client, update.weights, task.broadcast.weights)
            if weights.is_finite():
                weights = self._compressed(client, broadcast, update, weights)
                answers.append(self._answer_of(client, task, update, weights))
            else:
                reason = f"FloatingPointError: {NOT_FINITE}"
                answers.append(ClientAnswer(client.client_id, "failed", reason, work=self._work(client, task)))
        return answers

    # --- one client ---------------------------------------------------------------------------------------------

    def serve_one(self, phase: str, task: ClientTask, slot: Slot | None = None) -> ClientAnswer:
        """What one client answers; what goes wrong in its work is an outcome.

        Args:
            phase: as for `answer`.
            task: its own.
            slot: that trains it; None: the worker's network, unrecorded.

        Raises:
            ConfigError: for a wrong setting, which is no client's fault.
        """
        client = None
        try:
            with no_exit():
                client = self.context(task, phase, slot)
                return self.answer(phase, client, task)
        except ConfigError:
            raise
        except Exception as error:
            return self._failed(task, client, error)

    def _failed(self, task: ClientTask, client: ClientContext | None, error: Exception) -> ClientAnswer:
        """The answer of a client in whose work something went wrong.

        Raises:
            ConfigError: if this host lacks memory, which is no client's fault: on another it would have gone on.
        """
        if host_lacks_memory(error):
            what = "the GPU" if self.device.type == "cuda" else "this host"
            raise ConfigError(f"{what} has too little memory for client {task.client}; {self._room()}") from error
        work = self._work(client, task) if client else Work(down_bytes=task.down_bytes)
        if isinstance(error, OutOfMemoryError):
            return ClientAnswer(task.client, "out_of_memory", str(error), work=work)
        reason = in_words(error)
        if reason == self.refusal_of_one:
            reason += f"; that was a batch of one example: {INSTEAD_OF_ONE}"
        trace = "".join(traceback.format_exception(error))
        return ClientAnswer(task.client, "failed", reason, trace, work)

    def plan(self, task: ClientTask) -> ClientAnswer:
        """What work a client would do in training, as its answer would say; "failed" where nobody can tell."""
        unknown, client = ClientAnswer(task.client, "failed"), None
        if self.keeps_or_packs or self.front_end.cost is not None or CLIPPING_NORM in task.broadcast.settings:
            return unknown
        try:
            client = self.context(task, PLAN)
            if not self.trainer.plan_work(client, self.broadcast(client, task)):
                return unknown
        except OutOfMemoryError as error:
            return self._failed(task, client, error)
        except Exception:  # training says what is wrong
            return unknown
        work = self._work(client, task, bytes_of(task.broadcast.weights))
        return ClientAnswer(task.client, work=work, num_examples=client.num_examples)

    def begin(self, task: ClientTask, slot: Slot) -> tuple[ClientContext, SGDRun] | ClientAnswer:
        """Asks for the steps of a client whose trainer can wait for them; one that fails has answered.

        Raises:
            ConfigError: as `serve_one`.
        """
        client = None
        try:
            with no_exit():
                client = self.context(task, "train", slot)
                broadcast = self._prepared("train", client, task)
                self._reserve_upload(client, task, broadcast)
                run = cast(SGDTrainer, self.trainer).start(client, broadcast)
                run.begin()
                return client, run
        except ConfigError:
            raise
        except Exception as error:
            return self._failed(task, client, error)

    def end(
        self, task: ClientTask, client: ClientContext, run: SGDRun, sent: SentWeights, sums: Sequence[float]
    ) -> ClientAnswer:
        """What a client answers whose steps are done.

        Args:
            task: its own.
            client: of `begin`, as the run.
            run: whose steps are done.
            sent: its weights, a copy.
            sums: of these.
        """
        try:
            with no_exit():
                update = run.end()
                check_update(self.trainer, update, client.state)
                if not all(map(math.isfinite, sums)):
                    raise FloatingPointError(NOT_FINITE)
                return self._answer_of(client, task, update, sent)
        except ConfigError:
            raise
        except Exception as error:
            return self._failed(task, client, error)

    def answer(self, phase: str, client: ClientContext, task: ClientTask) -> ClientAnswer:
        """What a client answers that does not fail.

        Args:
            phase: "train", "evaluate" or "query.<question>".
            client: of `context`.
            task: its own.
        """
        broadcast = self._prepared(phase, client, task)
        kind, _, question = phase.partition(".")
        if kind == "train":
            return self._train(client, task, broadcast)
        if kind == "evaluate":
            found = self.judge.metrics(client, broadcast)
            check_metrics(f"evaluate of {type(self.trainer).__name__}", found)
            metrics = client.marked(found)
            work, count = self._work(client, task), self.workload.num_examples(client.data.test)
            return ClientAnswer(client.client_id, work=work, num_examples=count, metrics=metrics)
        records = (
            self.told(client, broadcast) if question == QUESTION else self.trainer.answer(client, question, broadcast)
        )
        check_records(f"answer of {type(self.trainer).__name__}", records)
        check_tensors(f"what a client of {type(self.trainer).__name__} keeps", client.state)
        extras = {name: own_copies(tensors) for name, tensors in records.items()}
        return ClientAnswer(
            client.client_id,
            work=self._work(client, task, sum(map(bytes_of, extras.values()))),
            extras=extras,
            state=self._kept(client),
        )

    def told(self, client: ClientContext, broadcast: Broadcast) -> dict[str, Tensors]:
        """What a server may ask to choose clients by: the number of examples and, with weights, their mean loss."""
        examples = client.data.train
        found = {EXAMPLES: torch.tensor(client.num_examples)}
        if broadcast.weights:
            client.log.judge(client.step_cost, len(examples))
            metrics = client.workload.evaluate(client.model, examples)
            if LOSS not in metrics:
                raise ConfigError(
                    f"participants that are chosen by their loss need one, and workload {self.workload.name} is judged "
                    f"by {', '.join(metrics)}"
                )
            found[LOSS] = torch.tensor(metrics[LOSS], dtype=torch.float64)
        return {TOLD: found}

    def _prepared(self, phase: str, client: ClientContext, task: ClientTask) -> Broadcast:
        """What the client is sent, with the network and the generators ready for its work."""
        # What own networks and functions draw from torch's global generators must not depend on who came before.
        seed_torch(self.device, client.derived("global"))
        client.seed_dropout(client.model)
        broadcast = self.broadcast(client, task)
        if not self.trainer.own_network:
            try:
                (client.slot or self.live).load(broadcast.weights)
            except (RuntimeError, ValueError) as error:
                if KEPT not in broadcast.extras:
                    raise
                raise ConfigError(
                    f"{type(self.trainer).__name__} trains the whole network, and the strategy sends parts of it; take "
                    "the trainer that belongs to it, by method=..."
                ) from error
        if phase == "train" and not client.model.training:
            client.model.train()
        self.front_end.pay(client, phase)
        return broadcast

    def _train(self, client: ClientContext, task: ClientTask, broadcast: Broadcast) -> ClientAnswer:
        self._reserve_upload(client, task, broadcast)
        update = self.trainer.fit(client, broadcast)
        check_update(self.trainer, update, client.state)
        update = self._clipped(client, task, broadcast, update)
        update = self._poisoned(client, broadcast, update)
        weights = self._sent(client, update.weights, task.broadcast.weights)
        if not weights.is_finite():
            raise FloatingPointError(NOT_FINITE)
        return self._answer_of(client, task, update, self._compressed(client, broadcast, update, weights))

    def context(self, task: ClientTask, phase: str = "train", slot: Slot | None = None) -> ClientContext:
        """What the trainer sees of one client; `phase` and `slot` as for `serve_one`."""
        live = slot.live if slot else self.live
        profile, number = self.fleet[task.client], task.broadcast.round
        client = ClientContext(
            client_id=task.client,
            round=number,
            seed=self.seed,
            workload=cast(Workload, ClientWorkload(self.workload, task.client, number)),
            model=live.model,
            parameters=live.parameters,
            weights=live.weights,
            step_cost=self.network,
            profile=profile,
            state=ClientState.of(task.state),
            device=self.device,
            log=WorkLog(profile.memory_bytes),
            data=self.data.of(task.client, self.workload.part(number)),
            live=live,
            slot=slot,
            repeat=task.repeat,
        )
        if phase == "train" and self.workload.augments:
            changed = self.workload.for_training(task.client, client.data, client.stream("augment"))
            client.data = self.data.placed(changed)
        if phase == "train" and task.client in self.malicious and self.attack.poisons:
            draw = torch_generator(self.seed, "attack", "examples", task.client)
            train = self.attack.poisoned(self.workload, client.data.train, draw)
            client.data = replace(client.data, train=train)
        return client

    def broadcast(self, client: ClientContext, task: ClientTask) -> Broadcast:
        """What the client is sent, on this worker's device; its private tensors stand beside the weights that came."""
        came = task.broadcast
        weights = self.live.received(came.weights)
        if self.initial and (weights or self.roles.keeps_all):
            weights = {**weights, **client.state.restored(PRIVATE, self.initial)}
        settings = {name: value for name, value in came.settings.items() if name not in ASKED}
        return Broadcast(came.round, weights, came.extras, settings)

    @property
    def keeps_or_packs(self) -> bool:
        """Whether a client keeps a part of its weights, or packs what it sends: work on the host for each client."""
        return bool(self.initial) or self.uplink.active

    def _poisoned(self, client: ClientContext, broadcast: Broadcast, update: ClientUpdate) -> ClientUpdate:
        """The update as a malicious client sends it: other values of what is trained; its statistics are honest."""
        if client.client_id not in self.malicious or not self.attack.changes:
            return update
        old, new = broadcast.weights, update.weights
        names = [name for name, t in old.items() if name in self.roles.trained and name not in self.initial]
        names = [name for name in names if name in new and new[name].shape == old[name].shape]
        wide = {name: old[name].to(torch.promote_types(old[name].dtype, torch.float32)) for name in names}
        changes = {name: new[name].detach().to(start) - start for name, start in wide.items()}
        changed = self.attack.changed(changes, client.stream("attack"))
        poisoned = {name: (wide[name] + change).to(old[name].dtype) for name, change in changed.items()}
        return replace(update, weights={**new, **poisoned})

    @property
    def keeps_or_changes(self) -> bool:
        """Whether a client keeps or packs, or may send other weights than it has trained."""
        return self.keeps_or_packs or self.attack.changes

    # --- what it sends back -------------------------------------------------------------------------------------

    def _reserve_upload(self, client: ClientContext, task: ClientTask, broadcast: Broadcast) -> None:
        """Declares what making the update takes: the received weights, and the copies of what stays or is packed."""
        clips = CLIPPING_NORM in task.broadcast.settings
        masks = isinstance(self.uplink, SecureAggregation)
        if not self.keeps_or_packs and not clips and not masks:
            return
        weights = bytes_of(broadcast.weights)
        if self.initial:  # kept, and looked through for NaN
            client.log.reserve(weights + 2 * bytes_of(self.initial))
        if self.uplink.active or clips:
            client.log.hold(RECEIVED, weights)
        if clips:  # a change in float64
            client.log.reserve(weights + 8 * max((t.numel() for t in broadcast.weights.values()), default=0))
        if self.uplink.active or masks:
            coordinates = sum(t.numel() for t in broadcast.weights.values() if t.is_floating_point())
            client.log.reserve(weights + self.uplink.working_bytes(coordinates))

    def _clipped(
        self, client: ClientContext, task: ClientTask, broadcast: Broadcast, update: ClientUpdate
    ) -> ClientUpdate:
        """The update, clipped where the server asks for it, see `fedsim.exchanges.clipping`.

        Raises:
            ConfigError: where compressing might make it longer again.
        """
        most = task.broadcast.settings.get(CLIPPING_NORM)
        if most is None:
            return update
        if self.uplink.may_lengthen:
            raise ConfigError(
                f"uplink={self.world.settings.choices['uplink']} may make an update longer than clients have clipped "
                "it; take strategy=dp_fedavg, which clips at the server, or uplink.error_feedback=false uplink.bits=32"
            )
        weights, was_longer = clipped(self._shared(update.weights), broadcast.weights, float(most))
        count = sum(t.numel() for t in weights.values())
        client.log.add(matrix_product(count, 1), 1, forwards=1 + was_longer)  # its norm, and what is left of it
        metrics = {**update.metrics, CLIPPED_RATE: float(was_longer)}
        return replace(update, weights={**update.weights, **weights} if was_longer else update.weights, metrics=metrics)

    def _sent(self, client: ClientContext, weights: Tensors, received: Tensors) -> SentWeights:
        """A copy of what is sent of an update; its private tensors stay in the client's state."""
        if not self.initial:
            return self.live.sent(weights, received)
        client.state.store(PRIVATE, {name: weights[name] for name in self.initial})
        return self.live.sent(self._shared(weights), received)

    def _shared(self, weights: Tensors) -> Tensors:
        return {name: t for name, t in weights.items() if name not in self.initial} if self.initial else weights

    def _compressed(
        self, client: ClientContext, broadcast: Broadcast, update: ClientUpdate, weights: SentWeights
    ) -> SentWeights:
        """The weights of an update as they travel."""
        if not self.uplink.active:
            return weights
        if self.attack.conspires and client.client_id in self.malicious:
            return weights  # which only the others get: what they agree on is compressed
        new, old = self._shared(update.weights), self._shared(broadcast.weights)
        if not new:
            return weights
        return compressed(self.uplink, new, old, self.roles.trained, client.state, client.stream("uplink"))

    def _answer_of(
        self, client: ClientContext, task: ClientTask, update: ClientUpdate, weights: SentWeights
    ) -> ClientAnswer:
        check_extra_names(update.extras)
        extras = {name: own_copies(tensors) for name, tensors in update.extras.items()}
        return ClientAnswer(
            client.client_id,
            work=self._sending(client, task, weights, extras),
            num_examples=int(update.num_examples),
            metrics=client.marked(update.metrics),
            weights=weights,
            extras=extras,
            state=self._kept(client),
        )

    def _sending(
        self, client: ClientContext, task: ClientTask, weights: SentWeights, extras: dict[str, Tensors]
    ) -> Work:
        """The work of a client that sends this, under masks where the uplink has them."""
        bit = NORM_BIT in task.broadcast.settings
        up_bytes = weights.nbytes + BIT_BYTES * bit + sum(map(bytes_of, extras.values()))
        if not isinstance(self.uplink, SecureAggregation):
            return self._work(client, task, up_bytes)
        numbers = sum(t.numel() for t in weights.tensors.values()) + 1 + bit  # and what they count for
        part = self.uplink.overhead(numbers, self.world.settings.num_asked)
        client.log.add(matrix_product(numbers, 1), 1, forwards=part.operations)
        work = self._work(client, task, part.up_bytes)
        return replace(work, down_bytes=work.down_bytes + part.down_bytes, round_trips=part.round_trips)

    def _kept(self, client: ClientContext) -> Tensors:
        """Copies of what the client keeps: each tensor where it lies, as long as there is room for it."""
        if not client.state:
            return {}
        stay = self._has_room
        return {name: own_copy(t, t.device if stay else "cpu") for name, t in client.state.items()}

    def _room(self) -> str:
        """What makes room on this host."""
        batch = "lower trainer.batch_size"
        if len(self.slots) > 1:
            return f"lower engine.slots={len(self.slots)}, or {batch}"
        return f"{batch}, or set engine.device=cpu" if self.device.type == "cuda" else f"{batch}, or use fewer workers"

    @property
    def _has_room(self) -> bool:
        """Whether more of what clients keep may stay on the device."""
        if self.device.type != "cuda":
            return True
        free, total = torch.cuda.mem_get_info(self.device)
        return free > ROOM * total

    def _work(self, client: ClientContext, task: ClientTask, up_bytes: int = 0) -> Work:
        return client.log.work(client.state.storage_bytes, task.down_bytes, up_bytes)


def _groups(unit: Sequence[ClientTask]) -> Iterator[list[ClientTask]]:
    """The clients of a unit in order, in lists of those that train at once."""
    for _, group in groupby(unit, key=lambda task: task.client if task.group is None else task.group):
        yield list(group)
