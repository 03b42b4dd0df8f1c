"""Shares of the shipped devices among the phones that people had, from a public list, by SoC.

`devices/population.yaml` holds the shares; `fedsim devices population` makes it from the list.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import yaml

from devices.errors import DeviceError, FileError, unknown
from devices.profile import KINDS, SHIPPED, DeviceProfile, kind_named, profile_names
from devices.profile_file import read_yaml
from devices.reading import read_text

T = TypeVar("T")
U = TypeVar("U")
D = TypeVar("D", bound=Any)  # a dataclass
FILE = Path(__file__).parent / "population.yaml"
LIST = "phones_ai_benchmark.csv"
YEARS = (2016, 2019)
TIERS = ("low", "mid", "high")
MAKERS = ("HiSilicon ", "Hisilicon ")  # words of the list that profiles leave out
CORES = (" Octa", " Quad", " Dual")
SAME = {"Exynos 9611": "Exynos 9610", "Kirin 990 5G": "Kirin 990"}  # their scores in the list differ by 1 %
# Newer than the list, so that their shares are not known: each counts as `NEWER_PHONES` phones.
NEWER = ("mi_10", "mi_11", "snapdragon_8_gen_2", "dimensity_9300")
NEWER_PHONES = 3.0

HEAD = """\
# Shares of phones: how many models of {first} to {last} in a public list have the SoC of a shipped device. Made by
# `fedsim devices population`. A model counts once, however many were sold and however often it was measured; where
# several devices have one SoC, each takes an equal part. The list is of Android phones and ends early in 2020: newer
# devices are `assumed`. `score` is the median float score on the CPU; tiers are thirds of the phones covered, by that
# score, cut between SoCs. The list: AI Benchmark (ai-benchmark.com), results of early 2020.
"""


@dataclass(frozen=True)
class Phone:
    """A model of the list with one SoC; `score` is the median of its float scores on the CPU."""

    name: str
    soc: str
    score: float


@dataclass(frozen=True)
class Share:
    """The phones that one device stands for.

    Attributes:
        phones: number of models in the list, or an assumed one.
        tier: low, mid or high.
        soc: as in the profile.
        score: median CPU float score of the SoC's phones; None where the list has none.
        provenance: dataset or assumed.
    """

    phones: float
    tier: str
    soc: str
    score: float | None
    provenance: str


@dataclass(frozen=True)
class Population:
    """Shares of devices, and how much of the list they cover.

    Attributes:
        listed: phones of the years in the list.
        covered: those whose SoC a shipped device has.
        covered_by_third: the covered part of the slowest, the middle and the fastest third of the listed phones.
        devices: by device name, slowest first.
    """

    listed: int
    covered: int
    covered_by_third: Sequence[float]
    devices: Mapping[str, Share]

    @property
    def coverage(self) -> float:
        """The share of the listed phones that is covered."""
        return self.covered / self.listed

    def of_tier(self, tier: str) -> float:
        """Returns the share of the fleet in a tier."""
        return sum(s.phones for s in self.devices.values() if s.tier == tier) / self.phones()

    def phones(self, provenance: str | None = None) -> float:
        """Returns the phones that all devices stand for, or those with one provenance."""
        return sum(s.phones for s in self.devices.values() if provenance in (None, s.provenance))

    def as_yaml(self) -> str:
        """Returns the text of `devices/population.yaml`."""
        lines = [HEAD.format(first=YEARS[0], last=YEARS[1]) + f"listed: {self.listed}", f"covered: {self.covered}"]
        lines += [f"covered_by_third: [{', '.join(f'{part:g}' for part in self.covered_by_third)}]", "devices:"]
        for name, s in self.devices.items():
            score = "null" if s.score is None else f"{s.score:g}"
            facts = f'phones: {s.phones:g}, tier: {s.tier}, soc: "{s.soc}", score: {score}, provenance: {s.provenance}'
            lines.append(f"  {name}: {{{facts}}}")
        return "\n".join(lines) + "\n"

    def as_fleet(self) -> str:
        """Returns the `devices` of a fleet with these shares, tier by tier, as lines of its configuration."""
        lines = ["devices:"]
        for tier in TIERS:
            lines.append(f"  # {tier}: {self.of_tier(tier):.0%} of the fleet")
            for name, s in self.devices.items():
                if s.tier == tier:
                    about = f"{s.soc}, assumed" if s.provenance == "assumed" else s.soc
                    lines.append(f"  {name}: {s.phones:g}  # {about}")
        return "\n".join(lines) + "\n"


@cache
def population() -> Population:
    """Reads the shipped population."""
    tree = read_yaml(FILE)
    devices = {name: Share(**share) for name, share in tree["devices"].items()}
    return Population(tree["listed"], tree["covered"], tree["covered_by_third"], devices)


def tier_of(device: str) -> str | None:
    """Returns the tier of a phone of the population, low, mid or high; None for any other device."""
    share = population().devices.get(device.partition("@")[0])
    return share.tier if share else None


def groups_of(device: DeviceProfile) -> tuple[str, ...]:
    """Returns the words for a device in settings by tier, the narrowest first: its name, its tier, its kind."""
    tier = tier_of(device.name)
    return (device.name, device.kind) if tier is None else (device.name, tier, device.kind)


def group_names() -> tuple[str, ...]:
    """Returns all words that settings by tier may use."""
    return (*KINDS, *TIERS, *profile_names())


def by_group(given: Mapping[str, T], where: str, error: type[Exception]) -> dict[str, T]:
    """Returns what a setting gives by device, tier or kind, by the present name of each.

    Args:
        given: by name.
        where: the setting, as a user writes it.
        error: raised for a name that is none.
    """
    for name in given:
        if kind_named(name) not in group_names():
            raise error(unknown(f"device, tier or kind in {where}", name, group_names()))
    return {kind_named(name): value for name, value in given.items()}


def changed_by_group(
    usual: D, given: Mapping[str, Mapping[str, Any]], where: str, error: type[Exception]
) -> dict[str, D]:
    """Returns settings with what changes in them by device, tier or kind; see `by_group`.

    Args:
        usual: a dataclass of settings.
        given: by name, the fields that change.
        where: as for `by_group`.
        error: raised for a name that is none, or is no field.
    """
    found = by_group(given, where, error)
    for name, changes in given.items():
        for key in changes:
            if key not in vars(usual):
                raise error(unknown(f"setting in {where}.{name}", key, vars(usual)))
    return {name: replace(usual, **changes) for name, changes in found.items()}


def of_device(given: Mapping[str, T], device: DeviceProfile, usual: U) -> T | U:
    """Returns what goes for a device, of what is given by device, tier or kind: the narrowest; else the usual."""
    return next((given[name] for name in groups_of(device) if name in given), usual) if given else usual


def from_list(phones: Sequence[Phone], devices: Mapping[str, str]) -> Population:
    """Counts the phones of a list by the devices that have their SoC.

    Args:
        phones: of the years wanted.
        devices: the SoC of each shipped phone.

    Raises:
        DeviceError: if no phone has the SoC of a device.
    """
    covered = [phone for phone in phones if phone.soc in devices.values()]
    if not covered:
        raise DeviceError(f"none of {len(phones)} phones has the SoC of a shipped device")
    edges = _thirds(covered)
    shares: dict[str, Share] = {}
    for soc in sorted({phone.soc for phone in covered}):
        scores = [phone.score for phone in covered if phone.soc == soc]
        owners = [name for name, own in devices.items() if own == soc]
        tier = TIERS[int(np.searchsorted(edges, median(scores)))]
        for name in owners:
            shares[name] = Share(round(len(scores) / len(owners), 2), tier, soc, round(median(scores)), "dataset")
    order = sorted(shares, key=lambda name: (shares[name].score, name))
    newer = {name: Share(NEWER_PHONES, TIERS[-1], devices[name], None, "assumed") for name in NEWER if name in devices}
    third_of = np.searchsorted(_thirds(phones), [phone.score for phone in phones])
    has_device = np.array([phone.soc in devices.values() for phone in phones])
    thirds = [has_device[third_of == third] for third in range(3)]
    by_third = [round(float(third.sum() / max(1, len(third))), 2) for third in thirds]
    return Population(len(phones), len(covered), by_third, {**{name: shares[name] for name in order}, **newer})


def read_list(data: Path) -> list[Phone]:
    """Reads the phones of the years in a folder's list: one per model and SoC, however often it was measured.

    Raises:
        DeviceError: for a folder without the list.
    """
    path = data / LIST
    if not path.is_file():
        raise DeviceError(f"{path} is not there; --data is the folder with {LIST}")
    scores: dict[tuple[str, str], list[float]] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path), newline="")):
            if YEARS[0] <= int(row["year"]) <= YEARS[1]:
                scores.setdefault((row["phone"], soc_named(row["soc"])), []).append(float(row["cpu_float_score"]))
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        columns = "columns year, phone, soc and cpu_float_score"
        raise DeviceError(f"{path} is no list of phones with {columns}: {error!r}") from None
    return [Phone(*key, median(values)) for key, values in scores.items()]


def soc_named(text: str) -> str:
    """Returns the name that our profiles give to a SoC of the list."""
    for word in MAKERS:
        text = text.removeprefix(word)
    for word in CORES:
        text = text.removesuffix(word)
    text = text.replace(" Plus", "+") if text.startswith("Snapdragon 8") else text
    return SAME.get(text, text)


def shipped_socs() -> dict[str, str]:
    """Returns the SoC of each shipped phone; of one that may have either of two, the first."""
    trees: dict[str, Any] = {name: yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()) for name in profile_names()}
    return {name: tree["soc"].split(" or ")[0] for name, tree in trees.items() if tree["kind"] == "phone"}


def _thirds(phones: Sequence[Phone]) -> np.ndarray:
    """Returns the two scores that part the phones into thirds."""
    return np.quantile([phone.score for phone in phones], [1 / 3, 2 / 3])
