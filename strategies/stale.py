"""Asynchronous aggregation: replies start from weights of different age.

Sources: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, algorithm 1
(FedBuff); Xie et al., "Asynchronous Federated Optimization", arXiv 1903.03934, algorithm 1 (FedAsync); both recalled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt, Interval, Le
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from fedsim.errors import ConfigError
from fedsim.grid.exchange import Exchange, Origin
from fedsim.grid.server_half import takes_its_step_by_the_mean
from fedsim.messages.blocks import BlockSum, WeightedSum, blocks
from fedsim.messages.records import ARRAYS, METRICS, NUM_EXAMPLES, arrays_in, record_of, tensors_of
from fedsim.messages.weights import rounded_to
from fedsim.workloads.base import Tensors
from strategies.wrapping import WrappingStrategy


class StaleStrategy(WrappingStrategy):
    """Makes weights of replies of different age, and lets another strategy take the step to them.

    Statistics of the network, which no optimiser may move, are averaged beside.

    Args:
        server: makes the strategy that takes the step.
        sampling: arguments of FedAvg.

    Raises:
        ConfigError: for another strategy that takes more of the clients than a mean.
    """

    takes_stale: ClassVar[bool] = True
    sums_in_float64: ClassVar[bool] = True
    derived: ClassVar[frozenset[str]] = frozenset({"exchange"})
    exchange: Exchange

    def __init__(self, server: Callable[..., Strategy], **sampling: Any):
        super().__init__(server, **sampling)
        if not takes_its_step_by_the_mean(self.server):
            raise ConfigError(
                f"strategy.server={type(self.server).__name__} takes more of the clients than a mean; take fedavg, "
                "fedavgm, fedadagrad, fedadam or fedyogi"
            )

    @property
    def wraps(self) -> None:
        """Nothing: the mean is taken here."""
        return

    def closed(self, exchange: Exchange) -> None:
        """Takes from which weights the replies started, and the present ones."""
        super().closed(exchange)
        self.exchange = exchange

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hands the weights that the replies make to the other strategy, as one reply."""
        good = list(replies)
        if not good:
            return None, None
        for reply in good:
            if beside := sorted(arrays_in(reply.content).keys() - {ARRAYS}):
                raise ConfigError(
                    f"the clients sent {beside} beside their weights, which {type(self).__name__} cannot use: they "
                    "may be stale; take a trainer that sends weights alone, such as trainer=sgd"
                )
        present = self.exchange.weights
        fresh = Origin(present, 0, 1.0)
        replied = [
            Stale(tensors_of(arrays_in(reply.content)[ARRAYS]), _examples(reply), origin)
            for reply, origin in zip(good, self.exchange.origins or [fresh] * len(good), strict=True)
        ]
        new = record_of(self.made(tensors_of(present), replied))
        metrics = self.train_metrics_aggr_fn([reply.content for reply in good], NUM_EXAMPLES)
        if type(self.server).aggregate_train is FedAvg.aggregate_train:
            return new, metrics
        good[0].content = RecordDict({METRICS: good[0].content[METRICS], ARRAYS: new})
        arrays, _ = super().aggregate_train(server_round, good[:1])
        return arrays, metrics

    def made(self, present: Tensors, replied: Sequence[Stale]) -> Tensors:
        """Returns the weights that replies make of the present ones.

        Args:
            present: the global weights; they may hold more than the replies do.
            replied: in client order.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Stale:
    """A reply, and what it started from."""

    weights: Tensors
    examples: int
    origin: Origin


class FedBuff(StaleStrategy):
    """Adds the mean of what clients changed to the present weights: w + rate / n sum of s(staleness) (w_k - w_start).

    Without stale replies, at rate 1 and weighted by examples, this is federated averaging, bit for bit.

    Args:
        server: makes the strategy that takes the step; another one than FedAvg goes towards these weights.
        server_lr: the rate, eta_g.
        weight: of a reply in the mean: "equal" as in the paper, or by its "examples".
        sampling: arguments of FedAvg.
    """

    def __init__(
        self,
        server: Callable[..., Strategy],
        server_lr: Annotated[float, Gt(0), Le(1e6)] = 1.0,
        weight: Literal["equal", "examples"] = "equal",
        **sampling: Any,
    ):
        super().__init__(server, **sampling)
        self.server_lr, self.weight = server_lr, weight

    def made(self, present: Tensors, replied: Sequence[Stale]) -> Tensors:
        shares = [float(one.examples) if self.weight == "examples" else 1.0 for one in replied]
        total, sums = sum(shares), WeightedSum()
        # By age, the weights that some started from, and what of them to take: after a resume each has a copy of them.
        starts: dict[int, tuple[Tensors, float]] = {}
        for block in blocks(list(zip(replied, shares, strict=True))):
            part = BlockSum()
            for one, share in block:
                counted, start = share * one.origin.weight, one.origin.weights
                part.add(one.weights, counted)
                age = one.origin.staleness
                tensors, before = starts.get(age) or (tensors_of(start) if age else present, 0.0)
                starts[age] = (tensors, before + counted)
            sums.add(part.tensors, part.weight, part.clients)
        fresh = starts.pop(0, (present, 0.0))[1]
        parts = [(tensors, -self.server_lr * counted / total) for tensors, counted in starts.values()]
        mean = {name: summed / total for name, summed in sums.totals.items()}
        return combined([(mean, self.server_lr), (present, 1 - self.server_lr * (fresh / total)), *parts], present)


class FedAsync(StaleStrategy):
    """Mixes each reply into the present weights as it comes: (1 - a) w + a w_k, where a = mixing s(staleness).

    Args:
        mixing: alpha.
        server: FedAvg, which draws the clients.
        sampling: arguments of FedAvg.
    """

    needs_buffer: ClassVar[bool] = True

    def __init__(
        self, server: Callable[..., Strategy], mixing: Annotated[float, Interval(gt=0, le=1)] = 0.6, **sampling: Any
    ):
        super().__init__(server, **sampling)
        self.mixing = mixing

    def made(self, present: Tensors, replied: Sequence[Stale]) -> Tensors:
        (one,) = replied
        rate = self.mixing * one.origin.weight
        return combined([(one.weights, rate), (present, 1 - rate)], present)


def combined(parts: Sequence[tuple[Tensors, float]], model: Tensors) -> Tensors:
    """Returns the sum of factor x tensors in float64, in the dtypes of `model`.

    What has a factor of zero is left out, and a factor of one changes no bit.

    Args:
        parts: the first says which tensors there are.
        model: of whose dtypes.
    """
    summed = {}
    for name in parts[0][0]:
        terms = [tensors[name].double() * factor for tensors, factor in parts if factor]
        summed[name] = rounded_to(torch.stack(terms).sum(0) if len(terms) > 1 else terms[0], model[name].dtype)
    return summed


def _examples(reply: Message) -> int:
    numbers = reply.content[METRICS]
    assert isinstance(numbers, MetricRecord)
    return int(numbers[NUM_EXAMPLES])  # type: ignore[arg-type]
