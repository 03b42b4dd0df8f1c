"""Scores the channels of a network and chooses those worth keeping.

Channels go from all coupled layers at once (`ChannelGroups`), so residual sums stay whole and what remains is a dense,
static network that any runtime runs faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from devices.compression.channels import ChannelGroups, Kept

ROUND_TO = 8  # int8 depthwise kernels took 30 times as long at channel counts that 8 does not divide (x86, torch 2.11)


def channel_scores(groups: ChannelGroups, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns how much each channel weighs: the mean of |w| over its filter, averaged over layers that make it.

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


def strongest(groups: ChannelGroups, scores: Mapping[str, Tensor], ratio: float, round_to: int = ROUND_TO) -> Kept:
    """Returns the channels with the highest scores; of equal ones the first.

    Args:
        groups: of the network.
        scores: by group, [channels].
        ratio: share of channels that stays, in (0, 1].
        round_to: counts are rounded up to a multiple of this, as far as there are channels; 1 does not round.

    Raises:
        DeviceError: for a ratio out of range.
    """
    blocks = {name: scores[name].view(-1, group.unit).mean(1) for name, group in groups.groups.items()}
    counts = {name: groups.count(name, ratio, round_to) for name in groups.groups}
    kept = {}
    for name, group in groups.groups.items():
        best = blocks[name].argsort(descending=True, stable=True)[: counts[name] // group.unit].sort().values
        kept[name] = (best[:, None] * group.unit + torch.arange(group.unit)).flatten()
    return kept


def largest_ratio(latency_ms: Callable[[float], float], limit_ms: float, ratios: list[float]) -> float:
    """Returns the largest of some keep ratios whose network is fast enough, or the smallest where none is.

    Args:
        latency_ms: of the network at a ratio.
        limit_ms: what is fast enough.
        ratios: to choose from.
    """
    for ratio in sorted(ratios, reverse=True):
        if latency_ms(ratio) <= limit_ms:
            return ratio
    return min(ratios)
