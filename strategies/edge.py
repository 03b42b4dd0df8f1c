"""FedAvg whose broadcast may differ per client and whose replies carry extras: the base of our own strategies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from devices.bounds import Checked
from devices.compression.channels import grid as entries
from fedsim.errors import ConfigError
from fedsim.grid.edge import EdgeGrid, Enrolled
from fedsim.messages.records import NUM_EXAMPLES, Broadcast, ClientUpdate, content_of, record_of, tensors_of, update_of
from fedsim.workloads.base import Tensors


class EdgeStrategy(Checked, FedAvg, group="strategy", error=ConfigError):
    """Override `broadcast` to say what each client gets, `combine` to make new weights of what came back.

    Both see tensors; packing, sampling and byte counting stay here and in the grid. Arguments are those of FedAvg.

    Attributes:
        derived: names of attributes that a checkpoint leaves out: they are made anew, or good for one round. All others
            hold numbers, texts, tensors and records, and lists, tuples, sets and dicts of them.
        takes_all_tensors: statistics and counters too are this strategy's to average. Flower's own strategies are
            handed the trained tensors only.
    """

    derived: ClassVar[frozenset[str]] = frozenset()
    takes_all_tensors: ClassVar[bool] = True

    def __init__(self, **sampling: Any):
        super().__init__(**sampling)

    def broadcast(self, round: int, client: Enrolled, weights: Tensors) -> Broadcast:
        """What `client` gets in this round; `weights` are the global ones and must not be changed in place."""
        return Broadcast(round, weights)

    def prepare(self, round: int, weights: Tensors, arrays: ArrayRecord, grid: EdgeGrid) -> None:
        """Exchanges before those of a round, after its cohort is drawn; `arrays` are the global weights, packed."""

    def complete(self, round: int, arrays: ArrayRecord, grid: EdgeGrid) -> ArrayRecord:
        """The global weights as they are judged; for what is made of them only then, by exchanges of its own."""
        return arrays

    def combine(self, round: int, updates: list[ClientUpdate]) -> Tensors:
        """New global weights from the accepted updates, in client order: here their mean weighted by examples.

        Sums in float64 and casts back, so that the result does not depend on the number of workers.
        Integers are rounded.
        """
        total = sum(u.num_examples for u in updates)
        mean = {}
        for name, first in updates[0].weights.items():
            stack = torch.zeros(first.shape, dtype=torch.float64)
            for update in updates:
                stack += update.weights[name].double() * (update.num_examples / total)
            mean[name] = (stack if first.is_floating_point() else stack.round()).to(first.dtype)
        return mean

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's cohort, each client with its own broadcast."""
        if not isinstance(grid, EdgeGrid):
            raise ConfigError(f"{type(self).__name__} needs fedsim's EdgeGrid, got {type(grid).__name__}")
        weights = tensors_of(arrays)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.prepare(server_round, weights, arrays, grid)
        self.fill(messages, server_round, grid, weights, arrays)
        return messages

    def fill(
        self, messages: Iterable[Message], round: int, grid: EdgeGrid, weights: Tensors, arrays: ArrayRecord
    ) -> None:
        """Gives each message its client's broadcast; `arrays` is the packed form of `weights`."""
        packed = {id(weights): (weights, arrays)}  # what several clients get is packed once; held, so that ids stay
        for message in messages:
            broadcast = self.broadcast(round, grid.client(message.metadata.dst_node_id), weights)
            own = broadcast.weights
            if id(own) not in packed:
                packed[id(own)] = (own, record_of(own))
            message.content = content_of(broadcast, packed[id(own)][1])

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hands the accepted updates to `combine`; metrics are averaged by examples."""
        good = [reply for reply in replies if reply.has_content()]
        if not good:
            return None, None
        updates = [update_of(reply.content, reply.metadata.src_node_id) for reply in good]
        metrics = self.train_metrics_aggr_fn([reply.content for reply in good], NUM_EXAMPLES)
        return record_of(self.combine(server_round, updates)), metrics


Places = (
    Tensor | Mapping[int, Tensor]
)  # of a part's tensor in the whole one: a mask of its shape, or entries by dimension


def mean_by_coordinate(weights: Tensors, parts: Sequence[tuple[float, Tensors, Mapping[str, Places]]]) -> Tensors:
    """The mean of each single weight over the parts that hold it; unchanged where none does.

    Sums in float64 and in the order given, as `EdgeStrategy.combine` does: of whole tensors it is that mean, bit for
    bit. Integers are rounded.

    Args:
        weights: the global ones.
        parts: of each client its weight (examples), its tensors, and by name where they belong: a mask of the tensor's
            own shape, True where a value counts, or the entries that it has of some dimensions, as
            `ChannelGroups.indices` gives them; a tensor that is not named counts as a whole.
    """
    mean = {}
    for name, old in weights.items():
        held, total = torch.zeros(old.shape, dtype=torch.float64), torch.zeros(old.shape, dtype=torch.float64)
        shares = [_share(weight, places.get(name, {}), old) for weight, _, places in parts]
        for place, share in shares:
            held[place] += share
        for (place, share), (_, tensors, _) in zip(shares, parts, strict=True):
            total[place] += tensors[name].double() * (share / held[place]).nan_to_num(0.0)
        new = (total if old.is_floating_point() else total.round()).to(old.dtype)
        mean[name] = torch.where(held > 0, new, old)
    return mean


def _share(weight: float, places: Places, old: Tensor) -> tuple[Any, float | Tensor]:
    """Where in the whole tensor a part counts, and how much."""
    if isinstance(places, Tensor):
        return ..., places.double() * weight
    whole = all(len(index) == old.shape[dim] for dim, index in places.items())
    return (... if whole else entries(places, old.shape, old.device)), weight
