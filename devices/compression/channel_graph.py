"""Groups of channels that can only be removed together: Torch-Pruning's dependency graph as plain values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from devices.errors import DeviceError, one_line

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
KNOWN = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, *BATCH_NORMS, nn.GroupNorm, nn.PReLU)
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


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


def find_groups(model: nn.Module, example: Tensor, network: str) -> dict[str, ChannelGroup]:
    """Finds the groups of Torch-Pruning's dependency graph and returns them as plain values.

    Args:
        model: of any values; its parameters must require gradients.
        example: one batch of input, [batch, ...].
        network: its name in errors.

    Returns:
        The groups by name, in the order of the model's layers, without those of the network's outputs.

    Raises:
        DeviceError: naming the layer, for networks that cannot be traced or whose channels cannot be removed.
    """
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
            reason = one_line(error)[:150] or type(error).__name__
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
        # Without a layer that makes them, they are channels of the input, which a depthwise layer came first to.
        if not is_output and any(c.side == "out" and c.layer in order for c in couplings):
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
    """Returns the layer's name, its tensors with a dimension on this side, and the size of that dimension."""
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
    """Returns the entries of the dimension by channel of the group, [channels, per channel]."""
    index, root = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
    counts = torch.bincount(root, minlength=channels)
    if len(counts) != channels or int(counts.min()) != int(counts.max()) or not len(index):
        raise DeviceError(
            f"network {network} cannot be narrowed: the channels that reach layer {layer!r} have different shares in it"
        )
    by_channel = index[torch.sort(root * (int(index.max()) + 1) + index).indices]
    return by_channel.view(channels, -1)
