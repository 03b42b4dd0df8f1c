"""The narrowed forms of a run's network: their channel groups, static networks and prices, made once per process.

Server and clients of methods that train different widths both build one from the workload, so that only tensors and one
bit per channel travel.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from devices.compression.channels import ChannelGroups, Kept
from devices.cost import LatencyModel, ModelCost, Passes, Work
from devices.errors import DeviceError
from devices.meter import inference_bytes, measure
from devices.profile import DeviceProfile
from devices.trace import trace
from fedsim.errors import ConfigError
from fedsim.models.dropout import unseeded
from fedsim.workloads.base import Tensors

NETWORKS = 32  # static networks kept per process; others are built anew
KEPT, BITS = "kept", "bits"  # the extra record that says which channels a part of the network has
RATIO = "keep-ratio"  # the setting that says how much of the network a client is to use


class Traceable(Protocol):
    """What it takes to trace and price a network: how it is built, some examples and the objective."""

    @property
    def build_model(self) -> Callable[[], nn.Module]:
        """Makes a fresh network."""

    @property
    def sample(self) -> Callable[[int], Tensors]:
        """Returns a batch of so many examples."""

    @property
    def sample_on(self) -> Callable[[torch.device | str, int], Tensors]:
        """Returns a batch of so many examples on a device."""

    @property
    def loss(self) -> Callable[[nn.Module, Tensors], torch.Tensor]:
        """Returns the mean loss of a network on a batch."""

    @property
    def inputs(self) -> Callable[[Tensors], tuple[torch.Tensor, ...]]:
        """Returns of a batch what a network is fed with."""


def model_cost(workload: Traceable, model: nn.Module, name: str, device: torch.device | str = "cpu") -> ModelCost:
    """Returns what one example costs in a network: FLOPs and memory of a step, and layers that can be traced."""
    model, four = unseeded(model), workload.sample_on(device, 4)
    cost = measure(model, workload.loss, four, name)
    cost = replace(cost, inference_bytes=inference_bytes(model, workload.loss, four))
    for examples in (1, 2):  # norms without running statistics refuse one; rows are of one example either way
        with suppress(DeviceError):
            rows = trace(model, workload.inputs(workload.sample_on(device, examples))).rows
            return replace(cost, layers=rows, encoding=getattr(model, "encoding", None))
    return cost  # latency=flops does without; the others say that they need it


class Slices:
    """Narrowed networks of one workload.

    Args:
        workload: whose model is narrowed; a server has its `ServerModel`.
        device: where the networks are used.
        prepare: called once with each network that is built and what it keeps, e.g. to hang hooks on its layers.
        kind: what of a network may go.

    Attributes:
        groups: of the model's channels.

    Raises:
        ConfigError: if the model cannot be narrowed, saying why.
    """

    def __init__(
        self,
        workload: Traceable,
        device: torch.device | str = "cpu",
        prepare: Callable[[nn.Module, Kept], None] | None = None,
        kind: type[ChannelGroups] = ChannelGroups,
    ):
        self.workload, self.device, self.prepare = workload, device, prepare
        self.model = workload.build_model()
        try:
            self.groups = kind.find(self.model, workload.inputs(workload.sample(2))[0])
        except DeviceError as error:
            raise ConfigError(f"{error}; take another model or another method") from error
        self._networks: OrderedDict[tuple[int, ...], nn.Module] = OrderedDict()
        self._costs: dict[tuple[int, ...], ModelCost] = {}

    def network(self, kept: Kept) -> nn.Module:
        """Returns a static network with room for this choice's weights; one object for all choices of its sizes."""
        sizes = tuple(map(len, kept.values()))
        if sizes not in self._networks:
            network = self.groups.build(self.model, kept).to(self.device)
            if self.prepare is not None:
                self.prepare(network, kept)
            self._networks[sizes] = network
            while len(self._networks) > NETWORKS:
                self._networks.popitem(last=False)
        self._networks.move_to_end(sizes)
        return self._networks[sizes]

    def cost(self, kept: Kept) -> ModelCost:
        """Returns what one example costs in the narrowed network."""
        sizes = tuple(map(len, kept.values()))
        if sizes not in self._costs:
            network = self.groups.build(self.model, kept)
            share = self.groups.keep_ratio(kept)
            name = "dense" if share == 1 else f"{share:.3g} of its channels"
            self._costs[sizes] = model_cost(self.workload, network, name)
        return self._costs[sizes]

    def step_ms(self, kept: Kept, batch: int, latency: LatencyModel, profile: DeviceProfile) -> float:
        """Predicts the milliseconds of a training step of the narrowed network on a device."""
        work = Work((Passes(self.cost(kept), batch, 1, 1),))
        return 1e3 * latency.compute_s(work, profile)
