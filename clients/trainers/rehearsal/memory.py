"""The examples that a client keeps from earlier tasks: their names in its state, their tensors while it trains.

The device stores inputs as bytes; the simulation keeps their names (`Workload.arrivals`) and asks for the examples when
a round needs them, or takes them from the state, where they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from clients.trainers.base import ClientContext
from clients.trainers.rehearsal import samples
from fedsim.workloads.base import Tensors, in_format

NAMES, PHASES = "memory_names", "memory_phases"
CANDIDATES, PHASE = "candidate_names", "phase"
SIDE_BYTES = 4  # of an example beside its input: label and task, two bytes each
NONE = torch.empty(0, dtype=torch.int64)


def example_bytes(client: ClientContext, input_bytes: int) -> int:
    """Returns what one kept example takes on the device, with `input_bytes` for each number of an input."""
    return prod(client.workload.input_shape) * input_bytes + SIDE_BYTES


class Memory:
    """Kept examples of one client, up to a capacity.

    Args:
        client: whose state holds them.
        capacity: how many there may be at any moment.
    """

    def __init__(self, client: ClientContext, capacity: int):
        self.client, self.capacity = client, capacity
        self.names = client.state.get(NAMES, NONE)  # [m] int64
        self.phases = client.state.get(PHASES, NONE)  # in which each was learned, [m] int64
        self.most = len(self.names)  # held at once
        self.drawn = NONE  # places of the batch that was drawn last
        self._examples: Tensors | None = None

    def __len__(self) -> int:
        return len(self.names)

    def examples(self) -> Tensors:
        """Returns all of them as one batch on the client's device, in order."""
        if self._examples is None:
            self._examples = recall(self.client, self.names)
        return self._examples

    def batch(self, places: Tensor) -> Tensors:
        """Returns the examples at these places."""
        return {key: t[places] for key, t in self.examples().items()}

    def keep(self, places: Tensor) -> None:
        """Drops all others."""
        self.names, self.phases = self.names[places], self.phases[places]
        if self._examples is not None:
            self._examples = {key: t[places] for key, t in self._examples.items()}

    def add(self, names: Tensor, phase: int) -> None:
        """Puts examples behind those that are there.

        Raises:
            RuntimeError: above the capacity; who adds makes room first.
        """
        self.names = torch.cat([self.names, names])
        self.phases = torch.cat([self.phases, torch.full_like(names, phase)])
        self._examples = None
        self.check()

    def replace(self, place: int, name: Tensor, phase: int, example: Tensors) -> None:
        """Puts an example at a place, or behind the last one."""
        self.examples()
        assert self._examples is not None
        if place == len(self.names):
            self.names, self.phases = (
                torch.cat([self.names, name[None]]),
                torch.cat([self.phases, NONE.new_tensor([phase])]),
            )
            self._examples = {
                key: torch.cat([t, example[key][None]]) if len(t) else example[key][None].clone()
                for key, t in self._examples.items()
            }
        else:
            self.names[place], self.phases[place] = name, phase
            for key, t in self._examples.items():
                t[place] = example[key]
        self.check()

    def check(self) -> None:
        """Raises RuntimeError if there are more than the capacity."""
        self.most = max(self.most, len(self.names))
        if len(self.names) > self.capacity:
            raise RuntimeError(f"the memory holds {len(self.names)} examples and may hold {self.capacity}")

    def save(self) -> None:
        """Stores names and tasks in the client's state."""
        self.client.state[NAMES], self.client.state[PHASES] = self.names, self.phases

    def batches(self, size: int, draw: torch.Generator) -> Iterator[Tensor]:
        """Yields places of batches of at most `size`, in shuffled passes over all, without end."""
        while len(self.names):
            for places in torch.randperm(len(self.names), generator=draw).split(size):
                self.drawn = places
                yield places


def recall(client: ClientContext, names: Tensor) -> Tensors:
    """Returns the examples with these names on the client's device; of none, tensors of length 0."""
    if not len(names):
        some = client.data.train.gather(torch.arange(1))
        return {key: t[:0] for key, t in some.items()}
    like = client.data.train.gather(torch.arange(1))["x"]
    last = like.dim() == 4 and not like.is_contiguous()
    here = samples.NAMES in client.state
    batch = samples.stored(client, names) if here else client.workload.recall(client.client_id, names)
    return {key: in_format(t.to(client.device), "channels_last" if last else "contiguous") for key, t in batch.items()}
