"""Workload: the data, model, objective and metrics of one learning problem.

A workload may be a finite data set, an endless task generator or an environment; `ClientData` hides which. Workloads
that tell classes apart are `fedsim.workloads.classification`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from devices.bounds import Checked
from fedsim.errors import ConfigError, DataError, NotFiniteError
from fedsim.models.dropout import replace_dropout
from fedsim.models.norms import allow_single_examples
from fedsim.seeding import derive
from fedsim.workloads.by_class import ByClass
from fedsim.workloads.fingerprint import MADE_BY, SEED, Fingerprint
from fedsim.workloads.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from devices.cost import ModelCost
    from devices.fleet import Fleet
    from fedsim.report.rounds import RoundReport

Tensors = dict[str, Tensor]
ModelFactory = Callable[..., nn.Module]  # called with input_shape=(...), num_classes=int
Sums = Callable[[nn.Module, Tensors], tuple[dict[str, Any], int]]  # of a model and a batch; see `Workload.sums`
OUTPUT_NOT_FINITE = (
    "its model's output on held-out examples is NaN or infinite; lower trainer.lr or set trainer.clip_norm"
)
KEPT_BYTES = 2**30  # of the examples of one evaluation that stay on a card
JUDGED_AT_ONCE = 512  # examples of a batch when a model is judged
GATHERED_BYTES = 2**19  # of batches gathered at once: they should still be in the cache when they are trained on
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Examples(Dataset[Tensors]):
    """Equally long tensors and the rows of them that belong here: no copy until `gather` or `materialise`.

    Args:
        tensors: equally long, e.g. {"x": [n, ...], "y": [n] or [n, steps]}; may be shared by many clients.
        rows: which rows, [m] int64; all of them when None.
        prepare: turns gathered raw rows into what the network is fed (uint8 to float, normalisation).
    """

    def __init__(
        self, tensors: Tensors, rows: Tensor | None = None, prepare: Callable[[Tensors], Tensors] | None = None
    ):
        self.tensors, self.rows, self.prepare = tensors, rows, prepare
        self._there: Examples | None = None  # on a card

    def __len__(self) -> int:
        return len(self.rows if self.rows is not None else next(iter(self.tensors.values()), ()))

    def __getitem__(self, index: int) -> Tensors:
        return {name: t[0] for name, t in self.gather(torch.tensor([index])).items()}

    def gather(self, index: Tensor) -> Tensors:
        """Returns the examples at `index` [b] int64 as one batch, ready for the network."""
        rows = self.rows[index] if self.rows is not None else index
        batch = {name: _rows(t, rows) for name, t in self.tensors.items()}
        return self.prepare(batch) if self.prepare else batch

    def gather_batches(self, index: Tensor, batch: int) -> Iterator[Tensors]:
        """Yields the examples at `index` [b] int64 in batches; the last may be smaller.

        Several small batches are gathered at once and handed out as views: half the time of one by one.
        """
        example_bytes = sum(t[:1].element_size() * t[:1].numel() for t in self.tensors.values())
        together = max(1, GATHERED_BYTES // max(1, batch * example_bytes))
        for some in index.split(batch * together):
            rows = self.gather(some)
            parts = {name: t.split(batch) for name, t in rows.items()}
            for number in range(-(-len(some) // batch)):
                yield {name: part[number] for name, part in parts.items()}

    def materialise(self, device: torch.device | str = "cpu", memory_format: str = "contiguous") -> Examples:
        """Returns the examples with prepared tensors of their own on `device`: `gather` is one copy per tensor then.

        Args:
            device: where they will be used.
            memory_format: of images, as the network wants it.
        """
        raw = self.rows is None and self.prepare is None
        own = self.tensors if raw else self.gather(torch.arange(len(self)))
        return Examples({name: in_format(on_device(t, device), memory_format) for name, t in own.items()})

    def on(self, device: torch.device) -> Examples:
        """Returns the examples where they will be used: on a card prepared, and kept there if they are few enough."""
        if device.type == "cpu" or all(t.device.type == device.type for t in self.tensors.values()):
            return self
        if self._there is not None:
            return self._there
        one = self.gather(torch.arange(min(1, len(self))))
        if len(self) * sum(t.nbytes for t in one.values()) > KEPT_BYTES:
            return self
        self._there = self.materialise(device)
        return self._there

    @property
    def labels(self) -> Tensor:
        """Returns the labels without touching the inputs, [m] or [m, steps] int64."""
        y = self.tensors["y"]
        return y[self.rows] if self.rows is not None else y


def added(sums: Iterable[tuple[dict[str, Any], int]]) -> tuple[dict[str, Any], int]:
    """Returns the sums of several parts of an evaluation as those of all."""
    totals: Counter[str] = Counter()
    count = 0
    for found, size in sums:
        totals.update(found)
        count += size
    return totals, count


def in_format(tensor: Tensor, memory_format: str) -> Tensor:
    """Returns images or convolution weights ([n, c, h, w]) in this memory format, any other tensor as it is."""
    return tensor.contiguous(memory_format=MEMORY_FORMATS[memory_format]) if tensor.dim() == 4 else tensor


def on_device(t: Tensor, device: torch.device | str) -> Tensor:
    """Returns a tensor on this device; on its way to a card it makes the host wait for nothing."""
    if torch.device(device).type != "cuda" or t.is_cuda:
        return t.to(device)
    # Not pinned, it would have to wait until the card has done all that it was asked before.
    return t.pin_memory().to(device, non_blocking=True)


def _rows(t: Tensor, index: Tensor) -> Tensor:
    """Returns `t[index]` in the memory format of `t`, in a third of the time: whole examples are copied at once."""
    index = on_device(index, t.device)
    if t.is_contiguous():
        return t.index_select(0, index)
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return t[index]


@dataclass(frozen=True)
class ClientData:
    """What one client owns: a part to train on and a held-out part to judge its personal model on (may be empty).

    `version` is another number whenever the training part is another, for what was derived from it.
    """

    train: Examples
    test: Examples
    version: int = 0


class Workload(Checked, ABC, group="workload", error=ConfigError):
    """Data of all clients, the model, the objective and the metrics of one learning problem.

    Attributes:
        name: as in the configuration.
        primary: the metric by which models are compared; `evaluate` and `judge` give it by its name.
        num_clients: population size; client ids are 0..num_clients-1.
        input_shape: of one example as the network is fed, e.g. (1, 28, 28), or (80,) for token sequences.
        num_outputs: size of the model's output.
        test: the held-out examples that the global model is judged on; no client trains on them.
        endless: training examples are made as they arrive, and `recall` cannot give them again.
    """

    name: str
    primary: Metric
    num_clients: int
    input_shape: tuple[int, ...]
    num_outputs: int
    test: Examples
    endless = False

    def __init__(self, model: ModelFactory, seed: int):
        self.model_factory, self.seed = model, seed

    @property
    def reads_rounds(self) -> str:
        """Says what of the data depends on the number of rounds that the run has; empty where nothing does."""
        return ""

    # --- model -------------------------------------------------------------------------------------------------------

    def build_model(self, number: int = 0) -> nn.Module:
        """Returns a fresh model: the same weights for the same seed, whatever was drawn before.

        Args:
            number: another one draws other weights; the run's own is 0.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "model", number) if number else derive(self.seed, "model"))
            model = self.model_factory(**self.model_arguments())
        allow_single_examples(model)
        replace_dropout(model)
        return model

    def model_arguments(self) -> dict[str, Any]:
        """Returns what the model's constructor is told of the data."""
        return {"input_shape": self.input_shape, "num_classes": self.num_outputs}

    def inputs(self, batch: Tensors) -> tuple[Tensor, ...]:
        """Returns what the network is traced and fed with, examples in the first dimension of each tensor."""
        return (batch["x"],)

    def batch_size_of(self, batch: Tensors) -> int:
        """Returns how many examples a batch holds."""
        return len(self.inputs(batch)[0])

    # --- data --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def client_data(self, client_id: int) -> ClientData:
        """Returns the data of one client; equal at every call.

        Raises:
            IndexError: if there is no such client.
        """

    def num_examples(self, data: Examples) -> int:
        """Returns how many examples a client counts for that trained, or judged a model, on `data`."""
        return len(data)

    def fingerprint(self) -> Fingerprint:
        """Returns what tells these data from others, whoever owns which part; see `fedsim.workloads.fingerprint`.

        Here of data that the seed decides on: who makes them, and the seed.
        """
        return {MADE_BY: f"{type(self).__module__}.{type(self).__qualname__}", SEED: str(self.seed)}

    def part(self, round: int) -> int:
        """Returns which part of its examples a client has in a round; ordinary workloads have one part only."""
        return 0

    def phase(self, round: int) -> int:
        """Returns which task a round belongs to, from 0; ordinary workloads have one task."""
        return 0

    def client_part(self, client_id: int, part: int) -> ClientData:
        """Returns what a client has while `part` lasts: all its data, where they do not arrive in parts.

        Raises:
            IndexError: if there is no such client.
        """
        return self.client_data(client_id)

    def arrivals(self, client_id: int, part: int) -> Tensor:
        """Names the training examples of a part for `recall`, [len(train)] int64: equal names, equal examples."""
        return torch.arange(len(self.client_part(client_id, part).train))

    def recall(self, client_id: int, names: Tensor) -> Tensors:
        """Returns training examples that a client has kept, as one batch; `names` [b] int64 as `arrivals` gave them."""
        return self.client_data(client_id).train.gather(names)

    def check_client(self, client_id: int) -> None:
        """Raises IndexError unless `client_id` is in 0..num_clients-1 (a negative one must not count from the end)."""
        if not 0 <= client_id < self.num_clients:
            raise IndexError(
                f"client_id must be in 0..{self.num_clients - 1} for workload {self.name}, got {client_id}"
            )

    def sample(self, batch: int) -> Tensors:
        """Returns a batch of held-out examples (repeated when there are too few), for tracing what the network costs.

        Raises:
            DataError: if there are none.
        """
        if not len(self.test):
            raise DataError(f"workload {self.name} has no test examples, so no model can be judged on it")
        return self.test.gather(torch.arange(batch) % len(self.test))

    def sample_on(self, device: torch.device | str, batch: int) -> Tensors:
        """Returns the same on a device."""
        return {key: tensor.to(device) for key, tensor in self.sample(batch).items()}

    def for_training(self, client_id: int, data: ClientData, draw: torch.Generator) -> ClientData:
        """Returns what a client trains on, of its `data`: the same, where nothing is augmented.

        Args:
            client_id: of the client.
            data: all that it has.
            draw: random numbers of this client and round.
        """
        return data

    def pixel(self, grey: float) -> Tensor:
        """Returns a pixel of this value, 0 black and 1 white, as the network is fed, [channels, 1, 1]."""
        return torch.full((self.input_shape[0], 1, 1), grey)

    def root_examples(self, count: int) -> Examples:
        """Returns labelled examples that the server has collected itself before the run, prepared.

        They come from where the clients' training examples come from, and none of them judges a model.

        Raises:
            ConfigError: if nobody can say what a server would have.
        """
        raise ConfigError(
            f"workload {self.name} has no examples for the server beside those that judge models; take another "
            "strategy, or a workload such as digits without a stream"
        )

    # --- devices -----------------------------------------------------------------------------------------------------

    @property
    def front_end(self) -> ModelCost | None:
        """Returns what making one example out of its recording costs a device; None where that is nothing."""
        return None

    @property
    def augments(self) -> bool:
        """Returns whether `for_training` changes anything."""
        return False

    @property
    def recordings_change(self) -> bool:
        """Returns whether training recordings are changed anew in every round, so that the front-end runs again."""
        return False

    @property
    def translation(self) -> ModelCost | None:
        """Returns what translating one example to another microphone costs a device, which fetches the network once."""
        return None

    @property
    def device_reads(self) -> Mapping[str, str]:
        """Returns what of the data goes by the clients' devices, in words, by the figure that is read."""
        return {}

    def num_translated(self, examples: int) -> int:
        """Returns how many of so many training examples are translated in a round."""
        return 0

    def record_with(self, fleet: Fleet) -> None:
        """Has every client record with the microphone of its device, where the fleet has microphones.

        Raises:
            ConfigError: for data that are not sound.
        """
        if fleet.microphones is None:
            return
        raise ConfigError(f"fleet.microphones is for sound, and workload {self.name} holds none; set it to null")

    # --- objective and judgement -----------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Returns the mean loss of a batch, a scalar."""
        return self.losses(model, batch).mean()

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Returns the loss of each example by itself, [batch]; `loss` is their mean up to rounding."""
        raise ConfigError(f"workload {self.name} has no loss for each example, which this method needs; take another")

    def sums(self, model: nn.Module, batch: Tensors) -> tuple[dict[str, Any], int]:
        """Returns the sum of each metric over a batch, and the number to divide them by; `evaluate` adds them up.

        Arrays of counts may stand beside the numbers, for `means`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must say what a batch adds to its metrics, or how to evaluate"
        )

    def evaluate(self, model: nn.Module, data: Examples, batch: int = JUDGED_AT_ONCE) -> dict[str, float]:
        """Returns the means of the metrics on `data`; an empty part gives an empty dict.

        Raises:
            NotFiniteError: if one is NaN or infinite, as the model's output is then.
        """
        return self.means(*self.totals(model, data, self.sums, batch)) if len(data) else {}

    @torch.no_grad()
    def totals(
        self, model: nn.Module, data: Examples, sums: Sums, batch: int = JUDGED_AT_ONCE
    ) -> tuple[dict[str, Any], int]:
        """Adds up what `sums` says of each batch of `data`.

        Raises:
            NotFiniteError: if a number is NaN or infinite, as the model's output is then.
        """
        device = next(model.parameters()).device
        was_training, data = model.training, data.on(device)
        model.eval()
        totals, count = added(
            sums(model, {name: on_device(t, device) for name, t in data.gather(rows).items()})
            for rows in torch.arange(len(data)).split(batch)
        )
        model.train(was_training)
        if not all(math.isfinite(total) for total in totals.values() if isinstance(total, int | float)):
            raise NotFiniteError(OUTPUT_NOT_FINITE)
        return totals, count

    def means(self, totals: Mapping[str, Any], count: int) -> dict[str, float]:
        """Returns metrics from the sums of an evaluation."""
        return {name: total / count for name, total in totals.items() if isinstance(total, int | float)}

    def judge(self, model: nn.Module, round: int) -> dict[str, float]:
        """Returns the metrics of the global model after a round (0: untrained): here on the held-out test set."""
        return self.evaluate(model, self.test)

    def judge_deployed(self, model: nn.Module) -> dict[str, Any]:
        """Returns the metrics of a network as devices run it when the run is over, on the held-out test set."""
        return {**self.evaluate(model, self.test)}

    def by_class(self, model: nn.Module, round: int) -> ByClass | None:
        """Returns how `judge` comes out by class; None where there are no classes."""
        return None

    # --- report ------------------------------------------------------------------------------------------------------

    def figures(self, reports: Sequence[RoundReport]) -> dict[str, Any]:
        """Returns what the summary of a finished run says beside the figures that every run has."""
        return {}

    def pictures(self, reports: Sequence[RoundReport]) -> dict[str, Figure]:
        """Returns drawings of a finished run, by name."""
        return {}
