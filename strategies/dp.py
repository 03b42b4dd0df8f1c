"""Central differential privacy: each client's update is clipped, and the mean gets Gaussian noise.

Sources: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018 (DP-FedAvg, flat
clipping); Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, algorithm 1. Differs
from Flower's wrappers, which weigh clients by examples (one with many moves the mean by more than the noise is for),
let the adaptive norm run away from the quantile (it shrinks while too many are clipped), and divide by the norm of an
update that is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Interval
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsim.errors import ConfigError
from fedsim.grid.server_half import is_plain_mean, server_half
from fedsim.messages.records import ARRAYS, METRICS, array_record, arrays_in, from_array, to_array
from fedsim.seeding import generator
from strategies.wrapping import WrappingStrategy

Arrays = dict[str, np.ndarray]


class DPFedAvg(WrappingStrategy):
    """Clips updates to a norm S, and hands another strategy their mean plus noise of deviation z S / n.

    All n clients of a round count the same. Round metrics say the norm, and the share of clients that it clipped.

    Args:
        server: makes the strategy that samples clients and takes a step by the noisy mean.
        noise_multiplier: z, the noise of the sum by the most that one client adds to it; 0 clips only.
        clipping_norm: S, the largest norm of an update over all tensors.
        sampling: arguments of FedAvg.

    Attributes:
        sent: the weights that clients of this round began with.

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
        **sampling: Any,
    ):
        super().__init__(server, **sampling)
        if not is_plain_mean(self.server) or server_half(self.server).wraps is not None:
            raise ConfigError(
                f"strategy.server={type(self.server).__name__} takes more of the clients than a mean, which is all "
                "that noise can hide; take fedavg, fedavgm, fedadagrad, fedadam or fedyogi"
            )
        self.noise_multiplier, self.clipping_norm = noise_multiplier, clipping_norm
        self.sent: Arrays = {}

    @property
    def wraps(self) -> None:
        """Nothing: the mean is taken here."""
        return

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
        updates = [self.update(reply) for reply in good]
        norms = [math.sqrt(sum(float(np.vdot(part, part)) for part in update.values())) for update in updates]
        clipped_rate = sum(norm > self.clipping_norm for norm in norms) / len(norms)
        figures = {"clipping_norm": self.clipping_norm, "clipped_rate": clipped_rate}
        mean = self.mean(server_round, updates, norms)
        content = {ARRAYS: array_record({name: to_array(self.sent[name] + part) for name, part in mean.items()})}
        good[0].content = RecordDict({METRICS: good[0].content[METRICS], **content})
        arrays, metrics = super().aggregate_train(server_round, good[:1])
        return arrays, MetricRecord({**(metrics or {}), **figures})

    def update(self, reply: Message) -> Arrays:
        """Returns by how much a client changed the weights."""
        weights = arrays_in(reply.content)[ARRAYS]
        return {name: from_array(weights[name]) - start for name, start in self.sent.items()}

    def mean(self, number: int, updates: Sequence[Arrays], norms: Sequence[float]) -> Arrays:
        """Returns the mean of the clipped updates with noise."""
        total = {name: np.zeros_like(part) for name, part in self.sent.items()}
        for update, norm in zip(updates, norms, strict=True):
            factor = min(1.0, self.clipping_norm / norm) if norm else 1.0
            for name, part in update.items():
                total[name] += factor * part
        draws = generator(self.context.seed, "privacy-noise", number)
        deviation = self.noise_of_sum * self.clipping_norm
        return {name: (part + draws.normal(0, deviation, part.shape)) / len(updates) for name, part in total.items()}

    @property
    def noise_of_sum(self) -> float:
        """The deviation of the sum's noise for a clipping norm of 1."""
        return self.noise_multiplier


class AdaptiveDPFedAvg(DPFedAvg):
    """DP-FedAvg whose clipping norm follows a quantile of the clients' norms.

    After each round C becomes C exp(-rate (b - quantile)), where b is the share of clients that were not clipped, with
    noise; a little more noise on the weights pays for it, so that both together are as private as `noise_multiplier`.

    Args:
        server: makes the strategy that samples clients and takes a step by the noisy mean.
        noise_multiplier: z of weights and share together; less than a tenth of `num_sampled_clients` with its count.
        clipping_norm: C of round 1.
        quantile: gamma, the share of clients that are not to be clipped.
        rate: eta_C.
        num_sampled_clients: expected in a round; the noise of their count has a twentieth of it as deviation.
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
        **sampling: Any,
    ):
        super().__init__(server, noise_multiplier, clipping_norm, **sampling)
        self.quantile, self.rate = quantile, rate
        self.count_noise = num_sampled_clients / 20 if noise_multiplier else 0.0
        if noise_multiplier and noise_multiplier >= 2 * self.count_noise:
            raise ConfigError(
                f"strategy.noise_multiplier must be less than a tenth of the {num_sampled_clients} clients of a round "
                f"where their clipping norm is noised too, got {noise_multiplier}; take a larger cohort"
            )

    def mean(self, number: int, updates: Sequence[Arrays], norms: Sequence[float]) -> Arrays:
        """Returns the noisy mean, and moves the clipping norm for the next round."""
        mean = super().mean(number, updates, norms)
        noise = generator(self.context.seed, "privacy-count", number).normal(0, self.count_noise)
        below = sum(norm <= self.clipping_norm for norm in norms) + noise
        self.clipping_norm *= math.exp(-self.rate * (below / len(norms) - self.quantile))
        return mean

    @property
    def noise_of_sum(self) -> float:
        """The deviation of the sum's noise for a clipping norm of 1, with the count's noise taken into account."""
        z = self.noise_multiplier
        return (z**-2 - (2 * self.count_noise) ** -2) ** -0.5 if z else 0.0
