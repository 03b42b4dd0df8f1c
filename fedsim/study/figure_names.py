"""What can be known of the names of figures before a run: what `summary.json` and the metrics of the rounds hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from devices.errors import unknown
from fedsim.errors import ConfigError
from fedsim.messages.cohort import OUTCOMES
from fedsim.workloads.metrics import ASYNCHRONY, AVERAGED, CLIENTS, METRICS

NEAR = 0.85  # of difflib: a letter more, less or swapped in a word of seven
SINGLE = (
    *("seed", "rounds", "simulated_s", "down_bytes", "up_bytes", "peak_memory_bytes", "storage_bytes"),
    *("not_finite_rounds", "host_s"),
)
CLOSED: Mapping[str, tuple[str, ...]] = {  # maps of the summary that hold these and nothing else
    "energy_j": ("total", "max_client", "waiting", "tail"),
    "outcomes": tuple(OUTCOMES),
    "clients": ("population", "took_part", "never"),
    "privacy": ("epsilon", "delta"),
}
OF_METRICS = ("final", "best", "to_target")  # maps of the summary with names of metrics in them
BESIDE = {"final": (), "best": ("round",), "to_target": ("round", "simulated_s", "energy_j", "down_bytes", "up_bytes")}
OPEN = (ASYNCHRONY, "continual", "compression", "calibration", "prices", "metrics")
KNOWN_METRICS = tuple(
    name for one in AVERAGED for name in (one, CLIENTS + one, f"{CLIENTS}{one}_worst_tenth", f"{one}_worst_tenth")
)


def check_figure(where: str, path: str) -> None:
    """Refuses the dotted path of a figure that no run can have, or whose name is all but that of a known one.

    Workloads and strategies of the user's may bring figures of their own, so other names pass until there are runs.

    Raises:
        ConfigError: with the nearest name.
    """
    head, dot, rest = path.partition(".")
    if not head or (dot and not rest):
        raise ConfigError(f"{where} must name a figure by its dotted path, e.g. final.accuracy, got {path!r}")
    if head in CLOSED and rest not in CLOSED[head]:
        raise ConfigError(f"{where}: {unknown('figure of a run', path, [f'{head}.{key}' for key in CLOSED[head]])}")
    if head in OF_METRICS:
        _refuse_near(where, f"{head}.", rest, (*KNOWN_METRICS, *BESIDE[head]))
    elif path.startswith(METRICS):
        _refuse_near(where, METRICS, rest, KNOWN_METRICS)
    elif dot:
        _refuse_near(where, "", head, (*CLOSED, *OF_METRICS, *OPEN), f".{rest}")
    elif path in (*OF_METRICS, *OPEN):
        raise ConfigError(f"{where}: {path} is a map; name one of its figures, e.g. {path}.accuracy")
    else:
        _refuse_near(where, "", path, SINGLE)


def check_metric(where: str, name: str) -> None:
    """Refuses the name of a metric of the rounds that is a path, or all but a known name.

    Raises:
        ConfigError: with the nearest name.
    """
    head, _, rest = name.partition(".")
    if head in (*OF_METRICS, METRICS.rstrip(".")):
        raise ConfigError(f"{where} must name a metric of the rounds alone, e.g. {rest or 'accuracy'}, got {name!r}")
    _refuse_near(where, "", name, KNOWN_METRICS)


def _refuse_near(where: str, before: str, name: str, known: Iterable[str], after: str = "") -> None:
    """Refuses a name that is nearly one of the known, and no longer form of it, such as accuracy_at_0.5."""
    known = list(known)
    if name in known or any(name.startswith(one) and not name[len(one)].isalpha() for one in known):
        return
    near = get_close_matches(name, known, 1, NEAR)
    if near and _letters(near[0]) != _letters(name):
        meant = f"{before}{near[0]}{after}"
        raise ConfigError(f"{where}: unknown figure of a run '{before}{name}{after}'; did you mean {meant!r}?")


def _letters(name: str) -> str:
    return re.sub(r"[0-9]", "", name)
