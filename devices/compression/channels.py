"""Which channels of a network belong together, and the smaller network that remains when some of them go.

Torch-Pruning finds the groups once per network; everything after that is `index_select` on state dicts, so that a
server and its clients can cut and mend weights without a graph. May import: torch, torch-pruning and `devices.errors`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from devices.errors import DeviceError, unknown

Tensors = dict[str, Tensor]
Kept = dict[str, Tensor]  # by group: the channels that stay, ascending, [k] int64
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
KNOWN = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, *BATCH_NORMS, nn.GroupNorm, nn.PReLU)
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")
PROBE_ERROR = 1e-8  # of double precision, relative to the largest output


@dataclass(frozen=True, eq=False)
class Coupling:
    """One side of one layer that loses entries with the channels of a group.

    Attributes:
        layer: name of the module, or of the parameter where it stands in no layer.
        side: "out", "in", or "both" for layers that keep channels apart (norms, depthwise convolutions).
        dims: (state-dict key, dimension) of every tensor of the layer that has this side.
        size: entries of that dimension in the dense network.
        entries: of the dimension, by channel, [channels, per channel] int64; a map that is flattened into a linear
            layer has height x width columns for each channel.
    """

    layer: str
    side: str
    dims: tuple[tuple[str, int], ...]
    size: int
    entries: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can only be removed together with others' at the same place.

    Attributes:
        name: the first layer, in the order of the model, that makes these channels.
        channels: how many there are.
        unit: they come and go in blocks of this many neighbours: the channels that a group norm takes together.
        couplings: all that changes when channels go.
    """

    name: str
    channels: int
    unit: int
    couplings: tuple[Coupling, ...]


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
            found = cls(_groups(copy, example, name))
            if not found.groups:
                raise DeviceError(f"network {name} has no layer whose channels could be removed before its outputs")
            found._try_out(copy, example, name)
        return found

    # --- which channels stay --------------------------------------------------------------------------------------

    def all(self) -> Kept:
        """Every channel: the dense network."""
        return {name: torch.arange(group.channels) for name, group in self.groups.items()}

    def first(self, ratio: float, round_to: int = 1) -> Kept:
        """The first channels of every group: as in ordered dropout, smaller networks are parts of larger ones.

        Args:
            ratio: share that stays, in (0, 1]; rounded up to whole units.
            round_to: rounded up further to a multiple of this many channels, as far as there are.
        """
        return {name: torch.arange(self.count(name, ratio, round_to)) for name in self.groups}

    def count(self, name: str, ratio: float, round_to: int = 1) -> int:
        """How many channels of a group stay at a ratio: whole units, at least one."""
        if not 0 < ratio <= 1:
            raise DeviceError(f"a keep ratio must be in (0, 1], got {ratio!r}")
        group = self.groups[name]
        step = math.lcm(group.unit, round_to)
        least = math.ceil(ratio * group.channels - 1e-9)
        return min(group.channels, -(-least // step) * step)

    def mask_of(self, kept: Kept) -> dict[str, Tensor]:
        """By group, True where a channel stays, [channels] bool."""
        self.check(kept)
        return {
            name: torch.zeros(group.channels, dtype=torch.bool).index_fill_(0, kept[name], True)
            for name, group in self.groups.items()
        }

    def kept_of(self, masks: Mapping[str, Tensor]) -> Kept:
        """The inverse of `mask_of`."""
        kept = {name: mask.nonzero().flatten() for name, mask in masks.items()}
        self.check(kept)
        return kept

    def pack(self, kept: Kept) -> Tensor:
        """One bit per channel of all groups, first bit highest, [ceil(channels / 8)] uint8: what a message carries."""
        bits = torch.cat(list(self.mask_of(kept).values())).to(torch.uint8)
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
        return (bits << torch.arange(7, -1, -1)).sum(1).to(torch.uint8)

    def unpack(self, packed: Tensor) -> Kept:
        """The inverse of `pack`."""
        bits = (packed.view(-1, 1) >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1).flatten().bool()
        sizes = [group.channels for group in self.groups.values()]
        if -(-sum(sizes) // 8) != len(packed):
            raise DeviceError(f"a mask of {sum(sizes)} channels takes {-(-sum(sizes) // 8)} bytes, got {len(packed)}")
        return self.kept_of(dict(zip(self.groups, bits[: sum(sizes)].split(sizes), strict=True)))

    def keep_ratio(self, kept: Kept) -> float:
        """Channels that stay over channels that there are."""
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
        """What stays of each tensor: by state-dict key and dimension the entries, ascending, [k] int64."""
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
        """The tensors of the smaller network; those that no group touches are the given ones."""
        indices = self.indices(kept)
        small = {}
        for key, tensor in state.items():
            for dim, index in indices.get(key, {}).items():
                if len(index) < tensor.shape[dim]:
                    tensor = tensor.index_select(dim, index.to(tensor.device))
            small[key] = _laid_out_as(tensor, state[key])
        return small

    def within(self, state: Mapping[str, Tensor], inner: Kept, outer: Kept) -> Tensors:
        """The tensors of a network that is narrower still, cut from those of a narrowed one; gradients go through.

        Args:
            state: tensors of the network that keeps `outer`.
            inner: channels of the dense network that stay, all of them in `outer`.
            outer: those that `state` has.

        Raises:
            DeviceError: if `inner` has a channel that `outer` lacks.
        """
        for name, index in inner.items():
            if not bool(torch.isin(index, outer[name]).all()):
                raise DeviceError(f"channels of group {name!r} are to stay that are not there any more")
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
        """A static network of the sizes that remain, with the model's own values in it; the model stays as it is."""
        small = deepcopy(model)
        sizes = self._sizes(kept)
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

    def _sizes(self, kept: Kept) -> dict[str, dict[str, int]]:
        """New channel counts by layer and side."""
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
                float((narrow - silenced).abs().max() / silenced.abs().max().clamp(min=1e-12)) if alike else math.inf
            )
        except RuntimeError as failure:
            reason = " ".join(str(failure).split())[:150]
            raise DeviceError(f"network {name} cannot run with fewer channels: {reason}") from failure
        if error > PROBE_ERROR:
            raise DeviceError(
                f"network {name} mixes its channels outside convolutions and linear layers (a softmax or a reshape "
                "over channels), so that removing some changes the others; it cannot be narrowed"
            )


def grid(places: Mapping[int, Tensor], shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """Indices that address the chosen entries of some dimensions, and all of the others, of a tensor."""
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
    """In the memory format of `model`, also where one channel makes both the same: kernels choose by the strides."""
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


# --- finding --------------------------------------------------------------------------------------------------------


def _groups(model: nn.Module, example: Tensor, network: str) -> dict[str, ChannelGroup]:
    """The groups of Torch-Pruning's dependency graph as plain values."""
    import torch_pruning as tp

    for name, module in model.named_modules():
        own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if own and not isinstance(module, KNOWN) and type(module).__module__.startswith("torch.nn"):
            kinds = "convolutions, linear layers, batch and group norms"
            raise DeviceError(
                f"network {network} cannot be narrowed: layer {name!r} is a {type(module).__name__}, and channels can "
                f"be removed from {kinds} only"
            )
        grouped = isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and module.groups > 1
        if grouped and not (
            isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels == module.out_channels
        ):
            raise DeviceError(
                f"network {network} cannot be narrowed: layer {name!r} is a convolution in {module.groups} groups of "
                "several channels; only plain and depthwise ones can lose channels"
            )
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    layers = {module: name for name, module in model.named_modules()}
    parameters = {id(p): name for name, p in model.named_parameters()}
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            graph = tp.DependencyGraph().build_dependency(model, example, verbose=False)
            raw = list(graph.get_all_groups())
        except Exception as error:
            reason = " ".join(str(error).split())[:150] or type(error).__name__
            raise DeviceError(f"network {network} cannot be narrowed: its graph cannot be traced ({reason})") from error
    found = []
    for items in raw:
        couplings: list[Coupling] = []
        is_output = False
        channels = len(set(items[0].root_idxs))
        for item in items:
            node, handler = item.dep.target, item.dep.handler
            out, into = graph.is_out_channel_pruning_fn(handler), graph.is_in_channel_pruning_fn(handler)
            is_output |= out and not node.outputs
            side = "both" if out and into else "out" if out else "in"
            if isinstance(node.module, nn.Parameter):
                key, dim = parameters[id(node.module)], node.pruning_dim
                place: tuple[str, tuple[tuple[str, int], ...], int] = (key, ((key, dim),), node.module.shape[dim])
            elif isinstance(node.module, KNOWN):
                place = _sides(layers[node.module], node.module, side)
            else:
                continue  # an operation without weights
            couplings.append(Coupling(place[0], side, place[1], place[2], _entries(item, channels, place[0], network)))
        if not is_output:
            found.append(_group(model, channels, couplings, order))
    found.sort(key=lambda group: order[group.name])
    return {group.name: group for group in found}


def _group(model: nn.Module, channels: int, couplings: list[Coupling], order: Mapping[str, int]) -> ChannelGroup:
    couplings.sort(key=lambda c: (order.get(c.layer, len(order)), c.side))
    unit = 1
    for coupling in couplings:
        layer: Any = model.get_submodule(coupling.layer) if coupling.layer in order else None
        if isinstance(layer, nn.GroupNorm):
            block = layer.num_channels // layer.num_groups
            unit = math.lcm(unit, max(1, block // coupling.entries.shape[1]))
    name = next(c.layer for c in couplings if c.side == "out" and c.layer in order)
    return ChannelGroup(name, channels, unit, tuple(couplings))


def _sides(name: str, layer: Any, side: str) -> tuple[str, tuple[tuple[str, int], ...], int]:
    """The layer's tensors with a dimension on this side, and its size."""
    transposed = isinstance(layer, TRANSPOSED)
    weight_dim = int((side == "in") != transposed) if side != "both" else 0
    tensors = {own: t for own, t in {**layer._parameters, **layer._buffers}.items() if t is not None}
    dims = [(own, weight_dim if own == "weight" else 0) for own in PER_CHANNEL if own in tensors]
    if side == "in":
        dims = [("weight", weight_dim)]
    elif isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        dims = []
    for field in ("num_features", "num_channels"):
        if hasattr(layer, field):
            return name, tuple((f"{name}.{own}", dim) for own, dim in dims), getattr(layer, field)
    size = layer.weight.shape[weight_dim]
    return name, tuple((f"{name}.{own}", dim) for own, dim in dims), size


def _entries(item: Any, channels: int, layer: str, network: str) -> Tensor:
    """Entries of the dimension by channel of the group, [channels, per channel]."""
    index, root = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
    counts = torch.bincount(root, minlength=channels)
    if len(counts) != channels or int(counts.min()) != int(counts.max()) or not len(index):
        raise DeviceError(
            f"network {network} cannot be narrowed: the channels that reach layer {layer!r} have different shares in it"
        )
    by_channel = index[torch.sort(root * (int(index.max()) + 1) + index).indices]
    return by_channel.view(channels, -1)
