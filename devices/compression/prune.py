"""Which channels of a network are worth keeping, and networks with fewer of them.

Channels go from all coupled layers at once (`ChannelGroups`), so residual sums stay whole and what remains is a dense,
static network that any runtime runs faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from devices.compression.channels import ChannelGroups, Kept
from devices.errors import DeviceError, unknown

ROUND_TO = 8  # int8 depthwise kernels took 30 times as long at channel counts that 8 does not divide (x86, torch 2.11)
SCOPES = ("layer", "global")


def channel_scores(groups: ChannelGroups, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How much each channel weighs: the mean of |w| over its filter, averaged over the layers that make it.

    Args:
        groups: of the network.
        state: its weights.

    Returns:
        By group, [channels] float64.
    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.1; averaged over coupled layers.
    """
    scores = {}
    for name, group in groups.groups.items():
        filters = [
            state[key].detach().cpu().double().abs().movedim(dim, 0).flatten(1).mean(1)[coupling.entries].mean(1)
            for coupling in group.couplings
            for key, dim in coupling.dims
            if coupling.side == "out" and state[key].dim() > 1
        ]
        scores[name] = torch.stack(filters).mean(0)
    return scores


def strongest(
    groups: ChannelGroups,
    scores: Mapping[str, Tensor],
    ratio: float,
    round_to: int = ROUND_TO,
    scope: str = "layer",
) -> Kept:
    """The channels with the highest scores; of equal ones the first.

    Args:
        groups: of the network.
        scores: by group, [channels].
        ratio: share of channels that stays, in (0, 1].
        round_to: counts are rounded up to a multiple of this, as far as there are channels; 1 does not round.
        scope: "layer" keeps the ratio in every group; "global" compares scores, each over its group's mean, across
            groups, which may keep much of one and at least one unit of another.

    Raises:
        DeviceError: for a ratio out of range or an unknown scope.
    """
    if scope not in SCOPES:
        raise DeviceError(unknown("scope", scope, SCOPES))
    blocks = {name: scores[name].view(-1, group.unit).mean(1) for name, group in groups.groups.items()}
    counts = {name: groups.count(name, ratio, round_to) for name in groups.groups}
    if scope == "global":
        relative = torch.cat([b / b.mean().clamp(min=1e-300) for b in blocks.values()])
        units = torch.cat([torch.full((len(b),), groups.groups[name].unit) for name, b in blocks.items()])
        order = relative.argsort(descending=True, stable=True)
        enough = int(torch.searchsorted(units[order].cumsum(0), ratio * int(units.sum()) - 1e-9)) + 1
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[:enough]] = True
        parts = chosen.split([len(b) for b in blocks.values()])
        for name, part in zip(groups.groups, parts, strict=True):
            share = max(int(part.sum()), 1) / len(part)
            counts[name] = groups.count(name, share, round_to)
    kept = {}
    for name, group in groups.groups.items():
        best = blocks[name].argsort(descending=True, stable=True)[: counts[name] // group.unit].sort().values
        kept[name] = (best[:, None] * group.unit + torch.arange(group.unit)).flatten()
    return kept


def prune(
    model: nn.Module, example: Tensor, ratio: float, round_to: int = ROUND_TO, scope: str = "layer"
) -> tuple[nn.Module, Kept]:
    """A smaller network of the model's strongest channels, and which they are; the model stays as it is."""
    groups = ChannelGroups.find(model, example)
    kept = strongest(groups, channel_scores(groups, model.state_dict()), ratio, round_to, scope)
    return groups.build(model, kept), kept


def narrow(model: nn.Module, example: Tensor, width: float, round_to: int = 1) -> tuple[nn.Module, Kept]:
    """The network with the first channels of every group, as a width multiplier gives it."""
    groups = ChannelGroups.find(model, example)
    kept = groups.first(width, round_to)
    return groups.build(model, kept), kept


def largest_ratio(latency_ms: Callable[[float], float], limit_ms: float, ratios: list[float]) -> float:
    """The largest of some keep ratios whose network is fast enough, or the smallest where none is.

    Args:
        latency_ms: of the network at a ratio.
        limit_ms: what is fast enough.
        ratios: to choose from.
    """
    for ratio in sorted(ratios, reverse=True):
        if latency_ms(ratio) <= limit_ms:
            return ratio
    return min(ratios)
