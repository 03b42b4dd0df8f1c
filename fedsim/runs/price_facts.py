"""Says how far the prices of a finished run are known: one line, from the work of a few of its rounds.

Read from the run folder, so that a resumed run says the same as one that never stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from devices.cost import LatencyModel, Passes, Work
from devices.fleet import Fleet
from devices.latency.columns import TABLE_KINDS
from devices.latency.models import DevicePrices, StructuredLatency, device_prices
from devices.latency.predictions import IN_WORDS, MOSTLY_CALLS
from devices.latency.prices import Prices
from devices.profile import DeviceProfile
from fedsim.report.files import as_array, read_rows, row_files

CLIENTS_READ = 256  # of a round, in the order of its rows
MAX_NAMED = 2  # devices that the line names; more are counted
ORDER = tuple(IN_WORDS)


@dataclass
class _Seen:
    """Milliseconds of the passes that a device computed and of their calls, with the remarks on their prices."""

    ms: float = 0.0
    calls_ms: float = 0.0
    remarks: dict[str, None] = field(default_factory=dict)  # in order


def price_facts(folder: Path, fleet: Fleet, latency: LatencyModel, rounds: int) -> dict[str, Any]:
    """Returns the summary's `prices`: the line, and figures by device; empty for latency models without prices.

    Looked at are the distinct passes of the first, the middle and the last training round.

    Args:
        folder: of the run, with its client rows written.
        fleet: of the run.
        latency: of the run.
        rounds: the last round.
    """
    if not isinstance(latency, StructuredLatency):
        return {}
    return facts_of(works(folder, sorted({1, (rounds + 1) // 2, rounds} - {0})), fleet.profiles)


def facts_of(done: Mapping[tuple[str, str], int], profiles: Sequence[DeviceProfile]) -> dict[str, Any]:
    """Returns the same as `price_facts`, from work that is at hand.

    Args:
        done: how often a device did some work, by (name of the device, `Work.to_dict` as JSON).
        profiles: of the fleet.
    """
    devices = {profile.name: profile for profile in profiles}
    seen: dict[str, _Seen] = {}
    trained: dict[str, None] = {}
    for (name, text), count in done.items():
        prices = device_prices(devices[name])
        for p in _passes(text):
            if p.backwards:
                trained[name] = None
            _add(seen.setdefault(name, _Seen()), prices, p, count)
    whole = sum(s.ms for s in seen.values())
    if not whole:
        return {}
    share = sum(s.calls_ms for s in seen.values()) / whole
    what, names = (
        ("training steps", [n for n in devices if n in trained]) if trained else ("forward passes", list(seen))
    )
    by_device = {}
    for name in names:
        used = device_prices(devices[name])
        known = used.step if trained and used.step else used.forward
        remarks = list(seen[name].remarks)
        by_device[name] = {"basis": known.basis, "error": known.error, "remarks": remarks}
    line = f"{what} are {_by_basis(by_device)}. {100 * share:.0f} % of the computing time is the fixed cost of starting"
    line += " operations: on a network this small, times are mostly overhead" if share > MOSTLY_CALLS else " operations"
    return {"prices": {"line": line, "calls_share": share, "devices": by_device}}


def works(folder: Path, rounds: Sequence[int]) -> dict[tuple[str, str], int]:
    """Counts how often a device did some work in these rounds, by (device, work as JSON)."""
    found: Counter[tuple[str, str]] = Counter()
    for number in rounds:
        for path in row_files(folder):
            first, last = (int(n) for n in path.stem.split("-")[1:])
            if first <= number <= last:
                table = read_rows(path, ["round", "device", "work"])
                own = np.flatnonzero(as_array(table["round"]) == number)[:CLIENTS_READ]
                rows = table.slice(own[0], len(own)) if len(own) else table.slice(0, 0)  # those of a round in a row
                found.update((row["device"], row["work"]) for row in rows.to_pylist())
    return dict(found)


def _passes(text: str) -> Iterator[Passes]:
    """Returns the passes that prices hold for: of networks that were traced, into a table of today's kinds."""
    for p in _work(text).passes:
        if p.network.layers is not None and len(p.network.layers) == len(TABLE_KINDS):
            yield p


@lru_cache(maxsize=256)
def _work(text: str) -> Work:
    return Work.from_dict(json.loads(text))


def _add(seen: _Seen, prices: DevicePrices, p: Passes, count: int) -> None:
    """Adds some passes as `StructuredLatency.compute_s` prices them."""
    layers = p.network.layers
    assert layers is not None
    backwards = p.backwards * p.network.backward_share
    forward_ms, forward_calls_ms = _spent(prices.forward, layers, p.batch)
    ms, calls_ms = p.forwards * forward_ms, p.forwards * forward_calls_ms
    known = prices.forward
    if backwards and prices.step is not None:
        known = prices.step
        step_ms, step_calls_ms = _spent(known, layers, p.batch)
        ms += backwards * max(0.0, step_ms - forward_ms)
        calls_ms += backwards * max(0.0, step_calls_ms - forward_calls_ms)
    seen.ms += count * ms
    seen.calls_ms += count * min(ms, calls_ms)
    if p.backwards:
        seen.remarks.update(dict.fromkeys(known.remarks(layers, p.batch)))


def _spent(prices: Prices, layers: tuple[tuple[float, ...], ...], batch: int) -> tuple[float, float]:
    ms = prices.ms(layers, batch)
    return ms, ms * prices.calls_share(layers, batch)


def _by_basis(devices: Mapping[str, Mapping[str, Any]]) -> str:
    """Says where the prices are from and on which devices, the least known first."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, facts in devices.items():
        measured = facts["basis"] in ("rows", "few rows", "one row", "threads")
        groups.setdefault((facts["basis"], measured and bool(facts["remarks"])), []).append(name)
    parts = []
    for basis, beyond in sorted(groups, key=lambda key: (-ORDER.index(key[0]), not key[1])):
        names = groups[basis, beyond]
        where = ", ".join(names) if len(names) <= MAX_NAMED else f"{len(names)} of {len(devices)} devices"
        where = "all devices" if len(names) == len(devices) > MAX_NAMED else where
        errors = sorted({devices[n]["error"] for n in names} - {None})
        known = f"error about {_span(errors)} %" if errors else "error unknown"
        parts.append(f"{IN_WORDS[basis]} for {where} ({known}{', extrapolated' if beyond else ''})")
    return ", ".join(parts)


def _span(errors: Sequence[float]) -> str:
    low, high = f"{100 * errors[0]:.0f}", f"{100 * errors[-1]:.0f}"
    return low if low == high else f"{low} to {high}"
