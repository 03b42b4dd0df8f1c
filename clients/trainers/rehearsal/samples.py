"""Kept examples themselves, eight bits for each number of an input: for streams that make their examples as they come.

Such examples cannot be fetched again by name. State: sample_names [n] int64, rising; sample_x [n, ...] uint8 with
sample_low, sample_span [n] float32; sample_KEY [n, ...] int16 of what else a batch holds (y, task).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from clients.trainers.base import ClientContext
from fedsim.workloads.base import Tensors

GROUP = "sample_"
NAMES, LOW, SPAN = f"{GROUP}names", f"{GROUP}low", f"{GROUP}span"
LEVELS = 255
SIDE_BYTES = 12  # of an example beside its input: label and task, two bytes each; lowest value and span, four each


def quantised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [n, ...] as bytes of the same shape, and the lowest value and the span of each example, [n].

    The error is at most half a level: span / 510.
    """
    flat = x.flatten(1)
    low = flat.amin(1)
    span = flat.amax(1) - low
    shape = (-1, *[1] * (x.dim() - 1))
    levels = (x - low.view(shape)) * (LEVELS / span.clamp(min=torch.finfo(x.dtype).tiny)).view(shape)
    return levels.round().to(torch.uint8), low, span


def restored(levels: Tensor, low: Tensor, span: Tensor) -> Tensor:
    """Returns the inverse of `quantised`, [n, ...] float32."""
    shape = (-1, *[1] * (levels.dim() - 1))
    return low.view(shape) + levels.to(low.dtype) * (span / LEVELS).view(shape)


def store(client: ClientContext, names: Tensor, most: int) -> None:
    """Keeps the examples with these names, and no others: some are in the state, the others arrived this round.

    Args:
        client: in whose state they are.
        names: [m] int64, in any order.
        most: how many there may be.

    Raises:
        RuntimeError: above that number.
    """
    names = names.unique()
    if len(names) > most:
        raise RuntimeError(f"{len(names)} examples are to be stored and there is room for {most}")
    state = client.state
    held = state.get(NAMES, names[:0])
    old = torch.isin(names, held)
    parts = [{key: t[torch.searchsorted(held, names[old])] for key, t in state.items() if key.startswith(GROUP)}]
    if not old.all():
        parts.append(_arrived(client, names[~old]))
    kept = {key: torch.cat([part[key] for part in parts if part]) for key in parts[-1]}
    order = kept[NAMES].argsort() if kept else names
    state.update({key: t[order] for key, t in kept.items()})


def _arrived(client: ClientContext, names: Tensor) -> Tensors:
    workload = client.workload
    here = workload.arrivals(client.client_id, workload.part(client.round))
    order = here.argsort()
    batch = client.data.train.gather(order[torch.searchsorted(here[order], names)])
    levels, low, span = quantised(batch.pop("x").cpu())
    others = {f"{GROUP}{key}": t.cpu().to(torch.int16) for key, t in batch.items()}
    return {NAMES: names, f"{GROUP}x": levels.contiguous(), LOW: low, SPAN: span, **others}


def stored(client: ClientContext, names: Tensor) -> Tensors:
    """Returns the examples with these names as one batch, from the state."""
    state = client.state
    places = torch.searchsorted(state[NAMES], names)
    x = restored(state[f"{GROUP}x"][places], state[LOW][places], state[SPAN][places])
    others = [key for key in state if key.startswith(GROUP) and key not in (NAMES, f"{GROUP}x", LOW, SPAN)]
    return {"x": x, **{key.removeprefix(GROUP): state[key][places].long() for key in others}}


def example_bytes(input_shape: tuple[int, ...]) -> int:
    """Returns what one kept example takes on the device."""
    return prod(input_shape) + SIDE_BYTES
