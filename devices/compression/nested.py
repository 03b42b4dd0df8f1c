"""Networks that lie inside one another: the first channels of every layer, and the first blocks of every stage.

A block that may be left out adds to what passes through it: with all of its weights zero, the network computes the same
as without it. Such blocks are found by trying, in any network that has its blocks in a list. What a smaller network has
are the tensors of a larger one, or their first entries, so that clients with different networks average what they
share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from devices.compression.channels import ChannelGroups, Kept, Tensors
from devices.errors import DeviceError

T = TypeVar("T")


class NestedNetworks(ChannelGroups):
    """Channel groups, and blocks that may be left out: in `Kept` a group of one, [0] or [], by the block's name.

    Args:
        channels: groups of the network's channels.
        stages: names of blocks that follow upon one another, by stage, in the order of the network.

    Attributes:
        blocks: all that may be left out.
    """

    def __init__(self, channels: ChannelGroups, stages: list[list[str]]):
        super().__init__(channels.groups)
        self.stages = stages
        self.blocks = [block for stage in stages for block in stage]
        self._inside = {
            name: next((b for b in self.blocks if all(_is_in(c.layer, b) for c in group.couplings)), None)
            for name, group in self.groups.items()
        }

    @classmethod
    def find(cls, model: nn.Module, example: Tensor) -> NestedNetworks:
        """Finds channel groups, as `ChannelGroups.find` does, and blocks that may be left out.

        Args:
            model: stays as it is.
            example: one batch of input, [batch, ...].

        Raises:
            DeviceError: for networks whose channels cannot be removed, saying why.
        """
        return cls(ChannelGroups.find(model, example), optional_blocks(model, example))

    # --- which of it stays ----------------------------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, int]:
        """By group: how many channels it has; 1 for each block."""
        return {**super().sizes, **dict.fromkeys(self.blocks, 1)}

    def all(self) -> Kept:
        """Returns every channel and every block."""
        return {**super().all(), **self._blocks(1.0)}

    def first(self, ratio: float, round_to: int = 1) -> Kept:
        """Returns the first channels of every group, and every block."""
        return {**super().first(ratio, round_to), **self._blocks(1.0)}

    def at(self, width: float, depth: float) -> Kept:
        """Returns the first channels of every group and the first blocks of every stage.

        Args:
            width: share of the channels that stay, in (0, 1]; rounded up.
            depth: share of those blocks of a stage that may be left out that stay, in [0, 1]; rounded up.
        """
        return {**super().first(width), **self._blocks(depth)}

    def _blocks(self, depth: float) -> Kept:
        if not 0 <= depth <= 1:
            raise DeviceError(f"a share of blocks must be in [0, 1], got {depth!r}")
        stay = {block for stage in self.stages for block in stage[: math.ceil(depth * len(stage) - 1e-9)]}
        return {block: torch.arange(int(block in stay)) for block in self.blocks}

    def left_out(self, kept: Kept) -> list[str]:
        """Returns the blocks that do not stay."""
        return [block for block in self.blocks if not len(kept[block])]

    def keep_ratio(self, kept: Kept) -> float:
        """Returns the share of channels that stay; in a block that is left out none does."""
        gone = set(self.left_out(kept))
        stay = sum(len(kept[name]) for name in self.groups if self._inside[name] not in gone)
        return stay / sum(group.channels for group in self.groups.values())

    def check(self, kept: Kept) -> None:
        """Refuses a choice that no network could be built from.

        Raises:
            DeviceError: as `ChannelGroups.check`, and for a block that is missing or neither [0] nor [].
        """
        super().check({name: index for name, index in kept.items() if name not in self.blocks})
        for block in self.blocks:
            if block not in kept or kept[block].tolist() not in ([], [0]):
                raise DeviceError(f"block {block!r} must stay, [0], or go, [], got {kept.get(block)}")

    # --- cutting and mending --------------------------------------------------------------------------------------

    def indices(self, kept: Kept) -> dict[str, dict[int, Tensor]]:
        """Returns the entries of each tensor that stay; none of the tensors of blocks that are left out."""
        self.check(kept)
        return self._without(super().indices(kept), kept)

    def slice(self, state: Mapping[str, Tensor], kept: Kept) -> Tensors:
        """Returns the tensors of the smaller network."""
        return super().slice(self._without(state, kept), kept)

    def within(self, state: Mapping[str, Tensor], inner: Kept, outer: Kept) -> Tensors:
        """Cuts the tensors of a still smaller network from those of a smaller one."""
        return super().within(self._without(state, inner), inner, outer)

    def build(self, model: nn.Module, kept: Kept) -> nn.Module:
        """Builds the static network of what remains, with the model's values; the model stays as it is."""
        small = deepcopy(model)
        for block in self.left_out(kept):
            small.set_submodule(block, nn.Identity())
        return super().build(small, kept)

    def _layer_sizes(self, kept: Kept) -> dict[str, dict[str, int]]:
        return self._without(super()._layer_sizes(kept), kept)

    def _without(self, by_name: Mapping[str, T], kept: Kept) -> dict[str, T]:
        """Returns what is named of layers and tensors without that of blocks that are left out."""
        gone = self.left_out(kept)
        return {name: value for name, value in by_name.items() if not any(_is_in(name, block) for block in gone)}


def optional_blocks(model: nn.Module, example: Tensor) -> list[list[str]]:
    """Returns the names of blocks that may be left out, by stage: blocks that follow upon one another in one list.

    Args:
        model: stays as it is.
        example: one batch of input, [batch, ...].
    """
    copy = deepcopy(model).cpu().float().eval().requires_grad_(False)
    lists = {name: m for name, m in copy.named_modules() if isinstance(m, nn.Sequential | nn.ModuleList)}
    inside = {f"{name}.{own}" if name else own: block for name, m in lists.items() for own, block in m.named_children()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        fed = _inputs(copy, inside, example.detach().cpu())
        optional = {name for name, block in inside.items() if name in fed and _is_optional(block, fed[name])}
    # A list of nothing but such blocks could go as a whole, too; its blocks are meant.
    optional -= {name for name in lists if any(f"{name}.{own}" in optional for own, _ in lists[name].named_children())}
    stages: list[list[str]] = []
    for name, container in lists.items():
        if any(_is_in(name, block) for block in optional):
            continue  # the block around this list is meant
        names = [f"{name}.{own}" if name else own for own, _ in container.named_children()]
        for stays, stage in groupby(names, optional.__contains__):
            stages += [list(stage)] if stays else []
    return stages


def _inputs(model: nn.Module, blocks: Mapping[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """Returns what blocks are given: of those that are called once, with one tensor, and return one of its shape."""
    calls: dict[str, list[Tensor | None]] = {}

    def note(name: str, args: Any, out: Any) -> None:
        fits = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(out, Tensor) and out.shape == args[0].shape
        calls.setdefault(name, []).append(args[0].clone() if fits else None)

    for name, block in blocks.items():
        block.register_forward_hook(lambda _, args, out, name=name: note(name, args, out))
    model(x)
    return {name: came[0] for name, came in calls.items() if len(came) == 1 and came[0] is not None}


def _is_optional(block: nn.Module, x: Tensor) -> bool:
    """Returns whether a block has weights and, with all of them zero, passes on what it is given."""
    if next(block.parameters(), None) is None or not bool(x.any()):
        return False
    silent = deepcopy(block)
    for parameter in silent.parameters():
        parameter.zero_()
    return torch.equal(silent(x), x)


def _is_in(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")
