"""Tables of measured latencies: many networks of a search space on many devices, with splits into learned and judged.

The files are HELP's released tables as npz (see `load_space`).
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from devices.errors import DeviceError, FileError, unknown
from devices.reading import read_npz

TRIM = 0.1  # HELP drops the fastest and the slowest tenth of each pool, per device
TABLE = {"devices": "U", "latency_ms": "fiu", "hw_embed_idx": "iu"}  # of a file, with kinds of dtype
ENCODED = {"nb201": ("arch_ops",), "fbnet": ("arch_ops",), "ofa": ("ks", "e", "d", "r")}  # arrays of the networks
NUMBERS = {"nb201": 6, "fbnet": 22, "ofa": 46}  # a network
TEST_NETWORKS = 1000  # the networks behind the training pool; 800 of them are left after the trim


@dataclass(frozen=True)
class SpaceSplit:
    """The devices and networks to learn from and to judge on, as in HELP's code.

    Attributes:
        pool: the first `pool` networks are for adaptation and meta-training, the next 1000 for judging.
        source: devices to learn from.
        valid: devices that choose the best weights of a training; none where the source devices do so, on networks that
            no training sees.
        unseen: devices to be judged on.
        published: HELP's published Spearman per unseen device (README of the authors' repository).
    """

    pool: int
    source: tuple[str, ...]
    valid: tuple[str, ...]
    unseen: tuple[str, ...]
    published: dict[str, float]


def _source(large: int) -> tuple[str, ...]:
    gpu = tuple(f"1080ti_{batch}" for batch in (1, 32, large))
    return (*gpu, "silver_4114", "silver_4210r", "samsung_a50", "pixel3", "essential_ph_1", "samsung_s7")


def _valid(large: int) -> tuple[str, ...]:
    return ("titanx_1", "titanx_32", f"titanx_{large}", "gold_6240")


SPLITS = {
    "nb201": SpaceSplit(
        900,
        _source(256),
        _valid(256),
        ("titan_rtx_256", "gold_6226", "pixel2", "raspi4", "eyeriss", "fpga"),
        {"titan_rtx_256": 0.987, "gold_6226": 0.989, "pixel2": 0.802, "raspi4": 0.890, "eyeriss": 0.940, "fpga": 0.985},
    ),
    "fbnet": SpaceSplit(
        4000,
        _source(64),
        _valid(64),
        ("raspi4", "eyeriss", "fpga"),
        {"raspi4": 0.887, "eyeriss": 0.943, "fpga": 0.892},
    ),
    "ofa": SpaceSplit(
        4000,
        tuple(f"{gpu}_{batch}" for gpu in ("2080ti", "titan_xp", "v100") for batch in (1, 32, 64)),
        ("titan_rtx_1", "titan_rtx_32"),
        ("titan_rtx_64",),
        {},
    ),
}

_GPUS = tuple(
    f"{gpu}_{batch}" for gpu in ("1080ti", "2080ti", "titan_rtx", "titanx", "titanxp") for batch in (1, 32, 64)
)


def _harder(source: tuple[str, ...], unseen: tuple[str, ...]) -> SpaceSplit:
    return SpaceSplit(4000, source, (), unseen, {})


# Harder splits of the FBNet table: Akhauri and Abdelfattah, "On Latency Predictors for Neural Architecture Search",
# MLSys 2024 (NASFLAT), after device_task_list.py of github.com/abdelfattah-lab/nasflat_latency. Their sets for
# NAS-Bench-201 need devices that the table does not have. They have no validation devices.
DEVICE_SETS = {
    "F1": _harder(
        ("2080ti_1", "essential_ph_1", "silver_4114", "titan_rtx_1", "titan_rtx_32"),
        ("eyeriss", "fpga", "raspi4", "samsung_a50", "samsung_s7"),
    ),
    "F2": _harder(
        ("essential_ph_1", "gold_6226", "gold_6240", "pixel3", "raspi4"),
        ("1080ti_1", "1080ti_32", "2080ti_32", "titan_rtx_1", "titanxp_1"),
    ),
    "F3": _harder(
        ("essential_ph_1", "pixel2", "pixel3", "raspi4", "samsung_s7"),
        ("1080ti_1", "1080ti_32", "2080ti_1", "titan_rtx_1", "titan_rtx_32"),
    ),
    "F4": _harder(
        (
            *("1080ti_64", "2080ti_1", "eyeriss", "gold_6226", "gold_6240"),
            *("raspi4", "samsung_s7", "silver_4210r", "titan_rtx_1", "titan_rtx_32"),
        ),
        ("1080ti_1", "pixel2", "essential_ph_1"),
    ),
    "FA": _harder(_GPUS, ("gold_6226", "essential_ph_1", "samsung_s7", "pixel2")),
}


@dataclass(frozen=True)
class Space:
    """One search space with its measurements.

    Attributes:
        name: "nb201", "fbnet" or "ofa".
        devices: names, in the order of the rows of `latency_ms`.
        latency_ms: milliseconds of one forward pass, [devices, networks] float64.
        ops: operation ids, [networks, 6 edges] or [networks, 22 layers] uint8; of ofa 20 kernel sizes, 20 ratios, 5
            depths and the resolution, [networks, 46] int.
        references: the ten networks of HELP's hardware embedding, [10] int.
        split: the devices and networks to learn from and to judge on.
    """

    name: str
    devices: tuple[str, ...]
    latency_ms: np.ndarray
    ops: np.ndarray
    references: np.ndarray
    split: SpaceSplit

    def latency(self, device: str) -> np.ndarray:
        """Returns the milliseconds of every network on one device, [networks].

        Raises:
            DeviceError: for a device that the table does not have.
        """
        if device not in self.devices:
            raise DeviceError(unknown("device", device, self.devices))
        own: np.ndarray = self.latency_ms[self.devices.index(device)]
        return own

    def pool(self, device: str) -> np.ndarray:
        """Returns the networks to adapt or train with, trimmed for this device; indices in rising order."""
        return trimmed(self.latency(device), np.arange(self.split.pool))

    def judged(self, device: str) -> np.ndarray:
        """Returns the networks to judge on, trimmed for this device: 800 indices in rising order."""
        return trimmed(self.latency(device), np.arange(self.split.pool, self.split.pool + TEST_NETWORKS))


def trimmed(latency_ms: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Returns `index` without the fastest and the slowest tenth, in rising order."""
    order = index[np.argsort(latency_ms[index], kind="stable")]
    cut = int(TRIM * len(index))
    return np.sort(order[cut : len(index) - cut])


def device_split(space: str, devices: str | None = None) -> SpaceSplit:
    """HELP's own split of a space, or the set of devices of that name (`DEVICE_SETS`).

    Raises:
        DeviceError: for an unknown space or set, or a set of another space.
    """
    if space not in SPLITS:
        raise DeviceError(unknown("space", space, SPLITS))
    if devices is None:
        return SPLITS[space]
    if devices not in DEVICE_SETS:
        near = get_close_matches(devices.upper(), DEVICE_SETS, n=1, cutoff=0)[0]
        allowed = ", ".join(DEVICE_SETS)
        raise DeviceError(f"unknown set of devices {devices!r}; did you mean {near!r}? (allowed: {allowed})")
    if space != "fbnet":
        raise DeviceError(f"the set of devices {devices} is for space fbnet, got space {space}; leave the set out")
    return DEVICE_SETS[devices]


def load_space(name: str, path: str | Path, devices: str | None = None) -> Space:
    """Reads a table: npz with `devices`, `latency_ms` [devices, networks], `hw_embed_idx` and, for the networks,
    `arch_ops` or, of ofa, `ks`, `e`, `d`, `r`; never unpickled.

    Args:
        name: of the space, "nb201", "fbnet" or "ofa".
        path: of the file.
        devices: name of a set of `DEVICE_SETS` to learn from and judge on; None for HELP's own.

    Raises:
        DeviceError: for an unknown space or set of devices, a missing or broken file, a wrong shape, or latencies that
            are not positive numbers.
    """
    split = device_split(name, devices)
    table = {**TABLE, **dict.fromkeys(ENCODED[name], "iu")}
    try:
        arrays = read_npz(Path(path), table, ())
    except FileError as error:
        raise DeviceError(f"{error}; a latency table of space {name} is an npz file with {', '.join(table)}") from None
    for key, kinds in table.items():
        if arrays[key].dtype.kind not in kinds:
            what = "texts" if "U" in kinds else "whole numbers" if kinds == "iu" else "numbers"
            raise DeviceError(f"{path}: {key} must hold {what}, got {arrays[key].dtype}")
    if any(arrays[key].ndim == 0 for key in table):
        raise DeviceError(f"{path}: {', '.join(table)} must be lists or tables, got a single value")
    names, latency, references = tuple(map(str, arrays["devices"])), arrays["latency_ms"], arrays["hw_embed_idx"]
    ops, edges = _side_by_side([arrays[key] for key in ENCODED[name]], path), NUMBERS[name]
    if latency.shape != (len(names), len(ops)) or ops.ndim != 2 or ops.shape[1] != edges:
        shapes = f"latency_ms {latency.shape}, devices {len(names)}, networks {ops.shape}"
        raise DeviceError(f"{path}: is no table of space {name} (needs {edges} numbers a network): {shapes}")
    if references.ndim != 1 or len(references) == 0 or references.min() < 0 or references.max() >= len(ops):
        raise DeviceError(f"{path}: hw_embed_idx must list some of the {len(ops)} networks by number")
    bad = np.argwhere(~(np.isfinite(latency) & (latency > 0)))
    if len(bad):
        row, column = bad[0]
        what = f"network {column} on {names[row]} is {latency[row, column]}"
        raise DeviceError(f"{path}: latencies must be positive numbers of milliseconds, but {what}")
    missing = [d for d in (*split.source, *split.valid, *split.unseen) if d not in names]
    if missing:
        raise DeviceError(f"{path}: lacks the device {missing[0]!r} that space {name} is judged with")
    return Space(name, names, latency.astype(np.float64), ops, references.astype(np.int64), split)


def _side_by_side(parts: list[np.ndarray], path: str | Path) -> np.ndarray:
    """Returns the numbers of each network in one row, [networks, numbers]."""
    if len({len(part) for part in parts}) > 1:
        raise DeviceError(f"{path}: each network needs all of its numbers, got {[part.shape for part in parts]}")
    if len(parts) == 1:
        return parts[0]
    return np.column_stack([part.astype(np.int64) for part in parts])
