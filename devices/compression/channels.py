"""Cuts the smaller network that remains when some channels of a network are removed.

Groups of channels are found once per network (`channel_graph`); everything after that is `index_select` on state dicts,
so that a server and its clients can cut and mend weights without a graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from devices.compression.bits import pack_bits, unpack_bits
from devices.compression.channel_graph import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED, ChannelGroup, Coupling, find_groups
from devices.errors import DeviceError, one_line, unknown

Tensors = dict[str, Tensor]
Kept = dict[str, Tensor]  # by group: the channels that stay, ascending, [k] int64
PROBE_ERROR = 1e-8  # of double precision, relative to the largest output


class ChannelGroups:
    """The prunable channels of one network, by group, in the order of its layers.

    Outputs of the network and channels of its input are in no group. Values of the network do not matter, so the groups
    found in one model hold for every state dict of its kind.

    Args:
        groups: by name.
    """

    def __init__(self, groups: Mapping[str, ChannelGroup]):
        self.groups = dict(groups)
        self._cuts: dict[tuple[str, int], list[tuple[str, Coupling]]] = {}
        for name, group in self.groups.items():
            for coupling in group.couplings:
                for place in coupling.dims:
                    self._cuts.setdefault(place, []).append((name, coupling))
        self._dims: dict[str, list[int]] = {}
        for key, dim in sorted(self._cuts):
            self._dims.setdefault(key, []).append(dim)

    @classmethod
    def find(cls, model: nn.Module, example: Tensor) -> ChannelGroups:
        """Finds the groups and tries them out: a narrowed copy must compute what a copy with silenced channels does.

        Args:
            model: stays as it is.
            example: one batch of input, [batch, ...].

        Raises:
            DeviceError: for networks whose channels cannot be removed, saying why.
        """
        name = type(model).__name__
        copy = deepcopy(model).cpu().float().requires_grad_(True)
        example = example.detach().cpu()
        with torch.random.fork_rng(devices=[]):
            found = cls(find_groups(copy, example, name))
            if not found.groups:
                raise DeviceError(f"network {name} has no layer whose channels could be removed before its outputs")
            found._try_out(copy, example, name)
        return found

    # --- which channels stay --------------------------------------------------------------------------------------

    def all(self) -> Kept:
        """Returns every channel of every group: the dense network."""
        return {name: torch.arange(group.channels) for name, group in self.groups.items()}

    def first(self, ratio: float, round_to: int = 1) -> Kept:
        """Returns the first channels of every group; as in ordered dropout, smaller networks are parts of larger ones.

        Args:
            ratio: share that stays, in (0, 1]; rounded up to whole units.
            round_to: rounded up further to a multiple of this many channels, as far as there are.
        """
        return {name: torch.arange(self.count(name, ratio, round_to)) for name in self.groups}

    def count(self, name: str, ratio: float, round_to: int = 1) -> int:
        """Returns how many channels of a group stay at a ratio: whole units, at least one."""
        if not 0 < ratio <= 1:
            raise DeviceError(f"a keep ratio must be in (0, 1], got {ratio!r}")
        group = self.groups[name]
        step = math.lcm(group.unit, round_to)
        least = math.ceil(ratio * group.channels - 1e-9)
        return min(group.channels, -(-least // step) * step)

    @property
    def sizes(self) -> dict[str, int]:
        """By group: how many things may stay or go, each of which takes a bit."""
        return {name: group.channels for name, group in self.groups.items()}

    def mask_of(self, kept: Kept) -> dict[str, Tensor]:
        """Returns a mask for each group that is True where a channel stays, [channels] bool."""
        self.check(kept)
        return {
            name: torch.zeros(size, dtype=torch.bool).index_fill_(0, kept[name], True)
            for name, size in self.sizes.items()
        }

    def kept_of(self, masks: Mapping[str, Tensor]) -> Kept:
        """Returns the channels that masks of `mask_of` leave."""
        kept = {name: mask.nonzero().flatten() for name, mask in masks.items()}
        self.check(kept)
        return kept

    def pack(self, kept: Kept) -> Tensor:
        """Packs one bit per channel of all groups, first bit highest, [ceil(channels / 8)] uint8, for a message."""
        return pack_bits(torch.cat(list(self.mask_of(kept).values())))

    def unpack(self, packed: Tensor) -> Kept:
        """Reads the channels from what `pack` made.

        Raises:
            DeviceError: for another number of bytes, or a choice that `check` refuses.
        """
        sizes = self.sizes
        total = sum(sizes.values())
        if -(-total // 8) != len(packed):
            raise DeviceError(f"a mask of {total} channels takes {-(-total // 8)} bytes, got {len(packed)}")
        return self.kept_of(dict(zip(sizes, unpack_bits(packed, (total,)).split(list(sizes.values())), strict=True)))

    def keep_ratio(self, kept: Kept) -> float:
        """Returns the share of channels that stay."""
        return sum(map(len, kept.values())) / sum(group.channels for group in self.groups.values())

    def check(self, kept: Kept) -> None:
        """Refuses a choice that no network could be built from.

        Raises:
            DeviceError: for missing or unknown groups, and channels that are none, out of order or cut a unit.
        """
        for name in kept:
            if name not in self.groups:
                raise DeviceError(unknown("channel group", name, self.groups))
        for name, group in self.groups.items():
            if name not in kept:
                raise DeviceError(f"channel group {name!r} is missing; say for every group which channels stay")
            index = kept[name]
            rising = len(index) > 0 and int(index[0]) >= 0 and bool((index[1:] > index[:-1]).all())
            if not rising or int(index[-1]) >= group.channels:
                raise DeviceError(
                    f"channels of group {name!r} must be one or more of 0..{group.channels - 1}, ascending, got "
                    f"{index.tolist()}"
                )
            units = index.view(-1, group.unit) if len(index) % group.unit == 0 else None
            if units is None or bool(
                (units != units[:, :1] // group.unit * group.unit + torch.arange(group.unit)).any()
            ):
                raise DeviceError(
                    f"channels of group {name!r} are normalised in blocks of {group.unit}, so whole blocks stay or go, "
                    f"got {index.tolist()}"
                )

    # --- cutting and mending ----------------------------------------------------------------------------------------

    def indices(self, kept: Kept) -> dict[str, dict[int, Tensor]]:
        """Returns the entries of each tensor that stay, by state-dict key and dimension, ascending, [k] int64."""
        self.check(kept)
        stay: dict[int, Tensor] = {}  # by coupling: a layer's weight and bias share one list
        found: dict[str, dict[int, Tensor]] = {}
        for key, dims in self._dims.items():
            for dim in dims:
                cuts = self._cuts[key, dim]
                number = id(cuts[0][1])
                if number not in stay:
                    stay[number] = _remaining(cuts, kept)
                found.setdefault(key, {})[dim] = stay[number]
        return found

    def slice(self, state: Mapping[str, Tensor], kept: Kept) -> Tensors:
        """Returns the tensors of the smaller network; those that no group touches are the given ones."""
        indices = self.indices(kept)
        small = {}
        for key, tensor in state.items():
            for dim, index in indices.get(key, {}).items():
                if len(index) < tensor.shape[dim]:
                    tensor = tensor.index_select(dim, index.to(tensor.device))
            small[key] = _laid_out_as(tensor, state[key])
        return small

    def within(self, state: Mapping[str, Tensor], inner: Kept, outer: Kept) -> Tensors:
        """Cuts the tensors of a still narrower network from those of a narrowed one; gradients go through.

        Args:
            state: tensors of the network that keeps `outer`.
            inner: channels of the dense network that stay, all of them in `outer`.
            outer: those that `state` has.

        Raises:
            DeviceError: if `inner` has a channel that `outer` lacks.
        """
        for name, index in inner.items():
            if not bool(torch.isin(index, outer[name]).all()):
                raise DeviceError(f"channel group {name!r}: only channels that the narrowed network has can stay")
        wanted, there = self.indices(inner), self.indices(outer)
        small = {}
        for key, tensor in state.items():
            for dim, index in wanted.get(key, {}).items():
                if len(index) < tensor.shape[dim]:
                    places = torch.searchsorted(there[key][dim], index)
                    tensor = tensor.index_select(dim, places.to(tensor.device))
            small[key] = _laid_out_as(tensor, state[key])
        return small

    def scatter(self, small: Mapping[str, Tensor], kept: Kept, like: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
        """Puts the tensors of a smaller network where they were in the dense one.

        Args:
            small: as `slice` gives them.
            kept: what was kept.
            like: tensors of the dense network, for their shapes.

        Returns:
            Dense tensors with zeros elsewhere, and masks of the same shapes that are True where `small` has a value.
            Loaded into the dense network, the first compute what the smaller network does.

        Raises:
            DeviceError: for tensors that do not have the shapes of this choice.
        """
        indices = self.indices(kept)
        dense, masks = {}, {}
        for key, tensor in small.items():
            shape = like[key].shape
            places = indices.get(key, {})
            due = tuple(len(places[d]) if d in places else size for d, size in enumerate(shape))
            if tuple(tensor.shape) != due:
                raise DeviceError(f"{key} should come as {list(due)} of {list(shape)}, got {list(tensor.shape)}")
            if not places or tensor.shape == shape:
                dense[key], masks[key] = tensor.clone(), torch.ones(shape, dtype=torch.bool, device=tensor.device)
                continue
            where = grid(places, shape, tensor.device)
            dense[key] = _laid_out_as(tensor.new_zeros(shape), like[key])
            dense[key][where] = tensor
            masks[key] = torch.zeros(shape, dtype=torch.bool, device=tensor.device)
            masks[key][where] = True
        return dense, masks

    @torch.no_grad()
    def build(self, model: nn.Module, kept: Kept) -> nn.Module:
        """Builds the static network of the sizes that remain, with the model's values; the model stays as it is."""
        small = deepcopy(model)
        sizes = self._layer_sizes(kept)
        tensors = self.slice(model.state_dict(), kept)
        for name, module in small.named_modules():
            for own, old in [*module._parameters.items(), *module._buffers.items()]:
                key = f"{name}.{own}" if name else own
                if old is not None and key in tensors and tensors[key].shape != old.shape:
                    new = tensors[key].clone(memory_format=torch.preserve_format)
                    setattr(module, own, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
            if name in sizes:
                _resize(module, sizes[name])
        return small

    def _layer_sizes(self, kept: Kept) -> dict[str, dict[str, int]]:
        """Returns the new channel counts by layer and side."""
        sides: dict[tuple[str, str], list[tuple[str, Coupling]]] = {}
        for name, group in self.groups.items():
            for coupling in group.couplings:
                sides.setdefault((coupling.layer, coupling.side), []).append((name, coupling))
        sizes: dict[str, dict[str, int]] = {}
        for (layer, side), cuts in sides.items():
            sizes.setdefault(layer, {})[side] = len(_remaining(cuts, kept))
        return sizes

    def _try_out(self, copy: nn.Module, example: Tensor, name: str) -> None:
        """Removes half of the channels of a copy with random norms, once for real and once by zeros."""
        copy.double().eval().requires_grad_(False)
        x = example.double() if example.is_floating_point() else example
        draw = torch.Generator().manual_seed(0)
        for module in copy.modules():  # fresh norms are all alike, and would hide channels that were mixed up
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if isinstance(module, (*BATCH_NORMS, nn.GroupNorm)) and tensor is not None and tensor.ndim:
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draw, dtype=tensor.dtype))
        kept = {}
        for group in self.groups.values():
            units = group.channels // group.unit
            some = torch.randperm(units, generator=draw)[: max(1, units // 2)].sort().values
            kept[group.name] = (some[:, None] * group.unit + torch.arange(group.unit)).flatten()
        state = copy.state_dict()
        try:
            narrow = self.build(copy, kept)(x)
            copy.load_state_dict(self.scatter(self.slice(state, kept), kept, state)[0])
            silenced = copy(x)
            alike = narrow.shape == silenced.shape
            error = (
                float((narrow - silenced).abs().max() / silenced.abs().max().clamp(min=1e-300)) if alike else math.inf
            )
        except RuntimeError as failure:
            reason = one_line(failure)[:150]
            raise DeviceError(f"network {name} cannot run with fewer channels: {reason}") from failure
        if error > PROBE_ERROR:
            raise DeviceError(
                f"network {name} mixes its channels outside convolutions and linear layers (a norm, a softmax or a "
                "reshape over channels), so that removing some changes the others; it cannot be narrowed"
            )


def grid(places: Mapping[int, Tensor], shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """Returns indices of the chosen entries of some dimensions of a tensor, and of all entries of the others."""
    last = max(places)
    index = []
    for dim in range(last + 1):
        own = places[dim].to(device) if dim in places else torch.arange(shape[dim], device=device)
        index.append(own.view(-1, *[1] * (last - dim)))
    return tuple(index)


def _remaining(cuts: list[tuple[str, Coupling]], kept: Kept) -> Tensor:
    """Entries of one dimension that stay when the groups that share it (concatenated maps) keep these channels."""
    mask = torch.ones(cuts[0][1].size, dtype=torch.bool)
    for _, coupling in cuts:
        mask[coupling.entries.flatten()] = False
    for name, coupling in cuts:
        mask[coupling.entries[kept[name]].flatten()] = True
    return mask.nonzero().flatten()


def _laid_out_as(tensor: Tensor, model: Tensor) -> Tensor:
    """Copies a tensor into the memory format of `model`, as kernels choose by strides, even of a single channel."""
    last = torch.channels_last
    if tensor.dim() != 4 or model.stride() != torch.empty(model.shape, device="meta", memory_format=last).stride():
        return tensor
    own = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=last)
    return tensor if tensor.stride() == own.stride() else own.copy_(tensor)


def _resize(module: nn.Module, sizes: Mapping[str, int]) -> None:
    """Writes the new sizes into the fields that modules keep beside their tensors."""
    both = sizes.get("both")
    if isinstance(module, CONVOLUTIONS) and both is not None:
        module.in_channels = module.out_channels = module.groups = both
    elif isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        module.out_channels = sizes.get("out", module.out_channels)
        module.in_channels = sizes.get("in", module.in_channels)
    elif isinstance(module, nn.Linear):
        module.out_features = sizes.get("out", module.out_features)
        module.in_features = sizes.get("in", module.in_features)
    elif isinstance(module, nn.GroupNorm) and both is not None:
        module.num_groups = both // (module.num_channels // module.num_groups)
        module.num_channels = both
    elif isinstance(module, BATCH_NORMS) and both is not None:
        module.num_features = both
    elif isinstance(module, nn.PReLU) and both is not None:
        module.num_parameters = both
