"""The Flower ClientApp: unpacks a cohort message, lets the trainer work for each client in it, packs the answers.

The same app runs in this process, in Ray actors and on Flower SuperNodes; it builds its world (data, model, trainer)
once per process from the settings that come with the message. Nothing here knows a method.
"""

from __future__ import annotations

import gc
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, product
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from clients.state import ClientState
from clients.trainers.base import RECEIVED, ClientContext, ClientWorkload, LocalTrainer, OutOfMemoryError, WorkLog
from devices.compression.plan import CompressionPlan, Pruned, Recipe
from devices.cost import NetworkCost, Work, pack_works
from devices.errors import one_line
from devices.profile import DeviceProfile
from fedsim.engines.blocks import BlockSum
from fedsim.engines.memory import keep_freed_memory
from fedsim.errors import ConfigError, in_words, no_exit
from fedsim.exchanges.slices import price
from fedsim.grid.pricing import Prices
from fedsim.messages.records import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    SETTINGS,
    STATE,
    Broadcast,
    ClientUpdate,
    all_finite,
    broadcast_of,
    content_of_update,
    is_channels_last,
    lay_out,
    pack_cohort,
    packed_record,
    payload_bytes,
    record_like,
    record_of,
    tensors_of,
    unpack_cohort,
)
from fedsim.messages.uplink import compressed, decompress
from fedsim.models.norms import needs_two_examples, refusal_of_one
from fedsim.models.roles import TensorRoles
from fedsim.runs.deployment import CALIBRATION, calibration
from fedsim.seeding import derive, seed_torch
from fedsim.settings.build import WORLD_CACHE_SIZE, World, build_world, instantiate, memory_format, pick_device
from fedsim.workloads.base import ClientData, Tensors, Workload

app = ClientApp()
NOT_FINITE = "its update holds NaN or infinite weights; lower trainer.lr or set trainer.clip_norm"
INSTEAD_OF_ONE = "change trainer.batch_size, or take norms with running statistics"
PRIVATE = "private"  # group of a client's state
_Answered = tuple[RecordDict, dict[str, Any], Work]  # of one client: records, facts and work
CACHE_BYTES = 512 * 2**20  # of prepared client data per process


class Worker:
    """One process's world: a model that is reused for every client, and the data of the clients seen lately."""

    def __init__(self, world: World):
        self.world, self.workload, self.fleet = world, world.workload, world.fleet
        settings = world.settings
        keep_freed_memory()
        gc.collect()
        gc.freeze()  # the half million objects of the imports: looking through them again takes 3 % of small steps
        torch.set_num_threads(settings["engine"]["threads"])
        self.seed = settings["seed"]
        self.device = pick_device(settings["engine"]["device"])
        self.trainer: LocalTrainer = instantiate(settings, "trainer")
        self.uplink = instantiate(settings, "uplink")
        self.compression: CompressionPlan = instantiate(settings, "compression")
        if self.compression.active and self.trainer.own_network:
            name = type(self.trainer).__name__
            raise ConfigError(f"{name} gives each device a network of its own already; set compression=none")
        self.networks: dict[Recipe, NetworkCost] = {}  # what devices run, where that is not all of the model
        self.model = self.workload.build_model().to(self.device)
        self.memory_format = memory_format(settings)
        self.flat = _lay_out(self.model)
        self.slots: Tensors = dict(self.model.state_dict())
        self.channels_last = self.flat is not None and is_channels_last(self.slots.values())
        self.parameters: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        self.roles = TensorRoles.of(self.model, settings["private"])
        against = (
            self.trainer.reason_against_together(self.model) if settings["engine"].get("batch_clients", 1) > 1 else ""
        )
        if against:
            raise ConfigError(f"{self._batching()} cannot be used: {against}; set engine.batch_clients=1")
        self.network = self._price(self.model, "dense")
        self._check_batches()
        self.trainer.private = self.roles.private
        self.initial = {n: t.detach().clone() for n, t in self.slots.items() if n in self.trainer.private}
        self.trainer.setup(self.workload, self.model, self.network)
        self._data: OrderedDict[tuple[int, int], ClientData] = OrderedDict()
        self._data_bytes = 0
        self._shared: tuple[ArrayRecord, Tensors] | None = None
        self._shared_flat: torch.Tensor | None = None
        self._pruned: tuple[ArrayRecord | None, dict[Recipe, Pruned]] = (None, {})

    def _check_batches(self) -> None:
        """Refuses batches of single examples that the network cannot train on, or that never move its statistics.

        Where clients that fail are dropped, a client whose last batch it is may fail.
        """
        two, one = (self.workload.sample_on(self.device, size) for size in (2, 1))
        self.refusal_of_one = refusal_of_one(self.model, self.workload.loss, two, one)
        if self.refusal_of_one and self.world.settings["on_client_error"] != "drop":
            self._check_last_batches()
        if getattr(self.trainer, "batch_size", None) != 1:
            return
        if needs_two_examples(self.model, self.workload.inputs(one)[0]):
            raise ConfigError(
                f"trainer.batch_size=1 gives the batch norms of model {type(self.model).__name__} nothing to average "
                "over; take at least 2, or a model with another norm"
            )

    def _check_last_batches(self) -> None:
        """Refuses batches that leave a client one example at the end; looked for only where that fails."""
        parts = range(self.workload.part(1), self.workload.part(self.world.settings["rounds"]) + 1)
        for part, client_id in product(parts, range(self.workload.num_clients)):
            examples = len(self.workload.client_part(client_id, part).train)
            if self.trainer.ends_in_one(examples):
                raise ConfigError(
                    f"client {client_id} has {examples} examples to train on and ends in a batch of one, which model "
                    f"{type(self.model).__name__} cannot be trained on ({self.refusal_of_one}); {INSTEAD_OF_ONE}"
                )

    def _price(self, model: nn.Module, name: str) -> NetworkCost:
        """What one example costs in a network: FLOPs and memory of a step, and its layers where they can be traced."""
        return price(self.workload, model, name, self.device)

    def serve(self, header: dict[str, Any], parts: list[RecordDict]) -> RecordDict:
        """Answers a whole cohort message; a failing client is a reported outcome and does not stop the others.

        With `sums` in the header, every block comes back as one sum over its clients that are in time, and the clients
        without their weights.
        """
        sums = _BlockSums(self.world, header) if "sums" in header and not header.get("separate") else None
        answers, facts, works = [], [], []
        for number, (answer, fact, work) in enumerate(self._each(header, parts)):
            if sums is not None:
                fact["up_bytes"] = payload_bytes(answer)
                decompress(answer, parts[number])
                sums.add(number, answer, replace(work, up_bytes=fact["up_bytes"]), fact)
            answers.append(answer)
            facts.append(fact)
            works.append(work)
        added: dict[str, Any] = {}
        if sums is not None:
            added = {"sums": sums.facts()}
            answers += sums.parts()
        return pack_cohort({"clients": facts, **added, **pack_works(works)}, answers)

    def _each(self, header: dict[str, Any], parts: list[RecordDict]) -> Iterator[_Answered]:
        """The clients' answers in order: one by one, or in the message's groups where clients train at once."""
        round, phase, clients = header["round"], header["phase"], header["clients"]
        groups = header.get("groups", range(len(clients)))
        for _, group in groupby(range(len(clients)), key=lambda number: groups[number]):
            numbers = list(group)
            ids, own = [clients[n] for n in numbers], [parts[n] for n in numbers]
            alone = [lambda i=i, p=p: self._one(i, p, round, phase) for i, p in zip(ids, own, strict=True)]
            if len(numbers) == 1:
                yield alone[0]()
                continue
            try:
                with no_exit():
                    together = self._together(ids, own, round)
            except OutOfMemoryError:
                together = [make() for make in alone]
            except Exception as error:
                together = [make() for make in alone]  # a client that fails by itself is named
                if all(fact["outcome"] == "completed" for _, fact, _ in together):
                    reason = one_line(error)
                    raise ConfigError(f"{self._batching()} failed: {reason}; set engine.batch_clients=1") from error
            yield from together

    def _together(self, ids: list[int], parts: list[RecordDict], round: int) -> list[_Answered]:
        clients = [self.context(client_id, part, round) for client_id, part in zip(ids, parts, strict=True)]
        tasks = [self._task(client, part) for client, part in zip(clients, parts, strict=True)]
        if any(task.settings != tasks[0].settings for task in tasks):
            return [self._one(client_id, part, round, "train") for client_id, part in zip(ids, parts, strict=True)]
        self.model.train()
        answered = []
        for client, task in zip(clients, tasks, strict=True):
            self._reserve_upload(client, task)
        updates = self.trainer.fit_together(clients, tasks)
        for client, part, task, update in zip(clients, parts, tasks, updates, strict=True):
            weights = self._shared_part(client, update.weights, _record(part, ARRAYS))
            answer, outcome, reason = self._packed(client, task, update, weights), "completed", ""
            if not all_finite(weights):
                answer, outcome, reason = RecordDict(), "failed", f"FloatingPointError: {NOT_FINITE}"
            fact = {"client": client.client_id, "outcome": outcome, "reason": reason, "traceback": ""}
            answered.append((answer, fact, client.log.work(client.state.storage_bytes)))
        return answered

    def _batching(self) -> str:
        return f"engine.batch_clients={self.world.settings['engine']['batch_clients']}"

    def _one(self, client_id: int, part: RecordDict, round: int, phase: str) -> tuple[RecordDict, dict[str, Any], Work]:
        outcome, reason, trace, answer, client = "completed", "", "", RecordDict(), None
        try:
            with no_exit():
                client = self.context(client_id, part, round)
                answer = self._answer(client, part, phase)
        except ConfigError:
            raise
        except OutOfMemoryError as error:
            outcome, reason = "out_of_memory", str(error)
        except Exception as error:
            outcome, reason, trace = "failed", in_words(error), traceback.format_exc()
            if reason == self.refusal_of_one:
                reason += f"; that was a batch of one example: {INSTEAD_OF_ONE}"
        work = client.log.work(client.state.storage_bytes) if client else Work()
        if outcome != "completed":
            answer = RecordDict()
        return answer, {"client": client_id, "outcome": outcome, "reason": reason, "traceback": trace}, work

    def _answer(self, client: ClientContext, part: RecordDict, phase: str) -> RecordDict:
        # Dropout and its like draw from torch's global generators: they must not depend on who came before.
        seed_torch(self.device, derive(self.seed, "global", client.round, client.client_id))
        task = self._task(client, part)
        if not self.trainer.own_network:
            self._load(task.weights)
        kind, _, question = phase.partition(".")
        if kind == "train":
            return self._fit(client, task, _record(part, ARRAYS))
        if kind == "evaluate":
            metrics = self._judge(client, task)
            count = self.workload.num_examples(client.data.test)
            return RecordDict(
                {"metrics": MetricRecord({NUM_EXAMPLES: count, **{k: float(v) for k, v in metrics.items()}})}
            )
        records = {name: record_of(tensors) for name, tensors in self.trainer.answer(client, question, task).items()}
        answer = RecordDict(records)  # type: ignore[arg-type]
        if client.state:
            answer[STATE] = client.state.pack()
        return answer

    def _judge(self, client: ClientContext, task: Broadcast) -> dict[str, float]:
        """The trainer's judgement of what the client's device runs, with its sizes and predicted latency."""
        if not self.compression.active or not len(client.data.test):
            metrics = self.trainer.evaluate(client, task)
            prices: dict[str, float] = {}
            for name, network in client.log.judged.items():
                prices |= self._predicted(network, client.profile, name)
            return {**prices, **metrics}
        recipe = self.compression.recipe(client.profile)
        deployed = self.compression.finish(
            self._pruned_by(recipe), recipe, calibration(self.workload, client.data.train)
        )
        if recipe not in self.networks:
            self.networks[recipe] = self._price(deployed.shape, "compressed")
        network = self.networks[recipe]
        if recipe.bits < 32:
            batches, size = CALIBRATION
            client.log.add_examples(network, min(len(client.data.train), batches * size), size)
        shared = deployed.model is not self.model  # with other clients: what a trainer does to it is for this one only
        own = replace(client, model=deepcopy(deployed.model) if shared else self.model, step_cost=network)
        metrics = self.trainer.evaluate(own, task)
        return {**metrics, **deployed.facts(), **self._predicted(network, client.profile)}

    def _pruned_by(self, recipe: Recipe) -> Pruned:
        """The model as devices with this recipe share it; once for all clients that were sent the same weights."""
        record = self._shared[0] if self._shared else None
        if self._pruned[0] is not record or self.initial:  # with private tensors each client's model is another
            self._pruned = (record, {})
        made = self._pruned[1]
        if recipe not in made:
            made[recipe] = self.compression.prune(
                self.model, self.workload.inputs(self.workload.sample(2))[0].to(self.device), recipe
            )
        return made[recipe]

    def _predicted(self, network: NetworkCost, own: DeviceProfile, name: str = "") -> dict[str, float]:
        """FLOPs of one inference and its milliseconds on the client's device, and on each kind that the fleet has."""
        latency, end = self.world.latency, f"_{name}" if name else ""
        found = {f"latency_ms{end}": latency.inference_ms(network, own), f"flops{end}": float(network.forward_flops)}
        kinds = self.fleet.profiles if len(self.fleet.profiles) > 1 else ()
        return found | {f"latency_ms_on_{p.name}{end}": latency.inference_ms(network, p) for p in kinds}

    def _fit(self, client: ClientContext, task: Broadcast, model: ArrayRecord) -> RecordDict:
        if not self.model.training:
            self.model.train()
        self._reserve_upload(client, task)
        update = self.trainer.fit(client, task)
        packed = None
        if update.weights is self.slots and self.flat is not None and self._shared_flat is not None:
            packed = packed_record(self.flat, self.channels_last)  # the live model as it lies in memory: one copy
        weights = packed or self._shared_part(client, update.weights, model)
        if not all_finite(weights):
            raise FloatingPointError(NOT_FINITE)
        return self._packed(client, task, update, weights)

    def _reserve_upload(self, client: ClientContext, task: Broadcast) -> None:
        """Declares what making the update takes: the received weights, and the copies of what stays or is packed."""
        weights = sum(t.nbytes for t in task.weights.values())
        if self.initial:  # kept, and looked through for NaN
            client.log.reserve(weights + 2 * sum(t.nbytes for t in self.initial.values()))
        if self.uplink.active:
            client.log.hold(RECEIVED, weights)
            coordinates = sum(t.numel() for t in task.weights.values() if t.is_floating_point())
            client.log.reserve(weights + self.uplink.working_bytes(coordinates))

    def _task(self, client: ClientContext, part: RecordDict) -> Broadcast:
        """The client's instruction; its private tensors stand beside the weights that were sent."""
        task = broadcast_of(part, self._weights(part), client.round)
        if not self.initial or not task.weights:
            return task
        return replace(task, weights={**task.weights, **client.state.restored(PRIVATE, self.initial)})

    def _shared_part(self, client: ClientContext, weights: Tensors, model: ArrayRecord) -> ArrayRecord:
        """What is sent of an update, named as in `model`; its private tensors stay in the client's state."""
        if self.initial:
            client.state.store(PRIVATE, {name: weights[name] for name in self.initial})
        return record_like(self._shared_tensors(weights), model, self.channels_last)

    def _shared_tensors(self, weights: Tensors) -> Tensors:
        return {name: t for name, t in weights.items() if name not in self.initial} if self.initial else weights

    def _packed(self, client: ClientContext, task: Broadcast, update: ClientUpdate, weights: ArrayRecord) -> RecordDict:
        if self.uplink.active:
            new, old = self._shared_tensors(update.weights), self._shared_tensors(task.weights)
            weights = compressed(self.uplink, new, old, self.roles.trained, client.state, client.stream("uplink"))
        answer = content_of_update(update, weights)
        if client.state:
            answer[STATE] = client.state.pack()
        return answer

    def context(self, client_id: int, part: RecordDict, round: int) -> ClientContext:
        """What the trainer sees of one client."""
        profile = self.fleet[client_id]
        return ClientContext(
            client_id=client_id,
            round=round,
            seed=self.seed,
            workload=cast(Workload, ClientWorkload(self.workload, client_id, round)),
            model=self.model,
            parameters=self.parameters,
            weights=self.slots,
            step_cost=self.network,
            profile=profile,
            state=ClientState.unpack(_record(part, STATE) if STATE in part else None),
            device=self.device,
            log=WorkLog(profile.memory_bytes),
            data=self._client_data(client_id, self.workload.part(round)),
        )

    def _weights(self, part: RecordDict) -> Tensors:
        """The broadcast weights on this worker's device; unpacked once when the cohort shares them."""
        if ARRAYS not in part:
            return {}
        record = _record(part, ARRAYS)
        if self._shared is None or self._shared[0] is not record:
            weights = tensors_of(record, self.device)
            self._shared = (record, weights)
            same = self.flat is not None and list(weights) == list(self.slots)
            same = same and all(
                weights[n].dtype == t.dtype and weights[n].shape == t.shape for n, t in self.slots.items()
            )
            self._shared_flat = self._laid_out(weights) if same else None
        return self._shared[1]

    def _laid_out(self, weights: Tensors) -> Tensor:
        """The weights in the order and memory format of the model's own buffer; they become views of it."""
        assert self.flat is not None
        buffer, start = torch.empty_like(self.flat), 0
        for name, slot in self.slots.items():
            view = buffer.as_strided(slot.shape, slot.stride(), start)
            weights[name] = view.copy_(weights[name])
            start += slot.numel()
        return buffer

    @torch.no_grad()
    def _load(self, weights: Tensors) -> None:
        if not weights:
            return
        if weights.keys() != self.slots.keys():
            raise ValueError(f"the broadcast has weights {sorted(weights)}, the model {sorted(self.slots)}")
        if self.flat is not None and self._shared_flat is not None:
            self.flat.copy_(self._shared_flat)
            return
        torch._foreach_copy_(list(self.slots.values()), [weights[name] for name in self.slots])

    def _client_data(self, client_id: int, number: int) -> ClientData:
        key = (client_id, number)
        if key in self._data:
            self._data.move_to_end(key)
            return self._data[key]
        raw = self.workload.client_part(client_id, number)
        train, test = (part.materialise(self.device, self.memory_format) for part in (raw.train, raw.test))
        data = ClientData(train, test, raw.version)
        self._data[key] = data
        self._data_bytes += _bytes_of(data)
        while self._data_bytes > CACHE_BYTES and len(self._data) > 1:
            self._data_bytes -= _bytes_of(self._data.popitem(last=False)[1])
        return data


class _BlockSums:
    """The sums of a message's blocks, over the clients whose replies will be accepted.

    Args:
        header: of the cohort message: `sums` says when the exchange began and when it closes, `blocks` and
            `down_bytes` have an entry for each client.
    """

    def __init__(self, world: World, header: dict[str, Any]):
        self.header, self.limit_s = header, header["sums"]["limit_s"]
        self.prices = Prices(world.fleet, world.latency, header["round"], header["sums"]["start_s"])
        self.blocks = {number: (BlockSum(), []) for number in header["blocks"]}  # type: dict[int, tuple[BlockSum, list[int]]]

    def add(self, number: int, answer: RecordDict, work: Work, fact: dict[str, Any]) -> None:
        """Takes the weights out of a client's answer and adds them if the reply is in time."""
        work = replace(work, down_bytes=self.header["down_bytes"][number])
        if fact["outcome"] == "completed":
            weights = answer.pop(ARRAYS)
            client, (block, clients) = fact["client"], self.blocks[self.header["blocks"][number]]
            if self.prices.of(client, work, fact["outcome"], fact["reason"]).arrives(self.limit_s):
                block.add(weights, float(answer[METRICS][NUM_EXAMPLES]))  # type: ignore[arg-type]
                clients.append(client)

    def facts(self) -> list[dict[str, Any]]:
        """Of each block: its clients and the sum of their examples."""
        return [
            {"block": number, "clients": clients, "weight": block.weight}
            for number, (block, clients) in self.blocks.items()
        ]

    def parts(self) -> list[RecordDict]:
        """The sum of each block; empty where no client is in time."""
        return [RecordDict({ARRAYS: b.record()} if clients else {}) for b, clients in self.blocks.values()]


@lru_cache(maxsize=WORLD_CACHE_SIZE)
def worker_for(config_json: str) -> Worker:
    """The worker of this process for these settings; built at the first message of a run."""
    return Worker(build_world(config_json))


def serve(message: Message, _: Context) -> Message:
    """Handles every kind of cohort message; the header says which."""
    header, parts = unpack_cohort(message.content)
    with no_exit():
        worker = worker_for(str(message.content[SETTINGS]["json"]))
    return Message(worker.serve(header, parts), reply_to=message)


app.train()(serve)
app.evaluate()(serve)
app.query()(serve)


def _record(part: RecordDict, name: str) -> ArrayRecord:
    record = part[name]
    assert isinstance(record, ArrayRecord)
    return record


def _lay_out(model: nn.Module) -> torch.Tensor | None:
    """Joins the model's weights in one buffer, in the order of its state dict; None if it cannot (tied weights)."""
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = list(model.state_dict())
    return lay_out([live[name] for name in names]) if set(names) == set(live) else None


def _bytes_of(data: ClientData) -> int:
    return sum(t.element_size() * t.numel() for part in (data.train, data.test) for t in part.tensors.values())
