"""What the server half of a method is told, and what the round loop asks of it beside Flower's hooks.

The two halves of a method meet only in message records. A strategy sees the grid, which sends, and its context; it does
not see the trainer's settings, who will be online, or any client's data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Strategy,
)
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor, nn

from devices.cost import LatencyModel
from fedsim.messages.records import NUM_EXAMPLES
from fedsim.workloads.base import Examples, Tensors, Workload

if TYPE_CHECKING:
    from fedsim.grid.edge import EdgeGrid
    from fedsim.grid.exchange import Exchange

PLAIN_MEANS = (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedProx)
PRIVATE = (DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyServerSideAdaptiveClipping)


@dataclass(frozen=True)
class ServerModel:
    """The network as its server knows it: how to build it, and what it takes to trace and price it.

    Attributes:
        build_model: makes a fresh network with the run's initial weights; with a number, with others.
        sample: returns a batch of so many examples of the server's own test set.
        sample_on: does so on a device.
        loss: returns the mean loss of a network on a batch.
        inputs: returns of a batch what a network is fed with.
        num_outputs: size of the network's output; the number of classes where it tells classes apart.
        root: returns so many labelled examples that the server has collected itself: none of its test set.
    """

    build_model: Callable[..., nn.Module]
    sample: Callable[[int], Tensors]
    sample_on: Callable[[torch.device | str, int], Tensors]
    loss: Callable[[nn.Module, Tensors], Tensor]
    inputs: Callable[[Tensors], tuple[Tensor, ...]]
    num_outputs: int
    root: Callable[[int], Examples]

    @classmethod
    def of(cls, workload: Workload) -> ServerModel:
        """Takes from a workload what is the server's."""
        w = workload
        return cls(w.build_model, w.sample, w.sample_on, w.loss, w.inputs, w.num_outputs, w.root_examples)


@dataclass(frozen=True)
class ServerContext:
    """What a strategy is told of its run, once, before the first round.

    Attributes:
        model: the network.
        latency: predicts seconds on a device, by the data sheets of `grid.client`.
        num_clients: population size; client ids are 0..num_clients-1.
        seed: of the run; a strategy names its own draws, e.g. `generator(context.seed, "width", client_id)`.
        rounds: that the run has at most.
        trained: names of the tensors that are trained and shared.
    """

    model: ServerModel
    latency: LatencyModel
    num_clients: int
    seed: int
    rounds: int
    trained: frozenset[str]


class ServerHalf:
    """What the round loop asks of a strategy beside Flower's hooks; the defaults hold for Flower's own strategies.

    Attributes:
        context: of the run; there once `begin` was called.
        asks_reachable: it holds exchanges of its own, with clients that it can reach just then.
        derived: names of attributes that a checkpoint leaves out: they are made anew, or good for one round. All others
            hold numbers, texts, tensors and records, and lists, tuples, sets and dicts of them.
        takes_all_tensors: statistics and counters too are this strategy's to average; others are handed the trained
            tensors only.
        sums_in_float64: replies may come in the precision of the model; for others they are widened first.
        takes_the_mean: all that this very class takes from a round is the mean weighted by examples, or as
            `weighs_alike` says. A subclass, which may look at each reply, does not inherit it.
        weighs_alike: in the mean that it takes all clients count the same, whatever their examples.
        hides_clients: it adds noise to what it makes public, so that nobody learns what a single client sent: nothing
            else that clients send may be averaged beside it, or around it.
        takes_stale: it looks at an exchange's origins, so that replies may start from older weights (`loop=buffer`).
        needs_buffer: it takes one reply at a time.
    """

    context: ServerContext
    asks_reachable: ClassVar[bool] = False
    derived: ClassVar[frozenset[str]] = frozenset()
    takes_all_tensors: ClassVar[bool] = False
    sums_in_float64: ClassVar[bool] = False
    takes_the_mean: ClassVar[bool] = False
    weighs_alike: ClassVar[bool] = False
    hides_clients: ClassVar[bool] = False
    takes_stale: ClassVar[bool] = False
    needs_buffer: ClassVar[bool] = False

    def begin(self, context: ServerContext) -> None:
        """Takes what there is to know of the run.

        Raises:
            ConfigError: if the method does not fit it.
        """
        self.context = context

    @property
    def device_reads(self) -> Mapping[str, str]:
        """What the method decides by a client's device, in words, by the figure it reads (`devices.profile.BY_...`).

        Other devices would change what clients learn there: a finished run is re-priced only where these are the same.
        """
        return {}

    @property
    def reads_rounds(self) -> str:
        """What the method decides by the number of rounds that the run has, in words; empty where nothing.

        A finished run of such a method cannot be prolonged: a longer one would have begun in another way.
        """
        return ""

    def judged(self, arrays: ArrayRecord) -> ArrayRecord:
        """Returns the weights that the server's test set judges: the global ones, or what of them clients use.

        Args:
            arrays: the global weights.
        """
        return arrays

    @property
    def networks(self) -> Mapping[int, str]:
        """Which network each client last trained, in words, by client; empty where all train the same one."""
        return {}

    @property
    def wraps(self) -> Strategy | None:
        """The strategy inside this one to which it leaves the averaging; None: it averages itself."""
        return None

    def closed(self, exchange: Exchange) -> None:
        """Takes what the training exchange of a round brought, before its replies are averaged.

        One mean may stand for all replies; here is who was accepted, and what each client reported.
        """

    def complete(self, number: int, arrays: ArrayRecord, grid: EdgeGrid) -> ArrayRecord:
        """Returns the global weights as they are judged, for what is made of them only then, by exchanges of its own.

        Args:
            number: of the round.
            arrays: the global weights.
            grid: for the exchanges.
        """
        return arrays


def server_half(strategy: Strategy) -> ServerHalf:
    """Returns a strategy's own answers, or the defaults where it has none, as Flower's strategies."""
    return strategy if isinstance(strategy, ServerHalf) else ServerHalf()


def averaging(strategy: Strategy) -> Strategy:
    """Returns the strategy that averages the weights: this one, or the innermost that it wraps."""
    inner = server_half(strategy).wraps
    return strategy if inner is None else averaging(inner)


def is_plain_mean(strategy: Strategy) -> bool:
    """Returns whether all that a strategy takes from a round is the mean, weighted by examples or as it says.

    Flower's own classes by exact type: a subclass may look at each reply, so it gets each reply, unless it says
    `takes_the_mean` itself. Of a strategy that wraps another one, the inner one counts.
    """
    strategy = averaging(strategy)
    return (
        (type(strategy) in PLAIN_MEANS or vars(type(strategy)).get("takes_the_mean", False))
        and isinstance(strategy, FedAvg)
        and strategy.weighted_by_key == NUM_EXAMPLES
        and strategy.train_metrics_aggr_fn is aggregate_metricrecords
    )


def hides_clients(strategy: Strategy) -> bool:
    """Returns whether a strategy hides by noise what single clients send, as `ServerHalf.hides_clients` says."""
    return server_half(strategy).hides_clients or isinstance(strategy, PRIVATE)


def takes_its_step_by_the_mean(strategy: Strategy) -> bool:
    """Returns whether a strategy can be handed a mean that another one has made, and asks for nothing more."""
    return is_plain_mean(strategy) and server_half(strategy).wraps is None and not hides_clients(strategy)
