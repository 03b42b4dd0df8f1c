"""Tables of measured latencies: many networks of one search space on many devices, and how they are split for judging.

The files are HELP's released tables as npz (see `load_space`). May import: numpy and `devices.errors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from devices.errors import DeviceError, unknown

TRIM = 0.1  # HELP drops the fastest and the slowest tenth of each pool, per device
TEST_NETWORKS = 1000  # the networks behind the training pool; 800 of them are left after the trim


@dataclass(frozen=True)
class SpaceSplit:
    """Which devices and networks are for what, as HELP's code has it.

    Attributes:
        pool: the first `pool` networks are for adaptation and meta-training, the next 1000 for judging.
        source, valid, unseen: device names.
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
}


@dataclass(frozen=True)
class Space:
    """One search space with its measurements.

    Attributes:
        name: "nb201" or "fbnet".
        devices: names, in the order of the rows of `latency_ms`.
        latency_ms: milliseconds of one forward pass, [devices, networks] float64.
        ops: operation ids, [networks, 6 edges] or [networks, 22 layers] uint8.
        references: the ten networks of HELP's hardware embedding, [10] int.
    """

    name: str
    devices: tuple[str, ...]
    latency_ms: np.ndarray
    ops: np.ndarray
    references: np.ndarray

    @property
    def split(self) -> SpaceSplit:
        return SPLITS[self.name]

    def latency(self, device: str) -> np.ndarray:
        """Milliseconds of every network on one device, [networks].

        Raises:
            DeviceError: for a device that the table does not have.
        """
        if device not in self.devices:
            raise DeviceError(unknown("device", device, self.devices))
        return self.latency_ms[self.devices.index(device)]

    def pool(self, device: str) -> np.ndarray:
        """The networks to adapt or train with, trimmed for this device; indices in rising order."""
        return trimmed(self.latency(device), np.arange(self.split.pool))

    def judged(self, device: str) -> np.ndarray:
        """The networks to judge on, trimmed for this device: 800 indices in rising order."""
        return trimmed(self.latency(device), np.arange(self.split.pool, self.split.pool + TEST_NETWORKS))


def trimmed(latency_ms: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`index` without the fastest and the slowest tenth, in rising order."""
    order = index[np.argsort(latency_ms[index], kind="stable")]
    cut = int(TRIM * len(index))
    return np.sort(order[cut : len(index) - cut])


def load_space(name: str, path: str | Path) -> Space:
    """Reads a table: npz with `devices`, `latency_ms` [devices, networks], `arch_ops`, `hw_embed_idx`; never unpickled.

    Raises:
        DeviceError: for an unknown space, a missing or broken file, a wrong shape, or latencies that are not positive
            numbers.
    """
    if name not in SPLITS:
        raise DeviceError(unknown("space", name, SPLITS))
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("devices", "latency_ms", "arch_ops", "hw_embed_idx")}
    except KeyError as error:
        raise DeviceError(f"{path}: has no array {error.args[0]!r}; a latency table of space {name} needs it") from None
    except (OSError, ValueError) as error:
        raise DeviceError(f"{path}: cannot be read as a latency table (npz): {error}") from None
    devices, latency, ops = tuple(map(str, arrays["devices"])), arrays["latency_ms"], arrays["arch_ops"]
    edges = {"nb201": 6, "fbnet": 22}[name]
    if latency.shape != (len(devices), len(ops)) or ops.ndim != 2 or ops.shape[1] != edges:
        shapes = f"latency_ms {latency.shape}, devices {len(devices)}, arch_ops {ops.shape}"
        raise DeviceError(f"{path}: is no table of space {name} (needs {edges} operations a network): {shapes}")
    bad = np.argwhere(~(np.isfinite(latency) & (latency > 0)))
    if len(bad):
        row, column = bad[0]
        what = f"network {column} on {devices[row]} is {latency[row, column]}"
        raise DeviceError(f"{path}: latencies must be positive numbers of milliseconds, but {what}")
    missing = [d for d in (*SPLITS[name].source, *SPLITS[name].unseen) if d not in devices]
    if missing:
        raise DeviceError(f"{path}: lacks the device {missing[0]!r} that space {name} is judged with")
    return Space(name, devices, latency.astype(np.float64), ops, arrays["hw_embed_idx"].astype(np.int64))
