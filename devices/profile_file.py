"""The YAML file of a device or a link: its numbers, their bounds, and a reader that notes all that is wrong in one.

`FIGURES` is the whole schema: checks, defaults and the comments of `fedsim devices new` come from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from devices import reading
from devices.errors import DeviceError, FileError, unknown
from devices.texts import quoted, storable

PROVENANCES = ("measured", "dataset", "datasheet", "derived", "recalled", "assumed")
FORM = f"{{value: ..., provenance: {'|'.join(PROVENANCES)}, source: ...}}"
BYTES_PER_MBIT = 1e6 / 8  # of network, as links are sold
JOULES_PER_BYTE = 8e-9  # one mW per Mbit/s: 1e-3 J for each 1e6 bits
MAX_RAM_MB = 4 * 2**20  # 4 TB
MAX_LETTERS = 1000  # of a name

Rule = tuple[str, Callable[[float], bool]]  # words for a sentence, and the test


@dataclass(frozen=True)
class Figure:
    """One number of a file; its bounds are wide enough for every device that is sold, and catch a wrong unit.

    Attributes:
        field: of a `DeviceProfile` or `Link`, which gets the number times `scale`.
        meaning: unit and meaning in a few words.
        low, high: the least and the largest allowed number.
        required: whether the file must have it.
        default: value where it is left out; None leaves the field as it is.
        scale: from the file's unit to that of the field.
        whole: whether fractions are refused.
    """

    field: str
    meaning: str
    low: float
    high: float
    required: bool = True
    default: float | None = None
    scale: float = 1.0
    whole: bool = False

    @property
    def rule(self) -> Rule:
        """The bounds as a sentence and a test."""
        kind = "a whole number" if self.whole else "a number"
        sentence = f"{kind} from {_plain(self.low)} to {_plain(self.high)} ({self.meaning})"
        return sentence, lambda x: self.low <= x <= self.high and not (self.whole and x != int(x))

    def in_si(self, value: float) -> float:
        """Converts the number to the unit of its field."""
        return int(value) if self.whole else value * self.scale


def _optional(field: str, meaning: str, low: float, high: float, default: float | None, scale: float = 1.0) -> Figure:
    return Figure(field, meaning, low, high, False, default, scale)


NETWORK: Mapping[str, Figure] = {
    "down_mbps": Figure("down_bytes_per_s", "Mbit/s to the device", 1e-3, 1e5, scale=BYTES_PER_MBIT),
    "up_mbps": Figure("up_bytes_per_s", "Mbit/s from the device", 1e-3, 1e5, scale=BYTES_PER_MBIT),
    "rtt_ms": Figure("rtt_s", "ms of a round trip to the server", 0, 10_000, scale=1e-3),
    "jitter_sigma": Figure("jitter_sigma", "sigma of the lognormal factor on a transfer's seconds", 0, 3),
    "setup_round_trips": _optional(
        "setup_round_trips", "round trips before the first byte; TCP, TLS 1.3 and request are 3", 0, 20, 1
    ),
    "spread_sigma": _optional("spread_sigma", "sigma of the lognormal factor between clients' bandwidths", 0, 3, 0.6),
}
RADIO: Mapping[str, Figure] = {
    "rx_mw_per_mbps": _optional(
        "rx_joules_per_byte", "mW for each Mbit/s received, beside rx_w", 0, 1e5, 0, JOULES_PER_BYTE
    ),
    "tx_mw_per_mbps": _optional(
        "tx_joules_per_byte", "mW for each Mbit/s sent, beside tx_w", 0, 1e5, 0, JOULES_PER_BYTE
    ),
    "tail_w": _optional("tail_watts", "W of the radio awake after a transfer, beside the device", 0, 20, 0),
    "tail_s": _optional("tail_s", "s that the radio stays awake after a transfer", 0, 60, 0),
}
FIGURES: Mapping[str, Mapping[str, Figure]] = {
    "compute": {
        "rate_gmacs_per_s": Figure(
            "flops_per_s", "1e9 multiply-adds per s on small networks, in effect", 1e-6, 1e7, scale=2e9
        ),
        "jitter_sigma": Figure("compute_jitter_sigma", "sigma of the lognormal factor on compute seconds", 0, 3),
        "threads": Figure("threads", "threads that compute", 1, 4096, False, 1, whole=True),
        "clock_ghz": _optional("clock_ghz", "GHz of a core that computes", 1e-3, 10, None),
        "peak_gmacs_per_s": _optional(
            "peak_macs_per_s", "1e9 multiply-adds per s in fp32 at these threads, in theory", 1e-6, 1e7, None, 1e9
        ),
        "memory_gb_per_s": _optional(
            "memory_bytes_per_s", "1e9 bytes per s of the memory, in theory", 1e-3, 1e5, None, 1e9
        ),
    },
    "memory": {
        "ram_mb": Figure("ram_mb", "MB of 2**20 bytes; a card's own for a GPU", 1e-3, MAX_RAM_MB),
        "usable_fraction": Figure("usable_fraction", "share of it that training may take", 1e-3, 1),
        "runtime_mb": Figure("runtime_mb", "MB that the training runtime takes of that share", 0, MAX_RAM_MB),
    },
    "network": NETWORK,
    "power": {
        "compute_w": Figure("compute_watts", "W of the whole device while training", 0, 2000),
        "rx_w": Figure("rx_watts", "W of the whole device while receiving", 0, 2000),
        "tx_w": Figure("tx_watts", "W of the whole device while sending", 0, 2000),
        "idle_w": Figure("idle_watts", "W of the whole device while waiting", 0, 2000),
        **RADIO,
        "base_w": _optional("base_watts", "W of a GPU that runs a kernel, without its arithmetic", 0, 2000, None),
        "pj_per_mac": _optional("joules_per_mac", "pJ of a multiply-add, beside base_w", 0, 1e7, None, 1e-12),
        "pj_per_byte": _optional(
            "joules_per_byte", "pJ of a byte of activations and weights, beside base_w", 0, 1e6, None, 1e-12
        ),
    },
    "reliability": {"failures_per_min": _optional("failures_per_min", "crashes per minute at work", 0, 60, 0)},
}


class Reader:
    """Takes values out of a file's tree and notes what is wrong, so that a user hears of all of it at once.

    Args:
        file: named in the error.

    Attributes:
        problems: one sentence each.
        assumed: keys whose provenance is `assumed`; a plain number has that one.
    """

    def __init__(self, file: str):
        self.file = file
        self.problems: list[str] = []
        self.assumed: list[str] = []

    def check_map(self, key: str, tree: Any, allowed: Iterable[str], required: Iterable[str], form: str = "") -> bool:
        """Notes keys that are unknown or missing, and returns whether `tree` is a map at all.

        Args:
            key: of the map itself, "" for the whole file.
            tree: the value in the file.
            allowed: keys that the map may have.
            required: keys that it must have.
            form: appended to the sentence about a missing key: how to write it.
        """
        allowed, required = list(allowed), list(required)
        if not isinstance(tree, dict):
            where = f"key {key!r}" if key else "the file"
            self.problems.append(f"{where} must be a map with {', '.join(required)}, got {quoted(tree)}")
            return False
        prefix = f"{key}." if key else ""
        strange = [str(k) for k in tree if k not in allowed]
        names = [f"{prefix}{k}" for k in allowed]
        self.problems += [unknown("key", f"{prefix}{k}", names) for k in strange]
        meant = {near for k in strange for near in get_close_matches(f"{prefix}{k}", names, n=1)}
        for k in required:
            if k not in tree and f"{prefix}{k}" not in meant:
                self.problems.append(f"key '{prefix}{k}' is missing{form}")
        return True

    def number(self, key: str, entry: Any, rule: Rule) -> float:
        """Reads a plain number or {value, provenance, source}; nan if that is wrong."""
        sentence, holds = rule
        provenance: Any = "assumed"
        value = entry
        if isinstance(entry, dict):
            fields, before = ("value", "provenance", "source"), len(self.problems)
            self.check_map(key, entry, fields, fields, f"; write it as {FORM}")
            value, provenance = entry.get("value"), entry.get("provenance")
            if "provenance" in entry and provenance not in PROVENANCES:
                self.problems.append(unknown(f"{key}.provenance", provenance, PROVENANCES))
            if "source" in entry and (not isinstance(entry["source"], str) or not entry["source"].strip()):
                self.problems.append(f"key '{key}.source' must say where the value is from, got {entry['source']!r}")
            if "value" not in entry:
                return math.nan
            where = f"{key}.value"
            failed = len(self.problems) > before
        else:
            where, failed = key, False
        if isinstance(value, bool) or not isinstance(value, int | float):
            form = "" if isinstance(entry, dict) else f", or {FORM}"
            self.problems.append(f"key {where!r} must be {sentence}{form}, got {quoted(value)}{_notation(value)}")
            return math.nan
        if not (math.isfinite(value) if isinstance(value, float) else abs(value) < 1e300) or not holds(value):
            self.problems.append(f"key {where!r} must be {sentence}, got {quoted(value)}")
            return math.nan
        if provenance == "assumed" and not failed:
            self.assumed.append(key)
        return float(value)

    def section(
        self, key: str, tree: Any, figures: Mapping[str, Figure], free: Iterable[str] = (), besides: Iterable[str] = ()
    ) -> dict[str, float]:
        """Reads the numbers that a map of figures holds, by key.

        Args:
            key: of the map.
            tree: the value in the file.
            figures: that the map may hold.
            free: required figures that may be missing this time.
            besides: keys that are no figures.
        """
        required = [k for k, figure in figures.items() if figure.required and k not in free]
        if not self.check_map(key, tree, (*figures, *besides), required, f"; write a number, or {FORM}"):
            return {}
        return {k: self.number(f"{key}.{k}", tree[k], figure.rule) for k, figure in figures.items() if k in tree}

    def text(self, tree: Mapping[str, Any], key: str) -> str:
        """Reads a text; empty where there is none."""
        text = tree.get(key, "")
        if key in tree and (not isinstance(text, str) or not text.strip()):
            self.problems.append(f"key {key!r} must be text, got {quoted(text)}")
        elif not storable(str(text)) or len(str(text)) > MAX_LETTERS:
            self.problems.append(
                f"key {key!r} must be text of one line and at most {MAX_LETTERS} letters, got {quoted(text)}"
            )
        return str(text)

    def choice(
        self,
        tree: Mapping[str, Any],
        key: str,
        options: Iterable[str],
        default: str = "",
        also: Mapping[str, str] | None = None,
    ) -> str:
        """Reads one of some words; `also` has older words for them."""
        options, word = list(options), tree.get(key, default)
        if isinstance(word, str) and also and word in also:
            return also[word]
        if key in tree and word not in options:
            self.problems.append(unknown(key, word, options))
        return str(word)

    def finish(self) -> None:
        """Ends the reading.

        Raises:
            DeviceError: if something is wrong: one line, or a list under a line that names the file.
        """
        if len(self.problems) == 1:
            raise DeviceError(f"{self.file}: {self.problems[0]}")
        if self.problems:
            listed = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
            raise DeviceError(f"{self.file}: {len(self.problems)} problems:{listed}")


def read_yaml(path: Path) -> Any:
    """Reads a YAML file of devices.

    Raises:
        DeviceError: if there is none, or it cannot be read.
    """
    try:
        return reading.read_yaml(path)
    except FileError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DeviceError(f"{path}: there is no such device file") from None
        raise


def _plain(value: float) -> str:
    """Writes a bound as one does in YAML, without an exponent."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _notation(value: object) -> str:
    """Returns a hint for a text such as 1e9, which YAML 1.1 does not read as a number."""
    try:
        return f" (YAML reads this as text; write {float(value):f})" if isinstance(value, str) else ""
    except ValueError:
        return ""
