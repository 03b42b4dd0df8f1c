"""Workloads whose examples are arrays in memory: checked once, split by a partition, prepared batch by batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from devices.profile import BY_NAME
from devices.texts import as_yaml
from fedsim.errors import ConfigError, DataError
from fedsim.seeding import generator
from fedsim.workloads.augmenting import Augmentation
from fedsim.workloads.base import ClientData, Examples, ModelFactory, Tensors, added
from fedsim.workloads.by_class import ByClass
from fedsim.workloads.classification import ClassificationWorkload
from fedsim.workloads.cropping import CropAndFlip
from fedsim.workloads.fingerprint import Fingerprint, content_of
from fedsim.workloads.front_end import front_end_cost
from fedsim.workloads.newcomers import newcomers_of
from fedsim.workloads.partition import Partition
from fedsim.workloads.sound import Changed, Heard, noise_from, silence_of
from fedsim.workloads.translating import translation_cost

if TYPE_CHECKING:
    from devices.cost import ModelCost
    from devices.fleet import Fleet
    from fedsim.report.rounds import RoundReport

Kind = Literal["image", "text", "audio", "tabular"]

DIMENSIONS = {"image": (3, 4), "text": (2,), "audio": (2, 3), "tabular": (2,)}  # of x, examples included
LAYOUT = {
    "image": "[n, height, width] or [n, height, width, channels]",
    "text": "[n, steps]",
    "audio": "[n, samples] or [n, frames, features]",
    "tabular": "[n, features]",
}
Features = Callable[[Tensor], Tensor]  # of [n, ...] float32
TestFraction = Annotated[float, Interval(ge=0, lt=1)]  # of a client's own examples, those that it holds out
STATISTICS_BYTES = 2**25  # of examples whose features are held at once
FULL_SCALE = {torch.uint8: 255.0, torch.int16: 32768.0}


class Arrays(NamedTuple):
    """One part of a data set.

    Attributes:
        x: examples, [n, ...] in the layout of their kind; uint8, int16 or floating (text: any integers).
        y: labels, [n] or for sequences [n, steps], integers.
        owners: who made each example, [n] integers or strings ("": nobody); None where the data do not say.
    """

    x: np.ndarray
    y: np.ndarray
    owners: np.ndarray | None = None

    def tensors(self) -> Tensors:
        """Returns examples and labels as tensors that share their memory."""
        return {"x": torch.from_numpy(self.x), "y": torch.from_numpy(self.y)}


class Prepare:
    """Turns gathered raw rows into what the network is fed.

    uint8 is divided by 255 and int16 by 32768; floats stay as they are; images become channels first; text int64.

    Args:
        kind: what the examples are.
        features: makes of the scaled examples what is fed, row by row.
        mean, std: subtracted and divided by afterwards, float64, shaped to broadcast against one prepared example.
    """

    def __init__(
        self,
        kind: Kind,
        features: Features | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        record: Features | None = None,
    ):
        self.kind, self.features, self.mean, self.std, self.record = kind, features, mean, std, record

    def recorded_by(self, record: Features) -> Prepare:
        """Returns the same for sound that goes through a microphone first."""
        return Prepare(self.kind, self.features, self.mean, self.std, record)

    def __call__(self, batch: Tensors) -> Tensors:
        """Turns `batch["x"]` [b, ...] from raw to float32 (text: int64); everything else is passed on."""
        x = batch["x"]
        if self.kind == "text":
            return {**batch, "x": x.long()}
        return {**batch, "x": self.fed(self.sensed(x))}

    def sensed(self, x: Tensor) -> Tensor:
        """Returns raw rows as numbers of full scale 1, channels first, through the microphone: before the front-end."""
        if self.kind == "image":
            x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
        scale = FULL_SCALE.get(x.dtype)
        x = x.to(torch.float32, memory_format=torch.contiguous_format)
        if scale:
            x = x / scale
        return x if self.record is None else self.record(x)

    def fed(self, x: Tensor) -> Tensor:
        """Returns what the network is fed, of numbers that `sensed` returned."""
        if self.features is not None:
            x = self.features(x)
        if self.mean is not None and self.std is not None:
            x = ((x.double() - self.mean) / self.std).to(x.dtype)  # in float32, a mean of 1e7 is off by up to 0.5
        return x


@dataclass(frozen=True)
class DataSet:
    """The arrays, classes and kind that a workload of arrays is made of.

    Attributes:
        train: what clients own.
        test: what the global model is judged on.
        classes: their names; for next-token prediction, the vocabulary.
        kind: of the examples.
        source: what errors call the data, e.g. "bundle data/mnist".
    """

    train: Arrays
    test: Arrays
    classes: Sequence[str]
    kind: Kind
    source: str

    def checked(self) -> DataSet:
        """Returns the same data as the rest of this module wants them.

        Raises:
            ConfigError, DataError: if they cannot be used.
        """
        if self.kind not in get_args(Kind):
            raise ConfigError(f"{self.source}: kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        count = len(self.classes)
        train = check_arrays(self.train, self.kind, count, f"{self.source}, train part")
        test = check_arrays(self.test, self.kind, count, f"{self.source}, test part")
        for key, ours, theirs in (("x", train.x, test.x), ("y", train.y, test.y)):
            if ours.shape[1:] != theirs.shape[1:] or (key == "x" and ours.dtype != theirs.dtype):
                raise DataError(
                    f"{self.source}: one example of {key} is {_describe(ours)} in the train part but "
                    f"{_describe(theirs)} in the test part; save both parts alike"
                )
        owners, test_owners = _alike(train.owners, test.owners, self.source)
        return replace(self, train=train._replace(owners=owners), test=test._replace(owners=test_owners))


class ArrayWorkload(ClassificationWorkload):
    """A classification problem held in arrays, which a subclass reads, and split over the clients.

    Every client's own examples are divided into a part to train on and a part to judge its personal model on. With a
    partition by owner and a test split that has the client's owner, the second part is the owner's rows of the test
    split, as far as the partition keeps them; where that is none, and otherwise, it is a seeded draw of the client's
    own examples. Rows of the test split are never trained on, and nobody's ("") judge the global model alone.

    Args:
        model: makes the network.
        partition: who owns which training example.
        num_clients: population size; None for all owners of a natural partition and `default_clients` of any other.
        seed: of the run.
        name: of the workload, as in the configuration.
        input_range: "unit" scales integers to [0, 1] (audio: [-1, 1)); "standard" also brings every channel of the
            training part (images), the whole (audio) or every feature (tabular) to mean 0 and standard deviation 1.
        client_test_fraction: share of its own examples that a client holds out; at least one always trains.
        default_clients: population size when `num_clients` does not say.
        features: makes of sound [n, samples] in [-1, 1) what the network is fed, e.g. `LogMel`; None: the samples. Each
            device pays for it, once a clip, and keeps the result; where sound is augmented, in every round.
        augment: changes the sounds or images that clients train on, anew in every round.
        newcomers: so many examples of each owner of the test part are trained on, and its others are held out; the
            train part is left aside. None: clients own the train part.

    Raises:
        ConfigError: if a setting is wrong.
        DataError: if the arrays cannot be used or are too few for the clients.
    """

    def __init__(
        self,
        model: ModelFactory,
        partition: Partition,
        num_clients: int | None,
        seed: int,
        name: str,
        input_range: Literal["unit", "standard"] = "unit",
        client_test_fraction: TestFraction = 0.1,
        default_clients: Annotated[int, Ge(1)] = 100,
        features: Features | None = None,
        augment: Augmentation | CropAndFlip | None = None,
        newcomers: Annotated[int, Ge(1)] | None = None,
    ):
        super().__init__(model, seed)
        self.name, self.client_test_fraction, self.features = name, client_test_fraction, features
        self.heard: Heard | None = None
        data = self.read()
        if input_range == "standard" and data.kind == "text":
            raise ConfigError(
                f"workload.input_range=standard is for numbers and {data.source} holds tokens: set it to unit"
            )
        if features is not None and not callable(features):
            raise ConfigError(
                f"workload.features must be a front-end, made by a `_target_`, got {as_yaml(features)}; by name "
                "one is taken with a slash, e.g. workload/features=mfcc"
            )
        self.is_sound = data.kind == "audio" and data.train.x.ndim == 2
        holds = "sound" if self.is_sound else {"image": "images"}.get(data.kind, data.kind)
        sound = None if features is None else "sound"
        for key, wanted in (("features", sound), ("augment", None if augment is None else augment.changes)):
            if wanted not in (None, holds):
                shape = f"{data.kind} {list(data.train.x.shape)}"
                raise ConfigError(f"workload.{key} is for {wanted}, and {data.source} holds {shape}; set it to null")
        data = data.checked()
        if newcomers is not None:
            data = newcomers_of(data, newcomers, seed)
        self.kind, self.classes, self.num_classes = data.kind, list(data.classes), len(data.classes)
        self._fingerprint: Fingerprint | None = None
        statistics: tuple[Tensor | None, Tensor | None] = (None, None)
        if input_range == "standard":
            statistics = _channel_statistics(data.train.x, data.kind, features)
        self.prepare = Prepare(data.kind, features, *statistics)
        self.train_tensors, test_tensors = data.train.tensors(), data.test.tensors()
        self.test = Examples(test_tensors, prepare=self.prepare)
        self.input_shape = tuple(self.test.gather(torch.tensor([0]))["x"].shape[1:])
        self._own(data, partition, default_clients if num_clients is None and not partition.by_owner else num_clients)
        self.changed: Changed | None = None
        self.cropped: CropAndFlip | None = None
        if isinstance(augment, CropAndFlip):
            augment.check_sides(*self.input_shape[-2:])
            self.cropped = augment if augment.acts else None
        elif augment is not None and augment.acts:
            rate = getattr(features, "sample_rate_hz", augment.sample_rate_hz)
            if rate != augment.sample_rate_hz:
                raise ConfigError(
                    f"workload.augment.sample_rate_hz must be that of workload.features, {rate}, got "
                    f"{augment.sample_rate_hz}"
                )
            self.changed = self._changed(augment)

    @abstractmethod
    def read(self) -> DataSet:
        """Returns the data; called once, when what the constructor was told is known.

        Raises:
            DataError: if they are not there or broken.
        """

    def _own(self, data: DataSet, partition: Partition, num_clients: int | None) -> None:
        """Divides the examples among the clients, and with them those of their owners in the test split."""
        train, test = data.train, data.test
        self._owners = {"train client": train.owners, "test client": test.owners}
        self.parts = partition.split(train.y, train.owners, num_clients, generator(self.seed, "partition"))
        self.num_clients = len(self.parts)
        self._test_rows: list[np.ndarray | None] = [None] * self.num_clients
        if partition.by_owner and train.owners is not None and test.owners is not None:
            theirs_of = _rows_of_owners(test.owners, [train.owners[rows] for rows in self.parts])
            kept = (
                rows[partition.keeps_held_out(train.y[part], test.y[rows])]
                for part, rows in zip(self.parts, theirs_of, strict=True)
            )
            self._test_rows = [rows if len(rows) else None for rows in kept]

    def fingerprint(self) -> Fingerprint:
        """Returns hashes of examples, labels and owners of both parts; see `fedsim.workloads.fingerprint`."""
        if self._fingerprint is None:
            arrays = {"train y": self.train_tensors["y"], "train x": self.train_tensors["x"]}
            arrays |= {"test y": self.test.tensors["y"], "test x": self.test.tensors["x"]}
            hashed = {name: content_of(t.numpy()) for name, t in arrays.items()}
            hashed |= {name: "none" if ids is None else content_of(ids) for name, ids in self._owners.items()}
            self._fingerprint = {**hashed, "classes": str(self.num_classes)}
        return self._fingerprint

    # --- sound -------------------------------------------------------------------------------------------------------

    def noise_recordings(self) -> list[Tensor]:
        """Returns recordings of noise for augmentation, in [-1, 1): the train part's clips of silence."""
        silent = silence_of(self.classes, self.train_tensors["y"])
        return list(self.prepare.sensed(self.train_tensors["x"][silent]))

    def _changed(self, augment: Augmentation) -> Changed:
        noise = None
        if augment.needs_noise:
            samples = self.train_tensors["x"].shape[1]
            recordings = [one for one in self.noise_recordings() if len(one) >= samples]
            if not recordings:
                raise ConfigError(
                    f"workload.augment.noise={augment.noise} needs recordings of noise, and {self.name} has none (no "
                    "clips of a class _silence_); set it to 0"
                )
            noise = noise_from(recordings, samples)
        return Changed(augment, self.seed, noise, self.classes)

    @cached_property
    def front_end(self) -> ModelCost | None:
        """Returns what the features of one clip cost; None where there are none."""
        if self.features is None:
            return None
        return front_end_cost(self.features, int(self.train_tensors["x"].shape[1]))

    @property
    def augments(self) -> bool:
        """Returns whether training sounds or images are augmented."""
        return self.changed is not None or self.cropped is not None

    @property
    def recordings_change(self) -> bool:
        """Returns whether sounds are shifted or get noise in every round."""
        return self.changed is not None and self.changed.augment.changes_sound

    @cached_property
    def translation(self) -> ModelCost | None:
        """Returns what translating one example costs; None where nothing is translated."""
        if self.heard is None or self.changed is None or not self.changed.translates:
            return None
        return translation_cost(self.heard.translator, self.input_shape)

    def num_translated(self, examples: int) -> int:
        """Returns how many of so many examples are translated in a round."""
        return self.changed.augment.num_translated(examples) if self.changed and self.changed.translates else 0

    def for_training(self, client_id: int, data: ClientData, draw: torch.Generator) -> ClientData:
        """Returns a client's data with training sounds or images augmented."""
        if self.cropped is not None:
            black = self.prepare.fed(torch.zeros(1, self.input_shape[0], 1, 1))
            found = data.train.tensors
            return replace(data, train=Examples({**found, "x": self.cropped.images(found["x"], black, draw)}))
        if self.changed is None:
            return data
        raw = self.client_data(client_id).train
        kind = "" if self.heard is None else self.heard.kind_of(client_id)
        return replace(data, train=self.changed.again(raw, data.train, self._prepare_of(client_id), draw, kind))

    def root_examples(self, count: int) -> Examples:
        """Returns examples of the training part, drawn whoever owns them: clients keep theirs."""
        there = len(self.train_tensors["y"])
        rows = generator(self.seed, "root", "examples").permutation(there)[:count]
        return Examples(self.train_tensors, torch.from_numpy(rows), self.prepare).materialise()

    def pixel(self, grey: float) -> Tensor:
        """Returns a pixel of images of this value, as the network is fed."""
        return self.prepare.fed(super().pixel(grey)[None])[0]

    @property
    def device_reads(self) -> Mapping[str, str]:
        """Returns the microphones, where devices have some."""
        return {} if self.heard is None else {BY_NAME: "clients record with the microphones of their devices"}

    def record_with(self, fleet: Fleet) -> None:
        if fleet.microphones is None and self.changed is not None and self.changed.augment.translated_share:
            raise ConfigError(
                f"workload.augment.translated_share={self.changed.augment.translated_share} translates between the "
                "microphones of a fleet, and fleet.microphones is null; set it, e.g. to "
                "{_target_: devices.microphones.Microphones}"
            )
        if fleet.microphones is None or not self.is_sound:
            return super().record_with(fleet)
        self.heard = Heard(fleet, fleet.microphones, self.test, self.prepare, self.seed)
        if len(self.heard.shares) == 1 and self.changed is not None and self.changed.augment.translated_share:
            raise ConfigError(
                f"workload.augment.translated_share={self.changed.augment.translated_share} translates to other kinds "
                f"of microphone, and all clients have {next(iter(self.heard.shares))}; set it to 0, or take a fleet of "
                "several kinds"
            )
        if self.changed is not None:
            self.changed.heard = self.heard

    def _prepare_of(self, client_id: int) -> Prepare:
        """Returns how a client's recordings become what the network is fed."""
        return self.prepare if self.heard is None else self.heard.prepare_of(client_id)

    def judge(self, model: nn.Module, round: int) -> dict[str, float]:
        """Returns the metrics of the global model; with microphones, on what each kind hears."""
        if self.heard is None:
            return super().judge(model, round)
        return self.heard.figures({kind: self.evaluate(model, self.heard.of(kind)) for kind in self.heard.kinds})

    def judge_deployed(self, model: nn.Module) -> dict[str, Any]:
        """Returns the metrics of a network as devices run it; with microphones, on what each kind hears."""
        if self.heard is None:
            return super().judge_deployed(model)
        return self.heard.of_deployed({kind: self.evaluate(model, self.heard.of(kind)) for kind in self.heard.kinds})

    def by_class(self, model: nn.Module, round: int) -> ByClass | None:
        """Returns how the model does for each class; with microphones, on what all kinds that clients have hear."""
        if self.heard is None:
            return super().by_class(model, round)
        kinds = [self.totals(model, self.heard.of(kind), self.sums_by_class) for kind in self.heard.shares]
        return ByClass.of(self.class_names(), added(kinds)[0])

    def figures(self, reports: Sequence[RoundReport]) -> dict[str, Any]:
        """Returns the accuracy on each kind of microphone, where there are any."""
        return {} if self.heard is None else self.heard.summary(reports)

    # --- model -------------------------------------------------------------------------------------------------------

    def build_model(self, number: int = 0) -> nn.Module:
        """Returns a fresh model: the same weights for the same seed and number.

        Raises:
            ConfigError: if the model does not take what this workload feeds (numbers or token ids).
        """
        model = super().build_model(number)
        takes = getattr(model, "takes_tokens", None)  # models from elsewhere need not say
        if takes is not None and takes != (self.kind == "text"):
            fed, other = ("token ids", "char_lstm") if self.kind == "text" else ("numbers, not token ids", "mlp")
            raise ConfigError(
                f"workload {self.name} feeds {fed}, which {type(model).__name__} does not take; try model={other}"
            )
        return model

    def client_data(self, client_id: int) -> ClientData:
        """Returns the examples of one client; time and memory grow with their number only.

        Raises:
            IndexError: if there is no such client.
        """
        self.check_client(client_id)
        rows, theirs = self.parts[client_id], self._test_rows[client_id]
        prepare = self._prepare_of(client_id)

        def examples(tensors: Tensors, rows: np.ndarray) -> Examples:
            return Examples(tensors, torch.from_numpy(rows), prepare)

        if theirs is not None:
            return ClientData(examples(self.train_tensors, rows), examples(self.test.tensors, theirs))
        held = held_out(len(rows), self.client_test_fraction)
        order = generator(self.seed, "holdout", client_id).permutation(len(rows))
        ours, own_test = (rows[np.sort(some)] for some in (order[held:], order[:held]))
        return ClientData(examples(self.train_tensors, ours), examples(self.train_tensors, own_test))


def held_out(examples: int, fraction: float) -> int:
    """Returns how many of a client's examples it holds out: the rounded share, but one always trains."""
    return min(int(examples * fraction + 0.5), examples - 1)


def check_arrays(part: Arrays, kind: Kind, num_classes: int, where: str) -> Arrays:
    """Refuses arrays that cannot be trained on, in one sentence.

    Args:
        part: what came.
        kind: what the examples should be.
        num_classes: labels must be below it.
        where: what the sentence calls this part.

    Returns:
        The same examples: contiguous, in the machine's byte order, y int64, text int32 or uint8.

    Raises:
        DataError: if shapes, types or values are not as `Arrays` says.
    """
    x, y, owners = part
    if not len(x) or not len(y) or not x.size:
        raise DataError(f"{where} is empty: x has shape {list(x.shape)} and y {list(y.shape)}")
    if x.ndim not in DIMENSIONS[kind]:
        raise DataError(f"{where}: x of kind {kind} must be {LAYOUT[kind]}, got shape {list(x.shape)}")
    if kind == "image" and x.ndim == 4 and x.shape[3] > 4 >= x.shape[1]:
        raise DataError(
            f"{where}: x has shape {list(x.shape)}, which looks like channels first; images are {LAYOUT[kind]}"
        )
    if len(x) != len(y):
        raise DataError(f"{where}: x has {len(x)} examples but y has {len(y)} labels; save one label per example")
    if owners is not None and (owners.ndim != 1 or len(owners) != len(x) or owners.dtype.kind not in "iuU"):
        raise DataError(
            f"{where}: client must be one integer or string id per example ([{len(x)}]), got {owners.dtype} of shape "
            f"{list(owners.shape)}"
        )
    x = np.ascontiguousarray(x, x.dtype.newbyteorder("="))
    if kind == "text":
        x = _check_tokens(x, num_classes if y.ndim == 2 else None, where)
    elif x.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold counts as infinite
            x = x.astype(np.float32, copy=False)
        wrong = len(x) - int(np.isfinite(x).reshape(len(x), -1).all(1).sum())
        if wrong:
            raise DataError(f"{where}: x holds NaN or infinite values in {wrong} of {len(x)} examples; remove these")
    elif x.dtype not in (np.uint8, np.int16):
        raise DataError(f"{where}: x must be uint8, int16 or floating, got {x.dtype}; save it as one of these")
    if y.dtype.kind not in "iu":
        raise DataError(f"{where}: labels must be integers, got {y.dtype}; save y as class numbers from 0")
    if y.ndim != 1 and not (kind == "text" and y.shape == x.shape):
        shapes = f"[{len(x)}]" + (f" or, per step, {list(x.shape)}" if kind == "text" else "")
        raise DataError(f"{where}: y must have shape {shapes}, got {list(y.shape)}")
    low, high = y.min(), y.max()
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{where}: labels must be in 0..{num_classes - 1} (there are {num_classes} classes), got {low}..{high}"
        )
    return Arrays(x, y.astype(np.int64), owners)


def _check_tokens(x: np.ndarray, vocabulary: int | None, where: str) -> np.ndarray:
    """Tokens must be whole and not negative and, where the next one is predicted, below `vocabulary`."""
    if x.dtype.kind not in "iu":
        raise DataError(f"{where}: x of kind text must be integer token ids, got {x.dtype}")
    low, high = x.min(), x.max()
    if low < 0 or high >= (vocabulary or 2**31):
        allowed = f"0..{vocabulary - 1} (the classes)" if vocabulary else "0..2147483647"
        raise DataError(f"{where}: token ids in x must be in {allowed}, got {low}..{high}")
    return x if x.dtype == np.uint8 else x.astype(np.int32, copy=False)


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape[1:])}"


def _channel_statistics(x: np.ndarray, kind: Kind, features: Features | None) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of the prepared examples, shaped to broadcast against one of them, float64.

    No number in it has a unit: a channel counts as constant, with deviation 1, where all its values are equal, and
    deviations are summed from each piece's own mean and joined as in Chan, Golub and LeVeque, "Updating Formulae and a
    Pairwise Algorithm for Computing Sample Variances", 1979. Summed by numpy, not torch, so that the number of threads
    cannot change the last bit.
    """
    channels = x.shape[-1] if kind == "tabular" or (kind == "image" and x.ndim == 4) else 1
    scale = 1.0 if features else FULL_SCALE.get(torch.from_numpy(x[:1]).dtype, 1.0)
    mean, squares, count = np.zeros(channels), np.zeros(channels), 0
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    for piece in _features_of(x, kind, features) if features else np.array_split(x, max(1, x.size // 2**20)):
        rows = piece.reshape(-1, channels).astype(np.float64)  # of all, it might not fit
        low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
        own = rows.mean(0)
        rows -= own
        apart, count = own - mean, count + len(rows)
        mean = mean + apart * (len(rows) / count)
        squares = squares + np.einsum("ij,ij->j", rows, rows) + apart**2 * (len(rows) * (count - len(rows)) / count)
    std = np.where(low < high, np.sqrt(squares / count), scale)
    mean = np.where(low < high, mean, low)
    shape = {"image": (-1, 1, 1), "tabular": (-1,), "audio": (), "text": ()}[kind]
    mean_of, std_of = (torch.from_numpy(values / scale).reshape(shape) for values in (mean, std))
    return mean_of, std_of


def _features_of(x: np.ndarray, kind: Kind, features: Features) -> Iterable[np.ndarray]:
    prepare = Prepare(kind, features)
    for rows in torch.from_numpy(x).split(max(1, STATISTICS_BYTES // (4 * x[0].size))):
        yield prepare({"x": rows})["x"].numpy()


def _alike(ours: np.ndarray | None, theirs: np.ndarray | None, source: str) -> tuple[np.ndarray | None, ...]:
    """Returns the owners of both parts as one type: text, int64 or uint64; mixed integers would compare as floats.

    Raises:
        DataError: for text and integers, or integers that no 64-bit type holds together.
    """
    if ours is None or theirs is None:
        return ours, theirs
    kinds = {owners.dtype.kind for owners in (ours, theirs)}
    where = f"{source}: client is {ours.dtype} in the train part but {theirs.dtype} in the test part"
    if kinds == {"U"}:
        return ours, theirs
    if "U" in kinds:
        raise DataError(f"{where}; save the ids of both parts as integers, or of both as text")
    low, high = (min(int(o.min()) for o in (ours, theirs)), max(int(o.max()) for o in (ours, theirs)))
    if low < 0 and high >= 2**63:
        raise DataError(f"{where}, with ids from {low} to {high}, which no 64-bit type holds; save both parts alike")
    dtype = np.uint64 if high >= 2**63 else np.int64
    return ours.astype(dtype), theirs.astype(dtype)


def _rows_of_owners(test_owners: np.ndarray, owners_of_clients: list[np.ndarray]) -> list[np.ndarray]:
    """Returns, for each client, the rows of the test split that its owner made, in order."""
    order = np.argsort(test_owners, kind="stable")
    ordered = test_owners[order]
    result: list[np.ndarray] = []
    for owners in owners_of_clients:
        owner = np.sort(owners)[-1]  # all alike, but for "" (nobody), which sorts first
        first, last = np.searchsorted(ordered, owner, "left"), np.searchsorted(ordered, owner, "right")
        result.append(order[first:first] if owner == "" else order[first:last])
    return result
