"""What `fedsim devices search` chooses from: networks with a score, a predicted latency, and perhaps a true one."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from devices.errors import DeviceError, FileError, unknown
from devices.texts import quoted
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from devices.cost import ModelCost
    from devices.latency.few_shot import Trial
    from devices.latency.spaces import Space
    from devices.nas.search import Measure
    from devices.profile import DeviceProfile
    from fedsim.cli.devices.own_model import NamedModel

ACCURACIES = {"cifar10": "cifar10_test", "cifar100": "cifar100_test", "imagenet16": "imagenet16_120_test"}
SCORE_COLUMNS = ("network", "score")
BY_MACS = "million multiply-adds, as there is no --score"


@dataclass(frozen=True, eq=False)
class Pool:
    """Candidates of a search.

    Attributes:
        name_of: name of a candidate by its place.
        use: overrides of a run that takes it, by its place; empty where no config is of its kind.
        scores: what is to be large, [n].
        about_score: what the score is.
        predicted_ms: [n].
        error: relative error to expect of these; None where nobody knows it.
        measured: networks that were measured for the prediction.
        true_ms: of each candidate, where a table has them, [n].
        measure: how a selected network is measured; None where that cannot be done.
        notes: what else a reader must know.
    """

    name_of: Callable[[int], str]
    use: Callable[[int], str]
    scores: np.ndarray
    about_score: str
    predicted_ms: np.ndarray
    error: float | None
    measured: int = 0
    true_ms: np.ndarray | None = None
    measure: Measure | None = None
    notes: Sequence[str] = field(default_factory=tuple)


# --- a search space with a table of latencies -------------------------------------------------------------------------


def table_pool(space: Space, device: str, trial: Trial, seed: int, score: Path | None, dataset: str | None) -> Pool:
    """Returns the networks of a latency table, with latencies on one of its devices predicted from a few of them.

    Networks in which nothing leads from input to output are left out.

    Raises:
        DeviceError: for an unknown device, or a score file that does not fit.
    """
    from devices.latency.few_shot import FewShot

    ms, few_shot = space.latency(device), FewShot(space, trial)
    index, scores, about = _scored(space, few_shot.macs, score, dataset)
    alive = few_shot.connected[index]
    index, scores = index[alive], scores[alive]
    if not len(index):
        raise DeviceError(f"{score}: scores no network of space {space.name} that computes something")
    measured = few_shot.references_of(device, seed)
    predicted = few_shot.estimate(device, measured, index, seed)
    notes = []
    if trial.predictor == "profile":
        notes.append("profile: the shipped profile may have been fitted to networks of this very table")
    if trial.predictor == "help" and device in (*space.split.source, *space.split.valid):
        notes.append(f"help: {device} is a device that its weights are usually trained with, so that this says little")
    true_ms = ms[index]
    return Pool(
        name_of=lambda place: _name_of(space.name, space.ops[index[place]], int(index[place])),
        use=lambda place: _ops_of(space.name, space.ops[index[place]]),
        scores=scores,
        about_score=about,
        predicted_ms=predicted.ms,
        error=predicted.error,
        measured=len(measured),
        true_ms=true_ms,
        measure=lambda place: {"ms": float(true_ms[place])},
        notes=notes,
    )


def _name_of(space: str, ops: np.ndarray, number: int) -> str:
    from devices.nas.nb201 import to_string

    if space == "nb201":
        return to_string(ops.tolist())
    return "".join(map(str, ops.tolist())) if space == "fbnet" else f"network {number} of the table"


def _ops_of(space: str, ops: np.ndarray) -> str:
    listed = ",".join(map(str, ops.tolist()))
    return f"model={space} 'model.ops=[{listed}]'" if space in ("nb201", "fbnet") else ""


def _scored(
    space: Space, macs: np.ndarray, score: Path | None, dataset: str | None
) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns networks by number, their scores, and what these are."""
    if dataset is not None and dataset not in ACCURACIES:
        raise ConfigError(unknown("data set", dataset, ACCURACIES))
    if score is None or score.suffix.lower() != ".npz":
        if dataset is not None:
            raise ConfigError("--dataset chooses among the accuracies of an npz file; name that with --score")
        if score is None:
            return np.arange(len(macs)), macs / 1e6, BY_MACS
        given = read_scores(score, lambda: _numbers(space))
        return np.array(list(given)), np.array(list(given.values())), f"score of {score.name}"
    if dataset is None:
        raise ConfigError(f"{score} holds accuracies of {', '.join(ACCURACIES)}; say which with --dataset")
    from devices.reading import read_npz

    accuracy = read_npz(score, [ACCURACIES[dataset]], ())[ACCURACIES[dataset]]
    if space.name != "nb201" or accuracy.shape != (len(space.ops),) or accuracy.dtype.kind not in "fiu":
        raise DeviceError(
            f"{score}: {ACCURACIES[dataset]} must hold an accuracy for each of the {len(space.ops)} networks of the "
            f"table of space nb201, got {list(accuracy.shape)} for space {space.name}"
        )
    return np.arange(len(macs)), accuracy.astype(float), f"accuracy on {dataset} after training, %"


def _numbers(space: Space) -> dict[str, int]:
    """Returns the number of each network by all names that a score file may have for it."""
    known = {str(number): number for number in range(len(space.ops))}
    if space.name in ("nb201", "fbnet"):
        known |= {"".join(map(str, ops)): number for number, ops in enumerate(space.ops.tolist())}
    if space.name == "nb201":
        known |= {_name_of("nb201", ops, number): number for number, ops in enumerate(space.ops)}
    return known


def read_scores(path: Path, known: Callable[[], Mapping[str, int]]) -> dict[int, float]:
    """Reads a CSV with the columns network and score.

    Args:
        path: of the file.
        known: returns the place of each network by its names.

    Raises:
        DeviceError: naming the line, for what is missing, wrong or there twice.
    """
    from devices.reading import read_text

    try:
        reader = csv.DictReader(io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""), skipinitialspace=True)
        lines = [(reader.line_num, line) for line in reader]
        columns = reader.fieldnames or ()
    except (FileError, csv.Error) as error:
        raise DeviceError(f"{path}: cannot be read as CSV: {error}") from None
    for column in SCORE_COLUMNS:
        if column not in columns:
            raise DeviceError(
                f"{path}: lacks the column {column!r}; a file of scores has {' and '.join(SCORE_COLUMNS)}"
            )
    if not lines:
        raise DeviceError(f"{path}: has no rows; one scored network is the least")
    places, found = known(), dict[int, float]()
    for number, line in lines:
        name, text = ((line[column] or "").strip() for column in SCORE_COLUMNS)
        where = f"{path}, line {number}"
        if name not in places:
            raise DeviceError(f"{where}: network {quoted(name)} is not in the space")
        if places[name] in found:
            raise DeviceError(f"{where}: network {quoted(name)} is scored twice")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DeviceError(f"{where}: score must be a number, got {quoted(text)}")
        found[places[name]] = value
    return found


# --- widths and depths of model configs -------------------------------------------------------------------------------


def family_names(spaces: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Returns model configs and their settings: every width and depth of the families.

    Raises:
        ConfigError: for what is no such family.
    """
    from fedsim.models.sizes import SIZES

    found = []
    for name in spaces:
        if name not in SIZES:
            raise ConfigError(f"{unknown('space', name, (*SIZES, 'nb201', 'fbnet', 'ofa'))}")
        sizes = SIZES[name]
        found += [(name, dict(zip(sizes, values, strict=True))) for values in itertools.product(*sizes.values())]
    return found


def family_pool(
    spaces: Sequence[str],
    device: str,
    build: Callable[[str, Mapping[str, Any]], NamedModel],
    price: Callable[[ModelCost, DeviceProfile], tuple[float, float | None]],
    score: Path | None,
    here: Callable[[NamedModel], float] | None,
    each: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Pool:
    """Returns the networks of some families, priced by a device's profile.

    Args:
        spaces: model configs that have sizes.
        device: name of a shipped device or path of a profile.
        build: makes a network from the name of its config and its sizes.
        price: returns milliseconds of a network on a device, and the error to expect.
        score: CSV of scores by the networks' names, e.g. "resnet8 depth=14 width=32"; multiply-adds when left out.
        here: measures milliseconds on this host; None where the device is another.
        each: goes through the networks, for a progress bar.
    """
    from devices.profile import load_profile
    from fedsim.cli.devices.own_model import trace_cost

    profile, sizes = load_profile(device), family_names(spaces)
    names = [" ".join([config, *(f"{key}={_value(value)}" for key, value in own.items())]) for config, own in sizes]
    given = None if score is None else read_scores(score, lambda: {name: place for place, name in enumerate(names)})
    kept = list(range(len(names))) if given is None else list(given)
    costs = [trace_cost(build(*sizes[place])) for place in each(kept)]
    priced = [price(cost, profile) for cost in costs]
    errors = [error for _, error in priced]
    scores = [cost.forward_flops / 2e6 for cost in costs] if given is None else list(given.values())

    def use(place: int) -> str:
        config, own = sizes[kept[place]]
        return " ".join([f"model={config}", *(f"'model.{key}={_value(value)}'" for key, value in own.items())])

    return Pool(
        name_of=lambda place: names[kept[place]],
        use=use,
        scores=np.array(scores, float),
        about_score=BY_MACS if score is None else f"score of {score.name}",
        predicted_ms=np.array([ms for ms, _ in priced]),
        error=None if None in errors else max(errors, default=None),  # type: ignore[type-var]
        measure=None if here is None else lambda place: {"ms": here(build(*sizes[kept[place]]))},
    )


def _value(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
