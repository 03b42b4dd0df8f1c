"""When clients can be reached: functions of the simulated time, without state, so that answers depend on no order.

A fleet builds one of these with `num_clients` and `seed`; in a configuration it is `_partial_: true`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval

from devices.bounds import Checked
from devices.draws import stream, uniforms
from devices.errors import DeviceError, FileError, unknown
from devices.reading import read_json

DAY_S = 86_400.0
LOOK_AHEAD_SLOTS = 10_000
LOOK_AHEAD_MIN = 366 * 24 * 60
MAX_TRACE_S = 1e10  # 300 years


class Availability(Checked, ABC, group="fleet.availability"):
    """When each of `num_clients` clients is online, in simulated seconds from the start of the run.

    Attributes:
        rhythm_s: seconds after which clients' habits repeat, at most a day; None where they do not. A shorter run meets
            only some of the clients.
    """

    rhythm_s: float | None = None

    def __init__(self, num_clients: int, seed: int):
        self.num_clients, self.seed = num_clients, seed

    def online(self, client_id: int, now_s: float) -> bool:
        """Returns whether the client can be reached at `now_s`."""
        return self._end_s(client_id, now_s) is not None

    def online_until(self, client_id: int, now_s: float) -> float:
        """Returns the simulated time at which the client goes offline: inf if never, `now_s` if it is offline now."""
        end_s = self._end_s(client_id, now_s)
        return now_s if end_s is None else end_s

    def online_from(self, client_id: int, now_s: float) -> float:
        """Returns the first time after `now_s` at which the client comes online; found to a minute.

        Raises:
            DeviceError: if that is not within a year.
        """
        for minute in range(1, LOOK_AHEAD_MIN):
            if self.online(client_id, now_s + 60.0 * minute):
                return now_s + 60.0 * minute
        raise DeviceError(f"client {client_id} went offline at {now_s:.6g} s and does not come back within a year")

    @abstractmethod
    def _end_s(self, client_id: int, now_s: float) -> float | None:
        """Returns when the online spell around `now_s` ends, or None when the client is offline then."""


class Always(Availability):
    """Every client is online all the time."""

    def _end_s(self, client_id: int, now_s: float) -> float | None:
        return math.inf


class Bernoulli(Availability):
    """Each client is online in each slot of time with the same probability, by a draw of its own.

    Args:
        num_clients: population size.
        seed: of the draws, one for each client and slot.
        p: probability of being online, in [0, 1].
        slot_s: length of a slot in seconds.

    `online_until` takes 1 / (1 - p) steps on average; it looks 10,000 slots ahead at most and then returns their end.
    """

    def __init__(
        self,
        num_clients: int,
        seed: int,
        p: Annotated[float, Interval(ge=0, le=1)] = 0.8,
        slot_s: Annotated[float, Interval(ge=1e-3, le=MAX_TRACE_S)] = 600.0,
    ):
        super().__init__(num_clients, seed)
        self.p, self.slot_s = float(p), float(slot_s)

    def online(self, client_id: int, now_s: float) -> bool:
        return self._drawn_online(client_id, math.floor(now_s / self.slot_s))

    def _end_s(self, client_id: int, now_s: float) -> float | None:
        slot = first = math.floor(now_s / self.slot_s)
        if not self._drawn_online(client_id, slot):
            return None
        if self.p == 1:
            return math.inf
        while slot < first + LOOK_AHEAD_SLOTS and self._drawn_online(client_id, slot):
            slot += 1
        return slot * self.slot_s

    def online_from(self, client_id: int, now_s: float) -> float:
        slot = math.floor(now_s / self.slot_s)
        for later in range(slot, slot + LOOK_AHEAD_SLOTS):
            if self._drawn_online(client_id, later) and later * self.slot_s >= now_s:
                return later * self.slot_s
        raise DeviceError(f"client {client_id} went offline at {now_s:.6g} s and does not come back")

    def _drawn_online(self, client_id: int, slot: int) -> bool:
        return uniforms(1, self.seed, "bernoulli", client_id, slot)[0] < self.p


class Diurnal(Availability):
    """Each client is online in one window of `hours` a day, which opens at an hour of its own.

    Args:
        num_clients: population size.
        seed: draws the opening hours.
        hours: length of the window, in (0, 24]; 24 is always online.
        start_hour: hour of the simulated day at which the earliest window opens.
        spread_hours: opening hours are uniform over this long from `start_hour` on. 24 is a population around the
            world, so that the share online is steady; less is one time zone, where all sleep at the same time.
    """

    def __init__(
        self,
        num_clients: int,
        seed: int,
        hours: Annotated[float, Interval(gt=0, le=24)] = 16.0,
        start_hour: Annotated[float, Interval(ge=0, le=24)] = 0.0,
        spread_hours: Annotated[float, Interval(ge=0, le=24)] = 24.0,
    ):
        super().__init__(num_clients, seed)
        self.window_s = 3600 * float(hours)
        phase = stream(seed, "diurnal").random(num_clients)
        opens_s = 3600 * float(start_hour) + 3600 * float(spread_hours) * phase
        self.opens_s = opens_s.astype(np.float32)  # [num_clients], in [0, 48 h)
        self.rhythm_s = DAY_S if self.window_s < DAY_S else None

    def _end_s(self, client_id: int, now_s: float) -> float | None:
        if self.window_s >= DAY_S:
            return math.inf
        opens_s = float(self.opens_s[client_id])
        end_s = opens_s + math.floor((now_s - opens_s) / DAY_S) * DAY_S + self.window_s
        return end_s if now_s < end_s else None

    def online_from(self, client_id: int, now_s: float) -> float:
        opens_s = float(self.opens_s[client_id])
        return opens_s + math.ceil((now_s - opens_s) / DAY_S) * DAY_S


class Trace(Availability):
    """Online spells read from a JSON file in FedScale's behaviour format, repeated for ever.

    The file is {client: {"duration", "inactive": [...], "finish_time", "active": [...], "model"}}, times in seconds:
    the client is online when active[i] <= t mod finish_time <= inactive[i]. Clients take the entries in the order of
    the file and wrap around when there are more clients than entries. Spells that touch are one spell, also over the
    wrap of the trace. Since both ends count, a client asked at the very end of a spell is online and has 0 s left.

    Args:
        num_clients: population size.
        seed: not used: the file holds everything.
        path: the JSON file; relative paths start where the command runs.

    Raises:
        DeviceError: naming the file, the client and the key that is wrong.
    Source: SymbioticLab/FedScale, benchmark/dataset/data/device_info (format only; no trace is shipped).
    """

    def __init__(self, num_clients: int, seed: int, path: str | Path):
        super().__init__(num_clients, seed)
        entries = [_spells(f"{path}: client {key!r}", entry) for key, entry in _read_trace(Path(path)).items()]
        self.offsets = np.cumsum([0, *(len(starts) for starts, _, _ in entries)])  # [entries + 1]
        self.starts_s = np.concatenate([starts for starts, _, _ in entries])  # [spells]
        self.ends_s = np.concatenate([ends for _, ends, _ in entries])  # [spells]
        self.finish_s = np.array([finish for _, _, finish in entries])  # [entries]
        self.rhythm_s = min(DAY_S, float(self.finish_s.max()))

    def _end_s(self, client_id: int, now_s: float) -> float | None:
        entry = client_id % len(self.finish_s)
        first, stop = self.offsets[entry], self.offsets[entry + 1]
        starts, ends, finish = self.starts_s[first:stop], self.ends_s[first:stop], float(self.finish_s[entry])
        cycle_s = math.floor(now_s / finish) * finish
        spell = int(np.searchsorted(starts, now_s - cycle_s, side="right")) - 1
        if spell < 0 or now_s - cycle_s > ends[spell]:
            return None
        if ends[spell] < finish or starts[0] > 0:
            return cycle_s + float(ends[spell])
        # The last spell runs into the first one of the next cycle.
        return math.inf if len(starts) == 1 else cycle_s + finish + float(ends[0])

    def online_from(self, client_id: int, now_s: float) -> float:
        entry = client_id % len(self.finish_s)
        starts = self.starts_s[self.offsets[entry] : self.offsets[entry + 1]]
        finish = float(self.finish_s[entry])
        cycle_s = math.floor(now_s / finish) * finish
        if not len(starts):
            raise DeviceError(f"client {client_id} is never online")
        later = starts[cycle_s + starts > now_s]
        return cycle_s + (float(later[0]) if len(later) else finish + float(starts[0]))


def _number(key: str, value: Any, low: float, high: float) -> float:
    """Returns the value as a float; raises DeviceError with the key and the allowed interval for any other value."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise DeviceError(f"{key} must be a number in [{low:g}, {high:g}], got {value!r}")
    return float(value)


def _read_trace(path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path)
    except FileError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DeviceError(f"{path}: there is no such trace file") from None
        raise DeviceError(f"{path}: a trace must be a JSON text file: {error}") from None
    if not isinstance(tree, dict) or not tree:
        raise DeviceError(f"{path}: a trace must be a map from client to its spells, got {str(tree)[:80]!r}")
    return tree


def _spells(where: str, entry: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns starts and ends of the online spells of one entry, [spells] each, and the trace's length in seconds."""
    allowed = ("duration", "inactive", "finish_time", "active", "model")
    if not isinstance(entry, dict):
        raise DeviceError(f"{where} must be a map with active, inactive and finish_time, got {str(entry)[:80]!r}")
    for key in entry:
        if key not in allowed:
            raise DeviceError(f"{where} has an {unknown('key', key, allowed)}")
    for key in ("active", "inactive", "finish_time"):
        if key not in entry:
            raise DeviceError(f"{where} has no key {key!r}")
    finish_s = _number(f"{where}: finish_time", entry["finish_time"], 1, MAX_TRACE_S)
    active, inactive = entry["active"], entry["inactive"]
    for key, times in (("active", active), ("inactive", inactive)):
        if not isinstance(times, list):
            raise DeviceError(f"{where}: {key} must be a list of seconds, got {str(times)[:80]!r}")
    if len(active) != len(inactive):
        raise DeviceError(
            f"{where}: active and inactive must be equally long, got {len(active)} and {len(inactive)} entries"
        )
    starts: list[float] = []
    ends: list[float] = []
    for i, (start, end) in enumerate(zip(active, inactive, strict=True)):
        start = _number(f"{where}: active[{i}]", start, ends[-1] if ends else 0, MAX_TRACE_S)
        end = _number(f"{where}: inactive[{i}]", end, start, MAX_TRACE_S)
        if start >= finish_s:
            break  # the time within a cycle never gets there
        if ends and start == ends[-1]:
            ends[-1] = end
        else:
            starts.append(start)
            ends.append(end)
    return np.array(starts), np.minimum(np.array(ends), finish_s), finish_s
