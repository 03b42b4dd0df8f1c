"""The compressed network that each device of a fleet runs: how many channels, which weights, how many bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from devices.bounds import Checked, checked
from devices.compression.channels import ChannelGroups
from devices.compression.masks import apply_masks, global_masks, prunable
from devices.compression.prune import ROUND_TO, channel_scores, strongest
from devices.compression.quantise import quantise
from devices.compression.sizes import dense_bytes, nonzero_bytes, wire_bytes
from devices.errors import DeviceError
from devices.population import changed_by_group, of_device
from devices.profile import BY_NAME, DeviceProfile

KeepRatio = Annotated[float, Interval(gt=0, le=1)]
Sparsity = Annotated[float, Interval(ge=0, lt=1)]
BitWidth = Literal[32] | Annotated[int, Interval(ge=2, le=8)]


@checked("compression")
@dataclass(frozen=True)
class Recipe:
    """Steps that compress a network: channels first, then single weights, then bits.

    Attributes:
        keep: share of channels that stays, in (0, 1].
        sparsity: share of zeros among the weights that are left, in [0, 1).
        bits: of weights and of what layers read: 32 (floats) or 2 to 8.
    """

    keep: KeepRatio = 1.0
    sparsity: Sparsity = 0.0
    bits: BitWidth = 32


@dataclass(frozen=True)
class Compressed:
    """A network as one kind of device runs it.

    Attributes:
        model: computes in floats what the device would.
        shape: the same network before its numbers changed, for tracing and pricing: a dense float one.
        keep_ratio: channels that stayed over all, after rounding.
        dense_bytes, nonzero_bytes, wire_bytes: see `devices.compression.sizes`.
    """

    model: nn.Module
    shape: nn.Module
    keep_ratio: float
    dense_bytes: int
    nonzero_bytes: float
    wire_bytes: int

    def facts(self) -> dict[str, float]:
        """Returns the sizes, as metrics of a report."""
        names = ("keep_ratio", "dense_bytes", "nonzero_bytes", "wire_bytes")
        return {name: float(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class Pruned:
    """A network without the channels and weights that a recipe removes: what all devices that follow it share.

    Attributes:
        network: with zeros where weights are gone; the model itself where nothing is.
        shape: see `Compressed`.
        keep_ratio: see `Compressed`.
    """

    network: nn.Module
    shape: nn.Module
    keep_ratio: float


class CompressionPlan(Checked, group="compression"):
    """The recipe that each device follows.

    Args:
        keep, sparsity, bits: of devices that `tiers` does not name.
        tiers: recipes by name, tier (low, mid, high: `devices.population`) or kind of device, the narrowest first; what
            one leaves out is taken from above.
        order: which channels stay: the strongest by L1 norm, or the first, as a width multiplier has them.
        round_to: channel counts are rounded up to a multiple of this.
        floor: share of its weights that every layer keeps under a mask.

    Raises:
        DeviceError: for a value or a name that is not allowed.
    """

    def __init__(
        self,
        keep: KeepRatio = 1.0,
        sparsity: Sparsity = 0.0,
        bits: BitWidth = 32,
        tiers: Mapping[str, Mapping[str, float]] | None = None,
        order: Literal["strongest", "first"] = "strongest",
        round_to: Annotated[int, Ge(1)] = ROUND_TO,
        floor: Annotated[float, Interval(ge=0, le=1)] = 0.03,
    ):
        self.usual = Recipe(keep, sparsity, bits)
        self.tiers = changed_by_group(self.usual, tiers or {}, "compression.tiers", DeviceError)
        self.order, self.round_to, self.floor = order, round_to, floor

    @property
    def active(self) -> bool:
        """Whether any device runs anything but the network itself."""
        return any(recipe != Recipe() for recipe in (self.usual, *self.tiers.values()))

    @property
    def device_reads(self) -> Mapping[str, str]:
        """What clients decide by their device, in words: which recipe it follows, where there are several."""
        return {BY_NAME: "recipes are given by tier (compression.tiers)"} if self.tiers else {}

    def recipe(self, profile: DeviceProfile) -> Recipe:
        """Returns the recipe that a device follows."""
        return of_device(self.tiers, profile, self.usual)

    @torch.no_grad()
    def apply(self, model: nn.Module, example: Tensor, recipe: Recipe, batches: Iterable[Tensor] = ()) -> Compressed:
        """Compresses a copy of a network.

        Args:
            model: stays as it is.
            example: a batch of input, for finding channels.
            recipe: what to do.
            batches: of inputs, for the ranges of activations where there are fewer bits.

        Raises:
            DeviceError: for networks whose channels cannot be removed.
        """
        return self.finish(self.prune(model, example, recipe), recipe, batches)

    @torch.no_grad()
    def prune(self, model: nn.Module, example: Tensor, recipe: Recipe) -> Pruned:
        """Removes channels and weights: the first half of `apply`, which depends on no device's data."""
        network, keep_ratio = model, 1.0
        if recipe.keep < 1:
            groups = ChannelGroups.find(model, example)
            kept = groups.first(recipe.keep, self.round_to)
            if self.order == "strongest":
                kept = strongest(groups, channel_scores(groups, model.state_dict()), recipe.keep, self.round_to)
            network, keep_ratio = groups.build(model, kept), groups.keep_ratio(kept)
        shape = network
        if recipe.sparsity:
            state = network.state_dict()
            masks = global_masks({name: state[name] for name in prunable(network)}, recipe.sparsity, self.floor)
            network = _loaded(network, apply_masks(state, masks))
        return Pruned(network, shape, keep_ratio)

    @torch.no_grad()
    def finish(self, pruned: Pruned, recipe: Recipe, batches: Iterable[Tensor] = ()) -> Compressed:
        """Quantises with the inputs of one device: the second half of `apply`."""
        network, state, bits = pruned.network, dict(pruned.network.state_dict()), {}
        dense = dense_bytes(state)
        if recipe.bits < 32:
            result = quantise(network, batches, recipe.bits, recipe.bits)
            network, state, bits = result.model, result.tensors, result.bits
        sizes = dense, nonzero_bytes(state, bits), wire_bytes(state, bits)
        return Compressed(network, pruned.shape, pruned.keep_ratio, *sizes)


def _loaded(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    from copy import deepcopy

    copy = deepcopy(network)
    copy.load_state_dict(state)
    return copy
