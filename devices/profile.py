"""Profiles of devices: rate, memory, network and power, from a YAML file that says where each number is from.

The shipped devices are `devices/profiles/*.yaml`; a user's own file has the same keys, all of them in
`devices.profile_file.FIGURES`. A number is plain, or {value, provenance, source}:

    name: my_board
    kind: sbc
    soc: BCM2711                             # may be left out, like `isa: arm`
    compute: {rate_gmacs_per_s: {value: 2.0, provenance: measured, source: "my bench"}, jitter_sigma: 0.15}
    memory: {ram_mb: 4096, usable_fraction: 0.6, runtime_mb: 120}
    network: {down_mbps: 72, up_mbps: 38, rtt_ms: 21, jitter_sigma: 0.2}   # or {link: wifi}, see below
    power: {compute_w: 6.4, rx_w: 3.2, tx_w: 3.4, idle_w: 2.7}
    reliability: {failures_per_min: 0}       # may be left out: the device never crashes
    latency: ...                             # may be left out: see `LatencyFacts`; then only `latency=flops` can price

`network.link` names a link of `devices/links.yaml` and stands for all figures of the network and the radio, rx_w and
tx_w among them. Figures that stand beside it win, one by one; rx_w and tx_w hold at every rate, so they win over the
slopes rx_mw_per_mbps and tx_mw_per_mbps of the link too.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from devices.errors import DeviceError, unknown
from devices.latency.columns import TABLE_KINDS, from_0_1
from devices.latency.prices import BASES, Prices
from devices.links import Link, load_link
from devices.profile_file import FIGURES, PROVENANCES, Reader, Rule, read_yaml
from devices.texts import quoted

SHIPPED = Path(__file__).parent / "profiles"
KINDS = ("phone", "sbc", "laptop", "desktop", "gpu", "server_cpu", "accelerator", "mcu", "embedded", "host")
OLD_KINDS = {"desktop_gpu": "gpu"}  # names of fedsim 0.1
PRICED = ("inference", "forward", "step", "int8")  # sections of `latency` with prices
ISAS = ("arm", "x86", "gpu", "mcu", "none")
# What a method may decide by a client's device: keys of `device_reads` of strategies, trainers and compression plans.
BY_NAME, BY_MEMORY, BY_LATENCY = "name", "memory_bytes", "latency"
BYTES_PER_MB = 2**20  # of memory, as RAM is sold


@dataclass(frozen=True)
class LatencyFacts:
    """Prices and measured milliseconds of a device.

    Attributes:
        inference: prices of a forward pass of one deployed network, or None.
        forward: prices of a forward pass in the training runtime, or None.
        step: prices of a training step, or None.
        int8: prices of a forward pass on integer kernels, or None.
        int8_over_float: time of an int8 network over that of the same one in floating point, or None.
        references: (space, network, batch, milliseconds of one forward pass); a network is the operation ids of its
            edges ("nb201", six) or layers ("fbnet", 22) in one word, e.g. "341213".
        embedding_ms: milliseconds of HELP's ten reference networks of NAS-Bench-201, or empty.
        coefficients_ms: a structured predictor of fedsim 0.1, [29], or empty.
        sigma: relative error of the fitted predictor on its references (leave-one-out); None where it is not known.
        train_ratio: (layer kind, time of a training step over time of a forward pass); kinds left out count 3.
    """

    references: tuple[tuple[str, str, int, float], ...] = ()
    embedding_ms: tuple[float, ...] = ()
    coefficients_ms: tuple[float, ...] = ()
    inference: Prices | None = None
    forward: Prices | None = None
    step: Prices | None = None
    int8: Prices | None = None
    int8_over_float: float | None = None
    sigma: float | None = None
    train_ratio: tuple[tuple[str, float], ...] = ()

    def scaled(self, factor: float | Sequence[float]) -> LatencyFacts:
        """Returns the facts of a slower device, on which nothing was measured.

        Args:
            factor: one for all, or [4] for multiply-adds, activations, weights and calls; milliseconds of whole
                networks are scaled by that of multiply-adds.
        """
        whole = factor if isinstance(factor, int | float) else factor[0]
        of_another = {
            key: replace(prices.scaled(factor), basis="scaled", error=None)
            for key in PRICED
            if (prices := getattr(self, key)) is not None
        }
        return replace(
            self,
            int8_over_float=None,
            references=tuple((space, network, batch, ms * whole) for space, network, batch, ms in self.references),
            embedding_ms=tuple(ms * whole for ms in self.embedding_ms),
            coefficients_ms=tuple(ms * whole for ms in self.coefficients_ms),
            **of_another,
        )


@dataclass(frozen=True)
class DeviceProfile:
    """One device. Watts are the whole draw of the device during the phase, not the part above idle.

    Attributes:
        name: as in the file, e.g. "pixel3".
        kind: one of `KINDS`.
        flops_per_s: effective rate on small networks, not the peak; a multiply-add is two FLOPs.
        memory_bytes: what training may use: RAM times the usable fraction, less the runtime.
        down_bytes_per_s: bandwidth to the device.
        up_bytes_per_s: bandwidth from the device.
        rtt_s: round-trip time.
        jitter_sigma: sigma of the lognormal factor on a transfer's seconds.
        compute_jitter_sigma: sigma of the lognormal factor on a computation's seconds.
        compute_watts: while training.
        rx_watts: while receiving.
        tx_watts: while sending.
        idle_watts: while waiting.
        failures_per_min: rate of crashes while at work; 0 never crashes.
        speed: how much faster this unit is than its model; `flops_per_s` includes it, `latency` does not.
        latency: measured latencies, or None.
        setup_round_trips: round trips before the first byte of a transfer: connection, encryption, request.
        rx_joules_per_byte: of a received byte, beside `rx_watts`.
        tx_joules_per_byte: of a sent byte, beside `tx_watts`.
        tail_watts: of the radio while it stays awake after a transfer, beside the rest of the device.
        tail_s: time that the radio stays awake after a transfer.
        soc: the chip, e.g. "BCM2711"; empty where the file does not say it.
        isa: one of `ISAS`, "none" where the file does not say it.
        core: microarchitecture of the cores that compute, e.g. "A72"; empty where the file does not say it.
        clock_ghz: of one of these cores.
        threads: that compute; `flops_per_s`, `peak_macs_per_s` and `compute_watts` hold for all of them together.
        peak_macs_per_s: multiply-adds in fp32 that the hardware could do in theory, or None.
        memory_bytes_per_s: bandwidth of the memory in theory, or None.
        base_watts: of a GPU that runs a kernel, without its arithmetic, or None.
        joules_per_mac: of a multiply-add, beside `base_watts`.
        joules_per_byte: of a byte of activations and weights, beside `base_watts`.
        spread_sigma: sigma of the lognormal factor between the bandwidths of clients with this device.
        link: name of the link that the network and radio figures come from, or None.
        assumed: keys of the file whose figure nobody measured, defaults included, e.g. "power.tail_s".
    """

    name: str
    kind: str
    flops_per_s: float
    memory_bytes: int
    down_bytes_per_s: float
    up_bytes_per_s: float
    rtt_s: float
    jitter_sigma: float
    compute_jitter_sigma: float
    compute_watts: float
    rx_watts: float
    tx_watts: float
    idle_watts: float
    failures_per_min: float = 0.0
    speed: float = 1.0
    latency: LatencyFacts | None = None
    setup_round_trips: float = 1.0
    rx_joules_per_byte: float = 0.0
    tx_joules_per_byte: float = 0.0
    tail_watts: float = 0.0
    tail_s: float = 0.0
    soc: str = ""
    isa: str = "none"
    core: str = ""
    threads: int = 1
    clock_ghz: float = 2.0
    peak_macs_per_s: float | None = None
    memory_bytes_per_s: float | None = None
    base_watts: float | None = None
    joules_per_mac: float = 0.0
    joules_per_byte: float = 0.0
    spread_sigma: float = 0.6
    link: str | None = None
    assumed: tuple[str, ...] = ()

    def unit(self, speed: float, bandwidth: float) -> DeviceProfile:
        """Returns one unit of this model, with factors on its speed and on its bandwidth."""
        return replace(
            self,
            flops_per_s=self.flops_per_s * speed,
            speed=self.speed * speed,
            down_bytes_per_s=self.down_bytes_per_s * bandwidth,
            up_bytes_per_s=self.up_bytes_per_s * bandwidth,
        )


@dataclass(frozen=True)
class Units:
    """The devices of some clients as columns; `units[number]` is the profile of one client.

    Attributes:
        models: profiles of the models of device.
        model: index into `models` of each client, [clients] int.
        speed: factor of each client's own unit, [clients] float64.
        bandwidth: factor on each client's bandwidth, [clients] float64.
    """

    models: tuple[DeviceProfile, ...]
    model: np.ndarray
    speed: np.ndarray
    bandwidth: np.ndarray

    def __len__(self) -> int:
        return len(self.model)

    def __getitem__(self, number: int) -> DeviceProfile:
        own = self.models[int(self.model[number])]
        return own.unit(float(self.speed[number]), float(self.bandwidth[number]))

    def column(self, figure: Callable[[DeviceProfile], float]) -> np.ndarray:
        """Returns a figure of each client's model, [clients]; own factors are not in it."""
        figures = np.array([figure(profile) for profile in self.models])
        return np.asarray(figures[self.model])


_POSITIVE: Rule = ("a finite number above 0", lambda value: value > 0)
_FROM_ZERO: Rule = ("a finite number 0 or above", lambda value: value >= 0)

REFERENCE_SPACES = {"nb201": (6, "01234"), "fbnet": (22, "012345678")}  # operations of a network, and their ids
COEFFICIENTS = 29  # of a predictor of fedsim 0.1: four sums for each of seven layer kinds, and a constant


def profile_names() -> tuple[str, ...]:
    """Returns the shipped devices, in alphabetical order."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def load_profile(path_or_name: str | Path) -> DeviceProfile:
    """Reads a shipped device by name, or a user's file by a path that ends in .yaml or .yml.

    Raises:
        DeviceError: naming the file, the key, what came and what is allowed.
    """
    path, variant = Path(path_or_name), ""
    if path.suffix.lower() not in (".yaml", ".yml"):
        base, _, variant = str(path_or_name).partition("@")
        if base not in profile_names():
            wrong = unknown("device", path_or_name, profile_names())
            how = "`fedsim devices list` shows all; a file of your own is given by its path, ending in .yaml"
            raise DeviceError(f"{wrong}; {how}")
        return _shipped(base, variant)
    return parse_profile(read_yaml(path), str(path))


@cache
def _shipped(base: str, variant: str) -> DeviceProfile:
    """Reads a shipped device once for all fleets of this process."""
    path = SHIPPED / f"{base}.yaml"
    return parse_profile(as_variant(read_yaml(path), variant, f"{base}@{variant}"), str(path))


def as_variant(tree: Any, variant: str, name: str) -> Any:
    """Overlays the tree of a device with one of its variants, e.g. the "1t" of "raspberry_pi_4@1t".

    Raises:
        DeviceError: for a variant that the device does not have.
    """
    if not variant:
        return tree
    variants = tree.get("variants", {}) if isinstance(tree, dict) else {}
    if variant not in variants:
        what = unknown("variant", variant, variants) if variants else f"there is no variant {variant!r}"
        raise DeviceError(f"{name}: {what}; variants of a device are ways of running networks, e.g. on one thread")
    made = {**tree, "name": f"{tree['name']}@{variant}"}
    for section, values in variants[variant].items():
        kept = made.get(section, {})
        if section == "latency":  # other passes were measured in the device's usual way
            kept = {key: rows for key, rows in kept.items() if key in ("references", "embedding")}
        made[section] = {**kept, **values}
    return made


def kind_named(word: str) -> str:
    """Returns the kind that a word stands for; kinds of fedsim 0.1 have new names."""
    return OLD_KINDS.get(word, word)


def parse_profile(tree: Any, file: str) -> DeviceProfile:
    """Checks what a profile file says and turns it into bytes, seconds and watts; `file` is named in errors.

    Raises:
        DeviceError: with everything that is wrong in the file.
    """
    reader = Reader(file)
    sections = tuple(section for section in FIGURES if section != "reliability")
    allowed = ("name", "kind", "soc", "isa", "core", "variants", "latency", *FIGURES)
    if not reader.check_map("", tree, allowed, ("name", "kind", *sections)):
        reader.finish()
    name, soc, core = (reader.text(tree, key) for key in ("name", "soc", "core"))
    kind = reader.choice(tree, "kind", KINDS, also=OLD_KINDS)
    isa = reader.choice(tree, "isa", ISAS, default="none")
    link, free = _link(reader, tree.get("network"))
    given = {
        section: reader.section(
            section, tree[section], figures, free.get(section, ()), ("link",) if section == "network" else ()
        )
        for section, figures in FIGURES.items()
        if section in tree
    }
    latency = _latency_of(reader, tree["latency"]) if "latency" in tree else None
    memory_bytes = _memory_bytes(reader, given.get("memory", {}))
    _check_together(reader, given)
    reader.finish()
    fields, assumed = _fields(given, reader.assumed, link)
    if isinstance(latency, DeviceProfile) and latency.latency is not None:
        latency = latency.latency.scaled(_slowdowns(fields, latency))
    assert not isinstance(latency, DeviceProfile)
    return DeviceProfile(
        name=name,
        kind=kind,
        soc=soc,
        isa=isa,
        core=core,
        memory_bytes=memory_bytes,
        latency=latency,
        assumed=assumed,
        **fields,
    )


def _link(reader: Reader, network: Any) -> tuple[Link | None, Mapping[str, tuple[str, ...]]]:
    """Returns the link that a network section names, and the keys that may be missing beside it, by section."""
    free = {"network": ("down_mbps", "up_mbps", "rtt_ms", "jitter_sigma"), "power": ("rx_w", "tx_w")}
    if not isinstance(network, dict):
        return None, free
    if "link" not in network:
        return None, {}
    try:
        return load_link(network["link"]), free
    except DeviceError as error:
        reader.problems.append(f"key 'network.link': {error}")
        return None, free


def _fields(
    given: Mapping[str, Mapping[str, float]], assumed: Iterable[str], link: Link | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the fields of a DeviceProfile from a file's figures, its link and the defaults, and the assumed keys."""
    power = given["power"]
    fields: dict[str, Any] = link.fields(power["idle_w"]) if link else {}
    for way in ("rx", "tx"):
        if f"{way}_w" in power:
            fields.pop(f"{way}_joules_per_byte", None)
    linked, found = set(fields), []
    for section, figures in FIGURES.items():
        for key, figure in figures.items():
            name, own = f"{section}.{key}", given.get(section, {}).get(key)
            if own is None and figure.field in linked:
                found += [name] if link and name in link.assumed else []
                continue
            value = figure.default if own is None else own
            if value is None:
                continue
            if own is None or name in assumed:
                found.append(name)
            if section != "memory":
                fields[figure.field] = figure.in_si(value)
    return fields, tuple(found)


def _memory_bytes(reader: Reader, memory: Mapping[str, float]) -> int:
    """Returns the bytes left for training, 0 where a figure is missing; notes a problem if nothing is left."""
    if len(memory) < len(FIGURES["memory"]) or any(value != value for value in memory.values()):
        return 0
    left = int((memory["ram_mb"] * memory["usable_fraction"] - memory["runtime_mb"]) * BYTES_PER_MB)
    if left <= 0:
        reader.problems.append(
            f"nothing is left for training: memory.runtime_mb ({memory['runtime_mb']:g}) must be below "
            f"memory.ram_mb ({memory['ram_mb']:g}) times memory.usable_fraction ({memory['usable_fraction']:g})"
        )
    return left


ORDERED = (  # pairs of figures of which the first is at most the second, and why
    ("power.idle_w", "power.compute_w", "a device at work draws no less than one that waits"),
    ("power.base_w", "power.compute_w", "a board draws its limit at most"),
    ("power.idle_w", "power.base_w", "a running kernel draws no less than waiting"),
    ("compute.rate_gmacs_per_s", "compute.peak_gmacs_per_s", "nothing computes above its peak"),
)


def _check_together(reader: Reader, given: Mapping[str, Mapping[str, float]]) -> None:
    """Notes figures that contradict each other; those that are missing or wrong themselves contradict nothing."""
    known = {f"{section}.{key}": value for section, figures in given.items() for key, value in figures.items()}
    for low, high, why in ORDERED:
        if low in known and high in known and known[low] > known[high]:
            reader.problems.append(f"key {low!r} must be at most {high} ({known[high]:g}), got {known[low]:g}: {why}")


_BEING_READ: ContextVar[tuple[str, ...]] = ContextVar("being read", default=())


def _scaled_device(file: str, device: Any) -> DeviceProfile:
    """Reads the device whose latencies another file scales; files may form a chain, but no ring."""
    chain = (*_BEING_READ.get(), str(Path(file).resolve()))
    if str(Path(str(device)).resolve()) in chain:
        raise DeviceError(f"{file}: latency.scaled.device {str(device)!r} leads back to itself")
    token = _BEING_READ.set(chain)
    try:
        return load_profile(str(device))
    finally:
        _BEING_READ.reset(token)


def _slowdowns(fields: Mapping[str, Any], other: DeviceProfile) -> tuple[float, float, float, float]:
    """Returns how much slower than another device multiply-adds, activations, weights and calls are.

    Multiply-adds follow the peak, bytes the bandwidth of the memory, calls the clock; where one of the two files does
    not say it, all follow the rate.
    """

    def ratio(field: str) -> float | None:
        own, others = fields.get(field), getattr(other, field)
        return others / own if own and others else None

    rate = other.flops_per_s / fields["flops_per_s"]
    macs, moved, calls = (ratio(field) or rate for field in ("peak_macs_per_s", "memory_bytes_per_s", "clock_ghz"))
    return macs, moved, moved, calls


def _latency_of(reader: Reader, tree: Any) -> LatencyFacts | DeviceProfile | None:
    """Reads the latency section; its first problem joins those of the rest."""
    try:
        return _latency(reader.file, tree)
    except DeviceError as error:
        reader.problems.append(str(error).removeprefix(f"{reader.file}: "))
        return None


def _latency(file: str, tree: Any) -> LatencyFacts | DeviceProfile:
    """Reads the latency section: prices, measured references, or those of another device times a factor.

    Without a factor it is that other device itself: what its latencies are scaled by are figures of both.
    """
    keys = (*PRICED, "references", "embedding", "coefficients_ms", "int8_coefficients_ms", "sigma", "train_ratio")
    _check_keys(file, "latency.", tree, (*keys, "int8_over_float", "scaled"), ())
    if "scaled" in tree:
        _check_keys(file, "latency.scaled.", tree["scaled"], ("device", "factor"), ("device",))
        scaled = tree["scaled"]
        other = _scaled_device(file, scaled["device"])
        if other.latency is None:
            raise DeviceError(f"{file}: latency.scaled.device {scaled['device']!r} has no latencies itself")
        if "factor" not in scaled:
            return other
        return other.latency.scaled(_number(file, "latency.scaled.factor", scaled["factor"], _POSITIVE))
    embedding = _sourced(file, "latency.embedding", tree["embedding"], ("ms",))["ms"] if "embedding" in tree else []
    ratios = tree.get("train_ratio", {})
    _check_keys(file, "latency.train_ratio.", ratios, tuple(ratios) if isinstance(ratios, Mapping) else (), ())
    priced = {key: _prices(file, f"latency.{key}", tree[key]) for key in PRICED if key in tree}
    old_int8 = _figures(file, "latency.int8_coefficients_ms", tree.get("int8_coefficients_ms"))
    if old_int8:
        cells = np.array(from_0_1(np.array(old_int8[:-1]).reshape(-1, 4).tolist(), as_prices=True))
        priced["int8"] = Prices.of_cells(cells, constant_ms=old_int8[-1], precision="int8")
    facts = LatencyFacts(
        references=_references(file, tree["references"]) if "references" in tree else (),
        embedding_ms=tuple(_plain(file, "latency.embedding.ms", ms) for ms in embedding),
        coefficients_ms=_figures(file, "latency.coefficients_ms", tree.get("coefficients_ms")),
        int8_over_float=(
            _number(file, "latency.int8_over_float", tree["int8_over_float"], _POSITIVE)
            if "int8_over_float" in tree
            else None
        ),
        sigma=_number(file, "latency.sigma", tree["sigma"], _FROM_ZERO) if "sigma" in tree else None,
        train_ratio=tuple((k, _number(file, f"latency.train_ratio.{k}", v, _FROM_ZERO)) for k, v in ratios.items()),
        **priced,
    )
    if not facts.references and not facts.coefficients_ms and not priced:
        allowed = ", ".join((*PRICED[:3], "references", "coefficients_ms"))
        raise DeviceError(f"{file}: latency needs one of {allowed}; leave the section out if there are none")
    return facts


def _prices(file: str, key: str, tree: Any) -> Prices:
    """Checks and reads one section of prices."""
    needed = ("runtime", "prices")
    facts = ("threads", "precision", "basis", "error", "rows", "networks", "batches", "largest_mmacs", "kinds")
    known = (*needed, *facts, "overlap", "extra_calls", "constant_ms", "provenance", "source")
    _check_keys(file, f"{key}.", tree, known, needed)
    for name in ("error", "rows", "networks", "largest_mmacs", "overlap", "extra_calls", "constant_ms", "threads"):
        if name in tree:
            _plain(file, f"{key}.{name}", tree[name], _FROM_ZERO)
    for name in ("runtime", "precision", "source"):
        if not isinstance(tree.get(name, ""), str):
            raise DeviceError(f"{file}: key '{key}.{name}' must be text, got {reprlib.repr(tree[name])}")
    kinds = tree.get("kinds", [])
    if not isinstance(kinds, list) or any(kind not in TABLE_KINDS for kind in kinds):
        allowed = ", ".join(TABLE_KINDS)
        raise DeviceError(f"{file}: key '{key}.kinds' must be a list of {allowed}, got {reprlib.repr(kinds)}")
    if tree.get("provenance", PROVENANCES[0]) not in PROVENANCES:
        raise DeviceError(f"{file}: {key}: {unknown('provenance', tree['provenance'], PROVENANCES)}")
    if tree.get("basis", "rows") not in BASES:
        raise DeviceError(f"{file}: {unknown(f'{key}.basis', tree['basis'], BASES)}")
    batches = tree.get("batches", [1, 1])
    if not isinstance(batches, list) or len(batches) != 2 or not all(isinstance(b, int) and b >= 1 for b in batches):
        raise DeviceError(f"{file}: key '{key}.batches' must be the smallest and largest batch, got {batches!r}")
    _check_keys(file, f"{key}.prices.", tree["prices"], TABLE_KINDS, ())
    for kind, row in tree["prices"].items():
        if not isinstance(row, list) or len(row) != 4:
            raise DeviceError(
                f"{file}: key '{key}.prices.{kind}' must be four numbers (ps per multiply-add, element and weight, "
                f"us per call), got {reprlib.repr(row)}"
            )
        for value in row:
            _plain(file, f"{key}.prices.{kind}", value, _FROM_ZERO)
    return Prices.from_dict(tree)


def _references(file: str, tree: Any) -> tuple[tuple[str, str, int, float], ...]:
    """Reads milliseconds of known networks; keys are "space@batch", e.g. "nb201@1"."""
    given = tuple(tree) if isinstance(tree, dict) else ()
    spaces = [key for key in given if key not in ("provenance", "source")]
    _sourced(file, "latency.references", tree, tuple(map(str, spaces)))
    found = []
    for key in spaces:
        space, _, batch = str(key).partition("@")
        where = f"latency.references.{key}"
        if space not in REFERENCE_SPACES or not re.fullmatch("0*[1-9][0-9]{0,8}", batch):
            allowed = " or ".join(f"{name}@BATCH" for name in REFERENCE_SPACES)
            raise DeviceError(
                f"{file}: key {quoted(where)} must be {allowed} with a batch from 1 to 999999999, e.g. nb201@1"
            )
        length, ids = REFERENCE_SPACES[space]
        if not isinstance(tree[key], dict):
            raise DeviceError(f"{file}: {where} must be a map from networks to milliseconds, got {tree[key]!r}")
        for network, ms in tree[key].items():
            if not isinstance(network, str) or len(network) != length or set(network) - set(ids):
                name = f"{where}.{network}"
                raise DeviceError(f"{file}: {name} must be {length} operation ids of {ids[0]} to {ids[-1]} in quotes")
            found.append((space, network, int(batch), _plain(file, f"{where}.{network}", ms)))
    return tuple(found)


def _sourced(file: str, key: str, tree: Any, names: tuple[str, ...]) -> Mapping[str, Any]:
    """Checks a map of figures that share one provenance and source."""
    _check_keys(file, f"{key}.", tree, (*names, "provenance", "source"), (*names, "provenance", "source"))
    if tree["provenance"] not in PROVENANCES:
        raise DeviceError(f"{file}: {key}: {unknown('provenance', tree['provenance'], PROVENANCES)}")
    checked: Mapping[str, Any] = tree
    return checked


def _figures(file: str, key: str, tree: Any) -> tuple[float, ...]:
    if tree is None:
        return ()
    values = _sourced(file, key, tree, ("value",))["value"]
    if not isinstance(values, list) or len(values) not in (0, COEFFICIENTS):
        raise DeviceError(f"{file}: {key} must be a list of {COEFFICIENTS} numbers, got {reprlib.repr(values)}")
    return tuple(_plain(file, key, value, _FROM_ZERO) for value in values)


def _plain(file: str, key: str, value: Any, rule: Rule = _POSITIVE) -> float:
    return _number(file, key, {"value": value, "provenance": "dataset", "source": "beside it"}, rule)


def _check_keys(file: str, prefix: str, tree: Any, allowed: Iterable[str], required: Iterable[str]) -> None:
    reader = Reader(file)
    reader.check_map(prefix.rstrip("."), tree, allowed, required)
    reader.finish()


def _number(file: str, key: str, entry: Any, rule: Rule) -> float:
    reader = Reader(file)
    value = reader.number(key, entry, rule)
    reader.finish()
    return value
