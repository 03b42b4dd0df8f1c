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
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
class DeviceProfile:
    """One device. Watts are the whole draw of the device during the phase, not the part above idle.

    Attributes:
        name: as in the file, e.g. "pixel3".
        kind: one of `KINDS`.
        flops_per_s: effective rate on small networks, not the peak; a multiply-add is two FLOPs.
        memory_bytes: what training may use: RAM times the usable fraction, less the runtime.
        down_bytes_per_s: bandwidth to the device.
        up_bytes_per_s: bandwidth from the device.
        rtt_s: round-trip time, paid once per transfer.
        jitter_sigma: sigma of the lognormal factor on a transfer's seconds.
        compute_jitter_sigma: sigma of the lognormal factor on a computation's seconds.
        compute_watts: while training.
        rx_watts: while receiving.
        tx_watts: while sending.
        idle_watts: while waiting.
        failures_per_min: rate of crashes while at work; 0 never crashes.
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
    _check_keys(file, "", tree, ("name", "kind", *SECTIONS), ("name", "kind", *required))
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
    )


class _UniqueKeys(yaml.SafeLoader):
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
        return yaml.load(text, _UniqueKeys)
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
