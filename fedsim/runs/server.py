"""What a strategy is handed of the model: the tensors that are trained; statistics and counters are averaged beside it.

To Flower's strategies all arrays are weights: an optimiser of theirs moves the running variance of a batch norm below
zero, and clients count as close to each other that took equally many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import AppExitException
from flwr.serverapp.strategy import Strategy

from devices.errors import UserError
from devices.texts import as_yaml
from fedsim.engines.blocks import WeightedSum
from fedsim.errors import ExitError, NotFiniteError, RunError, in_words, no_exit
from fedsim.messages.records import ARRAYS, METRICS, NUM_EXAMPLES, array_record
from fedsim.models.roles import TensorRoles


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


class ServerSide:
    """Stands between the shared weights and a strategy.

    A strategy that averages statistics and counters itself says so by `takes_all_tensors`, a class attribute or a
    property; it is handed everything.

    Args:
        strategy: that makes new weights.
        roles: of the model's tensors.
    """

    def __init__(self, strategy: Strategy, roles: TensorRoles):
        self.strategy = strategy
        takes_all = bool(getattr(strategy, "takes_all_tensors", False))
        self.beside = frozenset() if takes_all else roles.averaged - roles.private

    def handed(self, shared: ArrayRecord) -> ArrayRecord:
        """The part of the shared weights that the strategy sees."""
        return _without(shared, self.beside)

    def whole(self, part: ArrayRecord, shared: ArrayRecord) -> ArrayRecord:
        """The strategy's part, with what stands beside it taken from `shared`; in the model's order."""
        if not self.beside:
            return part
        arrays = {name: part.get(name, array) for name, array in shared.items() if name in part or name in self.beside}
        return array_record(arrays | {name: array for name, array in part.items() if name not in arrays})

    def sent(self, messages: Iterable[Message], handed: ArrayRecord, shared: ArrayRecord) -> list[Message]:
        """The strategy's messages, each with whole weights; those that shared a record or a content still do."""
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
        """What a hook of the strategy returns; messages as a list.

        Args:
            hook: name of a method of the strategy.
            number: of the round, its first argument.
            given: its other arguments.

        Raises:
            RunError: where it raises what is no sentence of ours, or returns what the round cannot go on with; names
                the strategy, the hook and the round.
            AppExitException: of `aggregate_train`, where Flower's strategies refuse what the clients sent.
        """
        what = f"{hook} of {type(self.strategy).__name__}"
        try:
            with no_exit():
                answer = getattr(self.strategy, hook)(number, *given)
                if hook.startswith("configure") and answer is not None:
                    answer, grid = list(answer), given[-1]
                    if _is_messages(answer):
                        grid.in_client_order(answer)
        except ExitError as error:
            raise RunError(f"{what} failed in round {number}: {error}") from error
        except (UserError, NotFiniteError, RunError):
            raise
        except Exception as error:
            if isinstance(error, AppExitException) and hook == "aggregate_train":
                raise
            shown = "FEDSIM_TRACEBACK=1 shows where"
            raise RunError(f"{what} failed in round {number}: {in_words(error)}; {shown}") from error
        is_right, needed = ANSWERS[hook]
        if not is_right(answer):
            raise RunError(f"{what} must return {needed}, got {as_yaml(answer)} in round {number}")
        return answer

    def aggregate(
        self, number: int, replies: Sequence[Message], shared: ArrayRecord
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """New shared weights of a round and its metrics, from the accepted replies in client order.

        Returns:
            None for the weights where the strategy makes none: then nothing else changes either.
        """
        beside = self._mean_beside(replies, shared) if self.beside else shared
        with np.errstate(all="ignore"):  # whoever takes the weights looks whether they are finite
            arrays, metrics = self.ask("aggregate_train", number, replies)
        return (None if arrays is None else self.whole(arrays, beside)), metrics

    def _mean_beside(self, replies: Sequence[Message], shared: ArrayRecord) -> ArrayRecord:
        """Takes what the strategy shall not see out of the replies; the shared weights with its mean by examples."""
        total = WeightedSum()
        for reply in replies:
            content = reply.content
            arrays, numbers = content.get(ARRAYS), content.get(METRICS)
            examples: Any = numbers.get(NUM_EXAMPLES, 0) if isinstance(numbers, MetricRecord) else 0
            if not isinstance(arrays, ArrayRecord) or not all(name in arrays for name in self.beside):
                continue  # what it lacks, the strategy names
            total.add(array_record({name: arrays[name] for name in shared if name in self.beside}), examples, 1)
            reply.content = RecordDict({**content, ARRAYS: _without(arrays, self.beside)})
        return array_record({**shared, **total.mean(shared)}) if total.weight > 0 else shared


def _without(record: ArrayRecord, names: frozenset[str]) -> ArrayRecord:
    return array_record({name: array for name, array in record.items() if name not in names}) if names else record
