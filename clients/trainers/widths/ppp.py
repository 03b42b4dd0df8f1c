"""Prototype-based personalised pruning: one network whose gates say which channels a user needs, from a few examples.

After Kim et al., "Prototype-based Personalized Pruning", ICASSP 2021: a reconstruction from the abstract and the patent
abstract, federated by us, so no figure of it is the paper's; a patent (US 12 505 348 B2) covers the idea. Records:
see `fedsim.exchanges.ppp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Interval, Le
from torch import Tensor, nn
from torch.nn import functional as F

from clients.trainers.base import ClientContext
from clients.trainers.sgd import Objective, SGDRun
from clients.trainers.widths.masks import CHOICES, deployed
from clients.trainers.widths.subnet import SubnetTrainer
from devices.compression.channels import Kept
from devices.compression.gates import (
    GatedNetwork,
    Gates,
    PerSample,
    Personal,
    PerUser,
    layer_flops,
    personal_masks,
)
from devices.cost import ModelCost
from devices.errors import DeviceError
from devices.meter import inference_memory_bytes
from fedsim.errors import ConfigError
from fedsim.exchanges.ppp import GATES, MASK, MASKED, SHARE
from fedsim.exchanges.slices import BITS, KEPT, RATIO, model_cost
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.seeding import torch_generator
from fedsim.workloads.base import Examples, Tensors, Workload

Mask = Literal["personal", "other", "global", "random", "magnitude"]
Control = Literal["other", "global", "random", "magnitude", "gates", "dense"]
ORACLES = {"other", "global"}


class Gated(Objective):
    """L = L_inst + L_proto + beta L_reg + gamma L_div of one user's batch; the workload's loss where gates are open.

    Args:
        beta, reg_mode, diversity, gate_noise: see PPPTrainer; diversity is gamma.
    """

    def __init__(self, beta: float, reg_mode: str, diversity: float, gate_noise: bool):
        self.beta, self.reg_mode, self.diversity, self.gate_noise = beta, reg_mode, diversity, gate_noise

    def __call__(self, run: PPPRun, batch: Tensors) -> Tensor:
        workload, network, extras = run.client.workload, run.client.model, run.broadcast.extras
        if not isinstance(network, GatedNetwork):
            return workload.loss(network, batch)
        ratio = float(batch[RATIO]) if RATIO in batch else run.trainer.ratio(run.broadcast)
        gates, noise = network.gates, run.client.stream("gate-noise") if self.gate_noise else None
        if ratio == 1:  # the gates' gradients are zero, but they have some
            nothing = sum(p.sum() for p in gates.parameters()) * 0
            return workload.loss(network.network, batch) + nothing
        alone, user = PerSample(gates, ratio, noise), PerUser(gates, ratio, noise=noise)
        loss = workload.loss(network.through(alone), batch) + workload.loss(network.through(user), batch)
        flops = run.trainer.flops
        budget = self.regulariser(alone.values, ratio, flops) + self.regulariser(user.values, ratio, flops)
        loss = loss + self.beta * budget
        if self.diversity and SHARE in extras:
            share = extras[SHARE]
            own = {name: p[0] for name, p in user.prototypes.items()}
            loss = loss + self.diversity * sum(likeness(p, share[name].to(p.device)) for name, p in own.items())
        return loss

    def regulariser(self, values: Mapping[str, Tensor], ratio: float, flops: Mapping[str, float]) -> Tensor:
        """Returns L_reg of one path from straight-through gates, [batch, units] by group, and their layers' FLOPs."""
        means = {name: gates.mean() for name, gates in values.items()}
        if self.reg_mode == "per_layer":
            return torch.stack([(mean - ratio) ** 2 for mean in means.values()]).sum()
        total = sum(flops.values())
        return (torch.stack([mean * (flops[n] / total) for n, mean in means.items()]).sum() - ratio) ** 2


class PPPRun(SGDRun):
    """Finds the client's mask, then trains all that was sent, or only what the mask keeps (masked training)."""

    trainer: PPPTrainer

    def fit(self) -> ClientUpdate:
        trainer, sent, groups = self.trainer, self.broadcast, self.trainer.slices.groups
        trainer.check_settings(sent)
        ratio, held, masked = trainer.ratio(sent), trainer.channels_sent(sent), bool(sent.settings.get(MASKED, False))
        weights = trainer.fitting(sent.weights, held)
        own = wanted = held
        extras: dict[str, Tensors] = {}
        self.client = trainer.narrowed(self.client, held, weights)
        if ratio < 1:
            gates = trainer.gates(sent)
            if trainer.levels and not gates.conditioned:
                raise ConfigError(
                    f"trainer.levels={trainer.levels} needs gates that read the keep ratio: set "
                    "strategy.budget_conditioned=true, or leave trainer.levels out"
                )
            found = trainer.personal(self.client, gates, held, ratio)
            wanted = gates.kept(found.wanted)
            if masked:
                own = gates.kept(found.masks)
                self.client = trainer.narrowed(self.client, own, groups.within(weights, own, held))
            self.client = trainer.gated(self.client, gates, own)
            extras[GATES] = {name: t.detach() for name, t in gates.state_dict().items()}
        self.reserve()
        train_loss = self.train(self.batches())
        if masked:
            extras[KEPT] = {BITS: groups.pack(own)}
        if not masked or not _equal(own, wanted):
            extras[MASK] = {BITS: groups.pack(wanted)}
        metrics = {"train_loss": train_loss, "keep_ratio": trainer.plan.keep_ratio(wanted)}
        update = trainer.returned(self.client.weights, own, sent.weights)
        return ClientUpdate(self.client.client_id, self.client.num_examples, update, metrics, extras)

    def log_step(self, batch: int) -> None:
        """Reports both paths, where gates are at work."""
        passes = 2 if isinstance(self.client.model, GatedNetwork) else 1
        self.client.log.add(self.client.step_cost, batch, forwards=passes, backwards=passes)

    def reserve(self) -> None:
        """Reserves the memory of a step; both paths are held until the backward pass."""
        client, batch = self.client, min(self.trainer.batch_size, len(self.client.data.train))
        cost = client.step_cost.twice() if isinstance(client.model, GatedNetwork) else client.step_cost
        client.log.reserve(self.trainer.step_bytes(cost, batch, self.copies()))


class OnDemand:
    """What a PPPTrainer makes when it is first needed, of the model and of weights alone: the same for all clients."""

    def __init__(self) -> None:
        self.gates: Gates | None = None  # one object, loaded for each client
        self.costs: dict[tuple[int, ...], ModelCost] = {}
        self.prototypes: tuple[tuple[float, ...], list[tuple[Tensors, Tensors]]] = ((), [])  # of all clients


class PPPTrainer(SubnetTrainer):
    """SGD on cross-entropy under gates per example, plus the same under the user's prototype, plus the budget.

    With keep ratio 1 the gates are open, both paths are one pass, and this is plain SGD. Clients are judged with the
    network that their mask leaves, cut out for real, without training.

    Args:
        mask_mode: "threshold" keeps channels whose prototype is above one half; "topk" exactly the keep ratio.
        mask: what a client is judged with. Controls: "other" is the next client's mask, "global" that of the mean
            prototype of all clients, "random" a permutation of the own mask, "magnitude" the filters with the largest
            weights; all at the personal mask's channel counts but "other" and "global", which choose by mask_mode.
            "other" and "global" are ORACLES: they read other clients' examples, no bytes are counted for that, and
            judged clients get the metric `oracle`.
        controls: further masks, "gates" (per example) or "dense", judged beside as `accuracy_NAME`; at no cost. At
            the ratios of `judged_at` they are judged too, as `accuracy_NAME_at_RATIO`.
        support: m, examples of the client's own training part that make its prototype.
        beta: weight of the budget.
        reg_mode: "per_layer" sums (mean gate - ratio)^2 over the layers; "flops" takes one mean, weighted by FLOPs.
        diversity: gamma, weight of the likeness of the client's prototype to the share of clients that keep a channel.
        levels: with conditioned gates in full training: keep ratios that each step draws from; empty takes its own.
        gate_noise: logistic noise on the gates in training.
        subnet: arguments of SubnetTrainer.
    """

    run = PPPRun
    known_settings = SubnetTrainer.known_settings | {RATIO, MASKED}

    def __init__(
        self,
        mask_mode: Literal["threshold", "topk"] = "threshold",
        mask: Mask = "personal",
        controls: Sequence[Control] = (),
        support: Annotated[int, Ge(1), Le(10**6)] = 10,
        beta: Annotated[float, Ge(0)] = 2.0,
        reg_mode: Literal["per_layer", "flops"] = "per_layer",
        diversity: Annotated[float, Ge(0)] = 0.0,
        levels: Sequence[Annotated[float, Interval(gt=0, le=1)]] = (),
        gate_noise: bool = False,
        **subnet: Any,
    ):
        super().__init__(**subnet)
        self.mask_mode, self.mask, self.controls, self.support = mask_mode, mask, tuple(controls), support
        self.levels, self.objective = list(levels), Gated(beta, reg_mode, diversity, gate_noise)
        self.on_demand = OnDemand()

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds the channel groups that can be gated; gates come with the first broadcast that has some.

        Raises:
            ConfigError: for a model without such groups.
        """
        super().setup(workload, model, network)
        try:
            with torch.random.fork_rng(devices=[]):
                self.plan = Gates(self.slices.model, self.slices.groups)
        except DeviceError as error:
            raise ConfigError(f"{error}; take another model or another method") from error
        self.flops = layer_flops(self.slices.model, workload.sample(1)["x"], self.plan.names)  # of the gated layers

    def batches(self, client: ClientContext, broadcast: Broadcast) -> Iterator[Tensors]:
        """Yields the batches of plain SGD, each with a keep ratio where levels are drawn."""
        network = client.model
        if not self.levels or not isinstance(network, GatedNetwork) or not network.gates.conditioned:
            yield from super().batches(client, broadcast)
            return
        draw, choices = client.stream("keep-ratios"), torch.tensor(self.levels)
        for batch in super().batches(client, broadcast):
            yield {**batch, RATIO: choices[torch.randint(len(choices), (), generator=draw)]}

    # --- deployment ---------------------------------------------------------------------------------------------------

    def evaluate(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Prunes the network for the client, without a gradient, and judges what remains on its held-out part."""
        if not len(client.data.test):
            return {}
        ratio = self.ratio(broadcast)
        if ORACLES & {self.mask, *self.controls}:
            client.oracle()  # marks the results of all clients, whatever their ratio
        own = deployed(self, client, broadcast, self.mask, ratio)
        narrowed = self.narrowed(client, own, broadcast.weights)
        metrics = super(SubnetTrainer, self).evaluate(narrowed, broadcast)
        metrics["keep_ratio"] = self.plan.keep_ratio(own)
        aside = replace(client, log=type(client.log)(client.log.memory_bytes))  # controls are no work of the device
        for name, control, at in self.beside(ratio):
            self.judge_beside(self.control(aside, broadcast, control, at), name, metrics)
        client.log.judged |= aside.log.judged
        return metrics

    def beside(self, ratio: float) -> Iterator[tuple[str, str, float]]:
        """Yields what is judged beside the client's own network: name in the metrics, control, keep ratio."""
        yield from ((control, control, ratio) for control in self.controls)
        for at in self.judged_at:
            yield f"at_{float(at)}", self.mask, at
            yield from ((f"{control}_at_{float(at)}", control, at) for control in self.controls if control != "dense")

    def control(self, client: ClientContext, broadcast: Broadcast, name: str, ratio: float) -> ClientContext:
        """Returns the client with the network of a control, and its price."""
        if name in CHOICES:
            return self.narrowed(client, deployed(self, client, broadcast, name, ratio), broadcast.weights)
        groups = self.slices.groups
        dense = self.narrowed(client, groups.all(), broadcast.weights)
        if name == "dense" or ratio == 1 or GATES not in broadcast.extras:
            return dense
        gates = self.gates(broadcast)
        network = GatedNetwork(dense.model, gates).through(PerSample(gates, ratio))
        return replace(dense, model=network, step_cost=self.gated_cost(gates, groups.all()))

    def personal(self, client: ClientContext, gates: Gates, held: Kept, ratio: float) -> Personal:
        """Returns the masks that the client's support gives; one forward pass, which the device pays for."""
        x = self.supported(client.data.train, client.seed, client.client_id)
        cost = self.gated_cost(gates, held)
        client.log.reserve(inference_memory_bytes(cost, len(x)))
        client.log.add(cost, len(x), forwards=1)
        return personal_masks(GatedNetwork(client.model, gates, held), x.to(client.device), ratio, self.mask_mode)

    def supported(self, data: Examples, seed: int, client_id: int) -> Tensor:
        """Returns the inputs of the client's support, the same in every round, [m, ...]; fewer where it has fewer."""
        order = torch.randperm(len(data), generator=torch_generator(seed, "support", client_id))
        return data.gather(order[: self.support])["x"]

    # --- tensors and prices -------------------------------------------------------------------------------------------

    def ratio(self, broadcast: Broadcast) -> float:
        """Returns the keep ratio that the strategy sent.

        Raises:
            ConfigError: if it sent none.
        """
        if RATIO not in broadcast.settings:
            raise ConfigError(
                f"{type(self).__name__} got no keep ratio; take the strategy that belongs to it, by method="
            )
        return float(broadcast.settings[RATIO])

    def gates(self, broadcast: Broadcast) -> Gates:
        """Returns the gates that the strategy sent; one object for all clients."""
        tensors = broadcast.extra(GATES)
        if self.on_demand.gates is None:
            with torch.random.fork_rng(devices=[]):  # or the first client of a process would draw other dropout
                gates = Gates.like(tensors, self.slices.model, self.slices.groups)
            self.on_demand.gates = gates.to(self.slices.device)
        self.on_demand.gates.load_state_dict(tensors)
        return self.on_demand.gates

    def gated(self, client: ClientContext, gates: Gates, kept: Kept) -> ClientContext:
        """Returns the client with its network under gates, both to be trained."""
        network = GatedNetwork(client.model, gates, kept).train()
        parameters = [*client.parameters, *gates.parameters()]
        return replace(client, model=network, parameters=parameters, step_cost=self.gated_cost(gates, kept))

    def gated_cost(self, gates: Gates, kept: Kept) -> ModelCost:
        """Returns what one example costs on one path of a narrowed network under gates."""
        sizes = tuple(map(len, kept.values()))
        if sizes not in self.on_demand.costs:
            network = GatedNetwork(self.slices.groups.build(self.slices.model, kept), deepcopy(gates).cpu(), kept)
            network.switch = PerSample(network.gates, 0.5)
            self.on_demand.costs[sizes] = model_cost(
                self.slices.workload, network, f"{self.slices.cost(kept).name}, gated"
            )
        return self.on_demand.costs[sizes]


def likeness(prototype: Tensor, share: Tensor) -> Tensor:
    """Returns cos(p - 1/2, s - 1/2), a scalar: 1 where the user keeps what most keep."""
    return F.cosine_similarity(prototype - 0.5, share - 0.5, dim=0)


def _equal(a: Kept, b: Kept) -> bool:
    return all(torch.equal(index, b[name]) for name, index in a.items())
