"""What a device can do: its rate, memory, network and power, read from a YAML file that says where each number is from.

May import: the standard library, yaml and this package. The shipped devices are `devices/profiles/*.yaml`; a user's own
file has the same keys:

    name: my_board
    kind: sbc
    compute: {rate_gmacs_per_s: {value: 2.0, provenance: measured, source: "my bench"}, jitter_sigma: {...}}
    memory: {ram_mb: {...}, usable_fraction: {...}, runtime_mb: {...}}
    network: {down_mbps: {...}, up_mbps: {...}, rtt_ms: {...}, jitter_sigma: {...}}
    power: {compute_w: {...}, rx_w: {...}, tx_w: {...}, idle_w: {...}}
    reliability: {failures_per_min: {...}}   # may be left out: the device never crashes
    latency: ...                             # may be left out: see `LatencyFacts`; then only `latency=flops` can price
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from devices.errors import DeviceError, unknown

SHIPPED = Path(__file__).parent / "profiles"
KINDS = ("phone", "sbc", "laptop", "desktop_gpu", "server_cpu", "accelerator", "host")
PROVENANCES = ("measured", "dataset", "datasheet", "assumed")

BYTES_PER_MB = 2**20  # of memory, as RAM is sold
BYTES_PER_MBIT = 1e6 / 8  # of network, as links are sold


@dataclass(frozen=True)
class LatencyFacts:
    """What is known of a device's latency; predictors are fitted to it when they are first asked.

    Attributes:
        references: (space, network, batch, milliseconds of one forward pass); a network is the operation ids of its
            edges ("nb201", six) or layers ("fbnet", 22) in one word, e.g. "341213".
        embedding_ms: milliseconds of HELP's ten reference networks of NAS-Bench-201, or empty.
        coefficients_ms: a fitted structured predictor, [29], or empty: then it is fitted to the references.
        int8_coefficients_ms: the same in int8, or empty.
        sigma: relative error of the fitted predictor on its references (leave-one-out); None where it is not known.
        train_ratio: (layer kind, time of a training step over time of a forward pass); kinds left out count 3.
    """

    references: tuple[tuple[str, str, int, float], ...] = ()
    embedding_ms: tuple[float, ...] = ()
    coefficients_ms: tuple[float, ...] = ()
    int8_coefficients_ms: tuple[float, ...] = ()
    sigma: float | None = None
    train_ratio: tuple[tuple[str, float], ...] = ()

    def scaled(self, factor: float) -> LatencyFacts:
        """The facts of a device that is `factor` times slower."""
        return replace(
            self,
            references=tuple((space, network, batch, ms * factor) for space, network, batch, ms in self.references),
            embedding_ms=tuple(ms * factor for ms in self.embedding_ms),
            coefficients_ms=tuple(ms * factor for ms in self.coefficients_ms),
            int8_coefficients_ms=tuple(ms * factor for ms in self.int8_coefficients_ms),
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
        speed: how much faster this one unit is than its model; `flops_per_s` has it already, `latency` has not.
        latency: measured latencies, or None.
        setup_round_trips: round trips before the first byte of a transfer: connection, encryption, request.
        rx_joules_per_byte: what a received byte takes beside `rx_watts`.
        tx_joules_per_byte: what a sent byte takes beside `tx_watts`.
        tail_watts: what the radio draws beside the rest of the device while it stays awake after a transfer.
        tail_s: for how long it does.
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


Rule = tuple[str, Callable[[float], bool]]  # how the sentence says it, and the test
_POSITIVE: Rule = ("above 0", lambda value: value > 0)
_FROM_ZERO: Rule = ("0 or above", lambda value: value >= 0)
_FRACTION: Rule = ("in (0, 1]", lambda value: 0 < value <= 1)

SECTIONS: Mapping[str, Mapping[str, Rule]] = {
    "compute": {"rate_gmacs_per_s": _POSITIVE, "jitter_sigma": _FROM_ZERO},
    "memory": {"ram_mb": _POSITIVE, "usable_fraction": _FRACTION, "runtime_mb": _FROM_ZERO},
    "network": {"down_mbps": _POSITIVE, "up_mbps": _POSITIVE, "rtt_ms": _FROM_ZERO, "jitter_sigma": _FROM_ZERO},
    "power": {"compute_w": _FROM_ZERO, "rx_w": _FROM_ZERO, "tx_w": _FROM_ZERO, "idle_w": _FROM_ZERO},
    "reliability": {"failures_per_min": _FROM_ZERO},
}
OPTIONAL = ("reliability",)
REFERENCE_SPACES = {"nb201": (6, "01234"), "fbnet": (22, "012345678")}  # operations of a network, and their ids
COEFFICIENTS = 29  # of a structured predictor: four sums for each of seven layer kinds, and a constant
FORM = f"{{value: ..., provenance: {'|'.join(PROVENANCES)}, source: ...}}"


def profile_names() -> tuple[str, ...]:
    """The shipped devices, in alphabetical order."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def load_profile(path_or_name: str | Path) -> DeviceProfile:
    """Reads a shipped device by name, or a user's file by a path that ends in .yaml or .yml.

    Raises:
        DeviceError: naming the file, the key, what came and what is allowed.
    """
    path = Path(path_or_name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        if str(path_or_name) not in profile_names():
            wrong = unknown("device", path_or_name, profile_names())
            raise DeviceError(f"{wrong}; a file of your own is given by its path, ending in .yaml")
        path = SHIPPED / f"{path_or_name}.yaml"
    return parse_profile(_read(path), str(path))


def parse_profile(tree: Any, file: str) -> DeviceProfile:
    """Checks what a profile file says and turns it into bytes, seconds and watts; `file` is named in errors."""
    required = [section for section in SECTIONS if section not in OPTIONAL]
    _check_keys(file, "", tree, ("name", "kind", "latency", *SECTIONS), ("name", "kind", *required))
    name, kind = tree["name"], tree["kind"]
    if not isinstance(name, str) or not name:
        raise DeviceError(f"{file}: key 'name' must be text, got {name!r}")
    if kind not in KINDS:
        raise DeviceError(f"{file}: {unknown('kind', kind, KINDS)}")
    compute, memory, network, power = (_section(file, section, tree[section]) for section in required)
    reliability = _section(file, "reliability", tree["reliability"]) if "reliability" in tree else {}
    memory_bytes = int((memory["ram_mb"] * memory["usable_fraction"] - memory["runtime_mb"]) * BYTES_PER_MB)
    if memory_bytes <= 0:
        raise DeviceError(
            f"{file}: nothing is left for training: memory.runtime_mb ({memory['runtime_mb']:g}) must be below "
            f"memory.ram_mb ({memory['ram_mb']:g}) times memory.usable_fraction ({memory['usable_fraction']:g})"
        )
    return DeviceProfile(
        name=name,
        kind=kind,
        flops_per_s=2e9 * compute["rate_gmacs_per_s"],
        memory_bytes=memory_bytes,
        down_bytes_per_s=BYTES_PER_MBIT * network["down_mbps"],
        up_bytes_per_s=BYTES_PER_MBIT * network["up_mbps"],
        rtt_s=network["rtt_ms"] / 1e3,
        jitter_sigma=network["jitter_sigma"],
        compute_jitter_sigma=compute["jitter_sigma"],
        compute_watts=power["compute_w"],
        rx_watts=power["rx_w"],
        tx_watts=power["tx_w"],
        idle_watts=power["idle_w"],
        failures_per_min=reliability.get("failures_per_min", 0.0),
        latency=_latency(file, tree["latency"]) if "latency" in tree else None,
    )


def _latency(file: str, tree: Any) -> LatencyFacts:
    """The latency section: measured references, a fitted predictor, or those of another device times a factor."""
    keys = ("references", "embedding", "coefficients_ms", "int8_coefficients_ms", "sigma", "train_ratio", "scaled")
    _check_keys(file, "latency.", tree, keys, ())
    if "scaled" in tree:
        _check_keys(file, "latency.scaled.", tree["scaled"], ("device", "factor"), ("device", "factor"))
        factor = _number(file, "latency.scaled.factor", tree["scaled"]["factor"], _POSITIVE)
        other = load_profile(tree["scaled"]["device"]).latency
        if other is None:
            raise DeviceError(f"{file}: latency.scaled.device {tree['scaled']['device']!r} has no latencies itself")
        return other.scaled(factor)
    embedding = _sourced(file, "latency.embedding", tree["embedding"], ("ms",))["ms"] if "embedding" in tree else []
    ratios = tree.get("train_ratio", {})
    _check_keys(file, "latency.train_ratio.", ratios, tuple(ratios) if isinstance(ratios, Mapping) else (), ())
    facts = LatencyFacts(
        references=_references(file, tree["references"]) if "references" in tree else (),
        embedding_ms=tuple(_plain(file, "latency.embedding.ms", ms) for ms in embedding),
        coefficients_ms=_figures(file, "latency.coefficients_ms", tree.get("coefficients_ms")),
        int8_coefficients_ms=_figures(file, "latency.int8_coefficients_ms", tree.get("int8_coefficients_ms")),
        sigma=_number(file, "latency.sigma", tree["sigma"], _FROM_ZERO) if "sigma" in tree else None,
        train_ratio=tuple((k, _number(file, f"latency.train_ratio.{k}", v, _FROM_ZERO)) for k, v in ratios.items()),
    )
    if not facts.references and not facts.coefficients_ms:
        raise DeviceError(
            f"{file}: latency needs references or coefficients_ms; leave the section out if there are none"
        )
    return facts


def _references(file: str, tree: Any) -> tuple[tuple[str, str, int, float], ...]:
    """Milliseconds of known networks; keys are "space@batch", e.g. "nb201@1"."""
    given = tuple(tree) if isinstance(tree, dict) else ()
    spaces = [key for key in given if key not in ("provenance", "source")]
    _sourced(file, "latency.references", tree, tuple(map(str, spaces)))
    found = []
    for key in spaces:
        space, _, batch = str(key).partition("@")
        where = f"latency.references.{key}"
        if space not in REFERENCE_SPACES or not batch.isdigit() or int(batch) < 1:
            allowed = " or ".join(f"{name}@BATCH" for name in REFERENCE_SPACES)
            raise DeviceError(f"{file}: {where}: measured networks stand under {allowed}, e.g. nb201@1")
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
    """A map of figures that share one provenance and source."""
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


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one map; YAML itself would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The map of a node, with its keys checked."""
        keys = [key.value for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DeviceError(f"{path}: there is no such device file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"{path}: cannot be read as a text file: {error}") from None
    try:
        return yaml.load(text, UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise DeviceError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None


def _check_keys(file: str, prefix: str, tree: Any, allowed: Iterable[str], required: Iterable[str]) -> None:
    if not isinstance(tree, dict):
        where = f"key {prefix.rstrip('.')!r}" if prefix else "the file"
        raise DeviceError(f"{file}: {where} must be a map with {', '.join(required)}, got {reprlib.repr(tree)}")
    for key in tree:
        if key not in allowed:
            raise DeviceError(f"{file}: {unknown('key', f'{prefix}{key}', [f'{prefix}{k}' for k in allowed])}")
    for key in required:
        if key not in tree:
            form = f"; write it as {FORM}" if prefix else ""
            raise DeviceError(f"{file}: key '{prefix}{key}' is missing{form}")


def _section(file: str, section: str, tree: Any) -> dict[str, float]:
    rules = SECTIONS[section]
    _check_keys(file, f"{section}.", tree, rules, rules)
    return {key: _number(file, f"{section}.{key}", tree[key], rule) for key, rule in rules.items()}


def _number(file: str, key: str, entry: Any, rule: Rule) -> float:
    fields = ("value", "provenance", "source")
    if not isinstance(entry, dict):
        raise DeviceError(f"{file}: key {key!r} must be {FORM}, got {reprlib.repr(entry)}")
    _check_keys(file, f"{key}.", entry, fields, fields)
    if entry["provenance"] not in PROVENANCES:
        raise DeviceError(f"{file}: {unknown(f'{key}.provenance', entry['provenance'], PROVENANCES)}")
    if not isinstance(entry["source"], str) or not entry["source"].strip():
        raise DeviceError(f"{file}: key '{key}.source' must say where the value is from, got {entry['source']!r}")
    value, (allowed, holds) = entry["value"], rule
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DeviceError(f"{file}: key '{key}.value' must be a number {allowed}, got {value!r}{_notation(value)}")
    if not (math.isfinite(value) if isinstance(value, float) else abs(value) < 1e300) or not holds(value):
        raise DeviceError(f"{file}: key '{key}.value' must be a finite number {allowed}, got {value!r}")
    return float(value)


def _notation(value: object) -> str:
    """YAML 1.1 reads 1e9 as text, which looks like a number to everyone else."""
    try:
        return f" (YAML reads this as text; write {float(value):f})" if isinstance(value, str) else ""
    except ValueError:
        return ""
