"""Means of groups of examples: what clients show a server that asks for averages instead of data.

A mean of many images is blurred, one of few is not, and the means of the labels are a class histogram: averaging alone
is no formal privacy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.seeding import torch_generator
from fedsim.workloads.base import Examples, Tensors
from fedsim.workloads.classification import ClassificationWorkload

LEVELS = 255  # of a mean that travels as uint8
DIFFERENCES = "donot_use_mm_for_euclid_dist"  # torch would expand |a - b|^2, which cancels where data are far from 0


def averages(
    data: Examples, group_size: int | None, num_classes: int, shuffle: torch.Generator, vocabulary: int | None = None
) -> Tensors:
    """Shuffles the examples once, cuts them into groups and takes the means of each.

    Args:
        data: a client's own, as the network is fed; there is no augmentation in it.
        group_size: examples per mean; a last group that is smaller is dropped. None: one group of all.
        num_classes: of the labels.
        shuffle: decides who is in a group with whom.
        vocabulary: of token inputs, which are averaged as one-hot vectors.

    Returns:
        "x" [groups, *input] (tokens: [groups, steps, vocabulary]) and "y" [groups, classes] (sequences: [groups, steps,
        classes]), float32 unless the examples are of higher precision; each y sums to 1 over the classes.
    """
    size = len(data) if group_size is None else group_size
    groups = len(data) // size if size else 0
    batch = data.gather(torch.randperm(len(data), generator=shuffle)[: groups * size])
    x = batch["x"]
    if not x.is_floating_point():
        if vocabulary is None:
            raise ConfigError("means of token ids mean nothing; they need a model with an embedding")
        x = F.one_hot(x, vocabulary).float()
    y = F.one_hot(batch["y"], num_classes).to(x.dtype)
    return {name: t.reshape(groups, size, *t.shape[1:]).mean(1) for name, t in (("x", x), ("y", y))}


def to_uint8(x: Tensor) -> Tensors:
    """Packs means in a quarter of the bytes: 256 even levels between the smallest and largest entry of each.

    Args:
        x: [groups, ...] floating.

    Returns:
        "x" [groups, ...] uint8, and of each group "low" and "step" [groups] float32.
    """
    flat = x.flatten(1)
    low = flat.amin(1)
    step = (flat.amax(1) - low) / LEVELS
    levels = ((flat - low[:, None]) / step.clamp(min=torch.finfo(x.dtype).tiny)[:, None]).round()
    return {"x": levels.reshape(x.shape).to(torch.uint8), "low": low.float(), "step": step.float()}


def from_uint8(pairs: Tensors) -> Tensor:
    """Returns what `to_uint8` packed, within half a step, [groups, ...] float32."""
    shape = (-1, *[1] * (pairs["x"].dim() - 1))
    return pairs["low"].view(shape) + pairs["x"].float() * pairs["step"].view(shape)


# --- looking at them -----------------------------------------------------------------------------------------------


class Exposure(NamedTuple):
    """What a server would see for one group size.

    Attributes:
        group_size: examples per mean; None: all of a client.
        pairs: of all clients that were looked at.
        pair_bytes: of one pair in float32.
        nearest: mean distance of a mean to the closest example of its client, over the mean distance of two examples
            of one client: 0 is an example itself.
        labels: mean number of classes in a histogram.
    """

    group_size: int | None
    pairs: int
    pair_bytes: int
    nearest: float
    labels: float


def exposures(
    workload: ClassificationWorkload, group_sizes: list[int | None], clients: int, seed: int
) -> list[Exposure]:
    """Returns figures for each group size over the first `clients` clients.

    Raises:
        ConfigError: for token sequences, whose means are no picture.
    """
    return [_exposure(workload, size, range(min(clients, workload.num_clients)), seed) for size in group_sizes]


def averages_of_client(workload: ClassificationWorkload, client: int, size: int | None, seed: int) -> Tensors:
    """Returns the averages that one client would share.

    Raises:
        ConfigError: for token sequences, whose means are no picture.
    """
    data = workload.client_data(client).train
    if data.labels.dim() > 1 or not data.gather(torch.arange(1))["x"].is_floating_point():
        raise ConfigError(f"workload {workload.name} feeds tokens, whose means are no picture; take one of images")
    return averages(data, size, workload.num_classes, torch_generator(seed, "averages", 0, client))


def _exposure(workload: ClassificationWorkload, size: int | None, clients: range, seed: int) -> Exposure:
    pairs, nearest, labels, pair_bytes = 0, 0.0, 0.0, 0
    for client in clients:
        means = averages_of_client(workload, client, size, seed)
        own = workload.client_data(client).train
        x = own.gather(torch.arange(len(own)))["x"].flatten(1).double()
        if not len(means["x"]):
            continue
        apart = float(torch.pdist(x).mean()) if len(x) > 1 else 0.0  # 0: examples that are all equal
        closest = torch.cdist(means["x"].flatten(1).double(), x, compute_mode=DIFFERENCES).amin(1)
        nearest += float(closest.sum()) / (apart or 1.0)
        labels += float((means["y"] > 0).sum())
        pairs += len(means["x"])
        pair_bytes = 4 * (means["x"][0].numel() + means["y"][0].numel())
    return Exposure(size, pairs, pair_bytes, nearest / max(pairs, 1), labels / max(pairs, 1))
