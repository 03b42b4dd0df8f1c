"""Gradual pruning by magnitude with learned integers: the plain trainer that others must beat, and their base.

Pruning follows Zhu and Gupta, "To prune, or not to prune", 2017, with gradients that pass the mask alone; integers are
those of Esser et al., "Learned Step Size Quantization", ICLR 2020. The uncompressed network may teach: by its outputs
(Hinton et al., 2015), or by what it looks at (Park et al., NeurIPS 2020, see `devices.compression.attribution`).

The server averages dense weights in floats, so nothing but the model travels: masks, steps and bits are each client's
own, stay with it between rounds, and count in what its compressed network would take (`wire_bytes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy as copy_of
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.func import functional_call

from clients.trainers.base import ClientContext
from clients.trainers.compressing.sparse import SparseRun, SparseTrainer, copy, sizes
from clients.trainers.compressing.taught import TEACHER, Compressed, Layer, Seeing, agreement, cost_with_maps, see
from clients.trainers.sgd import Objective, SGDRun
from devices.bounds import checked
from devices.compression.attribution import Attributed, feature_layer
from devices.compression.distil import Remembering
from devices.compression.masks import Masks, filter_masks, global_masks, masked, prunable, sparsity_of
from devices.compression.quantise import fake_quantise, limits
from devices.compression.two_paths import step_of
from devices.cost import ModelCost
from devices.errors import DeviceError
from devices.population import changed_by_group, of_device
from devices.profile import BY_NAME, DeviceProfile
from fedsim.errors import ConfigError
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload

QUANTISER = "quantiser"  # group of a client's state: what the quantiser learns
LEAST_STEP = 1e-8
Bits = Literal[32] | Annotated[int, Interval(ge=2, le=8)]
# Tensors as large as the pruned weights, found out by `test_memory_contract.py`: of making masks, of a step.
MASK_COPIES, MASKED_COPIES, ROUNDED_COPIES = 7.3, 2.0, 3.3


class GradualRun(SparseRun):
    """The local loop of a network under masks and fake integers.

    Attributes:
        compresses: whether the dense rounds are over.
        learned: what the quantiser learns, by name; empty in floats.
        teacher: tensors of the uncompressed network; empty where nobody teaches.
    """

    trainer: GradualTrainer

    def __init__(self, trainer: GradualTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.compresses = broadcast.round > trainer.dense_rounds
        self.teacher, self.learned = Tensors(), Tensors()
        self.draw = client.stream("attribution")
        if self.compresses and trainer.bits < 32:
            group = f"{QUANTISER}."
            kept = {n.removeprefix(group): t.to(client.device) for n, t in client.state.items() if n.startswith(group)}
            learned = kept or trainer.first_learned(self.masks or trainer.masks_at(broadcast.round - 1))
            self.learned = Tensors({name: t.detach().clone().requires_grad_() for name, t in learned.items()})

    def fit(self) -> ClientUpdate:
        trainer, client = self.trainer, self.client
        trainer.check_settings(self.broadcast)
        if self.compresses and trainer.keeps_teacher:
            received = self.broadcast.weights
            if not all(f"{TEACHER}.{name}" in client.state for name in received):
                client.state.store(TEACHER, received)
            self.teacher = client.state.restored(TEACHER, received) if trainer.teaches else Tensors()
        self.reserve()
        self.client = replace(client, parameters=[*client.parameters, *self.trained()])
        train_loss = self.train(self.batches())
        if self.learned:
            client.state.store(QUANTISER, self.learned)
        self.keep_masks()
        metrics = {"train_loss": train_loss, "sparsity": sparsity_of(self.masks)}
        return ClientUpdate(client.client_id, client.num_examples, client.weights, metrics)

    def trained(self) -> list[Tensor]:
        """Returns what is trained beside the model's parameters."""
        return list(self.learned.values())

    def settle(self, broadcast: Broadcast) -> None:
        """Makes this the network that a client uses: under masks as they are after the round."""
        self.masks = self.masks or self.trainer.masks_at(broadcast.round)

    # --- networks -----------------------------------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """Returns the tensors in which the compressed network differs from the model."""
        if not self.compresses:
            return {}
        trainer, masks = self.trainer, self.masks
        pruned = {name: trainer.masked(self, w, masks[name]) for name, w in trainer.weights().items()}
        return {name: trainer.quantised(self, name, w) for name, w in pruned.items()}

    def student(self) -> Remembering:
        """Returns the compressed network under the masks of the moment."""
        model, trainer, tensors = self.client.model, self.trainer, self.tensors()
        if trainer.layer:
            network: Remembering = Seeing(Attributed(model, *trainer.layer), tensors)
        else:
            network = Remembering(lambda x: functional_call(model, tensors, (x,)))
        if not self.compresses:
            return network
        call = network.call

        def integers(x: Tensor) -> Tensor:
            with trainer.integer_inputs(model):
                return call(x)

        network.call = integers
        return network

    def taught(self, batch: Tensors) -> Remembering | Attributed:
        """Returns the uncompressed network after a pass of the batch, with its running statistics."""
        model, inputs = self.client.model, self.client.workload.inputs(batch)
        if self.trainer.layer:
            return see(model, self.teacher, inputs, self.trainer.layer)
        network, was_training = Remembering(lambda x: functional_call(model, self.teacher, (x,))), model.training
        model.eval()
        with torch.no_grad():
            network(*inputs)
        model.train(was_training)
        return network

    def left_out(self, taught: Attributed) -> Tensor | None:
        """Draws which channels of the teacher the maps of a step leave out; none but with "sswa"."""
        trainer = self.trainer
        if trainer.attribution != "sswa":
            return None
        return (torch.rand(taught.channels, generator=self.draw) < trainer.left_out).to(taught.features.device)

    # --- work ---------------------------------------------------------------------------------------------------------

    def log_step(self, batch: int) -> None:
        log, cost = self.client.log, self.client.step_cost
        if self.teacher:
            log.add(cost, batch, forwards=1)
        log.add(self.step_cost(), batch, forwards=1, backwards=1)

    def step_cost(self) -> ModelCost:
        """Returns the cost of a step of the student, maps included."""
        attributed = self.trainer.attributed_cost if self.teacher else None
        return attributed or self.client.step_cost

    def reserve(self) -> None:
        """Reserves the memory of a step, maps included, and that of making masks: magnitudes, sorted with places."""
        log, trainer = self.client.log, self.trainer
        for name, held_bytes in self.objective.held(self).items():
            log.hold(name, held_bytes)
        batch = min(trainer.batch_size, len(self.client.data.train))
        scratch_bytes = trainer.scratch_bytes(self) if self.compresses else 0
        log.reserve(trainer.step_bytes(self.step_cost(), batch, self.copies()) + scratch_bytes)
        if self.compresses and trainer.sparsity and not self.masks:
            weights = (2 if trainer.momentum else 1) * self.client.step_cost.parameter_bytes
            log.reserve(weights + round(MASK_COPIES * self.pruned_bytes()))

    def pruned_bytes(self) -> int:
        """Returns the bytes of the weights that are pruned."""
        return sum(w.nbytes for w in self.trainer.weights().values())

    def copies(self) -> float:
        """Counts what a step holds of each pruned weight beside it, in weights of the model."""
        if not self.compresses:
            return super().copies()
        share = self.pruned_bytes() / self.client.step_cost.parameter_bytes
        return super().copies() + self.trainer.weight_copies(self) * share


@checked("trainer.tiers", ConfigError)
@dataclass(frozen=True)
class Tier:
    """How far a device compresses: see GradualTrainer."""

    sparsity: Annotated[float, Interval(ge=0, lt=1)]
    bits: Bits
    activation_bits: Bits


class GradualTrainer(SparseTrainer):
    """SGD of a network that is pruned more and more, with fake integers for weights and for what layers read.

    `prune_rounds` 0 prunes at once, after `dense_rounds` of ordinary training (one shot, then fine-tuning); `sparsity`
    0 with fewer bits is quantisation-aware training. The teacher is the model as the client received it in its first
    round after the dense ones, kept on the device and never trained; give it `dense_rounds` in which to become good,
    and a cohort of all clients where it shall be no one else's half-pruned model.

    Zeros change sizes, never milliseconds: kernels multiply them as any number. Integers change milliseconds where
    weights or what layers read have 8 bits and neither has more, on devices that were measured in int8, either way.

    Args:
        dense_rounds: rounds of ordinary training before anything is compressed.
        prune: "weights", or whole "filters" (output channels, by mean magnitude), of which `sparsity` then is a share.
        classifier: the last layer is compressed, too.
        bits: of weights, with a learned step for each output channel; 32: floats.
        activation_bits: of what layers read, over the range of each batch; 32: floats.
        distil: share of the divergence from the teacher in the loss; 0: none.
        temperature: of the divergence.
        attribution: maps by which the student shall look where the teacher does: "swa" (weighted by sensitivity), "ewa"
            (equally), "sswa" (as "swa", without some channels of the teacher), or "none".
        attribution_weight: beta, of the distance between maps; 0 only reports how maps agree.
        left_out: share of the teacher's channels that "sswa" leaves out, drawn anew for each step.
        tiers: other `sparsity`, `bits` and `activation_bits` by name, tier (low, mid, high) or kind of device, the
            narrowest first, e.g. {phone: {sparsity: 0.5}}. All train the same dense weights, which are averaged.
        sparse: arguments of SparseTrainer.

    Attributes:
        variants: this trainer as devices of other tiers have it.
        layer: of the features that maps are of; None without attribution.
        attributed_cost: of the student's part of a step with maps.
    """

    needs_classes = True
    run: ClassVar[type[GradualRun]] = GradualRun

    def __init__(
        self,
        sparsity: Annotated[float, Interval(ge=0, lt=1)],
        prune_rounds: Annotated[int, Ge(0)],
        dense_rounds: Annotated[int, Ge(0)] = 0,
        prune: Literal["weights", "filters"] = "weights",
        classifier: bool = False,
        bits: Bits = 32,
        activation_bits: Bits = 32,
        distil: Annotated[float, Interval(ge=0, le=1)] = 0.0,
        temperature: Annotated[float, Gt(0)] = 2.0,
        attribution: Literal["none", "swa", "ewa", "sswa"] = "none",
        attribution_weight: Annotated[float, Ge(0)] = 100.0,
        left_out: Annotated[float, Interval(ge=0, lt=1)] = 0.1,
        tiers: Mapping[str, Mapping[str, float]] | None = None,
        **sparse: Any,
    ):
        super().__init__(sparsity, prune_rounds, **sparse)
        self.usual = Tier(sparsity, bits, activation_bits)
        self.tiers = changed_by_group(self.usual, tiers or {}, "trainer.tiers", ConfigError)
        self.variants: dict[Tier, GradualTrainer] = {}
        self.dense_rounds, self.prune, self.classifier = dense_rounds, prune, classifier
        self.bits, self.activation_bits = bits, activation_bits
        self.attribution, self.left_out = attribution, left_out
        self.attribution_weight = attribution_weight
        self.keeps_teacher = distil > 0 or attribution != "none"
        self.teaches = distil > 0 or (attribution != "none" and attribution_weight > 0)
        self.objective: Objective = Compressed(distil, temperature, attribution, attribution_weight)
        self.layer: Layer | None = None
        self.attributed_cost: ModelCost | None = None

    @property
    def device_reads(self) -> Mapping[str, str]:
        """Returns what clients decide by their device: how far they compress, where that goes by tier."""
        return {BY_NAME: "compression goes by tier (trainer.tiers)"} if self.tiers else {}

    def tier(self, profile: DeviceProfile) -> Tier:
        """Returns how far a device compresses."""
        return of_device(self.tiers, profile, self.usual)

    def on(self, profile: DeviceProfile) -> GradualTrainer:
        """Returns this trainer as a device has it."""
        return self.variants.get(self.tier(profile), self)

    def integer_bits(self, round: int, profile: DeviceProfile) -> int:
        """Returns the larger of the bits of weights and of what layers read on a device, behind the dense rounds."""
        tier = self.tier(profile)
        return max(tier.bits, tier.activation_bits) if round > self.dense_rounds else 32

    def start(self, client: ClientContext, broadcast: Broadcast) -> SGDRun:
        """Begins one client's round, as its device is to compress."""
        own = self.on(client.profile)
        return own.run(own, client, broadcast)

    def names(self, model: nn.Module) -> list[str]:
        """Returns weights of convolutions and linear layers; of several, the last one's only with `classifier`."""
        names = prunable(model)
        return names if self.classifier else names[:-1] or names

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds the weights to prune and, for maps, the features; prices a step with maps.

        Raises:
            ConfigError: for a model without such weights or features.
        """
        super().setup(workload, model, network)
        if self.attribution != "none":
            self._find_features(workload, model, network)
        self.variants = {tier: self._as(tier) for tier in self.tiers.values()}

    def _as(self, tier: Tier) -> GradualTrainer:
        made = copy_of(self)
        made.variants, made.bits, made.activation_bits = {}, tier.bits, tier.activation_bits
        made.become_sparse(tier.sparsity)
        return made

    def _find_features(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        device = next(model.parameters()).device
        try:
            self.layer = feature_layer(model, workload.inputs(workload.sample_on(device, 2)))
        except DeviceError as error:
            raise ConfigError(f"trainer.attribution={self.attribution} cannot be used: {error}") from error
        if self.attribution_weight:
            self.attributed_cost = cost_with_maps(workload, model, network, self.layer, self.attribution)

    def smallest(self, weights: Mapping[str, Tensor], sparsity: float, floor: float) -> Masks:
        """Returns masks of the smallest weights, or filters."""
        return (filter_masks if self.prune == "filters" else global_masks)(weights, sparsity, floor)

    def weight_copies(self, run: GradualRun) -> float:
        """Returns tensors as large as a pruned weight that a step holds: mask and product, and those of rounding."""
        return MASKED_COPIES + (ROUNDED_COPIES if self.bits < 32 else 0.0)

    def scratch_bytes(self, run: GradualRun) -> int:
        """Returns bytes that a step holds for a while, however large the weights are."""
        return 0

    # --- the compressed network ---------------------------------------------------------------------------------------

    def masked(self, run: GradualRun, weight: Tensor, mask: Tensor) -> Tensor:
        """Returns a weight as the masks of a training step leave it."""
        return masked(weight, mask)

    def first_learned(self, masks: Masks) -> Tensors:
        """Returns what the quantiser learns, as it is at first: steps 2 mean |w| / sqrt(Q) by output channel."""
        return {name: step_of(w, masks[name], self.bits) for name, w in self.weights().items()}

    def quantised(self, run: GradualRun, name: str, weight: Tensor) -> Tensor:
        """Returns a masked weight rounded by fake integers."""
        if self.bits == 32:
            return weight
        step = run.learned[name].clamp(min=LEAST_STEP).view(-1, *[1] * (weight.dim() - 1))
        return fake_quantise(weight, step, *limits(self.bits))

    def integers(self, run: GradualRun, name: str, weight: Tensor) -> tuple[Tensor, Tensor, int]:
        """Returns a masked weight as integers, their scales [out] or [1], and the bits of each."""
        step = run.learned[name].clamp(min=LEAST_STEP)
        rounded = (weight / step.view(-1, *[1] * (weight.dim() - 1))).round().clamp(*limits(self.bits))
        return rounded, step, self.bits

    def exported(self, run: GradualRun) -> tuple[Tensors, dict[str, int]]:
        """Returns what a device stores: tensors with pruned weights, and the bits of the integer ones.

        With bits below 32 a weight comes as integers int8 and `<layer>.scale`.
        """
        tensors: Tensors = Tensors(self.model.state_dict())
        bits: dict[str, int] = {}
        if not run.compresses:
            return tensors, bits
        for name, weight in self.weights().items():
            tensors[name] = masked(weight, run.masks[name])
            if self.bits < 32:
                integers, scale, bits[name] = self.integers(run, name, tensors[name])
                tensors[name] = integers.to(torch.int8)
                tensors[f"{name.removesuffix('weight')}scale"] = scale
        return tensors, bits

    # --- judging ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Returns metrics and sizes of the compressed network and, with attribution, how its maps agree."""
        if not len(client.data.test):
            return {}
        if (own := self.on(client.profile)) is not self:
            return own.evaluate(client, broadcast)
        run = self.run(self, client, broadcast)
        run.settle(broadcast)
        tensors, bits = self.exported(run)
        facts = sizes(client.weights, run.masks, tensors, bits)
        if bits:
            entries = {name: mask.numel() for name, mask in run.masks.items()}
            facts["mean_bits"] = sum(bits[name] * n for name, n in entries.items()) / sum(entries.values())
        student = run.tensors()
        if self.layer and run.compresses:
            facts |= self.agreement(client, {**client.weights, **student}, broadcast)
        copy(student, client.weights)
        with self.integer_inputs(client.model) if run.compresses else nullcontext():
            metrics = super().evaluate(client, broadcast)
        return {**metrics, **facts}

    def agreement(self, client: ClientContext, student: Mapping[str, Tensor], broadcast: Broadcast) -> dict[str, float]:
        """Returns how the maps of the compressed network agree with those of the client's teacher."""
        assert self.layer is not None
        model, layer = client.model, self.layer
        teacher = client.state.restored(TEACHER, broadcast.weights)

        def own(inputs: tuple[Tensor, ...]) -> Attributed:
            with self.integer_inputs(model):
                return see(model, student, inputs, layer)

        return agreement(client, own, lambda inputs: see(model, teacher, inputs, layer), self.attribution)
