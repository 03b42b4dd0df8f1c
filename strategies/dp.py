"""Central differential privacy: each client's update is clipped, and the mean gets Gaussian noise.

Sources: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018 (DP-FedAvg, flat
clipping); Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, algorithm 1. Differs
from Flower's wrappers, which weigh clients by examples (one with many moves the mean by more than the noise is for),
let the adaptive norm run away from the quantile (it shrinks while too many are clipped), divide by the norm of an
update that is zero, and make the noise for the clients that were asked, not for those that answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Interval
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsim.errors import ConfigError
from fedsim.exchanges.clipping import CLIPPED_RATE, CLIPPING_NORM
from fedsim.grid.server_half import ServerContext, takes_its_step_by_the_mean
from fedsim.messages.records import ARRAYS, METRICS, array_record, arrays_in, from_array, to_array
from fedsim.seeding import generator
from fedsim.workloads.metrics import DELTA, EPSILON
from strategies.accounting import epsilon_of
from strategies.wrapping import WrappingStrategy

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Clipped:
    """What the clients of a round brought.

    Attributes:
        total: the sum of their clipped updates, float64.
        clients: whose updates are in it.
        longer: how many of these were longer than the norm.
    """

    total: Arrays
    clients: int
    longer: int


class DPFedAvg(WrappingStrategy):
    """Clips updates to a norm S, and hands another strategy their mean plus noise of deviation z S / n.

    All n clients of a round count the same. Round metrics say the norm, the share of clients that it clipped, and the
    epsilon that all rounds so far have spent of each client.

    Args:
        server: makes the strategy that samples clients and takes a step by the noisy mean.
        noise_multiplier: z, the noise of the sum by the most that one client adds to it; 0 clips only.
        clipping_norm: S, the largest norm of an update over all tensors.
        delta: of epsilon; None: 1 / num_clients^1.1.
        sampling: arguments of FedAvg.

    Attributes:
        sent: the weights that clients of this round began with.
        releases: how many noisy means were made.

    Raises:
        ConfigError: for another strategy that takes more of the clients than the mean.
    """

    hides_clients: ClassVar[bool] = True
    sums_in_float64: ClassVar[bool] = True
    derived: ClassVar[frozenset[str]] = frozenset({"sent"})

    def __init__(
        self,
        server: Callable[..., Strategy],
        noise_multiplier: Annotated[float, Ge(0)] = 0.1,
        clipping_norm: Annotated[float, Gt(0)] = 1.0,
        delta: Annotated[float, Interval(gt=0, lt=1)] | None = None,
        **sampling: Any,
    ):
        super().__init__(server, **sampling)
        if not takes_its_step_by_the_mean(self.server):
            raise ConfigError(
                f"strategy.server={type(self.server).__name__} takes more of the clients than a mean, which is all "
                "that noise can hide; take fedavg, fedavgm, fedadagrad, fedadam or fedyogi"
            )
        self.noise_multiplier, self.clipping_norm, self.delta = noise_multiplier, clipping_norm, delta
        self.sent: Arrays = {}
        self.releases = 0

    @property
    def wraps(self) -> None:
        """Nothing: the mean is taken here."""
        return

    def begin(self, context: ServerContext) -> None:
        """Takes the size of the population, by which delta goes."""
        super().begin(context)
        if self.delta is None:
            self.delta = float(max(2, context.num_clients) ** -1.1)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the other strategy's messages, and notes the weights that they bring."""
        self.sent = {name: from_array(array).astype(np.float64) for name, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hands the noisy mean to the other strategy, as one reply."""
        good = [reply for reply in replies if reply.has_content()]
        if not good:
            return None, None
        found = self.clipped(good)
        figures = {CLIPPING_NORM: self.clipping_norm, CLIPPED_RATE: found.longer / found.clients}
        mean = self.mean(server_round, found)
        content = {ARRAYS: array_record({name: to_array(self.sent[name] + part) for name, part in mean.items()})}
        good[0].content = RecordDict({METRICS: good[0].content[METRICS], **content})
        arrays, metrics = super().aggregate_train(server_round, good[:1])
        return arrays, MetricRecord({**(metrics or {}), **figures, **self.spent()})

    def clipped(self, replies: Sequence[Message]) -> Clipped:
        """Clips the updates of a round, and adds them up."""
        total, longer = {name: np.zeros_like(part) for name, part in self.sent.items()}, 0
        for reply in replies:
            weights = arrays_in(reply.content)[ARRAYS]
            update = {name: from_array(weights[name]) - start for name, start in self.sent.items()}
            norm = math.sqrt(sum(float(np.vdot(part, part)) for part in update.values()))
            longer += norm > self.clipping_norm
            factor = min(1.0, self.clipping_norm / norm) if norm else 1.0
            for name, part in update.items():
                total[name] += factor * part
        return Clipped(total, len(replies), longer)

    def mean(self, number: int, found: Clipped) -> Arrays:
        """Returns the mean of the clipped updates with noise: that of the sum, whoever has answered."""
        draws = generator(self.context.seed, "privacy-noise", number)
        deviation = self.noise_of_sum * self.clipping_norm
        self.releases += 1
        return {n: (part + draws.normal(0, deviation, part.shape)) / found.clients for n, part in found.total.items()}

    def spent(self) -> dict[str, float]:
        """Returns epsilon and delta of one client that may have been in every round; nothing without noise."""
        if not self.noise_multiplier or self.delta is None:
            return {}
        return {EPSILON: epsilon_of(self.releases, self.noise_multiplier, self.delta), DELTA: self.delta}

    @property
    def noise_of_sum(self) -> float:
        """The deviation of the sum's noise for a clipping norm of 1."""
        return self.noise_multiplier


class AdaptiveDPFedAvg(DPFedAvg):
    """DP-FedAvg whose clipping norm follows a quantile of the clients' norms.

    After each round C becomes C exp(-rate (b - quantile)), where b is the share of clients that were not clipped, with
    noise; a little more noise on the weights pays for it, so that both together are as private as `noise_multiplier`
    where a client that sends nothing counts as half below the norm: the count is of +1/2 and -1/2, as in the paper.

    Args:
        server: makes the strategy that samples clients and takes a step by the noisy mean.
        noise_multiplier: z of weights and share together; less than a tenth of `num_sampled_clients` with its count.
        clipping_norm: C of round 1.
        quantile: gamma, the share of clients that are not to be clipped.
        rate: eta_C.
        num_sampled_clients: expected in a round; the noise of their count has a twentieth of it as deviation.
        delta: of epsilon; None: 1 / num_clients^1.1.
        sampling: arguments of FedAvg.

    Raises:
        ConfigError: for a `noise_multiplier` that the count's noise alone is too small for.
    """

    def __init__(
        self,
        server: Callable[..., Strategy],
        noise_multiplier: Annotated[float, Ge(0)] = 0.1,
        clipping_norm: Annotated[float, Gt(0)] = 0.1,
        quantile: Annotated[float, Interval(ge=0, le=1)] = 0.5,
        rate: Annotated[float, Interval(gt=0, le=10)] = 0.2,
        num_sampled_clients: Annotated[int, Ge(1)] = 10,
        delta: Annotated[float, Interval(gt=0, lt=1)] | None = None,
        **sampling: Any,
    ):
        super().__init__(server, noise_multiplier, clipping_norm, delta, **sampling)
        self.quantile, self.rate = quantile, rate
        self.count_noise = num_sampled_clients / 20 if noise_multiplier else 0.0
        if noise_multiplier and noise_multiplier >= 2 * self.count_noise:
            raise ConfigError(
                f"strategy.noise_multiplier must be less than a tenth of the {num_sampled_clients} clients of a round "
                f"where their clipping norm is noised too, got {noise_multiplier}; take a larger cohort"
            )

    def mean(self, number: int, found: Clipped) -> Arrays:
        """Returns the noisy mean, and moves the clipping norm for the next round."""
        mean = super().mean(number, found)
        noise = generator(self.context.seed, "privacy-count", number).normal(0, self.count_noise)
        below = found.clients - found.longer + noise
        self.clipping_norm *= math.exp(-self.rate * (below / found.clients - self.quantile))
        return mean

    @property
    def noise_of_sum(self) -> float:
        """The deviation of the sum's noise for a clipping norm of 1, with the count's noise taken into account."""
        z = self.noise_multiplier
        return (z**-2 - (2 * self.count_noise) ** -2) ** -0.5 if z else 0.0
