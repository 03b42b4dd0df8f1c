"""Stands between the round loop and any strategy, ours or Flower's: supplies the defaults, checks what hooks return.

To Flower's strategies all arrays are weights: an optimiser of theirs moves the running variance of a batch norm below
zero, and clients count as close to each other that took equally many steps. So they are handed the trained tensors;
statistics and counters are averaged beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from devices.errors import UserError
from devices.texts import as_yaml
from fedsim.errors import ConfigError, ExitError, NotFiniteError, RunError, in_words, no_exit
from fedsim.grid.exchange import Exchange
from fedsim.grid.server_half import (
    ServerContext,
    ServerHalf,
    averaging,
    hides_clients,
    is_plain_mean,
    server_half,
)
from fedsim.messages.blocks import WeightedSum
from fedsim.messages.records import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    array_record,
    arrays_in,
    in_float64,
    record_of,
    tensors_of,
)
from fedsim.models.roles import TensorRoles

# Hooks that a base class of ours calls, and which one that is.
HOOKS_OF = {
    **dict.fromkeys(("broadcast", "combine"), "strategies.edge.EdgeStrategy"),
    "made": "strategies.stale.StaleStrategy",
}
CALLERS = {"configure_train", "configure_evaluate", "aggregate_train", "aggregate_evaluate", "closed", "complete"}
HOOKS_OF_0_1 = frozenset({"complete", "derived", "takes_all_tensors", "takes_the_mean"})


def _is_messages(answer: Any) -> bool:
    return isinstance(answer, list) and all(isinstance(m, Message) and m.has_content() for m in answer)


def _is_metrics(answer: Any) -> bool:
    return answer is None or isinstance(answer, Mapping)


def _is_pair(answer: Any) -> bool:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return False
    return (answer[0] is None or isinstance(answer[0], ArrayRecord)) and _is_metrics(answer[1])


# What the hooks of a strategy must return: a test, and in words.
MESSAGES = (_is_messages, "messages, one for each client that it asks")
ANSWERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "configure_train": MESSAGES,
    "configure_evaluate": MESSAGES,
    "aggregate_train": (_is_pair, "an ArrayRecord or None, and a MetricRecord or None"),
    "aggregate_evaluate": (_is_metrics, "a MetricRecord or None"),
    "complete": (lambda answer: isinstance(answer, ArrayRecord), "an ArrayRecord"),
}


def mean_is_all(strategy: Strategy) -> bool:
    """Returns whether new weights are nothing but the mean: the strategy would multiply every weight by one."""
    return is_plain_mean(strategy) and type(strategy).aggregate_train is FedAvg.aggregate_train


class ServerSide:
    """Adapts a strategy to the round loop.

    Args:
        strategy: that makes new weights; one that is no `ServerHalf` gets the defaults of that class.
        roles: of the model's tensors.

    Attributes:
        averages: the strategy takes nothing from a round but the mean.
        alike: in that mean all clients count the same.
        mean_is_all: and makes nothing else of it.

    Raises:
        ConfigError: for a strategy with hooks that only a `ServerHalf` is asked for, or one that hides clients where
            statistics, or what another strategy collects, would show them.
    """

    def __init__(self, strategy: Strategy, roles: TensorRoles):
        _check_hooks(strategy)
        self.strategy, self.half = strategy, server_half(strategy)
        self.averages, self.mean_is_all = is_plain_mean(strategy), mean_is_all(strategy)
        inner = server_half(averaging(strategy))
        self.alike = inner.weighs_alike
        if self.alike and not self.averages:
            raise ConfigError(
                f"strategy {type(averaging(strategy)).__name__} has weighs_alike, by which nothing goes unless that "
                "class itself says takes_the_mean = True"
            )
        self.beside = frozenset() if inner.takes_all_tensors else roles.averaged - roles.private
        self.widens = not self.averages and not inner.sums_in_float64
        self.hides = hides_clients(averaging(strategy))
        if self.hides:
            self._check_hidden()

    @property
    def name(self) -> str:
        """Returns what a sentence calls the strategy."""
        return type(self.strategy).__name__

    def begin(self, context: ServerContext) -> None:
        """Tells the strategy what there is to know of the run."""
        self._call("begin", "before the first round", lambda: self.half.begin(context))

    def check_masked(self, packs: bool) -> None:
        """Refuses a strategy that looks at more of the clients than the sum of what they send, and no such sum.

        Args:
            packs: whether updates are compressed one by one.

        Raises:
            ConfigError: says what does.
        """
        if packs:
            raise ConfigError("uplink=secagg adds up integers under masks; a class below it may not compress updates")
        if not self.averages or averaging(self.strategy) is not self.strategy:
            raise ConfigError(
                f"uplink=secagg hides what single clients send, and {self.name} looks at it; take a strategy that "
                "takes their mean alone, such as fedavg, fedadam or dp_client_fedavg"
            )

    def closed(self, number: int, exchange: Exchange) -> None:
        """Hands the strategy what a training exchange brought.

        Raises:
            ConfigError: for stale replies that it would take for fresh ones.
        """
        if any(origin.staleness for origin in exchange.origins) and not self.half.takes_stale:
            raise ConfigError(f"{self.name} takes all replies for fresh ones, and those of this loop are not")
        self._call("closed", f"in round {number}", lambda: self.half.closed(exchange))

    def handed(self, shared: ArrayRecord) -> ArrayRecord:
        """Returns the part of the shared weights that the strategy sees."""
        return _without(shared, self.beside)

    def whole(self, part: ArrayRecord, shared: ArrayRecord) -> ArrayRecord:
        """Returns the strategy's part with the other tensors of `shared` beside it, in the model's order."""
        if not self.beside:
            return part
        arrays = {name: part.get(name, array) for name, array in shared.items() if name in part or name in self.beside}
        return array_record(arrays | {name: array for name, array in part.items() if name not in arrays})

    def sent(self, messages: Iterable[Message], handed: ArrayRecord, shared: ArrayRecord) -> list[Message]:
        """Puts whole weights into the strategy's messages; those that shared a record or a content still do."""
        every = list(messages)
        if not self.beside:
            return every
        records, contents = {id(handed): (handed, shared)}, {}  # type: dict[int, Any], dict[int, Any]
        for message in every:
            content = message.content
            part = content.get(ARRAYS)
            if not isinstance(part, ArrayRecord):
                continue
            if id(part) not in records:
                records[id(part)] = (part, self.whole(part, shared))
            if id(content) not in contents:
                contents[id(content)] = (content, RecordDict({**content, ARRAYS: records[id(part)][1]}))
            message.content = contents[id(content)][1]
        return every

    def ask(self, hook: str, number: int, *given: Any) -> Any:
        """Asks a hook of the strategy and returns its answer; messages as a list.

        Args:
            hook: name of a method of the strategy.
            number: of the round, its first argument.
            given: its other arguments.

        Raises:
            RunError: naming strategy, hook and round, if it raises an error that is none of ours, or returns what the
                round cannot go on with.
            AppExitException: from `aggregate_train`, where Flower's strategies refuse what the clients sent.
        """

        def listed() -> Any:
            answer = self._hook(hook)(number, *given)
            if hook.startswith("configure") and answer is not None:
                answer, grid = list(answer), given[-1]
                if _is_messages(answer):
                    grid.in_client_order(answer)
            return answer

        answer = self._call(hook, f"in round {number}", listed)
        is_right, needed = ANSWERS[hook]
        if not is_right(answer):
            raise RunError(f"{hook} of {self.name} must return {needed}, got {as_yaml(answer)} in round {number}")
        return answer

    def _hook(self, name: str) -> Callable[..., Any]:
        strategy = self.strategy
        hooks: dict[str, Callable[..., Any]] = {
            "configure_train": strategy.configure_train,
            "configure_evaluate": strategy.configure_evaluate,
            "aggregate_train": strategy.aggregate_train,
            "aggregate_evaluate": strategy.aggregate_evaluate,
            "complete": self.half.complete,
        }
        return hooks[name]

    def _call(self, hook: str, when: str, function: Callable[[], Any]) -> Any:
        """Calls a hook; turns what it raises into a sentence that names it."""
        what = f"{hook} of {self.name} failed {when}"
        try:
            with no_exit():
                return function()
        except ExitError as error:
            raise RunError(f"{what}: {error}") from error
        except (UserError, NotFiniteError, RunError):
            raise
        except Exception as error:
            if isinstance(error, AppExitException) and hook == "aggregate_train":
                raise
            raise RunError(f"{what}: {in_words(error)}; FEDSIM_TRACEBACK=1 shows where") from error

    def metrics_function(self, phase: str) -> Callable[..., MetricRecord]:
        """Returns the function that makes metrics of a phase from those of the clients."""
        strategy = averaging(self.strategy)
        if not isinstance(strategy, FedAvg):
            return aggregate_metricrecords
        return {"train": strategy.train_metrics_aggr_fn, "evaluate": strategy.evaluate_metrics_aggr_fn}[phase]

    def aggregate(
        self, number: int, replies: Sequence[Message], shared: ArrayRecord
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Makes new shared weights and metrics from the accepted replies of a round, in client order.

        Returns:
            The weights, or None where the strategy makes none (then nothing else changes either), and the metrics.
        """
        if self.hides:
            self._check_plain(replies, shared)
        replies = in_float64(replies) if self.widens else replies
        beside = self._mean_beside(replies, shared) if self.beside else shared
        with np.errstate(all="ignore"):  # `Federation.take` looks whether they are finite
            arrays, metrics = self.ask("aggregate_train", number, replies)
        return (None if arrays is None else self.whole(arrays, beside)), metrics

    def _check_hidden(self) -> None:
        """Refuses what would be made public without noise, whatever clients send."""
        inner = averaging(self.strategy)
        if inner is not self.strategy:
            raise ConfigError(
                f"{type(inner).__name__} hides what single clients send, and {self.name} around it shows more of them; "
                "take one of the two"
            )
        if self.beside:
            raise ConfigError(
                f"{self.name} hides what single clients send, and statistics of this model ({min(self.beside)}) would "
                "be averaged without noise; take a model without them, such as model.norm=layer, or private=[norm]"
            )

    def _check_plain(self, replies: Sequence[Message], shared: ArrayRecord) -> None:
        """Refuses replies of which a strategy that hides clients would not hide all."""
        shapes = {name: tuple(array.shape) for name, array in shared.items()}
        for reply in replies:
            records = arrays_in(reply.content)
            weights = {name: tuple(array.shape) for name, array in records.get(ARRAYS, {}).items()}
            if beside := sorted(records.keys() - {ARRAYS}):
                sent = f"{beside} beside their weights"
            elif weights != shapes:
                sent = "parts of the network"
            else:
                continue
            raise ConfigError(
                f"{self.name} hides changes of the whole network's weights, and the clients sent {sent}; take a "
                "trainer that sends weights alone, such as trainer=sgd"
            )

    def _mean_beside(self, replies: Sequence[Message], shared: ArrayRecord) -> ArrayRecord:
        """Takes out of the replies what the strategy is not to see; returns the shared weights with its mean."""
        total = WeightedSum()
        for reply in replies:
            content = reply.content
            arrays, numbers = content.get(ARRAYS), content.get(METRICS)
            examples: Any = numbers.get(NUM_EXAMPLES, 0) if isinstance(numbers, MetricRecord) else 0
            if not isinstance(arrays, ArrayRecord) or not all(name in arrays for name in self.beside):
                continue  # what it lacks, the strategy names
            mine = array_record({name: arrays[name] for name in shared if name in self.beside})
            total.add(tensors_of(mine), examples, 1)
            reply.content = RecordDict({**content, ARRAYS: _without(arrays, self.beside)})
        if not total.weight > 0:
            return shared
        mean = total.mean({name: t.dtype for name, t in tensors_of(shared).items()})
        return array_record({**shared, **record_of(mean)})


def _check_hooks(strategy: Strategy) -> None:
    """Refuses a strategy with hooks that nothing calls: of a base class of ours that it does not derive from.

    A module that has a hook of the round itself may call its class's functions as it likes.
    """
    every = {name for kind in type(strategy).__mro__ for name in vars(kind)}
    if not isinstance(strategy, ServerHalf) and (unused := sorted(HOOKS_OF_0_1 & every)):
        raise ConfigError(
            f"strategy {type(strategy).__name__} has {', '.join(unused)}, which nothing asks for; derive it from "
            "fedsim.grid.server_half.ServerHalf, in front of Flower's class"
        )
    kinds = type(strategy).__mro__
    calling = {kind.__module__ for kind in kinds if CALLERS & vars(kind).keys()}
    for hook, base in HOOKS_OF.items():
        having = [kind for kind in kinds if hook in vars(kind)]
        if having and not calling & {kind.__module__ for kind in having}:
            raise ConfigError(
                f"strategy {having[0].__name__} has {hook}, which nothing calls: it is a hook of {base}, and "
                f"{type(strategy).__name__} does not derive from that"
            )


def _without(record: ArrayRecord, names: frozenset[str]) -> ArrayRecord:
    return array_record({name: array for name, array in record.items() if name not in names}) if names else record
