"""Reads public tables of measurements (networks on devices) and turns them into samples that prices are fitted to.

A folder of tables has `devices.csv`, `networks.csv`, `network_features.csv` and any of the measurement files of
`MEASUREMENTS`, all CSV. A setting is what was measured on one device in one way: never two runtimes, thread counts,
precisions or phases together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from devices.errors import DeviceError
from devices.latency.columns import TABLE_KINDS, Phase, Physics, counts
from devices.latency.prior import IN_ORDER, Facts, Sample, recalled

INFERENCE = ("ncnn.csv", "mobile_inference.csv")
PAIRED_NETWORKS = 3  # that were measured in int8 and in floating point, for a ratio of them
MEASUREMENTS = ("ncnn.csv", "mobile_inference.csv", "training.csv", "training_own.csv")
LITTLE = frozenset(["A53", "A55", "A510", "A520", "FTC310", "Icestorm", "RaptorE"])
X86 = frozenset(
    (
        *("Zen1", "Zen2", "Zen3", "Zen4", "Zen5", "CoffeeLake", "TigerLakeH", "KabyLake", "RaptorP", "RaptorE"),
        *("EmeraldRapids", "Airmont", "KNC", "CascadeLake", "SkylakeSP", "CascadeLakeSilver"),
    )
)
OTHER_ISA = frozenset(  # LoongArch, Sunway, MIPS, RISC-V
    ("GS264", "LA264", "LA364", "GS464E", "GS464V", "LA464", "LA664", "SW64", "XBurst2", "U74", "C910V", "X60")
)


@dataclass(frozen=True)
class Runtime:
    """How a runtime runs networks.

    Attributes:
        family: of the prior for its forward passes; training steps take `cpu_train_step` or `gpu_train_step`.
        fused: whether it folds norms and rectifiers into the layers before them.
        winograd: whether it has Winograd convolutions.
        year: of runs whose date the tables do not give.
    """

    family: str
    fused: bool
    winograd: bool
    year: float


RUNTIMES: Mapping[str, Runtime] = {
    "ncnn": Runtime("mobile", True, True, 2022),
    "tflite": Runtime("mobile", True, False, 2020),
    "xnnpack": Runtime("mobile", True, False, 2021),
    "paddlelite": Runtime("mobile", True, True, 2022),
    "tnn": Runtime("mobile", True, True, 2021),
    "mnn": Runtime("mobile", True, True, 2019),
    "pytorch": Runtime("cpu_forward", False, False, 2024),
    "pytorch_cuda": Runtime("gpu_forward", False, True, 2024),
    "tensorflow_cuda": Runtime("gpu_forward", False, True, 2021),
    "help": Runtime("mobile", True, True, 2021),
}


def runtime_of(backend: str, gpu: bool) -> str | None:
    """Returns the runtime of a table's backend; None for what no processor or card runs here (NNAPI, phone GPUs)."""
    if backend == "cpu":
        return "ncnn"
    if backend.startswith("pytorch"):
        return "pytorch_cuda" if gpu or "cuda" in backend else "pytorch"
    if backend.startswith("tensorflow"):
        return "tensorflow_cuda" if gpu else None
    name, _, where = backend.partition("_")
    return name if where == "cpu" and name in RUNTIMES else None


@dataclass(frozen=True)
class IntegerRatio:
    """Time of int8 networks over that of the same networks in floating point: a geometric mean over `networks`."""

    value: float
    networks: int
    threads: int


@dataclass(frozen=True)
class Setting:
    """One device measured in one way.

    Attributes:
        sample: the rows as counts and milliseconds, with the device's physics.
        batches, inputs: of each row.
        energy_mj: millijoules of each row, NaN where they were not measured.
    """

    device: str
    runtime: str
    precision: str
    threads: int
    cores: str
    phase: Phase
    run: str
    date: str
    source: str
    sample: Sample
    batches: np.ndarray = field(repr=False)
    inputs: tuple[str, ...] = field(repr=False)
    energy_mj: np.ndarray = field(repr=False)

    @property
    def family(self) -> str:
        """The family of runtimes whose prior the prices are drawn to."""
        family = RUNTIMES[self.runtime].family
        if self.phase == "train_step":
            return "gpu_train_step" if family == "gpu_forward" else "cpu_train_step"
        return family

    @property
    def num_networks(self) -> int:
        return len(set(self.sample.networks))

    def __str__(self) -> str:
        where = f"{self.threads} threads, {self.cores}" if self.sample.physics.isa != "gpu" else "card"
        return f"{self.device}, {self.runtime} {self.precision}, {where}, {self.phase}"


@dataclass(frozen=True)
class Core:
    """One core of a processor: its name, clock and fp32 multiply-adds a cycle."""

    name: str
    ghz: float
    macs_per_cycle: float

    @property
    def gmacs(self) -> float:
        return self.ghz * self.macs_per_cycle


def parse_cores(text: str, macs_per_cycle: Mapping[str, float]) -> list[Core]:
    """Reads the cores of "1xA76@2.96 + 4xA55@1.8", one by one, in that order."""
    found = []
    for count, name, ghz in re.findall(r"(\d+)x(\w+)@([\d.]+)", text):
        found += [Core(name, float(ghz), float(macs_per_cycle.get(name, 0.0)))] * int(count)
    return found


def cluster(cores: list[Core], which: str) -> list[Core]:
    """Returns the cores that a run uses, fastest first: the little ones, or the big ones (all, if all are alike)."""
    little = [core for core in cores if core.name in LITTLE]
    big = [core for core in cores if core.name not in LITTLE] or cores
    return sorted(little or cores if which == "little" else big, key=lambda core: -core.gmacs)


class Tables:
    """A folder of public tables.

    Args:
        folder: with devices.csv, networks.csv, network_features.csv and measurement files.

    Raises:
        DeviceError: where a file is missing or lacks a column.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.devices = self._csv("devices.csv", "device", "kind", "cores").set_index("device")
        networks = self._csv("networks.csv", "network", "usable_for_fit", "constructor")
        self.unusable = set(networks[networks.usable_for_fit != "yes"].network) - set(
            networks[networks.usable_for_fit == "yes"].network
        )
        self.constructors = dict(zip(networks.network, networks.constructor.astype(str), strict=True))
        features = self._csv("network_features.csv", "network", "input", "counted", "conv_macs", "win_macs")
        self._tables: dict[tuple[str, str, bool], np.ndarray] = {}
        for row in features.to_dict("records"):
            fused = row["counted"] != "unfused"
            key = (str(row["network"]), str(row["input"]), fused)
            # ncnn's list and the others may give one name to two networks; ncnn's are asked for by their own key.
            name = f"ncnn:{key[0]}" if row["counted"] == "ncnn" else key[0]
            self._tables[name, key[1], fused] = _table(row)

    def _csv(self, name: str, *needed: str) -> pd.DataFrame:
        path = self.folder / name
        try:
            frame = pd.read_csv(path)
        except FileNotFoundError:
            raise DeviceError(f"{path}: there is no such table; --tables takes the folder that holds it") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise DeviceError(f"{path}: cannot be read as CSV: {error}") from None
        if missing := [column for column in needed if column not in frame.columns]:
            raise DeviceError(f"{path}: lacks the column {missing[0]!r}")
        return frame

    def cores(self, device: str) -> list[Core]:
        """Returns the device's cores with their multiply-adds per cycle; empty where they are not known."""
        own = recalled()["cores"].get(device)
        if device in self.devices.index:
            derivation = self.devices.loc[device].get("peak_derivation")
            if isinstance(derivation, str) and " GHz" in derivation:
                found = []
                for count, ghz, macs, name in re.findall(
                    r"([\d.]+) x ([\d.]+) GHz(?: \([^)]*\))? x ([\d.]+) \((\w+)\)", derivation
                ):
                    found += [Core(name, float(ghz), float(macs))] * int(float(count))
                if found and own is None:
                    return found
        return parse_cores(own["cores"], own["macs_per_cycle"]) if own else []

    def bandwidth_gbs(self, device: str) -> float:
        """Returns the theoretical memory bandwidth in 1e9 bytes per s."""
        if device in self.devices.index:
            known: Any = self.devices.loc[device].get("mem_gbs_theory")
            if known == known and known is not None:
                return float(known)
        lists = recalled()
        for part in ("cores", "cards"):
            if device in lists[part]:
                return float(lists[part][device]["mem_gbs"])
        if device in lists["bandwidths"]:
            return float(lists["bandwidths"][device])
        kind = self.devices.loc[device, "kind"] if device in self.devices.index else "sbc"
        return float(lists["usual_bandwidth"].get(kind, 12.8))

    def physics(
        self, device: str, runtime: str, threads: int, cores: str, precision: str, year: float
    ) -> tuple[Physics, Facts] | None:
        """Returns what the datasheet says of a device run in one way; None where its peak is not known."""
        kind = RUNTIMES[runtime]
        half = precision == "fp16"
        bandwidth = 1e9 * self.bandwidth_gbs(device)
        if kind.family == "gpu_forward":
            card = recalled()["cards"].get(device, {})
            peak: Any = self.devices.loc[device].get("peak_gmacs_all") if device in self.devices.index else None
            gmacs = float(peak) if peak is not None and peak == peak else card.get("gmacs")
            if not gmacs:
                return None
            tensor_cores = precision == "tf32" or card.get("tf32_by_default", False)
            scale = card.get("tf32_over_fp32", 1.0) if tensor_cores else 1.0
            return Physics(1e9 * gmacs * scale, bandwidth, "gpu", winograd=kind.winograd), Facts(isa="gpu", year=year)
        known = [core for core in self.cores(device) if core.macs_per_cycle > 0]
        if not known:
            return None
        used = cluster(known, cores)[: max(1, threads)]
        isa = "x86" if used[0].name in X86 else "other" if used[0].name in OTHER_ISA else "arm"
        peak = 1e9 * sum(core.gmacs for core in used) * (2 if half else 1)
        kind_of = "none" if isa == "other" else isa
        physics = Physics(peak, bandwidth, kind_of, len(used), used[0].ghz, 2 if half else 4, kind.winograd)
        return physics, Facts(len(used), half, used[0].name in IN_ORDER, isa, year)

    def table(self, network: str, size: str, fused: bool, ncnn: bool = False) -> np.ndarray | None:
        """Returns the layer table of a network with an input "3x224x224", [10, 4]; None if its layers are not known.

        A fused table lacks norms and rectifiers, an unfused one counts them as elementwise: each is for one kind of
        runtime. Networks that the tables do not count are built and traced where a library or this package has them.
        """
        key = (f"ncnn:{network}" if ncnn else network, size, fused)
        if key not in self._tables:
            traced = _traced(network, size, self.constructors.get(network, ""))
            if traced is None:
                return None
            self._tables[key] = traced
        return self._tables[key]

    def settings(self, *files: str) -> list[Setting]:
        """Reads the measurement files, setting by setting; all files that are there when none is named.

        Phone GPUs and NPUs, int8, networks whose layers nobody knows, devices without a known peak, and rows without an
        input are left out.
        """
        found: list[Setting] = []
        for name in files or MEASUREMENTS:
            if not files and not (self.folder / name).exists():
                continue
            frame = self._csv(name, "device", "network", "input", "batch", "phase", "ms", "precision", "backend")
            frame = frame[~frame.network.isin(self.unusable) & frame.input.notna() & frame.ms.gt(0)]
            phases = frame.phase.isin(["forward", "train_step", "head_step"])
            frame = frame[~frame.precision.isin(["int8", "gpu"]) & phases].copy()
            for key, usual in {"cores": "all", "run": "", "date": "", "threads": 0}.items():
                given = frame[key] if key in frame else pd.Series(usual, index=frame.index)
                frame[key] = given.astype(object).where(given.notna(), usual)
            frame = frame[~frame.cores.astype(str).str.startswith("gpu:")]
            keys = ["source", "device", "backend", "precision", "threads", "cores", "phase", "run"]
            for values, group in frame.groupby(keys, sort=False):
                setting = self._setting(dict(zip(keys, values, strict=True)), group)
                if setting is not None:
                    found.append(setting)
        return found

    def int8_over_float(self, setting: Setting) -> IntegerRatio | None:
        """Returns how int8 networks compare with the same ones in floating point on a device, in one runtime and run.

        Of the runs of the setting's runtime, that with its number of threads, then the one with most networks counts;
        None where fewer than `PAIRED_NETWORKS` were measured in both ways.
        """
        found: list[tuple[bool, int, IntegerRatio]] = []
        for name in INFERENCE:
            if not (self.folder / name).exists():
                continue
            frame = self._csv(name, "device", "network", "input", "batch", "phase", "ms", "precision", "backend")
            frame = frame[(frame.device == setting.device) & (frame.phase == "forward") & frame.ms.gt(0)]
            runs_there = frame.backend.map(lambda backend: runtime_of(str(backend), False) == setting.runtime)
            frame = frame[runs_there.astype(bool)]
            for (threads, cores, _), group in frame.groupby(["threads", "cores", "run"], dropna=False, sort=False):
                ms = {kind: rows.groupby(["network", "input"]).ms.median() for kind, rows in group.groupby("precision")}
                if "int8" not in ms or setting.precision not in ms or str(cores) == "little":
                    continue
                ratios = (ms["int8"] / ms[setting.precision]).dropna()
                if len(ratios) >= PAIRED_NETWORKS:
                    ratio = IntegerRatio(float(np.exp(np.log(ratios).mean())), len(ratios), int(float(str(threads))))
                    found.append((ratio.threads == setting.threads, len(ratios), ratio))
        return max(found, key=lambda each: each[:2])[2] if found else None

    def _setting(self, key: dict[str, Any], group: pd.DataFrame) -> Setting | None:
        device = str(key["device"])
        gpu = device in self.devices.index and self.devices.loc[device, "kind"] == "gpu"
        runtime = runtime_of(str(key["backend"]), bool(gpu))
        if runtime is None:
            return None
        kind = RUNTIMES[runtime]
        date = str(group.date.iloc[0])
        year = _year(date, kind.year)
        known = self.physics(device, runtime, int(key["threads"]) or 1, str(key["cores"]), str(key["precision"]), year)
        if known is None:
            return None
        rows, kept = [], []
        for row in group.itertuples():
            table = self.table(str(row.network), str(row.input), kind.fused, ncnn=runtime == "ncnn")
            if table is not None:
                rows.append(counts(table, int(str(row.batch))))
                kept.append(row.Index)
        if not rows:
            return None
        group = group.loc[kept]
        phase: Phase = "train_step" if key["phase"] == "train_step" else "forward"
        names = tuple(f"{n}@{i}" for n, i in zip(group.network, group.input, strict=True))
        sample = Sample(device, names, np.stack(rows), group.ms.to_numpy(float), *known, phase=phase)
        energy = group.get("energy_mj", pd.Series(np.nan, index=group.index)).to_numpy(float)
        return Setting(
            device, runtime, str(key["precision"]), int(key["threads"]) or 1, str(key["cores"]), phase,
            f"{key['run']}{'head' if key['phase'] == 'head_step' else ''}", date, str(key["source"]), sample,
            group.batch.to_numpy(int), tuple(group.input.astype(str)), energy,
        )  # fmt: skip


def _year(date: str, usual: float) -> float:
    match = re.match(r"(\d{4})(?:-(\d{2}))?", date)
    return float(match[1]) + (int(match[2]) - 1) / 12 if match and match[2] else float(match[1]) if match else usual


def _table(row: Mapping[Any, Any]) -> np.ndarray:
    """Returns a row of network_features.csv in our kinds: `win` is part of its conv, `grp` part of its depthwise."""
    table = np.zeros((len(TABLE_KINDS), 4))
    for j, column in enumerate(("macs", "activations", "weights", "calls")):
        short = {"activations": "acts"}.get(column, column)
        win, grouped = row[f"win_{short}"], row[f"grp_{short}"]
        values = {kind: row[f"{kind}_{column}"] for kind in ("pointwise", "pool", "elementwise", "fc", "recurrent")}
        values |= {"conv3x3": win, "conv": row[f"conv_{column}"] - win}
        values |= {"grouped": grouped, "depthwise": row[f"depthwise_{column}"] - grouped}
        for kind, value in values.items():
            table[TABLE_KINDS.index(kind), j] = max(0.0, float(value))
    return table


def _traced(network: str, size: str, constructor: str) -> np.ndarray | None:
    """Traces a network that torchvision or `devices.latency.own_networks` can build; None for others."""
    import torch

    from devices.latency.own_networks import OWN
    from devices.trace import trace

    build: Callable[[], torch.nn.Module] | None = OWN.get(network)
    if build is None:
        import torchvision.models

        named = re.match(r"torchvision (\w+)", constructor)
        name = named[1] if named else network
        maker = getattr(torchvision.models, name, None)
        if not callable(maker) or name not in torchvision.models.list_models():
            return None
        extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        build = lambda: maker(weights=None, **extra)  # noqa: E731
    numbers = [int(n) for n in size.split("x")]
    example = torch.zeros(1, *numbers, dtype=torch.long if len(numbers) == 1 and network in _TOKENS else torch.float32)
    return np.array(trace(build().eval(), example).rows)


_TOKENS = ("char_lstm_2x256",)
